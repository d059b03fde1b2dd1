# SPDX-License-Identifier: Apache-2.0
"""One run of flows in this process: the stores, and how each of the scheduler's commands is carried out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from chatlearn.columns import FAILED, TIMED_OUT, UID
from chatlearn.errors import BatchError, DeadlineError, EngineError, ModuleError
from chatlearn.flow.batch import Batch, join, size, take
from chatlearn.flow.batching import isolate, merge
from chatlearn.flow.graph import FEED, FlowGraph
from chatlearn.module import state_of
from chatlearn.runtime.attempts import Attempts, Draws, Failure, Signs, counted
from chatlearn.runtime.lost_rows import Outlet
from chatlearn.runtime.protocol import (
    Call,
    Command,
    Deliver,
    Failed,
    Finished,
    Lost,
    NodeSpec,
    Piece,
    node_specs,
)
from chatlearn.runtime.returned import (
    recorded_step_output,
    returned_numbers,
    sample_output,
    step_output,
    without_rows,
)
from chatlearn.runtime.scheduler import Iterations, Samples, Scheduler
from chatlearn.runtime.store import OutputStore
from chatlearn.runtime.work import CallReport, FlowWork, Observer, Outcome, Starting, Tap, TrainWork
from chatlearn.runtime.worker import Result, Where, Worker, describe_uids

if TYPE_CHECKING:
    from chatlearn.runtime.local import LocalRuntime


class Pass:
    """One run of flows: the stores, and how each command is carried out."""

    def __init__(
        self,
        runtime: LocalRuntime,
        episode: int,
        flow: FlowWork | None,
        trainer: TrainWork | None,
        starting: Starting | None,
        observer: Observer | None,
        interrupted: Callable[[], bool],
        tap: Tap | None,
        batch_size: int | None,
    ) -> None:
        self._starting = starting
        self._runtime = runtime
        self._episode = episode
        self._flow = flow
        self._trainer = trainer
        self._observer = observer
        self._interrupted = interrupted
        self._tap = tap
        self._takers = _takers(flow.graph) if flow else []
        self._outputs = OutputStore()
        self._step_outputs = OutputStore()
        self._outcome = Outcome()
        self._specs = self._node_specs(batch_size)
        self._attempts = Attempts()
        self._tolerant = {s.index for s in self._specs if not s.recovery.stops_at_once}
        """Nodes whose first failure does not end the run."""
        fates = {spec.recovery.fate for spec in self._specs}
        self._may_lose = fates != {"stop"}
        self._outlet = Outlet(self._attempts.lost) if "mask" in fates else None

    def _node_specs(self, batch_size: int | None) -> list[NodeSpec]:
        if self._flow is None:
            return []
        specs = node_specs(self._flow.graph, batch_size)
        if not self._flow.keeps_batches:
            return specs
        # Nothing is trained on here, so no group has to go: what was lost stays among the results.
        return [
            replace(spec, recovery=replace(spec.recovery, fate="mask"))
            if spec.recovery.fate == "drop_group"
            else spec
            for spec in specs
        ]

    def run(self, iterations: Iterations) -> Outcome:
        flow, trainer, runtime = self._flow, self._trainer, self._runtime
        if self._tap is not None:
            self._tap.beginning(flow, trainer)
        scheduler = Scheduler(
            {name: range(len(workers)) for name, workers in runtime.workers.items()},
            iterations,
            flow=(self._specs, flow.graph.outputs, Samples(flow.feed.uids, flow.feed.groups))
            if flow
            else None,
            trainer=(node_specs(trainer.graph), trainer.source) if trainer else None,
            at_once=1,
        )
        call = self._take(scheduler.start())
        if flow is None and trainer is not None and trainer.samples is not None:
            self._outcome.samples.append(trainer.samples)
            self._outcome.uids = [int(uid) for uid in trainer.samples.get(UID, [])]
            call = self._take(scheduler.deliver(size(trainer.samples)))
        while call is not None:
            if not runtime.has_trained and self._interrupted():
                raise KeyboardInterrupt
            event = self._carry_out(call)
            made, call = call, self._take(scheduler.on(event))
            if scheduler.has_failed:
                raise self._attempts.ending(made)
        if scheduler.flow and scheduler.flow.has_lost_everything:
            raise self._attempts.nothing_left()
        if not scheduler.complete:
            raise EngineError(
                "the flow cannot go on: some nodes wait for samples that never come",
                fix="report this flow as a defect of the scheduler",
            )
        if flow and scheduler.flow and flow.keeps_batches:
            for output in flow.graph.outputs:
                self._outcome.results[output] = self._results(scheduler.flow.batches(output))
        if flow and scheduler.flow and self._may_lose:
            self._outcome.losses = {
                "masked_samples": self._outlet.masked if self._outlet else 0,
                "dropped_samples": scheduler.flow.dropped_samples,
                "dropped_groups": len(scheduler.flow.dropped_groups),
            }
        self._outcome.steps = scheduler.training.steps if scheduler.training else 0
        return self._outcome

    def _take(self, commands: Sequence[Command]) -> Call | None:
        """Carry deliveries out; return the next call, if one follows."""
        call = None
        for command in commands:
            if isinstance(command, Call):
                call = command
            elif isinstance(command, Lost):
                self._lose(command)
            elif self._flow is not None and not self._flow.keeps_batches:
                joined = self._delivered(command, self._flow)
                if self._tap is not None:
                    self._tap.delivered(self._flow.graph.name, command.uids, joined)
                self._outcome.samples.append(joined)
                self._outcome.uids += command.uids
        return call

    def _delivered(self, command: Deliver, flow: FlowWork) -> Batch:
        """Return the samples that leave the flow, in order; lost ones among them without values."""
        joined: Batch = {}
        if len(command.lost) < len(command.uids):
            joined = self._join(command.inputs, flow.graph.outputs, "what the flow returns")
        return self._outlet.completed(joined, command) if self._outlet else joined

    def _results(self, parts: Iterable[Deliver]) -> list[Batch]:
        """Return what a node of an evaluation flow has made; lost samples stand in it without values."""
        made = [(part, self._result(part)) for part in parts]
        if self._outlet is None:
            return [batch for _, batch in made]
        return self._outlet.results(made)

    def _result(self, part: Deliver) -> Batch:
        (pieces,) = part.inputs
        outputs = [self._outputs[piece.call] for piece in pieces]
        if len(pieces) == 1 and pieces[0].start == 0 and pieces[0].stop == size(outputs[0]):
            return outputs[0]
        rows = [take(o, p.start, p.stop) for o, p in zip(outputs, pieces, strict=True)]
        return merge(rows, "what the flow returns")

    def _carry_out(self, call: Call) -> Finished | Failed:
        try:
            if call.step is not None:
                return self._train(call)
            if call.node.index in self._tolerant:
                return self._attempt(call)
            return self._sample(call, self._inputs(call))
        except BatchError as error:  # of what the step was given or returned: say which call it was
            described = self._worker(call).describe_call(call.node.method, self._where(call))
            cause = f"{error.cause}\n{described}"
            raise BatchError(cause, place=error.place, fix=error.fix) from error.__cause__

    def _inputs(self, call: Call) -> Batch:
        spec = call.node
        data = self._join(call.inputs, spec.inputs, spec.name)
        if not all(source == FEED or self._takers[source] == 1 for source in spec.inputs):
            data = isolate(data)  # others take these samples, too
        return data

    def _attempt(self, call: Call) -> Finished | Failed:
        """Run a call whose samples may be tried again: its inputs and the random numbers it starts from are kept."""
        data = self._attempts.enter(call, self._inputs(call) if call.origin < 0 else None)
        draws, start = Draws(), time.perf_counter()
        try:
            return self._sample(call, data)
        except (ModuleError, BatchError) as error:
            draws.put_back()
            seconds = time.perf_counter() - start
            outcome = TIMED_OUT if isinstance(error, DeadlineError) else FAILED
            self._attempts.fail(call, Failure(self._described(call, error), outcome))
            self._outcome.module_seconds += seconds
            self._report(call, seconds, 0, {}, counted(call))
            return Failed(call.id, seconds)

    def _sample(self, call: Call, data: Batch) -> Finished:
        assert self._flow is not None
        graph, spec = self._flow.graph, call.node
        node = graph.nodes[spec.index]
        if self._tap is not None:
            self._tap.entering(graph.name, node, call, data)
        signs = Signs(call, data, self._worker(call).module)
        result = self._call(call, data, graph)
        place = f"{spec.name}, {node.place}"
        output, kept = sample_output(call, result.value, place)
        if not output and not (spec.filters and result.value is not None):
            self._refuse_missing(graph, spec.index, place)
        outcomes, rows = signs.new_in(output, kept, place)
        more = {} if kept is None else {"kept_fraction": len(kept) / len(call.uids)}
        metrics = {**result.metrics, **more}
        failed: tuple[int, ...] = ()
        if rows:
            failed = tuple(rows if kept is None else (kept[row] for row in rows))
            self._fail_on(call, dict(zip(failed, rows.values(), strict=True)), place)
            output = without_rows(output, rows)
            kept = None if kept is None else tuple(at for at in kept if at not in failed)
        done = replace(call, uids=_but_for(call.uids, failed)) if failed else call
        if self._tap is not None:
            self._tap.returned(graph.name, node, done, output, metrics)
        samples = len(done.uids) if kept is None else len(kept)
        self._outputs.put(call.id, output, samples * self._takers[spec.index])
        if spec.index in self._tolerant:
            self._attempts.settle(call, len(done.uids))
        self._report(call, result.seconds, len(done.uids), metrics, outcomes)
        return Finished(call.id, kept, result.seconds, failed)

    # ---- samples that a step fails on -----------------------------------------------------------------------------

    def _fail_on(self, call: Call, failed: Mapping[int, str], place: str) -> None:
        """Take note that a step says on which samples, by their offsets, it has failed.

        Raises:
            BatchError: the run stops at the first failure of this module.
        """
        by_uid = {call.uids[at]: outcome for at, outcome in failed.items()}
        own = state_of(self._worker(call).module)
        cause, own.failure = own.failure or f"{call.node.name} says so in its `outcome` column", ""
        text = f"a step failed on {describe_uids(list(by_uid))}: {cause}"
        if call.node.index not in self._tolerant:
            key = f"models.{call.node.module}.on_failure"
            fix = f"make the step work for every sample, or let {key} say what such samples do"
            raise BatchError(text, place=place, fix=fix)
        error = self._described(replace(call, uids=list(by_uid)), BatchError(text))
        self._attempts.fail(call, Failure(error, outcomes=by_uid))

    def _lose(self, command: Lost) -> None:
        """Take note that samples are given up, and tell the observer."""
        call, outcomes, failure = self._attempts.lose(command, self._group_of)
        if self._tap is not None and self._flow is not None:
            by_uid = {uid: failure.outcome_of(uid) for uid in command.uids}
            graph, drops = self._flow.graph, call.node.recovery.fate == "drop_group"
            node = graph.nodes[call.node.index]
            self._tap.lost(graph.name, node, by_uid, str(failure.error), drops_groups=drops)
        self._report(call, 0.0, 0, {}, outcomes, str(failure.error))

    @cached_property
    def _group_of(self) -> dict[int, int]:
        """The prompt's number by uid."""
        assert self._flow is not None
        return dict(zip(self._flow.feed.uids, self._flow.feed.groups, strict=True))

    def _described(self, call: Call, error: ModuleError | BatchError) -> ModuleError:
        if isinstance(error, ModuleError):
            return error
        described = self._worker(call).describe_call(call.node.method, self._where(call))
        made = ModuleError(f"{error}\n{described}")
        made.__cause__ = error
        return made

    def _train(self, call: Call) -> Finished:
        assert self._trainer is not None
        assert call.step is not None
        node = self._trainer.graph.nodes[call.node.index]
        per_input = [self._step_input(piece[0], call) for piece in call.inputs]
        names = [self._source_name(self._trainer.graph, source) for source in call.node.inputs]
        data_list = [
            isolate(join(list(zip(names, parts, strict=True)), call.node.name))
            for parts in zip(*per_input, strict=True)
        ]
        if self._tap is not None:
            self._tap.entering(self._trainer.graph.name, node, call, data_list)
        self._runtime.has_trained = True
        result = self._call(call, data_list, self._trainer.graph)
        takers = sum(other.inputs.count(node.index) for other in self._trainer.graph.nodes)
        parts: list[Batch] = []
        sizes = [len(part) for part in call.step.micro_batches]
        if takers:
            parts = step_output(result.value, sizes, f"{node.name}, {node.place}")
            self._step_outputs.put(call.id, parts, len(parts) * takers)
        metrics = {**result.metrics, **returned_numbers(result.value)}
        if self._tap is not None:
            state = state_of(self._worker(call).module)
            parts = recorded_step_output(parts or result.value, sizes, state)
            self._tap.returned(self._trainer.graph.name, node, call, parts, metrics)
        self._report(call, result.seconds, sum(sizes), metrics)
        return Finished(call.id, seconds=result.seconds)

    def _step_input(self, piece: Piece, call: Call) -> list[Batch]:
        assert call.step is not None
        if piece.call == FEED:
            return [self._outcome.samples.gather(part) for part in call.step.micro_batches]
        return self._step_outputs.take(piece)

    def _call(self, call: Call, data: Batch | list[Batch], graph: FlowGraph) -> Result:
        node = graph.nodes[call.node.index]
        where = self._where(call, node.turn)
        if self._starting is not None:
            self._starting(call.node.module, call.node.method, call.step is not None, where.uids)
        result = self._worker(call).step(node.method, data, call.iteration, node.constants, where)
        self._outcome.module_seconds += result.seconds
        return result

    def _worker(self, call: Call) -> Worker:
        return self._runtime.workers[call.node.module][call.replica]

    def _where(self, call: Call, turn: int = 0) -> Where:
        uids = call.uids
        if call.step is not None and self._outcome.uids:
            uids = [self._outcome.uids[i] for part in call.step.micro_batches for i in part]
        return Where(self._episode, uids, turn)

    def _report(
        self,
        call: Call,
        seconds: float,
        samples: int,
        metrics: Mapping[str, float],
        outcomes: Mapping[str, int] | None = None,
        cause: str = "",
    ) -> None:
        if self._observer is not None:
            module, method, trains = call.node.module, call.node.method, call.step is not None
            self._observer(
                CallReport(module, method, samples, seconds, metrics, trains, outcomes or {}, cause)
            )

    def _join(
        self, inputs: tuple[tuple[Piece, ...], ...], sources: Sequence[int], place: str
    ) -> Batch:
        assert self._flow is not None
        named: list[tuple[str, Batch]] = []
        for pieces, source in zip(inputs, sources, strict=True):
            name = self._source_name(self._flow.graph, source)
            named.append((name, merge([self._piece(piece) for piece in pieces], name)))
        return join(named, place)

    def _piece(self, piece: Piece) -> Batch:
        if piece.call == FEED:
            assert self._flow is not None
            batch = self._flow.feed.batch(piece.start, piece.stop)
            if self._tap is not None:
                self._tap.fed(self._flow.graph.name, piece.start, piece.stop, batch)
            return batch
        return take(self._outputs.take(piece), piece.start, piece.stop)

    @staticmethod
    def _source_name(graph: FlowGraph, source: int) -> str:
        return "batch" if source == FEED else graph.nodes[source].name

    def _refuse_missing(self, graph: FlowGraph, index: int, place: str) -> None:
        """A node may return nothing, unless somebody takes its output."""
        takers = [node.name for node in graph.nodes if index in node.inputs]
        unread = (
            self._flow is not None and graph is self._flow.graph and not self._flow.needs_output
        )
        if index in graph.outputs and not unread:
            takers.append(f"what {graph.name} returns")
        if takers:
            raise BatchError(
                f"{graph.nodes[index].name} returned nothing, but {' and '.join(takers)} needs its output",
                place=place,
                fix="return a dict of columns from the method (a filter that keeps nothing: empty columns)",
            )


def _but_for(uids: Sequence[int], failed: Sequence[int]) -> list[int]:
    return [uid for at, uid in enumerate(uids) if at not in failed]


def _takers(graph: FlowGraph) -> list[int]:
    """How often each sample that a node returned will be taken: by nodes, and by whoever the flow delivers to."""
    taken = [source for node in graph.nodes for source in node.inputs] + list(graph.outputs)
    return [taken.count(node.index) for node in graph.nodes]
