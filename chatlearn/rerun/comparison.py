# SPDX-License-Identifier: Apache-2.0
"""What running recorded nodes again gave, compared with the record: column by column, number by number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from chatlearn.flow.batch import Batch
from chatlearn.record.nodes import ABSENT, CallRecord, NodeRecord
from chatlearn.record.reading import EpisodeRecord, Loss, describe_numbers
from chatlearn.record.sameness import Difference, compare_columns
from chatlearn.rerun.again import Again, Rerun

_Row = tuple[int, int]
"""A sample of an update: its uid, and how often the update has held it before."""


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


@dataclass(frozen=True)
class UpdateSamples:
    """An update that holds other samples now than it did then."""

    update: int
    """Its number in the run, from 1."""
    now: list[int]
    """Uids of the samples that it holds only now."""
    then: list[int]
    """Uids of those that it held only then."""
    both: int
    """How many are the same."""

    def __str__(self) -> str:
        now, then = (describe_numbers(uids) or "none" for uids in (self.now, self.then))
        uid = "uid " if self.now else ""
        others = f"; {self.both} more in both" if self.both else ""
        return f"update {self.update}: {uid}{now} now, {'' if uid else 'uid '}{then} then{others}"


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
    updates: list[UpdateSamples] = field(default_factory=list[UpdateSamples])
    """Of a train step: the updates that do not hold the samples that they held."""
    remarks: list[str] = field(default_factory=list[str])
    """What cannot be compared: samples that came out, or updates that were made, on one side only."""
    failures: list[Loss] = field(default_factory=list[Loss])
    """Samples that the node fails on now and did not then, or in another way."""
    recoveries: list[Loss] = field(default_factory=list[Loss])
    """Samples that it failed on then and no longer does: why it did."""

    @property
    def is_equal(self) -> bool:
        """Whether all of it is as it was, bit for bit."""
        numbers_equal = not any(number.differing for number in self.numbers)
        samples_equal = not self.remarks and not self.updates
        return samples_equal and numbers_equal and all(c.is_equal for c in self.columns)


def compare(episode: EpisodeRecord, again: Rerun, *, evaluation: bool) -> list[NodeComparison]:
    """Compare what nodes returned with what the record says that they did, in the order of the flows."""
    recorded = episode.flow("eval_flow").nodes if evaluation else episode.nodes()
    made, by_name = again.made, {node.name: node for node in recorded}
    order = [*(name for name in by_name if name in made), *(n for n in made if n not in by_name)]
    found: list[NodeComparison] = []
    for name in order:
        record, calls = by_name.get(name), made[name]
        if record is None:
            remark = "the record has no such node: nothing to compare with"
            samples = sum(len(part) for call in calls for part in call.came_out)
            failures = list(again.losses.get(name, {}).values())
            found.append(
                NodeComparison(name, len(calls), samples, remarks=[remark], failures=failures)
            )
        elif record.trains:
            found.append(_compare_steps(record, calls))
        else:
            found.append(_compare_samples(record, again))
    return found


def _compare_samples(record: NodeRecord, again: Rerun) -> NodeComparison:
    calls, chosen = again.made[record.name], set(again.chosen)
    then = [uid for uid in record.came_out if uid in chosen]
    cells: dict[str, dict[int, Any]] = {}
    for call in calls:
        for uids, batch in zip(call.came_out, call.output, strict=True):
            for name, column in batch.items():
                cells.setdefault(name, {}).update(zip(uids, column, strict=True))
    now = {uid for call in calls for part in call.came_out for uid in part}
    both = [uid for uid in then if uid in now]
    comparison = NodeComparison(record.name, len(calls), len(both))
    _compare_losses(comparison, record, again, then, now)
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


def _compare_losses(
    comparison: NodeComparison,
    record: NodeRecord,
    again: Rerun,
    then: Sequence[int],
    now: Collection[int],
) -> None:
    """Tell which samples came out, or made the node fail, on one side only, and why."""
    chosen, own_now = set(again.chosen), again.losses.get(record.name, {})
    lost_then = {uid: loss for uid, loss in record.flow.losses.items() if uid in chosen}
    lost_now = {u: loss for losses in again.losses.values() for u, loss in losses.items()} | own_now
    own_then = {uid: loss for uid, loss in lost_then.items() if loss.node == record.name}
    gone = [uid for uid in then if uid not in now]
    new = sorted(set(now).difference(then))
    # Of a sample that several nodes failed on, the record has the first: of the others it cannot tell.
    more = [uid for uid in own_now if uid not in lost_then and uid not in gone]
    fewer = [uid for uid in own_then if uid not in lost_now and uid not in new]
    changed = [
        uid for uid in own_then if uid in own_now and own_now[uid].outcome != own_then[uid].outcome
    ]
    groups = dict(zip(record.flow.uids, record.flow.groups, strict=True))
    why_then, why_now = _reasons(lost_then, groups, "then "), _reasons(lost_now, groups)
    comparison.remarks += [
        *_told(gone, "came out then and no longer do", "came out then and no longer does", why_now),
        *_told(new, "come out now and did not then", "comes out now and did not then", why_then),
        *_told(more, "fail now and did not then", "fails now and did not then", why_now),
        *_told(fewer, "failed then and no longer do", "failed then and no longer does", why_then),
        *_told(changed, "fail otherwise than then", "fails otherwise than then", why_now),
    ]
    comparison.failures = [own_now[uid] for uid in [*gone, *more, *changed] if uid in own_now]
    comparison.recoveries = [own_then[uid] for uid in [*new, *fewer] if uid in own_then]


def _reasons(
    losses: Mapping[int, Loss], groups: Mapping[int, int], when: str = ""
) -> Callable[[int], str]:
    """Return what tells why a sample does not come out, as far as it is known."""
    culprits = {groups[uid]: loss for uid, loss in losses.items() if loss.drops_group}

    def why(uid: int) -> str:
        if uid in losses:
            return when + losses[uid].what
        if (culprit := culprits.get(groups[uid])) is not None:
            return f"{when}left with its group, for uid {culprit.uid} {culprit.what}"
        return ""

    return why


def _told(uids: Sequence[int], several: str, one: str, why: Callable[[int], str]) -> list[str]:
    """Return a line for all samples that have the same reason."""
    by_reason: dict[str, list[int]] = {}
    for uid in uids:
        by_reason.setdefault(why(uid), []).append(uid)
    return [
        f"{_counted(len(same), 'sample')} {one if len(same) == 1 else several}: "
        f"uid {describe_numbers(same)}{', ' * bool(reason)}{reason}"
        for reason, same in by_reason.items()
    ]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _compare_steps(record: NodeRecord, calls: Sequence[Again]) -> NodeComparison:
    recorded = {call.entry.step: call for call in record.calls}
    made = {call.step: call for call in calls}
    both = [step for step in recorded if step in made]
    comparison = NodeComparison(record.name, len(calls), len(both), trains=True)
    if len(both) < max(len(recorded), len(made)):
        counts = f"{_counted(len(made), 'update')} now, {len(recorded)} then"
        comparison.remarks.append(counts)
    then = [recorded[step].entry.numbers for step in both]
    now = [made[step].numbers for step in both]
    before = int(record.flow.episode.meta["train_iteration"])
    updates = [before + cast("int", step) + 1 for step in both]
    for name in dict.fromkeys(name for numbers in (*then, *now) for name in numbers):
        comparison.numbers.append(_compare_numbers(name, then, now, updates))
    rows = [(_recorded_rows(recorded[step]), _made_rows(made[step])) for step in both]
    for update, (old, new) in zip(updates, rows, strict=True):
        only_now = [uid for uid, nth in new if (uid, nth) not in old]
        only_then = [uid for uid, nth in old if (uid, nth) not in new]
        if only_now or only_then:
            shared = len(new) - len(only_now)
            comparison.updates.append(UpdateSamples(update, only_now, only_then, shared))
    comparison.columns = _compare_rows(rows)
    return comparison


def _compare_rows(
    rows: Sequence[tuple[Mapping[_Row, Batch], Mapping[_Row, Batch]]],
) -> list[Difference]:
    """Compare what updates told of each sample, for the samples that the same update has on both sides."""
    names_then = dict.fromkeys(n for old, _ in rows for cells in old.values() for n in cells)
    names_now = dict.fromkeys(n for _, new in rows for cells in new.values() for n in cells)
    shared = [(row[0], old[row], new[row]) for old, new in rows for row in old if row in new]
    found: list[Difference] = []
    for name in names_then | names_now:
        if name not in names_now:
            found.append(Difference(name, 0, note="is no longer returned"))
        elif name not in names_then:
            found.append(Difference(name, 0, note="is new"))
        elif not shared:
            found.append(Difference(name, 0, note="no sample in common"))
        else:
            pairs = [
                (uid, old.get(name, ABSENT), new.get(name, ABSENT)) for uid, old, new in shared
            ]
            uids, before, after = zip(*pairs, strict=True)
            found.append(compare_columns(name, uids, before, after))
    return found


def _recorded_rows(call: CallRecord) -> dict[_Row, Batch]:
    uids = call.uids
    if -1 in uids:  # of a dataset whose samples have no uids
        uids = call.node.table.meta("position")[call.start : call.start + call.entry.rows]
    return _rows(uids, map(len, call.parts), call.outputs())


def _made_rows(call: Again) -> dict[_Row, Batch]:
    return _rows(call.uids, map(len, call.came_out), call.output)


def _rows(uids: Sequence[int], sizes: Iterable[int], outputs: Sequence[Batch]) -> dict[_Row, Batch]:
    """Return the cells of each sample of an update; none of a step that told nothing of them."""
    cells: list[Batch] = [
        {name: column[row] for name, column in batch.items()}
        for rows, batch in zip(sizes, outputs, strict=False)
        for row in range(rows)
    ]
    found: dict[_Row, Batch] = {}
    held: Counter[int] = Counter()
    for uid, sample in zip(uids, cells or [{} for _ in uids], strict=True):
        found[uid, held[uid]] = sample
        held[uid] += 1
    return found


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
