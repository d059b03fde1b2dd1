# SPDX-License-Identifier: Apache-2.0
"""One pass of samples through a flow: cuts each node's samples into calls and says which of them may start.

Samples live in *spaces*: the feed's, plus one behind every filter. Within a space all nodes number samples alike,
so a batch may start as soon as its own range is there, whatever order calls finish in; a filter's space grows in
call order, so that order never depends on timing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from chatlearn.errors import FlowError
from chatlearn.flow.graph import FEED
from chatlearn.runtime.protocol import NodeSpec, Piece


@dataclass
class _Space:
    """Samples that share one numbering: their uids and groups as far as known."""

    uids: list[int] = field(default_factory=list[int])
    groups: list[int] = field(default_factory=list[int])
    closed: bool = False


@dataclass
class Task:
    """One call to come: samples `start` to `stop` of a node, in the node's input space."""

    node: int
    ordinal: int
    start: int
    stop: int
    started: bool = False


@dataclass
class _NodeRun:
    spec: NodeSpec
    space: _Space
    out_space: _Space
    tasks: list[Task] = field(default_factory=list[Task])
    starts: list[int] = field(default_factory=list[int])
    finished: int = 0
    ranges: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    """Finished calls as (start, stop, call id) in the output space, sorted."""
    range_starts: list[int] = field(default_factory=list[int])
    unplaced: dict[int, tuple[int, tuple[int, ...]]] = field(
        default_factory=dict[int, tuple[int, tuple[int, ...]]]
    )
    """Finished calls of a filter that wait for earlier ones: ordinal -> (call id, kept offsets)."""
    placed: int = 0

    @property
    def planned(self) -> int:
        return self.tasks[-1].stop if self.tasks else 0

    @property
    def complete(self) -> bool:
        planned_all = self.space.closed and self.planned == len(self.space.uids)
        return planned_all and self.finished == len(self.tasks)

    def add_range(self, at: int, start: int, stop: int, call: int) -> None:
        """Take note of what a finished call holds of the output space."""
        self.ranges.insert(at, (start, stop, call))
        self.range_starts.insert(at, start)

    def range_at(self, position: int) -> int:
        """Return the index of the last range that begins at or before `position` (0 if none does)."""
        return max(bisect_right(self.range_starts, position) - 1, 0)


