# SPDX-License-Identifier: Apache-2.0
"""One `learn()` in progress: what each line of the engine's loop does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from chatlearn.arithmetic import is_due
from chatlearn.checkpoint import rng
from chatlearn.checkpoint.folder import load_metrics
from chatlearn.checkpoint.state import RunState
from chatlearn.checkpointing import Checkpointing
from chatlearn.data.feed import Feed
from chatlearn.data.replay import Replay
from chatlearn.episode import EpisodeFlows, sampler_over_datasets
from chatlearn.evaluating import evaluate
from chatlearn.executors import Evaluator
from chatlearn.exporting import export_models
from chatlearn.interruption import Interruption
from chatlearn.module import BaseModule, mark_running
from chatlearn.observability.headline import EVAL
from chatlearn.observability.recorder import Recorder
from chatlearn.program import Program
from chatlearn.record_keeping import RecordKeeping
from chatlearn.result import EvalInfo, RunResult
from chatlearn.runtime.work import Outcome
from chatlearn.runtime.worker import Where
from chatlearn.stage import Results, Stage
from chatlearn.syncs import Syncs


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
        self._rng_to_save: rng.RngStates | None = None
        """The states before calls that a resumed run makes again; None stands for the present ones."""
        self._module_seconds = 0.0
        self._open_episode: int | None = None
        """The episode under way; its row of metrics is still to be written."""
        self._interruption = Interruption()
        self._made_up = False
        """Whether an evaluation was made that the checkpoint resumed from lacked."""
        self._is_whole = True
        """Whether modules are as the end of an episode left them."""
        self._syncs: Syncs | None = None
        self._replay: Replay | None = None
        if self.config.max_replay_episode and "trainer_flow" in program.graphs:
            runtime, sampler = self.config, program.replay_sampler
            self._replay = Replay(
                runtime.max_replay_episode, runtime.replay_episode_offset, sampler
            )

    # ---- start and end --------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._checkpointing = Checkpointing(self.program, self.stage)
        self._checkpointing.check_named()
        self._recorder = Recorder(self.program.config, goes_on=self._checkpointing.goes_on_in)
        mark_running(self.stage.modules, True)
        try:
            self._begin()
        except BaseException as error:
            self._end(error)
            if self._interruption.requested and isinstance(error, KeyboardInterrupt):
                sys.stderr.write(
                    "stopped during setup: nothing has been trained, nothing is saved\n"
                )
                raise SystemExit(self._interruption.exit_code) from None
            raise
        return self

    def _begin(self) -> None:
        folder = self._recorder.folder
        self.result.folder = folder.path
        self._checkpointing.restore(folder.checkpoints)
        self._resume_from, damaged = self._checkpointing.to_resume(folder.checkpoints)
        done = self._checkpointing.check(self._resume_from).episode if self._resume_from else 0
        self._interruption.catch()
        self._interruption.may_raise = True
        self._recorder.start(
            self.program.graphs,
            self.program.module_configs,
            episodes=self.config.num_episode,
            done=done,
            resumed=self._resume_from is not None,
        )
        rng.seed_all(self.config.seed)  # initial weights, and whatever modules draw
        with self._recorder.phase("setup"):
            self.stage.set_up(
                anew=True
            )  # a run starts from what setup() makes, whatever ran before
            self._checkpointing.take_down_weights()
        self._sampler, self._datasets = sampler_over_datasets(self.program, self.stage)
        self._plan = self.program.plan(sum(map(len, self._datasets))) if self._datasets else None
        self._syncs = Syncs(self.program, self.stage, self.config)
        resumed = self._go_on_from(self._resume_from) if self._resume_from is not None else []
        self._record = RecordKeeping(self.program, self.stage, self._recorder, done)
        self._flows = EpisodeFlows(
            self.program,
            self.stage,
            self._recorder,
            self._replay,
            lambda: self._interruption.requested,
            tap=self._record.tap,
        )
        self._show_progress_of_calls(self._tick)
        for note in [*damaged, *resumed, *self.program.remarks]:
            self._recorder.note(note)
        self._recorder.begin()
        self._interruption.may_raise = False

    def _go_on_from(self, path: Path) -> list[str]:
        """Bring the run and its folder to a checkpoint; return what to say about it."""
        self.state, surprises = self._checkpointing.resume(
            path, self._sampler, self._datasets, self._replay
        )
        self.state.evaluation_due &= self._evaluator is not None
        folder = self._recorder.folder.path
        surprises += self._recorder.go_on(
            self.program.graphs,
            self.program.module_configs,
            self.state.episode,
            saved=load_metrics(path),
            transcripts=self.state.transcripts if self._checkpointing.goes_on_in(folder) else 0,
        )
        return [f"resumed from {path}: {self.state.episode} episodes done", *surprises]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        interruption = self._interruption
        stopped = interruption.requested and isinstance(error, KeyboardInterrupt | None)
        try:
            if error is None or (stopped and self._is_whole and not interruption.is_forced):
                self._finish(complete=not stopped)
            elif not interruption.is_forced:
                self._keep_what_was_done()
        finally:
            self._end(KeyboardInterrupt() if stopped else error)
        if stopped:
            raise SystemExit(interruption.exit_code) from None

    def _finish(self, *, complete: bool) -> None:
        """Leave a checkpoint, the trained model, the report."""
        if (
            self._open_episode == self.state.episode
        ):  # interrupted in, or right behind, its evaluation
            self._record_episode() if self.state.evaluation_due else self._close_episode()
        if self.program.data_owner is not None:
            self._save()
        if not complete:
            self._recorder.note("stopped; the same command with runtime.resume=auto goes on")
        failed = export_models(self.program, self._recorder) if complete else None
        self._record.note_size()
        self.result.episodes = self.state.episode
        self.result.train_iteration = self.state.train_iteration
        self.stage.episode = self.state.episode
        self.stage.train_iteration = self.state.train_iteration
        self.result.evaluations = self._recorder.evaluations
        self.result.seconds = time.perf_counter() - self._start
        is_whole = complete and failed is None
        try:
            self._recorder.finish(self.state.episode, self.result.seconds, complete=is_whole)
        finally:
            if failed is not None:
                raise failed

    def _tick(self, tokens: int) -> None:
        """Take note of tokens of a call under way; end the call if a signal asks to and nothing is lost by it."""
        self._recorder.tick(tokens)
        if self._interruption.requested and not self.stage.runtime.has_trained:
            raise KeyboardInterrupt

    def _show_progress_of_calls(self, tick: Callable[[int], None] | None) -> None:
        for workers in self.stage.runtime.workers.values():
            for worker in workers:
                worker.module.progress = tick

    def _keep_what_was_done(self) -> None:
        """After a failure, or a Ctrl-C of the user's own code, leave the episodes that are done.

        Once a train step has touched them, they cannot be saved any more: what was saved before remains.
        """
        if not self._is_whole:
            latest = self._checkpointing.latest
            self._recorder.note(
                f"episode {self.state.episode + 1} had begun to train, which cannot be saved; "
                + (f"the last checkpoint is {latest}" if latest else "there is no checkpoint")
            )
            return
        if self.state.episode == 0:
            return
        try:
            if self._open_episode == self.state.episode:
                self._record_episode()  # it failed in its evaluation or checkpoint
            if not self._checkpointing.has_failed:
                self._save()
            self._recorder.finish(
                self.state.episode, time.perf_counter() - self._start, complete=False
            )
        except Exception as error:  # noqa: BLE001 - the failure that ended the run is the one to show
            self._recorder.note(f"what was done could not be saved: {error}")

    def _end(self, error: BaseException | None) -> None:
        mark_running(self.stage.modules, False)
        self._show_progress_of_calls(None)
        if self._syncs is not None:
            self._syncs.release()
        self._interruption.release()
        self._recorder.close(error)

    # ---- the steps of an episode ----------------------------------------------------------------------------------

    @property
    def evaluates_first(self) -> bool:
        """Whether to evaluate before the first of the episodes that are left.

        That is if asked to, if nothing else is to be done, or if the run was stopped before an evaluation was done.
        """
        now = self.program.data_owner is None or self.state.evaluation_due
        return now or (self.config.enable_eval_before_training and self.state.episode == 0)

    def episodes(self) -> Iterator[int]:
        """Yield the episodes that are left, `before_episode` and `after_episode` around each."""
        if self.program.data_owner is None:
            return
        if self.state.episode >= self.config.num_episode and self._resume_from is not None:
            self._recorder.note(
                f"nothing left to do: {self.state.episode} of {self.config.num_episode} episodes are done"
            )
        if self._made_up:  # the rest of that episode is as it would have been
            self.save_if_due()
            self._call_after_episode()
        while self.state.episode < self.config.num_episode and not self._interruption.requested:
            self._call_after_episode()  # of the episode that a checkpoint between episodes resumed
            self._recorder.begin_episode(self.state.episode + 1)
            self._rng_to_save = rng.rng_states()
            self.stage.runtime.hook("before_episode", episode=self.state.episode + 1)
            self._open_episode = self.state.episode + 1
            yield self.state.episode
            self._close_episode()

    def _close_episode(self) -> None:
        """End an episode that is done: the last hooks, its row of metrics."""
        self._open_episode = None
        try:
            self._call_after_episode()
        finally:
            self._record_episode()

    def _call_after_episode(self) -> None:
        """Call `after_episode` of every module that has not had it yet; one that fails has it again on resume."""
        due = self.state.after_episode_due
        for name, workers in self.stage.runtime.workers.items():
            if name not in due:
                continue
            if type(workers[0].module).after_episode is not BaseModule.after_episode:
                self._rng_to_save = rng.rng_states()
            for worker in workers:
                worker.hook("after_episode", where=Where(self.state.episode))
            due.remove(name)
        self._rng_to_save = None

    def _record_episode(self) -> None:
        self._open_episode = None
        self.result.metrics = self._recorder.episode_done(
            self.state.episode, self.state.train_iteration, self._module_seconds
        )

    def generate_and_train(self) -> None:
        """Run the environment flow and, as its samples allow, the trainer flow."""
        assert self._plan is not None
        drawn, counts = self._sampler.drawn, self.stage.iterations.copy()
        draws = self._sampler.draw(self._plan.prompts)
        feed = Feed(self._datasets, draws, self._plan.group_size, drawn)
        self.stage.runtime.has_trained = False
        try:
            with self._record.episode(self.state.episode + 1, self.state.train_iteration):
                outcome = self._flows.run(self.state.episode, feed)
        except BaseException:
            self._is_whole = not self.stage.runtime.has_trained
            if self._is_whole:  # go back to where the episode began: a checkpoint repeats it
                self._sampler.drawn = drawn
                self.stage.iterations.clear()
                self.stage.iterations.update(counts)
            raise
        self._is_whole = False  # until the sync
        self._account(outcome)

    def sync_parameters(self, *, first: bool = False) -> None:
        """Carry weights along every pair that is due; behind it, the episode counts as done."""
        assert self._syncs is not None
        with self._recorder.phase("sync"):
            if first:
                self._syncs.run_first(
                    self._recorder,
                    resumed=self._resume_from is not None,
                    settled=self._checkpointing.settled,
                )
            else:
                self._syncs.run_due(self._recorder, self.state.episode + 1)
        if not first:
            self.state.episode += 1
            self.state.after_episode_due = list(self.stage.runtime.workers)
            self.state.evaluation_due = self._evaluator is not None and is_due(
                self.state.episode, self.config.eval_episode_interval
            )
            self._is_whole, self._rng_to_save = True, None
            self._record.keep()  # only now: a disk that is full must not cost the episode

    def evaluate_if_due(self) -> None:
        """Run the evaluation flow every `eval_episode_interval` episodes."""
        if is_due(self.state.episode, self.config.eval_episode_interval):
            self.evaluate()

    def evaluate(self) -> Results:
        """Run the evaluation flow over its whole dataset, if there is an evaluator."""
        evaluator = self._evaluator
        if evaluator is None:
            return {}
        graph = self.program.graphs["eval_flow"]
        info = EvalInfo.of(self.state.episode - 1, self.state.train_iteration)
        counts = self.stage.iterations.copy()
        try:
            with self._record.evaluation(self.state.episode), self._recorder.phase("evaluation"):
                results = evaluate(
                    evaluator,
                    self.stage,
                    graph,
                    info,
                    starting=self._recorder.evaluation_starting,
                    observer=self._recorder.evaluation_call,
                    interrupted=lambda: self._interruption.requested,
                    note=self._recorder.note,
                    tap=self._record.tap,
                )
        except BaseException:  # a resumed run makes it again, from its first call
            self.stage.iterations.clear()
            self.stage.iterations.update(counts)
            raise
        self._recorder.evaluation_done(self.state.episode, results, evaluator.metrics)
        if self.state.evaluation_due and self._open_episode is None:
            self._made_up = self._checkpointing.is_outdated = True
            self.result.metrics = self._recorder.amend(
                self.state.episode, self.state.train_iteration
            )
        self.state.evaluation_due = False
        measured = {EVAL + name: value for name, value in evaluator.metrics.items()}
        self._checkpointing.refuse_unknown_metric(measured, evaluation=True)
        return results

    def save_if_due(self) -> None:
        """Write a checkpoint every `save_episode_interval` episodes."""
        if is_due(self.state.episode, self.config.save_episode_interval):
            self._save()

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _account(self, outcome: Outcome) -> None:
        self.state.train_iteration += outcome.steps
        self._module_seconds = outcome.module_seconds
        self._recorder.losses(outcome.losses)
        self._recorder.samples(self.state.episode + 1, outcome.samples.everything())

    def _save(self) -> None:
        root, state = self._recorder.folder.checkpoints, self.state
        records = self._recorder.records(state.episode, state.train_iteration, self._module_seconds)
        with self._recorder.phase("checkpoint"):
            saved = self._checkpointing.save(
                root,
                state,
                self._sampler,
                self._datasets,
                rng=self._rng_to_save,
                replay=self._replay,
                records=records,
            )
        for note in saved or []:
            self._recorder.note(note)
