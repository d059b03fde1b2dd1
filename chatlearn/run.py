# SPDX-License-Identifier: Apache-2.0
"""One `learn()` in progress: what each line of the engine's loop does."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from chatlearn.checkpoint import folder as checkpoints
from chatlearn.checkpoint.state import RunState
from chatlearn.data.feed import Dataset, Feed
from chatlearn.data.sampler import PromptSampler
from chatlearn.data.stream import StreamDataset
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.executors import EvalInfo, Evaluator
from chatlearn.module import BaseModule, has_model, resolved_config
from chatlearn.observability.recorder import Recorder
from chatlearn.program import Program
from chatlearn.runtime.local import FlowWork, Outcome, TrainWork
from chatlearn.stage import Results, Stage
from chatlearn.weights.local import ParameterSync, may_share


@dataclass
class RunResult:
    """What `learn()` returns: how far the run came, and where its things lie."""

    episodes: int
    train_iteration: int
    seconds: float
    folder: Path
    metrics: dict[str, float] = field(default_factory=dict[str, float], repr=False)
    """Of the last episode."""
    evaluations: list[tuple[int, dict[str, float]]] = field(
        default_factory=list[tuple[int, dict[str, float]]], repr=False
    )
    """Episodes done and the metrics, of every evaluation of the run, resumed parts included."""


class Run:
    """Set a program's modules up, run its episodes, and leave everything behind in order.

    A first Ctrl-C (or SIGTERM) ends the run at the next point where nothing is lost: at once while an episode only
    samples, else after its train steps and sync. Then a checkpoint is written. A second one stops right there.
    """

    def __init__(self, program: Program, stage: Stage, evaluator: Evaluator | None) -> None:
        self._evaluator = evaluator
        self.program = program
        self.stage = stage
        self.config = program.config.runtime
        self.state = RunState()
        self.result = RunResult(0, 0, 0.0, Path())
        self._resume_from: Path | None = None
        self._saved_episode = -1
        self._rng_to_save: checkpoints.RngStates | None = None
        self._module_seconds = 0.0
        self._forced = False
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    # ---- start and end --------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._refuse_missing_checkpoint()
        self._recorder = Recorder(self.program.config, goes_on=self._goes_on_in)
        try:
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def _begin(self) -> None:
        folder = self._recorder.folder
        self.result.folder = folder.path
        self._resume_from = self._checkpoint_to_resume(folder.checkpoints)
        done = RunState.read(self._resume_from).episode if self._resume_from else 0
        self._catch_signals()
        self._recorder.start(
            self.program.graphs,
            self.program.module_configs,
            episodes=self.config.num_episode,
            done=done,
            resumed=self._resume_from is not None,
        )
        checkpoints.seed_all(self.config.seed)  # initial weights, and whatever modules draw
        with self._recorder.phase("setup"):
            self.stage.set_up()
        self._sampler, self._datasets = self._sampler_over_datasets()
        self._plan = self.program.plan(sum(map(len, self._datasets))) if self._datasets else None
        self._syncs = self._parameter_syncs()
        if self._resume_from is not None:
            self._resume(self._resume_from)
        for workers in self.stage.runtime.workers.values():
            for worker in workers:
                worker.module.progress = self._recorder.tick
        self._recorder.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        stopped = self._signal is not None and (
            error is None or isinstance(error, KeyboardInterrupt)
        )
        try:
            if error is None or (stopped and kind is KeyboardInterrupt and not self._forced):
                self._finish(complete=not stopped)
        finally:
            self._end()
        if stopped:
            raise SystemExit(128 + (self._signal or signal.SIGINT)) from None

    def _finish(self, *, complete: bool) -> None:
        """Leave a checkpoint, the trained model, the report."""
        self._save()
        if complete:
            self._export()
        self.result.episodes = self.state.episode
        self.result.train_iteration = self.state.train_iteration
        self.result.evaluations = self._recorder.evaluations
        self.result.seconds = time.perf_counter() - self._start
        self._recorder.finish(self.state.episode, self.result.seconds, complete=complete)

    def _end(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}
        self._recorder.close()

    def _export(self) -> None:
        """Write trained models in a format others load: `model/`, or `model/<name>/` for several."""
        graph = self.program.graphs.get("trainer_flow")
        modules = graph.modules if graph else []
        trainers = [m for m in modules if type(m).export_model is not BaseModule.export_model]
        target = self._recorder.folder.model
        for module in trainers:
            folder = target if len(trainers) == 1 else target / module.name
            with self._recorder.phase("exporting"):
                module.export_model(folder)
            self._recorder.note(f"model of {module.name}: {folder}")

    # ---- the steps of an episode ----------------------------------------------------------------------------------

    def episodes(self) -> Iterator[int]:
        """Yield the episodes that are left, `before_episode` and `after_episode` around each."""
        if self.state.episode >= self.config.num_episode and self._resume_from is not None:
            self._recorder.note(
                f"nothing left to do: {self.state.episode} of {self.config.num_episode} episodes are done"
            )
        while self.state.episode < self.config.num_episode and self._signal is None:
            self._recorder.begin_episode(self.state.episode + 1)
            self.stage.runtime.hook("before_episode", episode=self.state.episode + 1)
            yield self.state.episode
            self.stage.runtime.hook("after_episode", episode=self.state.episode)
            self.result.metrics = self._recorder.episode_done(
                self.state.episode, self.state.train_iteration, self._module_seconds
            )

    def generate_and_train(self) -> None:
        """Run the environment flow and, as its samples allow, the trainer flow."""
        assert self._plan is not None
        graphs = self.program.graphs
        drawn, counts = self._sampler.drawn, self.stage.iterations.copy()
        rng = checkpoints.rng_states()
        draws = self._sampler.draw(self._plan.prompts)
        feed = Feed(self._datasets, draws, self._plan.group_size, drawn)
        flow = FlowWork(graphs["env_flow"], feed) if "env_flow" in graphs else None
        trainer = None
        if "trainer_flow" in graphs:
            samples = None if flow else feed.batch(0, len(feed))
            trainer = TrainWork(graphs["trainer_flow"], self._stream(), samples)
        try:
            outcome = self.stage.runtime.run(
                self.state.episode + 1,
                self.stage.iterations,
                flow=flow,
                trainer=trainer,
                batch_size=self.config.generation_batch_size,
                observer=self._recorder.call,
                interrupted=lambda: self._signal is not None,
            )
        except KeyboardInterrupt:
            # Nothing was trained: go back to where the episode began, so that the checkpoint repeats it.
            self._sampler.drawn, self._rng_to_save = drawn, rng
            self.stage.iterations.clear()
            self.stage.iterations.update(counts)
            raise
        self._account(outcome)

    def sync_parameters(self, *, first: bool = False) -> None:
        """Carry weights along every pair that is due."""
        if first and self._resume_from is not None:
            versions = {m.name: m.policy_version for m in self.stage.modules}
        else:
            versions = None
        with self._recorder.phase("sync"):
            for sync, frequency in self._syncs:
                restored = versions is not None and frequency > 1
                if first and sync.moves_nothing:
                    self._recorder.note(f"nothing to sync: {sync.pair} have no parameters")
                if (first and not restored) or (
                    not first and (self.state.episode + 1) % frequency == 0
                ):
                    report = sync.run()
                    self._recorder.synced(report.pair, report.seconds, report.bytes)
        if versions is not None:
            for module in self.stage.modules:
                module.policy_version = versions[module.name]
        if not first:
            self.state.episode += 1

    def evaluate_if_due(self) -> None:
        """Run the evaluation flow every `eval_episode_interval` episodes."""
        if self.state.episode % self.config.eval_episode_interval == 0:
            self.evaluate()

    def evaluate(self) -> Results:
        """Run the evaluation flow over its whole dataset, if there is an evaluator."""
        evaluator = self._evaluator
        if evaluator is None:
            return {}
        graph = self.program.graphs["eval_flow"]
        info = EvalInfo.of(self.state.episode - 1, self.state.train_iteration)
        with self._recorder.phase("evaluation"):
            results = evaluator.run(self.stage, graph, info, self._recorder.evaluation_call)
        self._recorder.evaluation_done(self.state.episode, results, evaluator.metrics)
        return results

    def save_if_due(self) -> None:
        """Write a checkpoint every `save_episode_interval` episodes."""
        interval = self.config.save_episode_interval
        if interval is not None and self.state.episode % interval == 0:
            self._save()

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _sampler_over_datasets(self) -> tuple[PromptSampler, list[Dataset]]:
        rows = self.program.training_rows
        if not rows:
            return PromptSampler([1]), []
        graph = self.program.graphs.get("env_flow") or self.program.graphs["trainer_flow"]
        datasets = self.stage.build_datasets(graph, rows, is_eval=False)
        sizes = [len(dataset) for dataset in datasets]
        sampler = PromptSampler(
            sizes,
            ratio=self.config.data_ratio,
            shuffle=self.config.data_shuffle,
            seed=self.config.seed,
        )
        return sampler, datasets

    def _stream(self) -> StreamDataset:
        return StreamDataset(
            self.config.stream_data_loader_type,
            global_batch_size=self.config.train_global_batch_size,
            micro_batch_size=self.config.train_micro_batch_size,
            epochs=self.config.num_training_epoch,
            incomplete_step=self.config.incomplete_step,
            seed=f"{self.config.seed}/{self.state.episode}",
        )

    def _account(self, outcome: Outcome) -> None:
        self.state.train_iteration += outcome.steps
        self._module_seconds = outcome.module_seconds
        self._recorder.samples(self.state.episode + 1, outcome.samples.everything())

    def _parameter_syncs(self) -> list[tuple[ParameterSync, int]]:
        trainer = self.program.graphs.get("trainer_flow")
        trained = set(map(id, trainer.modules)) if trainer else set[int]()
        receivers = [id(destination) for _, destination in self.program.sync_pairs]
        syncs: list[tuple[ParameterSync, int]] = []
        for source, destination in self.program.sync_pairs:
            replicas = [worker.module for worker in self.stage.runtime.workers[destination.name]]
            frequency = resolved_config(destination).sync_frequency
            share = may_share(
                frequency=frequency,
                replicas=len(replicas),
                streams=self.config.stream_data_loader_type == "dynamic",
                destination_trains=id(destination) in trained,
                destination_syncs=receivers.count(id(destination)),
            )
            syncs.append((ParameterSync(source, replicas, share=share), frequency))
        return syncs

    def _own_weights(self) -> set[str]:
        """Modules whose weights a resumed run cannot get elsewhere: trained ones, sources, and those synced rarely."""
        trainer = self.program.graphs.get("trainer_flow")
        own = {module.name for module in (trainer.modules if trainer else ())}
        for source, destination in self.program.sync_pairs:
            own.add(source.name)
            if resolved_config(destination).sync_frequency > 1:
                own.add(destination.name)
        return own

    def _weights_to_save(self) -> set[str]:
        """Besides `_own_weights`, modules outside all pairs that hold more than frozen weights."""
        received = {destination.name for _, destination in self.program.sync_pairs}
        others = {m.name for m in self.stage.modules if m.name not in received and _may_change(m)}
        return self._own_weights() | others

    def _save(self) -> None:
        if self._saved_episode == self.state.episode:
            return
        self.state.prompts_drawn = self._sampler.drawn
        self.state.dataset_sizes = [len(dataset) for dataset in self._datasets]
        self.state.iterations = {f"{m}.{s}": n for (m, s), n in self.stage.iterations.items()}
        self.state.policy_versions = {m.name: m.policy_version for m in self.stage.modules}
        self.state.config_digest = self.program.config.digest(self.program.module_configs)
        with self._recorder.phase("checkpoint"):
            self._module_checkpoints("save_checkpoint")
            root = self._recorder.folder.checkpoints
            path = checkpoints.save(
                root,
                self.state,
                self.stage.modules,
                with_weights=self._weights_to_save(),
                rng=self._rng_to_save,
            )
        self._saved_episode = self.state.episode
        self._recorder.note(f"checkpoint: {path}")

    def _module_checkpoints(self, hook: str) -> None:
        done = self.state
        self.stage.runtime.hook(hook, done.train_iteration, episode=done.episode)

    def _refuse_missing_checkpoint(self) -> None:
        resume = self.config.resume
        if resume not in ("never", "auto") and not (Path(resume) / "checkpoint.json").is_file():
            raise CheckpointError(
                f"runtime.resume={resume!r} names no checkpoint",
                place=self.program.config.provenance("runtime.resume"),
                fix="name a folder such as <output_dir>/checkpoints/episode-000012, or use auto",
            )

    def _checkpoint_to_resume(self, root: Path) -> Path | None:
        if self.config.resume == "auto":
            return checkpoints.newest(root)
        return None if self.config.resume == "never" else Path(self.config.resume)

    def _goes_on_in(self, folder: Path) -> bool:
        """Tell whether the run to resume lies in `folder`; what else lies there belongs to an earlier run."""
        checkpoint = self._checkpoint_to_resume(folder / "checkpoints")
        return checkpoint is not None and checkpoint.resolve().is_relative_to(folder.resolve())

    def _resume(self, path: Path) -> None:
        own = self._own_weights()
        self.state = checkpoints.load(path, self.stage.modules, required=own)
        sizes = [len(dataset) for dataset in self._datasets]
        if self.state.dataset_sizes != sizes:
            raise ConfigError(
                f"the datasets have {sizes} rows, but {self.state.dataset_sizes} when the run was saved",
                place=str(path),
                fix="resume with the same datasets, or start anew with runtime.resume=never",
            )
        self._sampler.drawn = self.state.prompts_drawn
        self.stage.iterations.update(self.state.counts())
        for module in self.stage.modules:
            module.policy_version = self.state.policy_versions.get(module.name, 0)
        self._module_checkpoints("load_checkpoint")
        self._saved_episode = self.state.episode
        self._recorder.note(f"resumed from {path}: {self.state.episode} episodes done")

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            self._forced = True
            raise KeyboardInterrupt
        self._signal = number
        sys.stderr.write("\nstopping at the next safe point; once more stops right here\n")


def _may_change(module: BaseModule) -> bool:
    """Tell whether a module holds more than frozen weights."""
    if type(module).state_dict is not BaseModule.state_dict:
        return True
    return has_model(module) and any(p.requires_grad for p in module.model.parameters())