class FlowRun:
    """Track one pass of a flow. Feed it finished calls; ask it which tasks may start."""

    def __init__(
        self,
        nodes: Sequence[NodeSpec],
        outputs: Sequence[int],
        uids: Sequence[int],
        groups: Sequence[int],
    ) -> None:
        self._feed = _Space(list(uids), list(groups), closed=True)
        self._outputs = tuple(outputs)
        self.nodes: list[_NodeRun] = []
        for spec in nodes:
            space = self._input_space(spec)
            self.nodes.append(_NodeRun(spec, space, _Space() if spec.filters else space))
        self._outlet_space = self._common_space(
            self._outputs,
            "what the flow returns",
            self.nodes[self._outputs[-1]].spec.place if outputs else "",
        )
        self._consumers: dict[int, list[int]] = {}
        for spec in nodes:
            for source in (*spec.inputs, *spec.after):
                self._consumers.setdefault(source, []).append(spec.index)
        self._delivered = 0
        self._fresh: list[tuple[_NodeRun, Task]] = []
        """Tasks planned since somebody last looked whether they may start."""

    def start(self) -> Iterator[Task]:
        """Return the tasks that need nothing but the feed."""
        for node in self.nodes:
            self._plan(node)
            if node.spec.filters and node.complete:
                self._grown(node)  # of no samples at all
        self._fresh.clear()
        yield from self._startable()

    def finish(self, task: Task, call: int, kept: tuple[int, ...] | None) -> Iterator[Task]:
        """Take note that `task` returned; yield the tasks that may start because of it."""
        node = self.nodes[task.node]
        node.finished += 1
        if node.spec.filters:
            self._place_filtered(node, task, call, kept or ())
            # What lies behind is planned only now: what was there before had all it needs from this filter.
            fresh, self._fresh = self._fresh, []
            yield from (late for owner, late in fresh if self._may_start(owner, late))
            if node.complete:  # which may close spaces far downstream
                yield from self._startable()
            return
        node.add_range(bisect_left(node.range_starts, task.start), task.start, task.stop, call)
        yield from self._released(node, task.start, task.stop)

    def inputs(self, task: Task) -> tuple[tuple[Piece, ...], ...]:
        """Return where each input of a task that may start is to be found."""
        return tuple(
            self._pieces(source, task.start, task.stop) or ()
            for source in self.nodes[task.node].spec.inputs
        )

    def uids(self, task: Task) -> Sequence[int]:
        """Return the uids of a task's samples."""
        return self.nodes[task.node].space.uids[task.start : task.stop]

    def newly_delivered(
        self,
    ) -> tuple[int, int, tuple[tuple[Piece, ...], ...], Sequence[int]] | None:
        """Return the samples, in order, for which all returned nodes have finished since the last call, if any."""
        if not self._outputs:
            return None
        start, stop = self._delivered, len(self._outlet_space.uids)
        for output in self._outputs:
            stop = min(stop, self._prefix(output, start))
            if stop == start:
                return None
        self._delivered = stop
        pieces = tuple(self._pieces(output, start, stop) or () for output in self._outputs)
        return start, stop, pieces, self._outlet_space.uids[start:stop]

    def calls_of(self, node: int) -> list[int]:
        """Return the ids of a node's finished calls in sample order."""
        return [call for _, _, call in self.nodes[node].ranges]

    @property
    def complete(self) -> bool:
        """Whether every node has run for every sample."""
        return all(node.complete for node in self.nodes)

    # ---- planning -----------------------------------------------------------------------------------------------

    def _input_space(self, spec: NodeSpec) -> _Space:
        return self._common_space(spec.inputs, f"the inputs of {spec.name}", spec.place)

    def _common_space(self, sources: Sequence[int], what: str, place: str) -> _Space:
        spaces = [self._feed if s == FEED else self.nodes[s].out_space for s in sources] or [
            self._feed
        ]
        if any(space is not spaces[0] for space in spaces):
            raise FlowError(
                f"both sides of a filter meet in {what}, so their samples do not correspond",
                place=place,
                fix="take all of it from before, or all from behind the filter",
            )
        return spaces[0]

    def _plan(self, node: _NodeRun) -> None:
        """Cut the samples known so far into tasks; the last, incomplete one waits until its space is closed."""
        while (stop := self._next_cut(node)) is not None:
            task = Task(node.spec.index, len(node.tasks), node.planned, stop)
            node.starts.append(task.start)
            node.tasks.append(task)
            self._fresh.append((node, task))

    def _next_cut(self, node: _NodeRun) -> int | None:
        space, start, known = node.space, node.planned, len(node.space.uids)
        if start == known:
            return None
        size = node.spec.batch_size
        if size is None or node.spec.batch_by == "episode":
            return known if space.closed else None
        if node.spec.batch_by == "sample":
            return min(start + size, known) if space.closed or start + size <= known else None
        stop = None
        for border in self._group_borders(space, start):
            if border - start > size and stop is not None:
                break
            stop = border
            if border - start >= size:
                break
        # Cut only where it is certain whatever comes next, so that cuts never depend on timing.
        full = stop is not None and (stop - start >= size or known - start > size)
        return stop if full or space.closed else None

    @staticmethod
    def _group_borders(space: _Space, start: int) -> Iterator[int]:
        """Yield the ends of the groups from `start` on that are known to be whole."""
        for i in range(start + 1, len(space.groups)):
            if space.groups[i] != space.groups[i - 1]:
                yield i
        if space.closed:
            yield len(space.groups)

    # ---- readiness ----------------------------------------------------------------------------------------------

    def _may_start(self, node: _NodeRun, task: Task) -> bool:
        if task.started:
            return False
        for source in node.spec.inputs:
            if self._pieces(source, task.start, task.stop) is None:
                return False
        for source in node.spec.after:
            other = self.nodes[source]
            if other.out_space is node.space:
                if self._pieces(source, task.start, task.stop) is None:
                    return False
            elif not other.complete:
                return False
        task.started = True
        return True

    def _pieces(self, source: int, start: int, stop: int) -> tuple[Piece, ...] | None:
        """Return the finished calls that cover samples `start` to `stop` of a node, or None if some are missing."""
        if source == FEED:
            return (Piece(FEED, start, stop),)
        ranges = self.nodes[source].ranges
        at = self.nodes[source].range_at(start)
        pieces: list[Piece] = []
        position = start
        while position < stop:
            if at == len(ranges) or not ranges[at][0] <= position < ranges[at][1]:
                return None
            first, last, call = ranges[at]
            end = min(last, stop)
            pieces.append(Piece(call, position - first, end - first))
            position = end
            at += 1
        return tuple(pieces)

    def _prefix(self, source: int, start: int) -> int:
        """Return up to where, from `start` on, a node's output is complete."""
        ranges = self.nodes[source].ranges
        at = self.nodes[source].range_at(start)
        position = start
        while at < len(ranges) and ranges[at][0] <= position < ranges[at][1]:
            position = ranges[at][1]
            at += 1
        return position

    def _startable(self) -> Iterator[Task]:
        for node in self.nodes:
            yield from (task for task in node.tasks if self._may_start(node, task))

    def _released(self, node: _NodeRun, start: int, stop: int) -> Iterator[Task]:
        """Yield the tasks downstream that overlap samples `start` to `stop` of the output and miss nothing else."""
        for consumer in dict.fromkeys(self._consumers.get(node.spec.index, [])):
            other = self.nodes[consumer]
            if other.space is node.out_space:
                at, end = max(bisect_right(other.starts, start) - 1, 0), stop
            elif node.complete:
                at, end = 0, len(other.space.uids)
            else:
                continue
            while at < len(other.tasks) and other.tasks[at].start < end:
                if self._may_start(other, other.tasks[at]):
                    yield other.tasks[at]
                at += 1

    # ---- filters ------------------------------------------------------------------------------------------------

    def _place_filtered(self, node: _NodeRun, task: Task, call: int, kept: tuple[int, ...]) -> None:
        """Append a filter's output to its space once all earlier calls of it have been appended."""
        node.unplaced[task.ordinal] = (call, kept)
        space = node.out_space
        while node.placed in node.unplaced:
            call, kept = node.unplaced.pop(node.placed)
            source = node.tasks[node.placed]
            start = len(space.uids)
            space.uids += [node.space.uids[source.start + i] for i in kept]
            space.groups += [node.space.groups[source.start + i] for i in kept]
            if kept:
                node.add_range(len(node.ranges), start, start + len(kept), call)
            node.placed += 1
        self._grown(node)

    def _grown(self, node: _NodeRun) -> None:
        """Plan the nodes behind a filter whose output grew, and close the spaces that can grow no more."""
        node.out_space.closed = node.complete
        for other in self.nodes:
            if other.space is node.out_space:
                self._plan(other)
                if other.spec.filters and other.complete:
                    self._grown(other)
