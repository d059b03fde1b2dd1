# SPDX-License-Identifier: Apache-2.0
"""What a batch is: a plain dict of columns, batch first. Pure functions that look into no column; they need no torch.

A column is a tensor whose first dimension is the batch, or a list with one entry per sample. What handles tensors
stands in `batching.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from chatlearn.errors import BatchError

if TYPE_CHECKING:
    from torch import Tensor

Column: TypeAlias = "Tensor | list[Any]"
Batch = dict[str, Column]


def size(batch: Batch) -> int:
    """Return the number of samples (0 for a batch without columns)."""
    return len(next(iter(batch.values()))) if batch else 0


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples `start` to `stop`; tensors are views."""
    return {key: column[start:stop] for key, column in batch.items()}


def join(inputs: Sequence[tuple[str, Batch]], place: str) -> Batch:
    """Merge a node's inputs, sample by sample, in argument order; on equal keys the later input wins.

    Args:
        inputs: name of the source and its batch, in argument order.
        place: the node, for the error.

    Raises:
        BatchError: the inputs disagree in their number of samples.
    """
    joined: Batch = {}
    counts = {name: size(batch) for name, batch in inputs if batch}
    if len(set(counts.values())) > 1:
        raise BatchError(
            f"inputs disagree in their number of samples: {counts}",
            place=place,
            fix="a step returns one entry per sample it got; a filter declares filters_samples = True",
        )
    for _, batch in inputs:
        joined.update(batch)
    return joined


def samples(batch: Batch) -> list[dict[str, Any]]:
    """Return one dict per sample."""
    return [{key: column[i] for key, column in batch.items()} for i in range(size(batch))]
