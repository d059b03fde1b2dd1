# SPDX-License-Identifier: Apache-2.0
"""One pass of train steps through the trainer flow: every node runs every step, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chatlearn.flow.graph import FEED
from chatlearn.flow.steps import Step
from chatlearn.runtime.protocol import NodeSpec, Piece


@dataclass(frozen=True)
class StepTask:
    """One call to come: `step` of trainer node `node`."""

    node: int
    step: Step
    replica: int = -1
    """As of a `Portion`: a step that failed is not tried again."""


class StepRun:
    """Track the trainer flow. Feed it steps and finished calls; ask it which tasks may start."""

    def __init__(self, nodes: Sequence[NodeSpec]) -> None:
        self.nodes = list(nodes)
        self._steps: list[Step] = []
        self._closed = False
        self._started = [0] * len(self.nodes)
        self._finished = [0] * len(self.nodes)
        self._calls: dict[tuple[int, int], int] = {}

    def extend(self, steps: Sequence[Step]) -> Iterator[StepTask]:
        """Add steps, in order; yield the tasks that may start because of it."""
        self._steps += steps
        yield from self._startable()

    def close(self) -> None:
        """Take note that no further steps come."""
        self._closed = True

    def finish(self, task: StepTask, call: int) -> Iterator[StepTask]:
        """Take note that `task` returned; yield the tasks that may start because of it."""
        self._finished[task.node] += 1
        self._calls[task.node, self._finished[task.node] - 1] = call
        yield from self._startable()

    def inputs(self, task: StepTask) -> tuple[tuple[Piece, ...], ...]:
        """Return, per input, the step's micro-batches: of the feed, or what another node returned for this step."""
        count = len(task.step.micro_batches)
        at = self._started[task.node] - 1
        sources = self.nodes[task.node].inputs
        calls = (FEED if source == FEED else self._calls[source, at] for source in sources)
        return tuple((Piece(call, 0, count),) for call in calls)

    @property
    def steps(self) -> int:
        """How many steps have been finished by every node."""
        return min(self._finished, default=0)

    @property
    def complete(self) -> bool:
        """Whether every node has run every step and no further ones come."""
        return self._closed and all(count == len(self._steps) for count in self._finished)

    def _startable(self) -> Iterator[StepTask]:
        for node in self.nodes:
            at = self._started[node.index]
            waits = (source for source in (*node.inputs, *node.after) if source != FEED)
            idle = self._finished[node.index] == at  # a trainer takes its steps one after the other
            if idle and at < len(self._steps) and all(self._finished[w] > at for w in waits):
                self._started[node.index] += 1
                yield StepTask(node.index, self._steps[at])
