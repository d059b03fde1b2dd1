# SPDX-License-Identifier: Apache-2.0
"""A driver on a virtual clock: carries the scheduler's commands out after simulated durations, on plain values."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatlearn.data.stream import StreamDataset
from chatlearn.flow.graph import FEED
from chatlearn.flow.steps import Step
from chatlearn.runtime.protocol import (
    Call,
    Command,
    Deliver,
    Failed,
    Finished,
    Lost,
    NodeSpec,
    Piece,
)
from chatlearn.runtime.scheduler import Samples, Scheduler

Seconds = Callable[[Call], float]
Fails = Callable[[Call], bool | Collection[int]]
"""Whether a call raises, or the uids of the samples that it says it failed on."""


def node(index: int, *inputs: int, **more: Any) -> NodeSpec:
    """Make a node of a module of its own (`m<index>`, unless told otherwise)."""
    module = more.pop("module", f"m{index}")
    return NodeSpec(index, f"{module}.step", module, "step", inputs or (FEED,), **more)


def chain(length: int, *sizes: int | None) -> list[NodeSpec]:
    """Make nodes that take each other's output."""
    batch_sizes = sizes or (None,) * length
    return [node(i, i - 1 if i else FEED, batch_size=batch_sizes[i]) for i in range(length)]


@dataclass(frozen=True)
class Timed:
    """One call with the simulated time it took."""

    call: Call
    start: float
    stop: float

    @property
    def uids(self) -> list[int]:
        return list(self.call.uids)


class VirtualClock:
    """Run a scheduler with any number of replicas; calls take `seconds(call)` and run at the same time.

    Every value is a tuple that says how it was made, so equal values mean the same calls on the same samples.
    """

    def __init__(
        self,
        nodes: Sequence[NodeSpec],
        outputs: Sequence[int],
        samples: int,
        *,
        group: int | Sequence[int] = 1,
        replicas: Mapping[str, int] | None = None,
        trainer: Sequence[NodeSpec] = (),
        source: StreamDataset | None = None,
        seconds: Seconds = lambda call: 1.0,
        keeps: Callable[[int], bool] = lambda uid: True,
        fails: Fails = lambda call: False,
        at_once: int | None = None,
    ) -> None:
        self.nodes = list(nodes)
        self.outputs = tuple(outputs)
        self.replicas = Counter({n.module: 1 for n in [*nodes, *trainer]}) | Counter(replicas or {})
        self._uids = list(range(100, 100 + samples))
        groups = [i // group for i in range(samples)] if isinstance(group, int) else list(group)
        self._group = dict(zip(self._uids, groups, strict=True))
        self._seconds, self._keeps, self._fails = seconds, keeps, fails
        self.iterations: Counter[tuple[str, str]] = Counter()
        self.scheduler = Scheduler(
            {name: range(count) for name, count in self.replicas.items()},
            self.iterations,
            flow=(nodes, outputs, Samples(self._uids, groups)) if nodes else None,
            trainer=(trainer, source) if source else None,
            at_once=at_once,
        )
        self.now = 0.0
        self.calls: list[Timed] = []
        self.delivered: list[Any] = []
        self.delivered_at: list[float] = []
        self.delivered_uids: list[int] = []
        self.lost: list[tuple[int, int]] = []
        """Node and uid of samples that were given up."""
        self.finished: list[tuple[int, tuple[int, ...]]] = []
        """Node and uids of the samples that a call succeeded on."""
        self._values: dict[int, list[Any]] = {}
        self._running: list[tuple[float, int, Timed]] = []

    def run(self) -> VirtualClock:
        """Run to the end; fails if anything is left that never became possible."""
        self._take(self.scheduler.start())
        while self._running:
            self.now, _, timed = heapq.heappop(self._running)
            self._take(self.scheduler.on(self._ended(timed)))
        assert self.scheduler.complete or self.scheduler.has_failed, "deadlock"
        return self

    def of(self, index: int) -> list[Timed]:
        """Return the calls of a flow node in the order of their samples."""
        own = [t for t in self.calls if t.call.step is None and t.call.node.index == index]
        return sorted(own, key=lambda t: t.uids)

    def steps(self, module: str) -> list[Timed]:
        """Return the train steps of a module in the order they ran."""
        return [t for t in self.calls if t.call.step is not None and t.call.node.module == module]

    def trained(self, module: str) -> list[list[list[int]]]:
        """Return what a module was trained on: the uids of every micro-batch of every step."""
        steps = [step_of(timed) for timed in self.steps(module)]
        return [
            [[self.delivered_uids[i] for i in part] for part in step.micro_batches]
            for step in steps
        ]

    def work(self, module: str) -> dict[int, int]:
        """Return how many samples each replica of a module ran."""
        work = dict.fromkeys(range(self.replicas[module]), 0)
        for timed in self.calls:
            if timed.call.node.module == module:
                work[timed.call.replica] += len(timed.uids)
        return work

    def _take(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Lost):
                node = next(t.call.node.index for t in self.calls if t.call.id == command.call)
                self.lost += [(node, uid) for uid in command.uids]
                continue
            if isinstance(command, Deliver):
                columns = [self._gather(pieces) for pieces in command.inputs]
                live = zip(*columns, strict=True)
                self.delivered += [
                    None if at in command.lost else next(live) for at in range(len(command.uids))
                ]
                assert next(live, None) is None
                self.delivered_uids += command.uids
                self.delivered_at += [self.now] * (len(self.delivered) - len(self.delivered_at))
                continue
            timed = Timed(command, self.now, self.now + self._seconds(command))
            busy = {(t.call.node.module, t.call.replica) for _, _, t in self._running}
            assert (command.node.module, command.replica) not in busy, "one call at a time"
            self.calls.append(timed)
            heapq.heappush(self._running, (timed.stop, command.id, timed))

    def _ended(self, timed: Timed) -> Finished | Failed:
        call = timed.call
        fails = self._fails(call)
        if fails is True:
            return Failed(call.id)
        if call.step is not None:
            return Finished(call.id)
        marked = set[int]() if fails is False else set(fails)
        self.finished.append((call.node.index, tuple(u for u in call.uids if u not in marked)))
        columns = [self._gather(pieces) for pieces in call.inputs]
        made = [
            (call.node.index, uid, *values)
            for uid, *values in zip(call.uids, *columns, strict=True)
        ]
        if call.node.batch_by == "group":
            mates = {
                u: [v for v in call.uids if self._group[v] == self._group[u]] for u in call.uids
            }
            made = [(*value, *mates[uid]) for uid, value in zip(call.uids, made, strict=True)]
        elif call.node.batch_by == "episode":
            made = [(*value, *call.uids) for value in made]
        failed = tuple(i for i, uid in enumerate(call.uids) if uid in marked)
        if not call.node.filters:
            self._values[call.id] = [value for i, value in enumerate(made) if i not in failed]
            return Finished(call.id, failed=failed)
        kept = tuple(i for i, uid in enumerate(call.uids) if self._keeps(uid) and uid not in marked)
        self._values[call.id] = [made[i] for i in kept]
        return Finished(call.id, kept, failed=failed)

    def _gather(self, pieces: Sequence[Piece]) -> list[Any]:
        return [
            value
            for piece in pieces
            for value in (self._uids if piece.call == FEED else self._values[piece.call])[
                piece.start : piece.stop
            ]
        ]


def step_of(timed: Timed) -> Step:
    """Return the global batch of a train step."""
    assert timed.call.step is not None
    return timed.call.step
