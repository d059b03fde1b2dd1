# SPDX-License-Identifier: Apache-2.0
"""What a module with a `namespace` sees of a batch, and under which names its columns leave. Pure functions.

    outside              module "solver_reward", namespace="solver", writes={"rewards"}      outside again
    uid               -> uid                                                              -> uid
    solver/completion -> completion                                                       -> solver/completion
    completion        -> ../completion         (hidden by the module's own)               -> completion
    answer            -> answer                                                           -> answer
    rewards           -> ../rewards, and rewards: a copy, which it may read and replace   -> rewards
                         rewards                                                          -> solver/rewards
                         rewards/score         (written here: a part of `rewards`)        -> solver/rewards/score

What is hidden or would be overwritten travels with the samples as `../<column>`, so it survives a filter, which
selects the same samples from every column.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, cast

from chatlearn.columns import PROMPT_UID, UID
from chatlearn.errors import BatchError
from chatlearn.flow.batching import Batch, isolate

SHARED: Final = frozenset({UID, PROMPT_UID})
"""Columns that number samples and prompts for every module; no namespace has its own."""
OUTER: Final = "../"
"""Before the name of a plain column that a module's own column hides."""


def own_columns(names: Iterable[str], namespace: str) -> frozenset[str]:
    """Return what the module calls those of the columns `names` that are its namespace's."""
    start = f"{namespace}/"
    inner = (name.removeprefix(start) for name in names if name.startswith(start))
    return frozenset(x for x in inner if x and x not in SHARED and not x.startswith(OUTER))


def enter(batch: Batch, namespace: str, writes: Collection[str]) -> Batch:
    """Return `batch` as a module of `namespace` that writes the columns `writes` sees it.

    Example:
        >>> enter({"solver/rewards": [1.0], "rewards": [0.0], "answer": ["4"]}, "solver", {"advantages"})
        {'rewards': [1.0], '../rewards': [0.0], 'answer': ['4']}
    """
    seen: Batch = {}
    for inside, outside in doors(batch, namespace, writes).items():
        # A column that is there under no such name outside is the copy of a plain one that may be overwritten.
        seen[inside] = (
            batch[outside] if outside in batch else isolate({inside: batch[inside]})[inside]
        )
    return seen


def leave(
    output: Mapping[Any, Any], entered: Collection[str], namespace: str, writes: Collection[str]
) -> dict[Any, Any]:
    """Return what the module returned under the names that it has outside.

    Args:
        output: columns as the module calls them.
        entered: names of the columns of the batch that it got, as they are outside.
        namespace: the module's.
        writes: the columns that its class declares.

    Raises:
        BatchError: there is a column that neither came in nor is declared.

    Example:
        >>> leave({"rewards": [1.0], "../rewards": [0.0]}, ["solver/rewards", "rewards"], "solver", ())
        {'solver/rewards': [1.0], 'rewards': [0.0]}
    """
    names = doors(entered, namespace, writes)
    left: dict[Any, Any] = {}
    for name, column in output.items():
        outside = names.get(name)
        if outside is None and isinstance(name, str):
            if not _covers(writes, name):
                raise _undeclared(name, namespace, writes)
            outside = f"{namespace}/{name}"
        left[name if outside is None else outside] = column
    return left


def doors(names: Iterable[str], namespace: str, writes: Collection[str]) -> dict[str, str]:
    """Pair the name of each column inside with the one outside, where it leaves; no two of either are equal.

    Args:
        names: of the columns outside.
        namespace: the module's.
        writes: the columns that its class declares.
    """
    names = list(names)
    own = own_columns(names, namespace)
    pairs: dict[str, str] = {}
    for name in names:
        if (inside := name.removeprefix(f"{namespace}/")) != name and inside in own:
            pairs[inside] = name
        elif name in SHARED or not (name in own or name.startswith(OUTER) or _covers(writes, name)):
            pairs[name] = name
        else:
            pairs[OUTER + name] = name
            if name in writes and name not in own and not name.startswith(OUTER):
                pairs[name] = f"{namespace}/{name}"
    return pairs


def _covers(writes: Collection[str], name: str) -> bool:
    """Tell whether a declared column is `name`, or what `name` is a part of (`rewards` of `rewards/score`)."""
    if name in SHARED or name.startswith(OUTER):
        return False
    parts = name.split("/")
    return any("/".join(parts[:length]) in writes for length in range(1, len(parts) + 1))


def _undeclared(name: str, namespace: str, writes: Collection[str]) -> BatchError:
    declared = ", ".join(sorted(map(repr, writes))) or "none"
    return BatchError(
        f"column {name!r} is new, but the class does not declare it (declared: {declared}), "
        f"so it is not known whether namespace {namespace!r} holds it",
        fix=f"add {name!r} to the class's `writes`, or make plain columns in a module without namespace",
    )


def own_row(row: Mapping[str, Any], namespace: str | None) -> tuple[dict[str, Any], frozenset[str]]:
    """Return a dataset's row as a module of `namespace` reads it, and which of its columns are the namespace's."""
    if namespace is None:
        return dict(row), frozenset()
    own = own_columns(row, namespace)
    return {**row, **{name: row[f"{namespace}/{name}"] for name in own}}, own


def leave_all(
    value: object,
    entered: list[tuple[str, ...]] | tuple[str, ...],
    namespace: str,
    writes: Collection[str],
) -> Any:
    """Let what a step returned leave: a batch, or of a train step one batch per micro-batch.

    What is no batch (nothing, the numbers of a train step, a mistake that is named later) stays as it is.
    """
    if isinstance(entered, tuple):
        is_batch = isinstance(value, Mapping)
        return (
            leave(cast("Mapping[Any, Any]", value), entered, namespace, writes)
            if is_batch
            else value
        )
    if not isinstance(value, list) or len(parts := cast("list[Any]", value)) != len(entered):
        return cast("object", value)
    return [
        leave_all(part, names, namespace, writes)
        for part, names in zip(parts, entered, strict=True)
    ]
