# SPDX-License-Identifier: Apache-2.0
"""Run recorded nodes again with the present code: one node, the train steps, or all that follows the rollouts.

::

    recorded episode                         the script, as it is now
         |  nodes that are kept                   |  nodes that run again
         v                                        v
       stand-ins, which answer          +      the modules, set up anew; weights from the checkpoint
       from the record                         before the episode, where they learn
         |                                        |
         +-------> one graph, run by the engine's own scheduler -------> compared with the record

So calls are cut, ordered and trained on as in a run; there is no second loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatlearn.checkpoint.rng import restore_rng
from chatlearn.columns import UID
from chatlearn.episode import training_work
from chatlearn.errors import RecordError
from chatlearn.flow.batch import Batch, size
from chatlearn.flow.batching import isolate
from chatlearn.flow.graph import FlowGraph, Node
from chatlearn.program import Program
from chatlearn.record.nodes import NodeRecord
from chatlearn.record.reading import EpisodeRecord, FlowRecord, Loss
from chatlearn.record.sameness import same_column
from chatlearn.record.stand_in import RecordedFeed, StandIn, assemble, with_stand_ins
from chatlearn.rerun.selection import ENV, EVAL, TRAINER, Selection
from chatlearn.rerun.weights import bring_weights, with_sources
from chatlearn.runtime.protocol import Call
from chatlearn.runtime.scheduler import Iterations
from chatlearn.runtime.work import FlowWork, TrainWork
from chatlearn.stage import Stage


@dataclass
class Again:
    """One call that was made again."""

    uids: list[int]
    """Of the samples that it got; samples of a train step that have none are numbered by position."""
    came_out: list[list[int]]
    """Of the samples in each batch of `output`."""
    step: int | None
    output: list[Batch]
    """Nothing, one batch, or of a train step one per micro-batch."""
    numbers: dict[str, float]
    made: set[str]
    """Columns that it made or changed."""


class Rerun:
    """Run a selection of an episode's nodes again.

    Args:
        program: of the script as it is now.
        episode: the record.
        selection: which nodes run.
        samples: uids to run the environment's (or evaluation's) nodes for; None takes all.
    """

    def __init__(
        self,
        program: Program,
        episode: EpisodeRecord,
        selection: Selection,
        samples: Sequence[int] | None = None,
    ) -> None:
        self._program = program
        self._episode = episode
        self._selection = selection
        self._samples = samples
        self.made: dict[str, list[Again]] = {}
        """Per node that ran, its calls that ended well."""
        self.losses: dict[str, dict[int, Loss]] = {}
        """Per node, the samples that it gave up, by uid."""
        self.chosen: list[int] = []
        """Uids of the samples that entered the environment's (or evaluation's) flow."""
        self.notes = list(selection.notes)

    def run(self) -> None:
        """Set the modules up that are needed, run, and let go of them again.

        Raises:
            RecordError: something that is needed was not recorded, or its weights are gone.
            ChatLearnError: a module failed.
        """
        graphs = self._graphs()
        again = {n.name for graph in graphs.values() for n in graph.nodes if not _stands_in(n)}
        self.made.update((n.name, []) for g in graphs.values() for n in g.nodes if n.name in again)
        modules = list({id(m): m for graph in graphs.values() for m in graph.modules}.values())
        real = [module for module in modules if not isinstance(module, StandIn)]
        stage = Stage(with_sources(modules, self._program), self._program.config.runtime)
        try:
            stage.set_up(anew=True)
            is_evaluation = bool(self._selection.evaluation)
            self.notes += bring_weights(
                stage, self._program, self._episode, real, after=is_evaluation
            )
            stage.iterations.update(self._iterations(again))
            self._run_flows(stage, graphs)
        finally:
            stage.close()

    # ---- what runs -------------------------------------------------------------------------------------------------

    def _graphs(self) -> dict[str, FlowGraph]:
        graphs, selection = self._program.graphs, self._selection
        if selection.evaluation:
            return {
                EVAL: with_stand_ins(
                    graphs[EVAL], selection.evaluation, self._episode.flow(EVAL), delivers=False
                )
            }
        made: dict[str, FlowGraph] = {}
        given = selection.trains and self._episode.flow(TRAINER).is_given
        if selection.env or (selection.trains and not given):
            made[ENV] = with_stand_ins(
                graphs[ENV], selection.env, self._episode.flow(ENV), delivers=selection.trains
            )
        if selection.trains:
            made[TRAINER] = with_stand_ins(
                graphs[TRAINER], selection.trainer, self._episode.flow(TRAINER), delivers=False
            )
        return made

    def _run_flows(self, stage: Stage, graphs: Mapping[str, FlowGraph]) -> None:
        tap = _Watch(self._episode, self.made, self.losses)
        name = EVAL if EVAL in graphs else ENV
        flow = None
        if name in graphs:
            uids = self._chosen(self._episode.flow(name))
            self.chosen = self._episode.flow(name).uids if uids is None else uids
            feed = RecordedFeed(self._episode.flow(name), uids)
            flow = FlowWork(graphs[name], feed, needs_output=self._selection.trains)
        trainer = None
        if TRAINER in graphs:
            samples = None
            if self._episode.flow(TRAINER).is_given:
                if flow is not None:  # with replay, the flow ends before anything is trained on
                    self._run(stage, tap, flow, None)
                samples = _overlaid(self._episode.flow(TRAINER), tap.delivered_samples)
                flow = None
            runtime = self._program.config.runtime
            trainer = training_work(runtime, graphs[TRAINER], self._episode.number - 1, samples)
        self._run(stage, tap, flow, trainer)

    def _run(
        self, stage: Stage, tap: _Watch, flow: FlowWork | None, trainer: TrainWork | None
    ) -> None:
        stage.runtime.run(
            self._episode.number,
            stage.iterations,
            flow=flow,
            trainer=trainer,
            batch_size=self._program.config.runtime.generation_batch_size,
            tap=tap,
        )

    def _chosen(self, flow: FlowRecord) -> list[int] | None:
        """Return the uids to run: whole groups of those asked for."""
        if self._samples is None:
            return None
        group_of = dict(zip(flow.uids, flow.groups, strict=True))
        unknown = [uid for uid in self._samples if uid not in group_of]
        if unknown:
            raise RecordError(
                f"episode {self._episode.number} has no samples {', '.join(map(str, unknown))}",
                place=str(flow.folder),
                fix=f"its uids go from {min(flow.uids)} to {max(flow.uids)}" if flow.uids else "",
            )
        groups = {group_of[uid] for uid in self._samples}
        chosen = [uid for uid in flow.uids if group_of[uid] in groups]
        if len(chosen) > len(set(self._samples)):
            self.notes.append(f"samples run in whole groups: {len(chosen)} of them")
        return chosen

    def _iterations(self, again: Collection[str]) -> Iterations:
        """Return where the counts of calls stood before the episode's first call of each method."""
        counts: Iterations = Counter()
        flows = (EVAL,) if self._selection.evaluation else (ENV, TRAINER)
        for flow in (name for name in flows if name in self._episode.flows):
            by_method: dict[tuple[str, str], list[NodeRecord]] = {}
            for node in self._episode.flow(flow).nodes:
                by_method.setdefault((node.module, node.method), []).append(node)
            for key, nodes in by_method.items():
                counts[key] = min(
                    (call.entry.iteration for node in nodes for call in node.calls), default=0
                )
                running = [node.name for node in nodes if node.name in again]
                if running and (len(running) < len(nodes) or self._samples is not None):
                    self.notes.append(
                        f"`iteration` counts other calls of {'.'.join(key)} than it did then: not all are made"
                    )
        return counts


