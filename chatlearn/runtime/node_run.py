# SPDX-License-Identifier: Apache-2.0
"""One node of a flow under way: the calls its samples are cut into, and what finished calls hold of its output."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from chatlearn.runtime.positions import Task, runs
from chatlearn.runtime.protocol import NodeSpec, Piece

LOST: Final = -2
"""Stands for a call where samples were lost, so that no call holds them."""


@dataclass
class Space:
    """Samples that share one numbering: their uids and groups as far as known."""

    uids: list[int] = field(default_factory=list[int])
    groups: list[int] = field(default_factory=list[int])
    closed: bool = False

    def borders(self, start: int) -> Iterator[int]:
        """Yield the ends of the groups from `start` on that are known to be whole."""
        for i in range(start + 1, len(self.groups)):
            if self.groups[i] != self.groups[i - 1]:
                yield i
        if self.closed:
            yield len(self.groups)

    def last_border(self, start: int, stop: int) -> int:
        """Return the last of these ends up to `stop`, or `start` if there is none."""
        if stop == len(self.groups) and self.closed:
            return stop
        while stop > start and (
            stop == len(self.groups) or self.groups[stop] == self.groups[stop - 1]
        ):
            stop -= 1
        return stop


@dataclass
class NodeRun:
    """The calls of one node; positions are those of its input space, ranges those of its output space."""

    spec: NodeSpec
    space: Space
    out_space: Space
    tasks: list[Task] = field(default_factory=list[Task])
    starts: list[int] = field(default_factory=list[int])
    finished: int = 0
    ranges: list[tuple[int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int]])
    """What finished calls hold of the output space, sorted: (start, stop, call id, row of `start` in its output)."""
    kept: dict[int, list[tuple[int, int, int]]] = field(
        default_factory=dict[int, list[tuple[int, int, int]]]
    )
    """What a filter let through: a task's ordinal -> (position, call id, row), until earlier calls have finished."""
    placed: int = 0
    lost: set[int] = field(default_factory=set[int])
    """Positions that were lost here or before."""
    succeeded: int = 0
    """Samples that a call has finished."""
    gave_up: int = 0
    """Samples that were lost here."""
    _range_starts: list[int] = field(default_factory=list[int])

    @property
    def planned(self) -> int:
        """How many samples are cut into calls."""
        return self.tasks[-1].stop if self.tasks else 0

    @property
    def complete(self) -> bool:
        """Whether every sample is finished or lost, and no further ones come."""
        planned_all = self.space.closed and self.planned == len(self.space.uids)
        return planned_all and self.finished == len(self.tasks)

    # ---- planning -----------------------------------------------------------------------------------------------

    def plan(self) -> Iterator[Task]:
        """Cut the samples known so far into tasks; the last, incomplete one waits until its space is closed."""
        while (stop := self._next_cut()) is not None:
            task = Task(self.spec.index, len(self.tasks), self.planned, stop)
            self.starts.append(task.start)
            self.tasks.append(task)
            yield task

    def _next_cut(self) -> int | None:
        space, start, known = self.space, self.planned, len(self.space.uids)
        if start == known:
            return None
        size = self.spec.batch_size
        if size is None or self.spec.batch_by == "episode":
            return known if space.closed else None
        if self.spec.batch_by == "sample":
            return min(start + size, known) if space.closed or start + size <= known else None
        stop = None
        for border in space.borders(start):
            if border - start > size and stop is not None:
                break
            stop = border
            if border - start >= size:
                break
        # Cut only where it is certain whatever comes next, so that cuts never depend on timing.
        full = stop is not None and (stop - start >= size or known - start > size)
        return stop if full or space.closed else None

    def live(self, task: Task) -> Sequence[int]:
        """Return the positions of a task's samples that are not lost."""
        everything = range(task.start, task.stop)
        if not self.lost or self.lost.isdisjoint(everything):
            return everything
        return [at for at in everything if at not in self.lost]

    # ---- what finished calls hold ---------------------------------------------------------------------------------

    def hold(self, positions: Sequence[int], call: int) -> None:
        """Take note that a call's output has one row for each of these positions."""
        if isinstance(positions, range):
            self._add_range(positions.start, positions.stop, call, 0)
            return
        row = 0
        for start, stop in runs(positions):
            self._add_range(start, stop, call, row)
            row += stop - start

    def leave_out(self, positions: Sequence[int]) -> None:
        """Count lost positions as there; a filter does not keep them, which says as much."""
        for start, stop in runs(positions) if not self.spec.filters else ():
            self._add_range(start, stop, LOST, 0)

    def keep(self, task: Task, positions: Sequence[int], kept: Sequence[int], call: int) -> None:
        """Take note that a filter's call let the positions at the offsets `kept` through."""
        entries = [(positions[offset], call, row) for row, offset in enumerate(kept)]
        self.kept.setdefault(task.ordinal, []).extend(entries)

    def place(self) -> None:
        """Append a filter's calls to its output space, each once all earlier ones have been appended."""
        space = self.out_space
        while self.placed < len(self.tasks) and self.tasks[self.placed].is_done:
            entries = sorted(self.kept.pop(self.placed, ()))
            first, begin = len(space.uids), 0
            space.uids += [self.space.uids[position] for position, _, _ in entries]
            space.groups += [self.space.groups[position] for position, _, _ in entries]
            for end in range(1, len(entries) + 1):
                _, call, row = entries[end - 1]
                if end == len(entries) or entries[end][1:] != (call, row + 1):
                    self._add_range(first + begin, first + end, call, entries[begin][2])
                    begin = end
            self.placed += 1

    def pieces(self, start: int, stop: int) -> tuple[Piece, ...]:
        """Return the finished calls that cover `start` to `stop` of the output, which must be there."""
        ranges, at = self.ranges, self._range_at(start)
        pieces: list[Piece] = []
        position = start
        while position < stop:
            first, last, call, row = ranges[at]
            end = last if last < stop else stop
            if call != LOST:
                pieces.append(Piece(call, row + position - first, row + end - first))
            position = end
            at += 1
        return tuple(pieces)

    def prefix(self, start: int) -> int:
        """Return up to where, from `start` on, the output is complete, lost samples included."""
        ranges, at = self.ranges, self._range_at(start)
        position = start
        while at < len(ranges) and ranges[at][0] <= position < ranges[at][1]:
            position = ranges[at][1]
            at += 1
        return position

    def _add_range(self, start: int, stop: int, call: int, row: int) -> None:
        at = bisect_left(self._range_starts, start)
        self.ranges.insert(at, (start, stop, call, row))
        self._range_starts.insert(at, start)

    def _range_at(self, position: int) -> int:
        """Return the index of the last range that begins at or before `position` (0 if none does)."""
        return max(bisect_right(self._range_starts, position) - 1, 0)
