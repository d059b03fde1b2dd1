# SPDX-License-Identifier: Apache-2.0
"""One pass of samples through a flow: cuts each node's samples into calls and says which of them may start.

Samples live in *spaces*: the feed's, plus one behind every filter. Within a space all nodes number samples alike,
so a batch may start as soon as its own range is there, whatever order calls finish in; a filter's space grows in
call order, so that order never depends on timing.

A sample that was given up keeps its number. The node that lost it and all nodes behind that one count it as there and
have no row of it: what a call holds depends on what was lost before its node, never on when.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from chatlearn.errors import FlowError
from chatlearn.flow.graph import FEED
from chatlearn.runtime.node_run import NodeRun, Space
from chatlearn.runtime.positions import Portion, Task, runs, without
from chatlearn.runtime.protocol import Deliver, NodeSpec, Piece


class FlowRun:
    """Track one pass of a flow. Feed it finished calls; ask it which may start."""

    def __init__(
        self,
        nodes: Sequence[NodeSpec],
        outputs: Sequence[int],
        uids: Sequence[int],
        groups: Sequence[int],
    ) -> None:
        self._feed = Space(list(uids), list(groups), closed=True)
        self._outputs = tuple(outputs)
        self.nodes: list[NodeRun] = []
        for spec in nodes:
            space = self._input_space(spec)
            self.nodes.append(NodeRun(spec, space, Space() if spec.filters else space))
        self._outlet_space = self._common_space(
            self._outputs,
            "what the flow returns",
            self.nodes[self._outputs[-1]].spec.place if outputs else "",
        )
        self._consumers: dict[int, list[int]] = {}
        for spec in nodes:
            for source in (*spec.inputs, *spec.after):
                self._consumers.setdefault(source, []).append(spec.index)
        self._before_outputs = self._depended_on()
        self._drops = any(
            self.nodes[i].spec.recovery.fate == "drop_group" for i in self._before_outputs
        )
        self._delivered = 0
        self._has_delivered = False
        """Whether a sample that is not lost has left the flow."""
        self._fresh: list[tuple[NodeRun, Task]] = []
        """Tasks planned since somebody last looked whether they may start."""
        self.lost_uids: set[int] = set()
        """Samples that some node has given up."""
        self.dropped_groups: set[int] = set()
        """Groups that are not delivered because a sample of theirs was lost."""
        self.dropped_samples = 0

    def start(self) -> Iterator[Portion]:
        """Return the calls that need nothing but the feed."""
        for node in self.nodes:
            self._plan(node)
            if node.spec.filters and node.complete:
                self._grown(node)  # of no samples at all
        self._fresh.clear()
        yield from self._startable()

    def finish(
        self,
        portion: Portion,
        call: int,
        kept: tuple[int, ...] | None,
        failed: tuple[int, ...] = (),
    ) -> Iterator[Portion]:
        """Take note of a call that returned, but for what it `failed` on; return the calls that may start now."""
        task, node = portion.task, self.nodes[portion.task.node]
        done = without(portion.positions, failed)
        task.left -= len(done)
        node.succeeded += len(done)
        if node.spec.filters:
            node.keep(task, portion.positions, kept or (), call)
        else:
            node.hold(done, call)
        return self._resolved(node, task)

    def lose(self, portion: Portion) -> Iterator[Portion]:
        """Give up a portion's samples: no node behind gets them; return the calls that may start now."""
        task, node = portion.task, self.nodes[portion.task.node]
        uids, groups = node.space.uids, node.space.groups
        self.lost_uids.update(uids[at] for at in portion.positions)
        if node.spec.recovery.fate == "drop_group" and node.spec.index in self._before_outputs:
            self.dropped_groups.update(groups[at] for at in portion.positions)
        for index in self._behind(node):
            self.nodes[index].lost.update(portion.positions)
        task.left -= len(portion.positions)
        node.gave_up += len(portion.positions)
        node.leave_out(portion.positions)
        return self._resolved(node, task)

    def inputs(self, portion: Portion) -> tuple[tuple[Piece, ...], ...]:
        """Return where each input of a call that may start is to be found."""
        sources = self.nodes[portion.task.node].spec.inputs
        return tuple(self._rows(source, portion.positions) for source in sources)

    def uids(self, portion: Portion) -> Sequence[int]:
        """Return the uids of a call's samples."""
        return _at(self.nodes[portion.task.node].space.uids, portion.positions)

    def groups(self, portion: Portion) -> Sequence[int]:
        """Return the group of each of a call's samples."""
        return _at(self.nodes[portion.task.node].space.groups, portion.positions)

    def newly_delivered(self) -> Deliver | None:
        """Return the samples, in order, for which all returned nodes have finished since the last call, if any.

        Where a node may drop groups, groups leave whole: of one that is dropped late, nobody has seen a sample. And
        lost samples wait for one that is not, which tells what columns there are.
        """
        if not self._outputs:
            return None
        space = self._outlet_space
        start, stop = self._delivered, len(space.uids)
        for output in self._outputs:
            stop = min(stop, self.nodes[output].prefix(start))
            if stop == start:
                return None
        if self._drops:
            stop = space.last_border(start, stop)
        positions: Sequence[int] = range(start, stop)
        if self.dropped_groups:
            positions = [at for at in positions if space.groups[at] not in self.dropped_groups]
        gone: set[int] = set()
        for output in self._outputs if self.lost_uids else ():
            gone |= self.nodes[output].lost
        live = [at for at in positions if at not in gone] if gone else positions
        if not live and positions and not self._has_delivered:
            return None
        self._delivered = stop
        self.dropped_samples += stop - start - len(positions)
        if not positions:
            return None
        self._has_delivered = True
        lost = tuple(offset for offset, at in enumerate(positions) if at in gone) if gone else ()
        rows = tuple(self._rows(output, live) for output in self._outputs)
        return Deliver(rows, _at(space.uids, positions), lost)

    def batches(self, output: int) -> Iterator[Deliver]:
        """Return what a node has made, a batch for each call that was planned, in order; of a filter what it kept."""
        node = self.nodes[output]
        if node.spec.filters:
            for start, stop, call, row in node.ranges:
                piece = Piece(call, row, row + stop - start)
                yield Deliver(((piece,),), node.out_space.uids[start:stop])
            return
        for task in node.tasks:
            everything = range(task.start, task.stop)
            lost = tuple(at - task.start for at in everything if at in node.lost)
            yield Deliver(
                (self._rows(output, node.live(task)),), _at(node.space.uids, everything), lost
            )

    @property
    def complete(self) -> bool:
        """Whether every node has run for every sample that is not lost."""
        return all(node.complete for node in self.nodes)

    @property
    def has_lost_everything(self) -> bool:
        """Whether samples were lost and none has left the flow (of a flow that returns nothing: all were lost)."""
        if self._outputs:
            return bool(self.lost_uids) and not self._has_delivered
        return bool(self.lost_uids) and len(self.lost_uids) == len(self._feed.uids)

    # ---- planning -----------------------------------------------------------------------------------------------

    def _input_space(self, spec: NodeSpec) -> Space:
        return self._common_space(spec.inputs, f"the inputs of {spec.name}", spec.place)

    def _common_space(self, sources: Sequence[int], what: str, place: str) -> Space:
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

    def _depended_on(self) -> set[int]:
        """Return the nodes that what the flow returns depends on, the returned ones included."""
        found: set[int] = set()
        ways = [*self._outputs]
        while ways:
            index = ways.pop()
            if index != FEED and index not in found:
                found.add(index)
                ways += [*self.nodes[index].spec.inputs, *self.nodes[index].spec.after]
        return found

    def _behind(self, node: NodeRun) -> set[int]:
        """Return a node and those that depend on it sample by sample: up to the next filter, which is one of them."""
        found: set[int] = set()
        ways = [node.spec.index]
        while ways:
            index = ways.pop()
            if index in found or self.nodes[index].space is not node.space:
                continue
            found.add(index)
            ways += self._consumers.get(index, [])
        return found

    def _plan(self, node: NodeRun) -> None:
        self._fresh += ((node, task) for task in node.plan())

    def _grown(self, node: NodeRun) -> None:
        """Plan the nodes behind a filter whose output grew, and close the spaces that can grow no more."""
        node.out_space.closed = node.complete
        for other in self.nodes:
            if other.space is node.out_space:
                self._plan(other)
                if other.spec.filters and other.complete:
                    self._grown(other)

    # ---- readiness ----------------------------------------------------------------------------------------------

    def _start(self, node: NodeRun, task: Task) -> Iterator[Portion]:
        """Yield the call of a task that may start; of one whose samples are all lost, what may start behind it."""
        live = node.live(task)
        task.started, task.left = True, len(live)
        if task.left < task.stop - task.start:
            node.leave_out([at for at in range(task.start, task.stop) if at in node.lost])
        if task.left:
            yield Portion(task, live)
        else:
            yield from self._resolved(node, task)

    def _may_start(self, node: NodeRun, task: Task) -> bool:
        if task.started:
            return False
        for source in node.spec.inputs:
            if not self._has(source, task):
                return False
        for source in node.spec.after:
            other = self.nodes[source]
            if other.out_space is node.space:
                if not self._has(source, task):
                    return False
            elif not other.complete:
                return False
        return True

    def _has(self, source: int, task: Task) -> bool:
        """Tell whether what a task takes from a node is there, or lost."""
        return source == FEED or self.nodes[source].prefix(task.start) >= task.stop

    def _resolved(self, node: NodeRun, task: Task) -> Iterator[Portion]:
        """Take note that samples of a task are finished or lost; return the calls that may start because of it."""
        node.finished += not task.left
        if node.spec.filters:
            return iter(()) if task.left else self._placed(node)
        return self._released(node, task.start, task.stop)

    def _placed(self, node: NodeRun) -> Iterator[Portion]:
        """Let a filter's output grow; yield the calls that may start behind it."""
        node.place()
        self._grown(node)
        # What lies behind is planned only now: what was there before had all it needs from this filter.
        fresh, self._fresh = self._fresh, []
        for owner, late in fresh:
            if self._may_start(owner, late):
                yield from self._start(owner, late)
        if node.complete:  # which may close spaces far downstream
            yield from self._startable()

    def _rows(self, source: int, positions: Sequence[int]) -> tuple[Piece, ...]:
        """Return the finished calls that hold samples which are not lost."""
        if isinstance(positions, range):
            if source == FEED:
                return (Piece(FEED, positions.start, positions.stop),)
            return self.nodes[source].pieces(positions.start, positions.stop)
        stretches = (range(start, stop) for start, stop in runs(positions))
        return tuple(piece for stretch in stretches for piece in self._rows(source, stretch))

    def _startable(self) -> Iterator[Portion]:
        for node in self.nodes:
            for task in node.tasks:
                if self._may_start(node, task):
                    yield from self._start(node, task)

    def _released(self, node: NodeRun, start: int, stop: int) -> Iterator[Portion]:
        """Yield the calls downstream that overlap samples `start` to `stop` of the output and miss nothing else."""
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
                    yield from self._start(other, other.tasks[at])
                at += 1


def _at(values: Sequence[int], positions: Sequence[int]) -> Sequence[int]:
    if isinstance(positions, range):
        return values[positions.start : positions.stop]
    return [values[at] for at in positions]
