# SPDX-License-Identifier: Apache-2.0
"""The scheduler: decides what runs when, and does nothing itself. Events in, commands out.

::

        Finished, Failed, ReplicaJoined, ReplicaLeft                  Call, Deliver, Lost
    driver ------------------------------------------> Scheduler ------------------------> driver
                                                        |     |
                       env/eval flow: samples, in order v     v trainer flow: global batches, in order
                                              FlowRun --Deliver--> StepSource --> StepRun

A finished call unblocks the nodes that overlap its samples (`FlowRun`); samples that left the environment flow, in
order, become train steps (`StepSource`), which unblock the trainer's nodes (`StepRun`). Samples that a call failed on
run again, in smaller calls, or are given up, as the node's `Recovery` says (`recovery.py`). A call that may start waits
in its module's queue until a replica is free; the free replica with the least load takes it. A driver that
carries out one call after the other asks for no more than that (`at_once=1`): a call is then given to a replica when
it is made, so that replicas in one process share the work by load, too. There are no threads, no clock and no
tensors here: every backend, and a test, drives the same code.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from chatlearn.errors import EngineError
from chatlearn.flow.steps import StepSource
from chatlearn.runtime.flow_run import FlowRun
from chatlearn.runtime.positions import Portion
from chatlearn.runtime.protocol import (
    Call,
    Command,
    Deliver,
    Event,
    Failed,
    Finished,
    Lost,
    NodeSpec,
    ReplicaJoined,
    ReplicaLeft,
)
from chatlearn.runtime.recovery import halves, is_hopeless, tries_again
from chatlearn.runtime.step_run import StepRun, StepTask

Iterations = Counter[tuple[str, str]]
"""How often each (module, method) has been called; goes on over episodes and resume."""


@dataclass(frozen=True)
class Samples:
    """What enters the environment (or evaluation) flow: a uid per sample, and the group each belongs to."""

    uids: Sequence[int]
    groups: Sequence[int]


_Queued = tuple[tuple[int, ...], int, Portion | StepTask]
"""What waits for a replica: its priority, when it came, and the work."""

_LOAD_STEP_S: Final = 0.02
"""Replicas that have been busy for equally many of these steps count as equally loaded; then samples decide.

So a slow replica gets less, while what takes no time is shared by samples, in the same way every time."""


class _Replicas:
    """The replicas of one module: who is free, and how much each has done."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.free: set[int] = set(ids)
        self._samples: dict[int, int] = dict.fromkeys(self.free, 0)
        self._seconds: dict[int, float] = dict.fromkeys(self.free, 0.0)

    def __len__(self) -> int:
        return len(self._samples)

    def has_other(self, than: int) -> bool:
        """Tell whether another replica than this one is free, or whether it is the only one there is."""
        return len(self) == 1 or bool(self.free - {than})

    def take(self, samples: int, *, other_than: int = -1) -> int:
        """Give `samples` samples to the free replica with the least load, to `other_than` if there is no other."""
        free = self.free - {other_than} if other_than in self.free else self.free
        replica = min(free or self.free, key=self._load)
        self.free.remove(replica)
        self._samples[replica] += samples
        return replica

    def give_back(self, replica: int, seconds: float) -> None:
        """Take note that a replica, unless it has left, is free again after `seconds` of work."""
        if replica in self._samples:
            self._seconds[replica] += seconds
            self.free.add(replica)

    def join(self, replica: int) -> None:
        """Add a replica as one that has done as much as the busiest: it need not catch up."""
        self._samples[replica] = max(self._samples.values(), default=0)
        self._seconds[replica] = max(self._seconds.values(), default=0.0)
        self.free.add(replica)

    def leave(self, replica: int) -> None:
        """Forget a replica."""
        self._samples.pop(replica, None)
        self._seconds.pop(replica, None)
        self.free.discard(replica)

    def _load(self, replica: int) -> tuple[int, int, int]:
        return int(self._seconds[replica] / _LOAD_STEP_S), self._samples[replica], replica