def _stands_in(node: Node) -> bool:
    return isinstance(node.module, StandIn)


def _overlaid(trainer: FlowRecord, new: Mapping[int, Mapping[str, Any]]) -> Batch:
    """Return the samples that were trained on, those of this episode as they are made now."""
    samples = trainer.delivered()
    uids = trainer.delivered_uids
    for name, column in samples.items():
        cells = list(column)
        changed = [
            new[uid].get(name, cell) if uid is not None and uid in new else cell
            for uid, cell in zip(uids, cells, strict=True)
        ]
        layouts = [trainer.batch.layouts[call.inputs[0]] for call in trainer.batch.calls]
        samples[name] = assemble({name: changed}, layouts)[name]
    return samples


class _Watch:
    """Tells stand-ins what they are asked, gives modules the random numbers they had, keeps what they return."""

    def __init__(
        self,
        episode: EpisodeRecord,
        made: dict[str, list[Again]],
        losses: dict[str, dict[int, Loss]],
    ) -> None:
        self._episode = episode
        self._made = made
        self._losses = losses
        self._trained_uids: list[int] = []
        """Uids of the samples delivered to the trainer, by position."""
        self._entered: list[Batch] = []
        self._uids: list[int] = []
        self._states: dict[tuple[str, str], dict[Any, Any]] = {}
        self.delivered_samples: dict[int, dict[str, Any]] = {}
        """Cells of each sample that left the environment flow, by uid."""

    def beginning(self, flow: FlowWork | None, trainer: TrainWork | None) -> None:
        """Take note of the samples that a trainer flow is given."""
        if trainer is not None and trainer.samples is not None:
            given = trainer.samples
            self._trained_uids = [int(u) for u in given.get(UID, range(size(given)))]

    def fed(self, flow: str, start: int, stop: int, batch: Batch) -> None:
        """Take note of nothing: what enters is recorded."""

    def entering(self, flow: str, node: Node, call: Call, data: Batch | list[Batch]) -> None:
        """Announce the call to a stand-in; else bring the random generators to where the recorded call found them."""
        if isinstance(node.module, StandIn):
            node.module.expect(call)
            return
        self._uids = list(call.uids)
        self._entered = [isolate(batch) for batch in (data if isinstance(data, list) else [data])]
        states = self._random_states(flow, node.name).get(_key(call))
        if states is not None:
            restore_rng(states)

    def returned(
        self,
        flow: str,
        node: Node,
        call: Call,
        output: Batch | list[Batch],
        metrics: Mapping[str, float],
    ) -> None:
        """Keep what a node that runs again returned."""
        if isinstance(node.module, StandIn):
            return
        batches = output if isinstance(output, list) else [output] if output else []
        step = None if call.step is None else call.step.index
        came_out = [list(call.uids)]
        if call.step is not None:
            parts = call.step.micro_batches
            came_out = [[self._trained_uids[position] for position in part] for part in parts]
            self._uids = [uid for part in came_out for uid in part]
        elif node.module.filters_samples and batches:
            came_out = [[int(uid) for uid in batches[0].get(UID, [])]]
        kept = [isolate(batch) for batch in batches]
        made = {
            n for before, b in zip(self._entered, batches, strict=False) for n in _made(before, b)
        }
        again = Again(self._uids, came_out[: len(kept)], step, kept, dict(metrics), made)
        self._made[node.name].append(again)

    def lost(
        self,
        flow: str,
        node: Node,
        outcomes: Mapping[int, str],
        cause: str,
        *,
        drops_groups: bool,
    ) -> None:
        """Keep why samples were given up."""
        found = self._losses.setdefault(node.name, {})
        for uid, outcome in outcomes.items():
            found[uid] = Loss(uid, node.name, outcome, cause.strip(), drops_groups)

    def delivered(self, flow: str, uids: Sequence[int], samples: Batch) -> None:
        """Keep what leaves the flow, for replay's choice and for the train steps."""
        self._trained_uids += uids
        for i, uid in enumerate(uids):
            self.delivered_samples[uid] = {name: column[i] for name, column in samples.items()}

    def _random_states(self, flow: str, name: str) -> dict[Any, Any]:
        if (flow, name) not in self._states:
            record = self._episode.flow(flow)
            node = next((node for node in record.nodes if node.name == name), None)
            self._states[flow, name] = {
                tuple(call.uids) if call.entry.step is None else call.entry.step: record.random[
                    call.entry.random
                ]
                for call in (node.calls if node else ())
                if call.entry.random is not None
            }
        return self._states[flow, name]


def _made(before: Batch, output: Batch) -> set[str]:
    """Return the columns of an output that are not the unchanged input; of a filter, those that are new."""
    if size(before) != size(output):
        return output.keys() - before.keys()
    return {n for n, c in output.items() if n not in before or not same_column(before[n], c)}


def _key(call: Call) -> Any:
    return tuple(call.uids) if call.step is None else call.step.index
