# SPDX-License-Identifier: Apache-2.0
"""Everything a run leaves for people, behind one object: the engine reports here and nowhere else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from chatlearn.config import Config, ModuleConfig
from chatlearn.flow.graph import FlowGraph
from chatlearn.observability.calls import Call
from chatlearn.observability.headline import EVAL
from chatlearn.observability.metrics import KEYS, EpisodeMetrics, MetricStore, Records
from chatlearn.observability.outcomes import FirstCauses, OutcomeCounts, words
from chatlearn.observability.program_files import write_program
from chatlearn.observability.progress import Progress
from chatlearn.observability.report import write_report
from chatlearn.observability.run_folder import open_folder
from chatlearn.observability.trackers import TensorBoardTracker, Tracker
from chatlearn.observability.transcripts import Batch, Phase, TranscriptLog
from chatlearn.observability.wandb_tracker import WandbTracker

_SHOWN_AS = {
    "sync": "syncing",
    "evaluation": "evaluating",
    "checkpoint": "saving",
    "replay": "replaying",
    "record": "recording",
}
_TOKENS = "_tokens"
_RECORDED = ("record/bytes", "record/seconds")


class Recorder:
    """Write a run's folder and show its progress.

    Args:
        config: of the run; `runtime.output_dir` names the folder, `runs/<script>` where it is not set.
        goes_on: tells of a folder whether the run goes on from what lies there; else that is moved aside.
    """

    def __init__(self, config: Config, *, goes_on: Callable[[Path], bool]) -> None:
        self._config = config
        self.folder = open_folder(config.runtime.output_dir, goes_on)
        self._stack = ExitStack()
        self._stack.callback(self.folder.close)
        self._progress: Progress | None = None
        self._trackers: list[Tracker] = []
        self._episode = EpisodeMetrics()
        self._evaluation: dict[str, float] = {}
        self._outcomes = OutcomeCounts()
        self._causes = FirstCauses()
        self._speeds: dict[str, tuple[float, float]] = {}
        self._began = time.perf_counter()
        self._unshown: dict[str, float] | None = None
        self._transcripts_failed = False
        self._number: int | None = None
        """The episode whose row is still to be written."""
        self._last: dict[str, float] = {}
        """The metrics of the last row."""
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        """Episodes done and the metrics, of every evaluation of the run, resumed parts included."""

    # ---- start and end --------------------------------------------------------------------------------------------

    def start(
        self,
        graphs: Mapping[str, FlowGraph],
        modules: Mapping[str, ModuleConfig],
        *,
        episodes: int,
        done: int,
        resumed: bool,
    ) -> None:
        """Open the files, write configuration and drawings, begin to show progress.

        Of a run that is resumed nothing changes before `go_on`: it may yet be refused.
        """
        self._metrics = MetricStore(self.folder.metrics)
        self._transcripts = TranscriptLog(self.folder.transcripts)
        self._stack.callback(self._metrics.close)
        self._stack.callback(self._transcripts.close)
        for tracker in self._config.runtime.trackers:
            self._trackers.append(self._open(tracker, modules))
            self._stack.callback(self._trackers[-1].close)
        if not resumed:
            write_program(self.folder, self._config, graphs, modules)
        self._progress = self._stack.enter_context(Progress(episodes, done))
        self.note(f"run folder: {self.folder.path}")
        if self.folder.moved_to is not None:
            self.note(f"an earlier run was moved to {self.folder.moved_to}")

    def go_on(
        self,
        graphs: Mapping[str, FlowGraph],
        modules: Mapping[str, ModuleConfig],
        done: int,
        *,
        saved: str | None,
        transcripts: int,
    ) -> list[str]:
        """Have the files go on after `done` episodes.

        Args:
            graphs: to draw.
            modules: their configuration.
            done: episodes done; rows and samples of later ones are dropped.
            saved: the lines of `metrics.jsonl` that the checkpoint kept; None if its version kept none.
            transcripts: samples that had been written by then.

        Returns:
            What of it may surprise.
        """
        rows = self._metrics.restore(done, saved)
        self._remember(rows)
        kept = self._transcripts.rewind(done if done else -1)  # before the first all is done again
        write_program(self.folder, self._config, graphs, modules)
        for tracker in self._trackers:
            tracker.go_on(done)
            if rows and done:
                tracker.log(done, self._last)
        if kept >= transcripts or not done:
            return []
        return [
            f"{self.folder.transcripts.name} lacks {transcripts - kept} of the {transcripts} samples that were "
            "written to it by then"
        ]

    def begin(self) -> None:
        """Begin to show progress; modules are set up now."""
        if self._progress is not None:
            self._progress.begin()

    def tick(self, tokens: int) -> None:
        """Take note of tokens that a call under way has produced."""
        if self._progress is not None:
            self._progress.tick(tokens)

    def finish(self, episodes: int, seconds: float, *, complete: bool) -> None:
        """Write the summary and the report; a report that fails is noted, for the run is done."""
        if self._evaluation:  # of an evaluation that no episode followed
            self._write_row(episodes, 0)
        summary = {
            "episodes": episodes,
            "seconds": round(seconds, 3),
            "complete": complete,
            "evaluation_first": self.evaluations[0][1] if self.evaluations else {},
            "evaluation_last": self.evaluations[-1][1] if self.evaluations else {},
        }
        self.folder.write_text("summary.json", json.dumps(summary, indent=2))
        self._metrics.close()
        self._transcripts.close()
        for line in self._causes.summary():
            self.note(line)
        try:
            self.note(f"report: {write_report(self.folder.path)}")
        except Exception as error:  # noqa: BLE001 - what was trained is worth more than its report
            self.note(
                f"the report could not be written: {_describe(error)}\n"
                f"  try again with: chatlearn report {self.folder.path}"
            )

    def close(self, error: BaseException | None = None) -> None:
        """Close every file and release the folder; safe to call twice."""
        self._stack.__exit__(type(error) if error else None, error, None)

    # ---- during a run ---------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Show what the run does now, and add the time of the block to `time/<name>`."""
        start = time.perf_counter()
        self._show(_SHOWN_AS.get(name, name))
        try:
            yield
        finally:
            self._episode.add_time(name, time.perf_counter() - start)

    def begin_episode(self, number: int) -> None:
        """Start the numbers of an episode; what was measured before the first stays out of them."""
        if number == 1 or self._evaluation:
            self._write_row(number - 1, 0)
        self._number = number
        self._episode = EpisodeMetrics()
        self._outcomes = OutcomeCounts()
        self._speeds = {}
        self._began = time.perf_counter()

    def starting(self, module: str, method: str, is_training: bool, uids: Sequence[int]) -> None:
        """Show which call is made next."""
        if self._progress is not None:
            name = f"{module}.{method}"
            self._progress.phase("training" if is_training else name, name, uids)

    def evaluation_starting(
        self, module: str, method: str, is_training: bool, uids: Sequence[int]
    ) -> None:
        """Take note of which call of the evaluation flow is made next."""
        if self._progress is not None:
            self._progress.calling(f"{module}.{method}", uids)

    def call(self, call: Call) -> None:
        """Take the numbers of a finished call of the environment or trainer flow."""
        self._episode.add(call.module, call.method, call.metrics, call.samples)
        phase = "trainer_flow" if call.is_training else "env_flow"
        self._episode.add_time(phase, call.seconds)
        for name, value in call.metrics.items():
            if name.endswith(_TOKENS):
                tokens, seconds = self._speeds.get(f"{call.module}/{name}", (0.0, 0.0))
                self._speeds[f"{call.module}/{name}"] = (tokens + value, seconds + call.seconds)
        if call.outcomes:
            self._outcomes.add(call)
        if self._progress is not None:
            self._progress.advance(call)
        if call.cause:
            self._tell_cause(call)

    def losses(self, losses: Mapping[str, int]) -> None:
        """Take what became of the samples that an episode lost: how many were masked, or went with their groups."""
        self._outcomes.add_losses(losses)

    def samples(self, episode: int, batches: Batch | Sequence[Batch]) -> None:
        """Keep transcripts of an episode's samples."""
        self._transcribe(batches, episode, "train")

    def synced(self, pair: str, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a parameter sync."""
        for name, value in numbers.items():
            self._episode.put(f"sync/{pair}/{name}", value)

    def replayed(self, episodes: int, samples: int, *, oldest: int) -> None:
        """Take note of how many episodes were trained on, with how many samples, and of the oldest (from 1)."""
        for name, value in (
            ("episodes", episodes),
            ("samples", samples),
            ("oldest_episode", oldest),
        ):
            self._episode.put(f"replay/{name}", value)

    def recorded(self, written_bytes: int, seconds: float) -> None:
        """Take the size of the episode's record, its evaluation included, and the time that recording took."""
        self._episode.put("record/bytes", written_bytes)
        self._episode.put("record/seconds", seconds)

    def evaluation_call(self, call: Call) -> None:
        """Take note of a finished call of the evaluation flow."""
        if self._progress is not None:
            self._progress.advance(call)
        if call.cause:
            self._tell_cause(call)

    def evaluation_done(
        self, episode: int, results: Mapping[str, Sequence[Batch]], metrics: Mapping[str, float]
    ) -> None:
        """Keep what an evaluation measured, and transcripts of it."""
        longest: Sequence[Batch] = max(results.values(), key=_columns, default=())
        self._transcribe(list(longest), episode, "eval")
        self._evaluation = {EVAL + name: value for name, value in metrics.items()}
        self.evaluations.append((episode, dict(metrics)))
        self._unshown = dict(metrics)
        if episode == 0:
            self._show_evaluation()

    def episode_done(
        self, episode: int, train_iteration: int, module_seconds: float
    ) -> dict[str, float]:
        """Write the numbers of an episode and return them.

        `time/engine` is what of the episode passed outside modules, syncs, evaluations and checkpoints.
        """
        self._sum_up(module_seconds)
        metrics = self._write_row(episode, train_iteration)
        self._number = None
        if self._progress is not None:
            self._progress.episode_done(metrics)
        self._show_evaluation()  # only now: the display counts the episode as done
        return metrics

    def amend(self, episode: int, train_iteration: int) -> dict[str, float]:
        """Add an evaluation to the row of its episode, which was written without it; return the row's metrics."""
        taken = self._episode.summary()
        times = {n: taken[n] for n in ("time/evaluation", *_RECORDED) if n in taken}
        before = {name: self._last.get(name, 0.0) for name in times}
        summed = {name: before[name] + seconds for name, seconds in times.items()}
        self._last = {**self._last, **summed, **self._evaluation}
        added = {**summed, **self._evaluation}
        self._evaluation = {}
        self._metrics.amend(episode, train_iteration, added)
        for tracker in self._trackers:
            tracker.log(episode, added)
        self._show_evaluation()
        return self._last

    def records(self, episode: int, train_iteration: int, module_seconds: float) -> Records:
        """Have on disk what was written, and return what a checkpoint behind `episode` keeps of it.

        The row of an episode that is still open goes into the checkpoint as it would be now.
        """
        self._metrics.sync()
        self._transcripts.sync()
        for tracker in self._trackers:
            tracker.flush()
        lines, metrics = self._metrics.written(), self._last
        if self._number == episode:
            self._sum_up(module_seconds)
            metrics = self._measured()
            lines = self._metrics.lines(episode, train_iteration, metrics)
        return Records(lines, metrics, self._transcripts.count)

    def _sum_up(self, module_seconds: float) -> None:
        wall = time.perf_counter() - self._began
        summary = self._episode.summary()
        other = sum(summary.get(f"time/{name}", 0.0) for name in _SHOWN_AS)
        self._episode.put("time/episode", wall)
        self._episode.put("time/engine", max(wall - module_seconds - other, 0.0))
        for name, (tokens, seconds) in self._speeds.items():
            self._episode.put(f"{name}_per_s", tokens / max(seconds, 1e-9))

    def _measured(self) -> dict[str, float]:
        return {**self._episode.summary(), **self._outcomes.metrics(), **self._evaluation}

    def _tell_cause(self, call: Call) -> None:
        """Tell of samples that were given up: the first time in full, then how many there are."""
        if self._progress is not None:
            self._progress.losing(words(self._outcomes.metrics()))
        if (note := self._causes.note_of(call)) is not None:
            self.note(note)

    def note(self, text: str) -> None:
        """Show a line of its own."""
        if self._progress is not None:
            self._progress.note(text)

    def _open(self, tracker: str, modules: Mapping[str, ModuleConfig]) -> Tracker:
        if tracker == "tensorboard":
            return TensorBoardTracker(self.folder.tensorboard)
        project = self.folder.path.resolve().name
        return WandbTracker(project, self.folder.path, self._config.to_dict(modules))

    def _transcribe(self, batches: Batch | Sequence[Batch], episode: int, phase: Phase) -> None:
        """Keep transcripts; where that fails, say so once and go on."""
        try:
            self._transcripts.record(batches, episode=episode, phase=phase)
        except Exception as error:  # noqa: BLE001 - a run is worth more than its transcripts
            if not self._transcripts_failed:
                self.note(
                    f"samples of episode {episode} are missing in {self.folder.transcripts.name}: "
                    f"{_describe(error)}"
                )
            self._transcripts_failed = True

    def _remember(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take over the evaluations, and the last metrics, of the part of the run that is resumed."""
        for row in rows:
            self._last = {
                name: value
                for name, value in row.items()
                if isinstance(value, float) and name not in KEYS
            }
            found = {
                name.removeprefix(EVAL): float(value)
                for name, value in row.items()
                if name.startswith(EVAL) and value is not None
            }
            if found:
                self.evaluations.append((int(row["episode"]), found))

    def _write_row(self, episode: int, train_iteration: int) -> dict[str, float]:
        metrics = self._measured()
        self._evaluation = {}
        if metrics:
            self._last = metrics
            self._metrics.write(episode, train_iteration, metrics)
            for tracker in self._trackers:
                tracker.log(episode, metrics)
        return metrics

    def _show_evaluation(self) -> None:
        if self._progress is not None and self._unshown is not None:
            self._progress.evaluation_done(self._unshown)
        self._unshown = None

    def _show(self, phase: str) -> None:
        if self._progress is not None:
            self._progress.phase(phase)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _columns(batches: Sequence[Batch]) -> int:
    return len(batches[0]) if batches else 0