class Scheduler:
    """Run one episode: an environment flow over samples, a trainer flow over the steps cut from them, or one of both.

    Args:
        replicas: replica ids per module name.
        iterations: call counts so far; updated in place.
        flow: nodes of the environment or evaluation flow, with the returned nodes and the samples to run.
        trainer: nodes of the trainer flow, with the source of its steps; without a flow the source must be filled
            by `deliver`.
        at_once: calls that the driver carries out at a time; None for as many as there are replicas.

    Example:
        >>> scheduler = Scheduler({"policy": [0]}, Counter(), flow=(specs, outputs, samples))
        >>> commands = scheduler.start()
        >>> while commands:
        ...     commands = [c for call in commands for c in scheduler.on(carry_out(call))]
    """

    def __init__(
        self,
        replicas: Mapping[str, Sequence[int]],
        iterations: Iterations,
        *,
        flow: tuple[Sequence[NodeSpec], Sequence[int], Samples] | None = None,
        trainer: tuple[Sequence[NodeSpec], StepSource] | None = None,
        at_once: int | None = None,
    ) -> None:
        self._at_once = at_once
        self._replicas = {name: _Replicas(ids) for name, ids in replicas.items()}
        self._iterations = iterations
        self._queues: dict[str, list[_Queued]] = {}
        self._running: dict[int, tuple[Call, Portion | StepTask]] = {}
        self._next_call = 0
        self._queued = 0
        self._lost: list[Lost] = []
        """Samples given up that the driver does not know of yet."""
        self.has_failed = False
        """Whether a failure ends the run: no command follows any more."""
        self.flow = FlowRun(flow[0], flow[1], flow[2].uids, flow[2].groups) if flow else None
        self._source = trainer[1] if trainer else None
        self.training = StepRun(trainer[0]) if trainer else None
        self._source_closed = False

    def start(self) -> list[Command]:
        """Return the first commands."""
        if self.flow is not None:
            self._enqueue(self.flow.start())
        return list(self._commands())

    def deliver(self, samples: int) -> list[Command]:
        """Train on `samples` samples that did not come from a flow of this scheduler."""
        if self._source is not None and self.training is not None:
            steps = [*self._source.extend(samples), *self._source.close()]
            self._source_closed = True
            self._enqueue(self.training.extend(steps))
            self.training.close()
        return list(self._commands())

    def on(self, event: Event) -> list[Command]:
        """Take an event and return the commands that follow from it."""
        if isinstance(event, Finished):
            self._finish(event)
        elif isinstance(event, Failed):
            self._fail(event)
        elif isinstance(event, ReplicaJoined):
            self._replicas.setdefault(event.module, _Replicas(())).join(event.replica)
        else:
            self._leave(event)
        return list(self._commands())

    @property
    def complete(self) -> bool:
        """Whether everything that was to run has finished."""
        flow_done = self.flow is None or self.flow.complete
        return flow_done and (self.training is None or self.training.complete)

    @property
    def calls(self) -> int:
        """How many calls have been made."""
        return self._next_call

    def _finish(self, event: Finished) -> None:
        call, work = self._running.pop(event.call)
        self._replicas[call.node.module].give_back(call.replica, event.seconds)
        if isinstance(work, StepTask):
            assert self.training is not None
            self._enqueue(self.training.finish(work, call.id))
            return
        assert self.flow is not None
        self._enqueue(self.flow.finish(work, call.id, event.kept, event.failed))
        if event.failed:
            culprits = [work.positions[offset] for offset in event.failed]
            self._recover(call, replace(work, positions=culprits), are_culprits=True)

    def _fail(self, event: Failed) -> None:
        call, work = self._running.pop(event.call)
        self._replicas[call.node.module].give_back(call.replica, event.seconds)
        if isinstance(work, StepTask):
            self.has_failed = True
        else:
            self._recover(call, work)

    def _recover(self, call: Call, portion: Portion, *, are_culprits: bool = False) -> None:
        """Try samples again that a call failed on, in halves if need be, or give them up."""
        assert self.flow is not None
        spec = call.node
        origin = call.id if portion.origin < 0 else portion.origin
        portion = replace(portion, origin=origin, iteration=call.iteration, replica=call.replica)
        if tries_again(spec.recovery, portion):
            self._enqueue(iter([replace(portion, attempt=portion.attempt + 1)]))
            return
        if spec.recovery.fate == "stop":
            self.has_failed = True
            return
        parts = [] if are_culprits else halves(spec, portion, self.flow.groups(portion))
        if parts:
            self._enqueue(iter(parts))
            return
        self._lost.append(Lost(call.id, self.flow.uids(portion)))
        self._enqueue(self.flow.lose(portion))
        self.has_failed |= is_hopeless(self.flow.nodes[spec.index])

    def _leave(self, event: ReplicaLeft) -> None:
        replicas = self._replicas[event.module]
        replicas.leave(event.replica)
        if not replicas:
            raise EngineError(
                f"the last replica of module {event.module!r} left",
                fix="resume from the last checkpoint with runtime.resume=auto",
            )

    def _enqueue(self, works: Iterator[Portion] | Iterator[StepTask]) -> None:
        for work in works:
            if isinstance(work, Portion):
                assert self.flow is not None
                # Deeper nodes first: an episode streams, and its early groups can train while others generate.
                node = work.task.node
                spec, priority = self.flow.nodes[node].spec, (1, -node, work.positions[0])
            else:
                assert self.training is not None
                spec, priority = self.training.nodes[work.node], (0, work.step.index, work.node)
            queue = self._queues.setdefault(spec.module, [])
            heapq.heappush(queue, (priority, self._queued, work))
            self._queued += 1

    def _commands(self) -> Iterator[Command]:
        lost, self._lost = self._lost, []
        yield from lost
        if self.has_failed:
            return
        yield from self._deliveries()
        while self._at_once is None or len(self._running) < self._at_once:
            first = min(self._heads(), default=None)
            if first is None:
                return
            (_, _, work), module = first
            heapq.heappop(self._queues[module])
            yield self._call(work, self._replicas[module])

    def _heads(self) -> Iterator[tuple[_Queued, str]]:
        """Yield what stands first in each queue for which a replica is free, one that has not just failed on it."""
        for module, queue in self._queues.items():
            if queue and (replicas := self._replicas[module]).free:
                failed_on = queue[0][2].replica
                if failed_on < 0 or replicas.has_other(failed_on):
                    yield queue[0], module

    def _deliveries(self) -> Iterator[Deliver]:
        if self.flow is None:
            return
        new = self.flow.newly_delivered()
        if new is not None:
            yield new
            if self._source is not None and self.training is not None:
                self._enqueue(self.training.extend(self._source.extend(len(new.uids))))
        ends = self.flow.complete and not self._source_closed
        if ends and self._source is not None and self.training is not None:
            self._source_closed = True
            self._enqueue(self.training.extend(self._source.close()))
            self.training.close()

    def _call(self, work: Portion | StepTask, replicas: _Replicas) -> Call:
        number = self._next_call
        self._next_call += 1
        if isinstance(work, StepTask):
            assert self.training is not None
            spec, inputs = self.training.nodes[work.node], self.training.inputs(work)
            replica = replicas.take(sum(map(len, work.step.micro_batches)))
            call = Call(number, spec, replica, self._count(spec), inputs, (), work.step)
        else:
            assert self.flow is not None
            spec, inputs = self.flow.nodes[work.task.node].spec, self.flow.inputs(work)
            replica = replicas.take(len(work.positions), other_than=work.replica)
            # A further try has the number of the first, so that later calls have theirs whatever has failed.
            iteration = self._count(spec) if work.origin < 0 else work.iteration
            uids, attempt, origin = self.flow.uids(work), work.attempt, work.origin
            call = Call(number, spec, replica, iteration, inputs, uids, None, attempt, origin)
        self._running[call.id] = (call, work)
        return call

    def _count(self, spec: NodeSpec) -> int:
        """Return the number of a new call of a module's method."""
        key = (spec.module, spec.method)
        self._iterations[key] += 1
        return self._iterations[key] - 1
