# SPDX-License-Identifier: Apache-2.0
"""Carry batches into a module with a `namespace` and out again, by the names of `namespace.py`. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from chatlearn.errors import BatchError
from chatlearn.flow.batch import Batch
from chatlearn.flow.batching import isolate
from chatlearn.flow.namespace import covers, doors


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
            if not covers(writes, name):
                raise _undeclared(name, namespace, writes)
            outside = f"{namespace}/{name}"
        left[name if outside is None else outside] = column
    return left


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


def _undeclared(name: str, namespace: str, writes: Collection[str]) -> BatchError:
    declared = ", ".join(sorted(map(repr, writes))) or "none"
    return BatchError(
        f"column {name!r} is new, but the class does not declare it (declared: {declared}), "
        f"so it is not known whether namespace {namespace!r} holds it",
        fix=f"add {name!r} to the class's `writes`, or make plain columns in a module without namespace",
    )
