# SPDX-License-Identifier: Apache-2.0
"""What of a run goes into its checkpoints, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from chatlearn.checkpoint import changes
from chatlearn.checkpoint import folder as checkpoints
from chatlearn.checkpoint.files import Shapes, find_unloadable
from chatlearn.checkpoint.newest import newest, whole
from chatlearn.checkpoint.retention import Retention
from chatlearn.checkpoint.rng import RngStates
from chatlearn.checkpoint.state import GivenData, RunState, versions
from chatlearn.data.feed import Dataset
from chatlearn.data.fingerprint import fingerprint, name_of
from chatlearn.data.replay import Replay
from chatlearn.data.sampler import PromptSampler
from chatlearn.errors import CheckpointError, ConfigError, DataError
from chatlearn.flow.batch import Batch
from chatlearn.module import BaseModule, call_hook
from chatlearn.observability.metrics import Records
from chatlearn.program import Program
from chatlearn.ranking import needs_evaluation, score, unknown_metric
from chatlearn.saved_weights import SavedWeights, bring_back
from chatlearn.stage import Stage


class Checkpointing:
    """Find, save and resume checkpoints of one run."""

    def __init__(self, program: Program, stage: Stage) -> None:
        self._program = program
        self._stage = stage
        self._resume = program.config.runtime.resume
        self._resumed_from: Path | None = None
        self.latest: Path | None = None
        """The checkpoint that was written or resumed from last."""
        self.is_outdated = False
        """Whether the latest lacks something of its own episode, an evaluation that was made up for."""
        self.has_failed = False
        """Whether one could not be written: trying again at once would only take time."""
        self.settled: set[str] = set()
        """Destinations of syncs that were brought to their exact weights, which a first sync would change."""
        self._weights = SavedWeights(program, stage)
        self._given = [GivenData(len(r), fingerprint(r)) for r in program.training_rows]

    # ---- before setup ---------------------------------------------------------------------------------------------

    def to_resume(self, root: Path) -> tuple[Path | None, list[str]]:
        """Find the checkpoint to go on from, `root` being the output folder's checkpoints; `auto` reads all of it.

        Returns:
            The checkpoint, if there is one, and a line for each damaged one that it was preferred to.

        Raises:
            CheckpointError: `runtime.resume=auto` finds checkpoints, but none that is whole.
        """
        if self._resume == "auto":
            return newest(root, verified=True)
        return (None if self._resume == "never" else Path(self._resume)), []

    def restore(self, root: Path) -> None:
        """Undo what a crash left half-done below `root`, which must be this run's own by now.

        Raises:
            CheckpointError: it cannot be written there.
        """
        if self._resume != "never":
            checkpoints.clear(root)

    def check_named(self) -> None:
        """Refuse a checkpoint that `runtime.resume` names, before anything is written anywhere (see `check`)."""
        if self._resume not in ("auto", "never"):
            checkpoints.verify(Path(self._resume))
            self.check(Path(self._resume))

    def check(self, path: Path) -> RunState:
        """Return a checkpoint's counters; nothing has been set up, and none of its large files is read.

        Raises:
            CheckpointError: it is not whole, or a module will have weights of other shapes.
            DataError: a dataset is another one than it was.
            ConfigError: samples would be numbered or seeded otherwise.
        """
        state = checkpoints.check(path)
        self._refuse_other_data(path, state)
        self._refuse_other_sampling(path, state)
        saved = checkpoints.saved_shapes(path, state)
        for module in self._stage.modules:
            described = call_hook(module, "describe_parameters") if module.name in saved else None
            if described is not None:
                changes.refuse_other_shapes(
                    path, module.name, saved[module.name], shapes_of(described)
                )
        return state

    def goes_on_in(self, folder: Path) -> bool:
        """Tell whether the run to resume lies in `folder`; what else lies there belongs to an earlier run."""
        if self._resume == "auto":
            return newest(folder / "checkpoints")[0] is not None
        named = None if self._resume == "never" else Path(self._resume)
        return named is not None and named.resolve().is_relative_to(folder.resolve())

    def take_down_weights(self) -> None:
        """Remember what `setup()` made, to see later what changed; called right behind it."""
        self._weights.take_down()

    # ---- saving ---------------------------------------------------------------------------------------------------

    def save(
        self,
        root: Path,
        state: RunState,
        sampler: PromptSampler,
        datasets: Sequence[Dataset],
        *,
        rng: RngStates | None,
        replay: Replay | None,
        records: Records,
    ) -> list[str]:
        """Write a checkpoint below `root`, unless the run wrote the one of this episode or went on from it.

        Returns:
            What to say: where it lies, if one was written, and what of the older ones could not be removed.

        Raises:
            CheckpointError: it cannot be written; it says what is not saved.
            ConfigError: it is written, and `best_metric` names nothing that this episode measured.
        """
        target = checkpoints.path_of(root, state.episode)
        is_latest = self.latest is not None and self.latest.resolve() == target.resolve()
        if is_latest and not self.is_outdated:
            return []
        self._take_down(root, state, sampler, datasets, replay, records)
        self._hook("save_checkpoint", state)
        try:
            self.latest = checkpoints.save(
                root,
                state,
                self._replicas(),
                with_weights=self._weights.to_save(),
                rng=rng,
                replay=None if replay is None else replay.state(),
                metrics=records.lines,
            )
        except CheckpointError as error:
            self.has_failed = True
            lost = f"what came after {self.latest.name}" if self.latest else "the whole run so far"
            raise CheckpointError(
                f"{error.cause}; not saved is {lost}", place=error.place, fix=error.fix
            ) from error
        self.is_outdated = False
        notes = [f"checkpoint: {self.latest}", *self._retain(root)]
        if state.episode:  # before the first there are none
            self.refuse_unknown_metric(records.metrics, evaluation=False)
        return notes

    def refuse_unknown_metric(self, metrics: Mapping[str, float], *, evaluation: bool) -> None:
        """Refuse a `best_metric` that is none of `metrics`, those of an evaluation or of an episode.

        Raises:
            ConfigError: listing what there is.
        """
        runtime = self._program.config.runtime
        is_theirs = needs_evaluation(self._program) == evaluation
        if runtime.keep_last is None or runtime.keep_best is None or not is_theirs:
            return
        if score(self._program, metrics) is None:
            raise unknown_metric(self._program, metrics)

    def _take_down(
        self,
        root: Path,
        state: RunState,
        sampler: PromptSampler,
        datasets: Sequence[Dataset],
        replay: Replay | None,
        records: Records,
    ) -> None:
        """Have `state` hold everything that goes into `checkpoint.json`."""
        modules, config = self._stage.modules, self._program.config
        configs = self._program.module_configs
        state.prompts_drawn = sampler.drawn
        state.dataset_sizes = [len(dataset) for dataset in datasets]
        state.datasets = self._given
        state.iterations = {f"{m}.{s}": n for (m, s), n in self._stage.iterations.items()}
        state.policy_versions = {module.name: module.policy_version for module in modules}
        state.sampling = self._sampling()
        state.replay = _settings(replay)
        state.config_digest = config.digest(configs)
        state.config = config.to_dict(configs)
        state.versions = dict(versions())
        described = {module.name: changes.architecture(module) for module in modules}
        state.architectures = {name: a for name, a in described.items() if a is not None}
        finite = {name: value for name, value in records.metrics.items() if isfinite(value)}
        state.metrics, state.transcripts = finite, records.transcripts
        if self.latest in (None, self._resumed_from):  # others may have been written there before
            state.sequence = max([state.sequence, *(s.sequence for s in whole(root).values())])
        state.sequence += 1

    def _retain(self, root: Path) -> list[str]:
        """Remove the checkpoints that need not stay."""
        runtime = self._program.config.runtime
        keep = [path for path in (self.latest, self._resumed_from) if path is not None]
        ranked_by = partial(score, self._program)
        return Retention(runtime.keep_last, runtime.keep_best or 0, ranked_by).apply(root, keep)

    # ---- resuming -------------------------------------------------------------------------------------------------

    def resume(
        self,
        path: Path,
        sampler: PromptSampler,
        datasets: Sequence[Dataset],
        replay: Replay | None,
    ) -> tuple[RunState, list[str]]:
        """Bring every replica, the sampler, the counts and replay to the state of a checkpoint.

        Returns:
            The run's state, and what of it may surprise.
        """
        state = checkpoints.check(path)
        sizes = [len(dataset) for dataset in datasets]
        if state.dataset_sizes != sizes:
            raise ConfigError(
                f"the datasets have {sizes} rows, but {state.dataset_sizes} when the run was saved",
                place=str(path),
                fix="resume with the same datasets, or start anew with runtime.resume=never",
            )
        self._refuse_other_models(path, state)
        replicas = self._replicas()
        _, self.settled, surprises = bring_back(
            path, replicas, self._program, required=self._weights.needed()
        )
        self._weights.go_on_from(checkpoints.saved_shapes(path, state))
        sampler.drawn = state.prompts_drawn
        self._stage.iterations.update(state.counts())
        for replica in replicas:
            replica.policy_version = state.policy_versions.get(replica.name, 0)
        program = self._program
        notes = [
            *surprises,
            *changes.config_changes(state.config, program.config.to_dict(program.module_configs)),
            *changes.version_changes(state),
            *changes.left_behind(state, [module.name for module in self._stage.modules]),
            *_resume_replay(path, state, replay),
        ]
        self._hook("load_checkpoint", state)
        self.latest = self._resumed_from = path
        return state, notes

    def _refuse_other_models(self, path: Path, state: RunState) -> None:
        """Refuse models that the checkpoint does not fit, before any of them is touched."""
        saved = checkpoints.saved_shapes(path, state)
        for module in self._stage.modules:
            if module.name in saved:
                changes.refuse_other_architecture(
                    path, state.architectures.get(module.name), module
                )
            # A load_state_dict of the user's own may take what a plain one would refuse.
            plain = type(module).load_state_dict is BaseModule.load_state_dict
            if module.name in saved and plain:
                now = shapes_of(call_hook(module, "state_dict"))
                changes.refuse_other_shapes(path, module.name, saved[module.name], now)

    def _replicas(self) -> list[BaseModule]:
        workers = self._stage.runtime.workers
        return [worker.module for name in workers for worker in workers[name]]

    def _refuse_other_data(self, path: Path, state: RunState) -> None:
        new, old, anew = self._given, state.datasets, "start anew with runtime.resume=never"
        if not old:  # saved before datasets were told apart
            return
        if len(new) != len(old):
            raise DataError(
                f"the run has {len(new)} datasets, but had {len(old)} when it was saved",
                place=str(path),
                fix=f"resume with the same datasets, or {anew}",
            )
        owner = self._program.data_owner
        for number, (now, then) in enumerate(zip(new, old, strict=True)):
            known = now.sha256 and then.sha256
            if now.rows == then.rows and not (known and now.sha256 != then.sha256):
                continue
            source = owner.sources[number] if owner is not None else ""
            what = (
                f"it has {now.rows} rows, and had {then.rows}"
                if now.rows != then.rows
                else f"it still has {now.rows} rows, but not the same ones"
            )
            raise DataError(
                f"{name_of(source, number)} changed since the run was saved: {what}",
                place=f"{source}, {path}" if isinstance(source, str | Path) else str(path),
                fix=f"resume with the rows that the run was started with, or {anew}",
            )

    def _refuse_other_sampling(self, path: Path, state: RunState) -> None:
        changed = [k for k, v in self._sampling().items() if v != state.sampling.get(k)]
        if changed:
            new = ", ".join(f"{k}={self._sampling()[k]}" for k in changed)
            old = ", ".join(f"{k}={state.sampling.get(k)}" for k in changed)
            raise ConfigError(
                f"the run cannot go on with other samples than it began with: {new}, but it was {old}",
                place=str(path),
                fix="resume with the values the run was started with, or start anew: runtime.resume=never",
            )

    def _sampling(self) -> dict[str, Any]:
        """What decides which sample has which number, and its random numbers."""
        runtime = self._program.config.runtime
        keys = ("seed", "num_inference_per_prompt", "data_shuffle", "data_ratio")
        return {key: getattr(runtime, key) for key in keys}

    def _hook(self, name: str, state: RunState) -> None:
        self._stage.runtime.hook(name, state.train_iteration, episode=state.episode)


def shapes_of(state: Mapping[str, Any]) -> Shapes:
    """Return names and shapes of the tensors of a state dict."""
    return {name: tuple(t.shape) for name, t in state.items() if isinstance(t, Tensor)}


def refuse_unkeepable(samples: Batch, episode: int) -> None:
    """Refuse samples that no checkpoint could keep for replay, before anybody trains on them.

    Raises:
        CheckpointError: a column holds something that could not be loaded again.
    """
    for name, column in samples.items():
        if found := find_unloadable(column):
            raise CheckpointError(
                f"column {name!r} holds a {found[1]}, which a checkpoint cannot keep for replay",
                place=f"the samples of episode {episode + 1}",
                fix="have the environment flow return tensors, numbers, texts, lists and dicts, or drop the column; "
                "without replay (runtime.max_replay_episode=0) samples are not saved",
            )


def _settings(replay: Replay | None) -> dict[str, int]:
    if replay is None:
        return {}
    return {"max_replay_episode": replay.episodes, "replay_episode_offset": replay.offset}


def _resume_replay(path: Path, state: RunState, replay: Replay | None) -> list[str]:
    """Hand replay the episodes that were kept; it drops what it would not have kept itself."""
    saved = checkpoints.load_replay(path)
    if replay is None:
        return (
            [f"no replay now: {len(saved)} episodes kept for it are left behind"] if saved else []
        )
    if saved is None:
        since = f"replay keeps episodes from {state.episode + 1} on: the run was saved without it"
        return [since] if state.episode > replay.offset else []
    replay.load(saved)
    now, then = _settings(replay), state.replay
    if now == then:
        return []
    changes = ", ".join(
        f"{k}={v} instead of {then.get(k)}" for k, v in now.items() if v != then.get(k)
    )
    return [f"replay goes on with {len(replay.kept)} of {len(saved)} kept episodes: {changes}"]
