# SPDX-License-Identifier: Apache-2.0
"""What a step method returned, checked against what its kind of node may return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from chatlearn.errors import BatchError
from chatlearn.flow.batching import Batch, isolate, normalise, numbers, size
from chatlearn.runtime.protocol import Call


def returned_numbers(value: Any) -> dict[str, float]:
    """A train step may return its numbers as a dict instead of calling `self.log`."""
    return numbers(cast("dict[Any, Any]", value)) if isinstance(value, dict) else {}


def step_output(value: Any, sizes: Sequence[int], place: str) -> list[Batch]:
    """A trainer node's output, for the node that takes it: one batch per micro-batch, `sizes` samples each."""
    parts = cast("list[Any]", value) if isinstance(value, list) else []
    if len(parts) != len(sizes):
        kind = type(cast("object", value)).__name__
        what = f"{len(parts)} micro-batches" if isinstance(value, list) else f"a {kind}"
        raise BatchError(
            f"the step returned {what} for {len(sizes)} micro-batches, but another node takes its output",
            place=place,
            fix="return a list with one dict of columns per micro-batch of data_list",
        )
    batches = [isolate(normalise(part, place)) for part in parts]
    for number, (batch, samples) in enumerate(zip(batches, sizes, strict=True)):
        if size(batch) != samples:
            raise BatchError(
                f"the step returned {size(batch)} samples for the {samples} of micro-batch {number}",
                place=place,
                fix="return one entry per sample in every column",
            )
    return batches


def kept_offsets(call: Call, output: Batch, place: str) -> tuple[int, ...]:
    """Find which samples a filter let through, by their uids."""
    column = output.get("uid", [])
    position = {uid: i for i, uid in enumerate(call.uids)}
    kept = [position.get(_number(uid), -1) for uid in column]
    if len(kept) != size(output) or -1 in kept or kept != sorted(set(kept)):
        raise BatchError(
            f"the filter {call.node.name} must return the `uid` column of the samples it keeps, in order",
            place=place,
            fix="select the same samples from every column of the batch, `uid` included",
        )
    return tuple(kept)


def _number(uid: Any) -> int:
    """A uid as it comes in a column; -1 is nobody's."""
    try:
        return int(uid)
    except (TypeError, ValueError):
        return -1
