# SPDX-License-Identifier: Apache-2.0
"""How columns are called inside a module with a `namespace`, and under which names they leave. Pure functions of names.

    outside              module "solver_reward", namespace="solver", writes={"rewards"}      outside again
    uid               -> uid                                                              -> uid
    solver/completion -> completion                                                       -> solver/completion
    completion        -> ../completion         (hidden by the module's own)               -> completion
    answer            -> answer                                                           -> answer
    rewards           -> ../rewards, and rewards: a copy, which it may read and replace   -> rewards
                         rewards                                                          -> solver/rewards
                         rewards/score         (written here: a part of `rewards`)        -> solver/rewards/score

What is hidden or would be overwritten travels with the samples as `../<column>`, so it survives a filter, which
selects the same samples from every column. Batches are carried through these doors by `passage.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from chatlearn.columns import PROMPT_UID, UID

SHARED: Final = frozenset({UID, PROMPT_UID})
"""Columns that number samples and prompts for every module; no namespace has its own."""
OUTER: Final = "../"
"""Before the name of a plain column that a module's own column hides."""


def own_columns(names: Iterable[str], namespace: str) -> frozenset[str]:
    """Return what the module calls those of the columns `names` that are its namespace's."""
    start = f"{namespace}/"
    inner = (name.removeprefix(start) for name in names if name.startswith(start))
    return frozenset(x for x in inner if x and x not in SHARED and not x.startswith(OUTER))


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
        elif name in SHARED or not (name in own or name.startswith(OUTER) or covers(writes, name)):
            pairs[name] = name
        else:
            pairs[OUTER + name] = name
            if name in writes and name not in own and not name.startswith(OUTER):
                pairs[name] = f"{namespace}/{name}"
    return pairs


def covers(writes: Collection[str], name: str) -> bool:
    """Tell whether a declared column is `name`, or what `name` is a part of (`rewards` of `rewards/score`)."""
    if name in SHARED or name.startswith(OUTER):
        return False
    parts = name.split("/")
    return any("/".join(parts[:length]) in writes for length in range(1, len(parts) + 1))


def own_row(row: Mapping[str, Any], namespace: str | None) -> tuple[dict[str, Any], frozenset[str]]:
    """Return a dataset's row as a module of `namespace` reads it, and which of its columns are the namespace's."""
    if namespace is None:
        return dict(row), frozenset()
    own = own_columns(row, namespace)
    return {**row, **{name: row[f"{namespace}/{name}"] for name in own}}, own
