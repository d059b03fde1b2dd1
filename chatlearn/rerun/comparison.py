# SPDX-License-Identifier: Apache-2.0
"""What running recorded nodes again gave, compared with the record: column by column, number by number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from chatlearn.flow.batch import Batch
from chatlearn.record.nodes import ABSENT, NodeRecord
from chatlearn.record.reading import EpisodeRecord
from chatlearn.record.sameness import Difference, compare_columns
from chatlearn.rerun.again import Again

_SHOWN = 5


@dataclass(frozen=True)
class NumberDifference:
    """A number that train steps logged, in the record and now."""

    name: str
    steps: int
    """Steps compared."""
    differing: int
    largest: float
    """Largest absolute difference of a step's."""
    recorded: float | None
    """Of the step that differs most, else of the first."""
    made: float | None
    """Of the same step."""
    update: int
    """Number of that step in the run, from 1."""


@dataclass
class NodeComparison:
    """One node that ran again."""

    node: str
    calls: int
    samples: int
    """Samples that it returned both then and now; of a train step, steps."""
    trains: bool = False
    columns: list[Difference] = field(default_factory=list[Difference])
    """Columns that the node made, then or now; what it passes on is compared where it was made."""
    numbers: list[NumberDifference] = field(default_factory=list[NumberDifference])
    """Of a train step: what it logged."""
    remarks: list[str] = field(default_factory=list[str])
    """What cannot be compared."""

    @property
    def is_equal(self) -> bool:
        """Whether all of it is as it was, bit for bit."""
        numbers_equal = not any(number.differing for number in self.numbers)
        return not self.remarks and numbers_equal and all(c.is_equal for c in self.columns)


def compare(
    episode: EpisodeRecord, made: Mapping[str, Sequence[Again]], *, evaluation: bool
) -> list[NodeComparison]:
    """Compare what nodes returned with what the record says that they did, in the order of the flows."""
    recorded = episode.flow("eval_flow").nodes if evaluation else episode.nodes()
    by_name = {node.name: node for node in recorded}
    order = [*(name for name in by_name if name in made), *(n for n in made if n not in by_name)]
    found: list[NodeComparison] = []
    for name in order:
        record, calls = by_name.get(name), made[name]
        if record is None:
            remark = "the record has no such node: nothing to compare with"
            samples = sum(len(call.came_out) for call in calls)
            found.append(NodeComparison(name, len(calls), samples, remarks=[remark]))
        elif record.trains:
            found.append(_compare_steps(record, calls))
        else:
            found.append(_compare_samples(record, calls))
    return found


def _compare_samples(record: NodeRecord, calls: Sequence[Again]) -> NodeComparison:
    ran = {uid for call in calls for uid in call.uids}
    then = [uid for uid in record.came_out if uid in ran]
    cells: dict[str, dict[int, Any]] = {}
    for call in calls:
        for name, column in (call.output[0] if call.output else {}).items():
            cells.setdefault(name, {}).update(zip(call.came_out, column, strict=True))
    now = {uid for call in calls for uid in call.came_out}
    both = [uid for uid in then if uid in now]
    comparison = NodeComparison(record.name, len(calls), len(both))
    _remark(comparison, "came out then and no longer do", [uid for uid in then if uid not in now])
    _remark(comparison, "come out now and did not then", sorted(now.difference(then)))
    made = set(record.made).union(*(call.made for call in calls))
    for name in dict.fromkeys([*record.output_names, *cells]):
        if name not in cells and not both:
            continue
        if name not in cells:
            comparison.columns.append(Difference(name, 0, note="is no longer returned"))
            continue
        if name not in record.output_names:
            comparison.columns.append(Difference(name, 0, note="is new"))
            continue
        old = record.cells_of(name, both)
        new = [cells[name].get(uid, ABSENT) for uid in both]
        if name in made:  # the rest it passes on
            comparison.columns.append(compare_columns(name, both, old, new))
    return comparison


def _remark(comparison: NodeComparison, what: str, uids: Sequence[int]) -> None:
    if uids:
        shown = ", ".join(map(str, uids[:_SHOWN])) + (", ..." if len(uids) > _SHOWN else "")
        comparison.remarks.append(f"{len(uids)} samples {what}: uid {shown}")


def _compare_steps(record: NodeRecord, calls: Sequence[Again]) -> NodeComparison:
    recorded = {call.entry.step: call for call in record.calls}
    made = {call.step: call for call in calls}
    both = [step for step in recorded if step in made]
    comparison = NodeComparison(record.name, len(calls), len(both), trains=True)
    if len(both) < max(len(recorded), len(made)):
        comparison.remarks.append(f"{len(made)} updates now, {len(recorded)} then")
    then = [recorded[step].entry.numbers for step in both]
    now = [made[step].numbers for step in both]
    before = int(record.flow.episode.meta["train_iteration"])
    updates = [before + cast("int", step) + 1 for step in both]
    for name in dict.fromkeys(name for numbers in (*then, *now) for name in numbers):
        comparison.numbers.append(_compare_numbers(name, then, now, updates))
    columns: dict[str, tuple[list[Any], list[Any], list[Any]]] = {}
    for step in both:
        uids = iter(recorded[step].uids)
        parts = zip(recorded[step].outputs(), made[step].output, strict=False)
        for old, new in parts:
            own = [next(uids) for _ in range(_size(old))]
            for name in (name for name in old if name in new):
                known = columns.setdefault(name, ([], [], []))
                for into, values in zip(known, (own, old[name], new[name]), strict=True):
                    into.extend(values)
    for name, (uids, old, new) in columns.items():
        if len(old) == len(new):
            comparison.columns.append(compare_columns(name, uids, old, new))
    return comparison


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values()))) if batch else 0


def _compare_numbers(
    name: str,
    then: Sequence[Mapping[str, float]],
    now: Sequence[Mapping[str, float]],
    updates: Sequence[int],
) -> NumberDifference:
    pairs = [(old.get(name), new.get(name)) for old, new in zip(then, now, strict=True)]
    gaps = [_gap(old, new) for old, new in pairs]
    most = gaps.index(max(gaps))
    differing = sum(not _equal(old, new) for old, new in pairs)
    return NumberDifference(name, len(pairs), differing, gaps[most], *pairs[most], updates[most])


def _gap(old: float | None, new: float | None) -> float:
    if _equal(old, new):
        return 0.0
    if old is None or new is None or math.isnan(old - new):
        return math.inf
    return abs(old - new)


def _equal(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is new
    return old == new or (math.isnan(old) and math.isnan(new))
