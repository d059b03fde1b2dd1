# SPDX-License-Identifier: Apache-2.0
"""What a step method returned, checked against what its kind of node may return."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, cast

import numpy as np
from torch import Tensor

from chatlearn.columns import CUT, FAILED, OUTCOME, OUTCOMES, TIMED_OUT, UID
from chatlearn.errors import BatchError
from chatlearn.flow.batch import Batch, size
from chatlearn.flow.batching import isolate, normalise, numbers, select
from chatlearn.module import ModuleState
from chatlearn.runtime.promises import refuse_broken
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


def recorded_step_output(value: Any, sizes: Sequence[int], state: ModuleState) -> list[Batch]:
    """A trainer node's output for the record: batches of samples, if it returned any, and what it told besides.

    What the step told the record, `state` lets go of.
    """
    told, state.recorded = state.recorded, []
    try:
        parts = step_output(value, sizes, "")
    except BatchError:  # where nobody takes it, a step may return what it likes
        parts = []
    if not told:
        return parts
    return [{**more, **part} for part, more in zip(parts or [{} for _ in told], told, strict=True)]


def sample_output(call: Call, value: object, place: str) -> tuple[Batch, tuple[int, ...] | None]:
    """An environment or evaluation node's output, and of a filter which of the call's samples are in it.

    Raises:
        BatchError: it is no batch, or its samples are not those of the call in their order.
    """
    # A copy: the module may keep what it returned and write into it in its next call.
    output = isolate(normalise({} if value is None else value, place))
    refuse_broken(call.node, output)
    if call.node.filters:
        return output, _kept_offsets(call, output, place)
    if output and size(output) != len(call.uids):
        raise BatchError(
            f"{call.node.name} returned {size(output)} samples for {len(call.uids)}",
            place=place,
            fix="return one entry per sample, or declare `filters_samples = True` on the class",
        )
    _refuse_reordered(call, output, place)
    return output, None


def _kept_offsets(call: Call, output: Batch, place: str) -> tuple[int, ...]:
    """Find which samples a filter let through, by their uids."""
    position = {uid: i for i, uid in enumerate(call.uids)}
    kept = [position.get(uid, -1) for uid in _uids(output)]
    if len(kept) != size(output) or -1 in kept or kept != sorted(set(kept)):
        raise BatchError(
            f"the filter {call.node.name} must return the `uid` column of the samples it keeps, in order",
            place=place,
            fix="select the same samples from every column of the batch, `uid` included",
        )
    return tuple(kept)


def _refuse_reordered(call: Call, output: Batch, place: str) -> None:
    """Refuse samples in another order than they came in: their rows would be paired with those of others."""
    uids = _uids(output)
    for at, (given, found) in enumerate(zip(call.uids, uids, strict=False)):
        if given != found:
            raise BatchError(
                f"{call.node.name} returned its samples in another order: at position {at} uid {found} "
                f"instead of {given}",
                place=place,
                fix="return every column in the order of the batch that came in, and leave `uid` as it is",
            )


def _uids(output: Batch) -> list[int]:
    column = output.get(UID, [])
    if isinstance(column, Tensor):
        column = cast("list[Any]", column.tolist())
    return [_number(uid) for uid in column]


def _number(uid: Any) -> int:
    """A uid as it comes in a column; -1 is nobody's."""
    try:
        return int(uid)
    except (TypeError, ValueError):
        return -1


Marks = Mapping[str, Sequence[Any]]
"""Columns that say how samples fared: `outcome`, and that of every namespace."""


def marks_of(batch: Batch) -> Marks:
    """Return a batch's outcome columns, for comparison with what a step makes of them."""
    return {
        name: list(batch[name]) for name in batch if name == OUTCOME or name.endswith(_OF_SPACE)
    }


def new_marks(before: Marks, after: Marks, kept: Sequence[int] | None) -> dict[int, str]:
    """Return the rows of its output that a step marks as cut, failed or timed out, and with which of these.

    A mark that the sample had before in any such column is not the step's.

    Args:
        before: the marks that were there when it was called.
        after: those of what it returned.
        kept: of a filter, which of its samples the rows are.
    """
    found: dict[int, str] = {}
    for name, column in after.items():
        if column == before.get(name):
            continue
        for row, mark in enumerate(column):
            at = row if kept is None else kept[row]
            if mark in _MARKS and all(was[at] != mark for was in before.values()):
                found[row] = max(mark, found.get(row, ""), key=_MARKS.index)
    return found


def refuse_unknown_marks(
    call: Call, before: Marks, after: Marks, own: str, kept: Sequence[int] | None, place: str
) -> None:
    """Refuse what is no outcome, which would pass for `ok`.

    Args:
        call: whose step returned it.
        before: the marks that were there when it was called; what is among them is not the step's.
        after: those of what it returned.
        own: the name of the step's own column of them; others may be anything.
        kept: of a filter, which of its samples the rows are.
        place: the step.

    Raises:
        BatchError: the column holds something else than `OUTCOMES`.
    """
    for row, mark in enumerate(after.get(own, ())):
        at = row if kept is None else kept[row]
        if isinstance(mark, str) and mark in OUTCOMES:
            continue
        if any(repr(was[at]) == repr(mark) for was in before.values()):  # NaN is NaN, too
            continue
        shown = mark.item() if isinstance(mark, Tensor) and mark.numel() == 1 else mark
        meant = difflib.get_close_matches(str(shown), OUTCOMES, 1)
        raise BatchError(
            f"{call.node.name} returned {shown!r} in its column {own!r} for uid {call.uids[at]}, which is no outcome",
            place=place,
            fix=(f"did you mean {meant[0]!r}? " if meant else "")
            + f"it is one of {', '.join(map(repr, OUTCOMES))}",
        )


def unusable_rewards(batch: Batch, column: str) -> dict[int, Any]:
    """Return the entries of a column of rewards, by their rows, that nobody can train on.

    These are the ones that are no finite number, and no sequence of such.
    """
    values = batch.get(column, ())
    if isinstance(values, Tensor):
        wrong = ~values.isfinite()
        rows = wrong.reshape(len(wrong), -1).any(1) if len(wrong) else wrong
        found = cast("list[int]", rows.nonzero().flatten().tolist())
        return {row: cast("Any", values[row].tolist()) for row in found}
    return {row: value for row, value in enumerate(values) if not _is_finite(value)}


def _is_finite(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, list | tuple | np.ndarray):
        return all(map(_is_finite, cast("Iterable[Any]", value)))
    return isinstance(value, Real) and math.isfinite(value)


_OF_SPACE = f"/{OUTCOME}"
_MARKS = ("", CUT, FAILED, TIMED_OUT)


def without_rows(output: Batch, rows: Collection[int]) -> Batch:
    """Return a batch but for some rows."""
    return select(output, [row for row in range(size(output)) if row not in rows])
