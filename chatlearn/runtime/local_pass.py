# SPDX-License-Identifier: Apache-2.0
"""One run of flows in this process: the stores, and how each of the scheduler's commands is carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from chatlearn.columns import UID
from chatlearn.errors import BatchError, EngineError
from chatlearn.flow.batching import Batch, isolate, join, merge, size, take
from chatlearn.flow.graph import FEED, FlowGraph
from chatlearn.runtime.protocol import Call, Command, Finished, Piece, node_specs
from chatlearn.runtime.returned import (
    returned_numbers,
    sample_output,
    step_output,
    untaken_step_output,
)
from chatlearn.runtime.scheduler import Iterations, Samples, Scheduler
from chatlearn.runtime.store import OutputStore
from chatlearn.runtime.work import CallReport, FlowWork, Observer, Outcome, Starting, Tap, TrainWork
from chatlearn.runtime.worker import Result, Where, Worker

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

    def run(self, iterations: Iterations, batch_size: int | None) -> Outcome:
        flow, trainer, runtime = self._flow, self._trainer, self._runtime
        if self._tap is not None:
            self._tap.beginning(flow, trainer)
        scheduler = Scheduler(
            {name: range(len(workers)) for name, workers in runtime.workers.items()},
            iterations,
            flow=(
                node_specs(flow.graph, batch_size),
                flow.graph.outputs,
                Samples(flow.feed.uids, flow.feed.groups),
            )
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
            call = self._take(scheduler.on(self._carry_out(call)))
        if not scheduler.complete:
            raise EngineError(
                "the flow cannot go on: some nodes wait for samples that never come",
                fix="report this flow as a defect of the scheduler",
            )
        if flow and scheduler.flow and flow.keeps_batches:
            for output in flow.graph.outputs:
                calls = scheduler.flow.calls_of(output)
                self._outcome.results[output] = [self._outputs[call] for call in calls]
        self._outcome.steps = scheduler.training.steps if scheduler.training else 0
        return self._outcome

    def _take(self, commands: Sequence[Command]) -> Call | None:
        """Carry deliveries out; return the next call, if one follows."""
        call = None
        for command in commands:
            if isinstance(command, Call):
                call = command
            elif self._flow is not None and not self._flow.keeps_batches:
                outputs = self._flow.graph.outputs
                joined = self._join(command.inputs, outputs, "what the flow returns")
                if self._tap is not None:
                    self._tap.delivered(self._flow.graph.name, command.uids, joined)
                self._outcome.samples.append(joined)
                self._outcome.uids += command.uids
        return call

    def _carry_out(self, call: Call) -> Finished:
        try:
            return self._train(call) if call.step is not None else self._sample(call)
        except BatchError as error:  # of what the step was given or returned: say which call it was
            described = self._worker(call).describe_call(call.node.method, self._where(call))
            cause = f"{error.cause}\n{described}"
            raise BatchError(cause, place=error.place, fix=error.fix) from error.__cause__

    def _sample(self, call: Call) -> Finished:
        assert self._flow is not None
        graph, spec = self._flow.graph, call.node
        node = graph.nodes[spec.index]
        data = self._join(call.inputs, spec.inputs, spec.name)
        if not all(source == FEED or self._takers[source] == 1 for source in spec.inputs):
            data = isolate(data)  # others take these samples, too
        if self._tap is not None:
            self._tap.entering(graph.name, node, call, data)
        result = self._call(call, data, graph)
        place = f"{spec.name}, {node.place}"
        output, kept = sample_output(call, result.value, place)
        if not output and not (spec.filters and result.value is not None):
            self._refuse_missing(graph, spec.index, place)
        samples = len(call.uids) if kept is None else len(kept)
        more = {} if kept is None else {"kept_fraction": len(kept) / len(call.uids)}
        metrics = {**result.metrics, **more}
        if self._tap is not None:
            self._tap.returned(graph.name, node, call, output, metrics)
        self._outputs.put(call.id, output, samples * self._takers[spec.index])
        self._report(call, result.seconds, len(call.uids), metrics)
        return Finished(call.id, kept, result.seconds)

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
        samples = sum(map(len, call.step.micro_batches))
        takers = sum(other.inputs.count(node.index) for other in self._trainer.graph.nodes)
        parts: list[Batch] = []
        sizes = [len(part) for part in call.step.micro_batches]
        if takers:
            parts = step_output(result.value, sizes, f"{node.name}, {node.place}")
            self._step_outputs.put(call.id, parts, len(parts) * takers)
        metrics = {**result.metrics, **returned_numbers(result.value)}
        if self._tap is not None:
            parts = parts or untaken_step_output(result.value, sizes)
            self._tap.returned(self._trainer.graph.name, node, call, parts, metrics)
        self._report(call, result.seconds, samples, metrics)
        return Finished(call.id, seconds=result.seconds)

    def _step_input(self, piece: Piece, call: Call) -> list[Batch]:
        assert call.step is not None
        if piece.call == FEED:
            return [self._outcome.samples.gather(part) for part in call.step.micro_batches]
        return self._step_outputs.take(piece)

    def _call(self, call: Call, data: Batch | list[Batch], graph: FlowGraph) -> Result:
        if self._starting is not None:
            self._starting(call.node.module, call.node.method, call.step is not None)
        node = graph.nodes[call.node.index]
        result = self._worker(call).step(
            node.method, data, call.iteration, node.constants, self._where(call, node.turn)
        )
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
        self, call: Call, seconds: float, samples: int, metrics: Mapping[str, float]
    ) -> None:
        if self._observer is not None:
            module, method, trains = call.node.module, call.node.method, call.step is not None
            self._observer(CallReport(module, method, samples, seconds, metrics, trains))

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


def _takers(graph: FlowGraph) -> list[int]:
    """How often each sample that a node returned will be taken: by nodes, and by whoever the flow delivers to."""
    taken = [source for node in graph.nodes for source in node.inputs] + list(graph.outputs)
    return [taken.count(node.index) for node in graph.nodes]
