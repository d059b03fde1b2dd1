# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of episodes: how many prompts, samples and updates a configuration means, and when what is due.

Pure functions of `RuntimeConfig` and the size of the dataset; the engine takes its numbers from
here, and `chatlearn explain` prints them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import Literal

from chatlearn.config import RuntimeConfig
from chatlearn.errors import ConfigError, DataError


@dataclass(frozen=True)
class TrainPlan:
    """The updates that a trainer flow makes of `samples` samples.

    Example:
        >>> runtime = RuntimeConfig(train_global_batch_size=128, train_micro_batch_size=8)
        >>> print(train_plan(runtime, 512).describe())
        4 updates x 16 micro-batches of 8
    """

    samples: int
    """Samples that each pass goes through."""
    passes: int
    """Passes of the trainer flow over the samples."""
    steps_per_pass: int
    """Updates of one pass."""
    step_samples: int
    """Samples of a full update."""
    micro_batch_size: int
    """Samples of a full micro-batch."""
    rest: int
    """Samples of a pass that make no full update; 0 if all do."""
    incomplete_step: Literal["fill", "drop_last", "keep"]
    """What becomes of the rest."""

    @property
    def updates(self) -> int:
        """Count the updates of all passes."""
        return self.steps_per_pass * self.passes

    @property
    def micro_batches(self) -> int:
        """Count the micro-batches of a full update; the last may be smaller."""
        return ceil(self.step_samples / self.micro_batch_size)

    @property
    def filled(self) -> int:
        """Count the samples that fill up the last update of a pass."""
        return self.step_samples - self.rest if self.rest and self.incomplete_step == "fill" else 0

    def step_sizes(self) -> list[int]:
        """List the samples of each update of one pass."""
        sizes = [self.step_samples] * self.steps_per_pass
        if self.rest and self.incomplete_step == "keep":
            sizes[-1] = self.rest
        return sizes

    def describe(self) -> str:
        """Say passes, updates and micro-batches."""
        passes = f"{self.passes} passes x " if self.passes > 1 else ""
        return f"{passes}{count(self.steps_per_pass, 'update')} x {self.describe_update()}"

    def describe_update(self) -> str:
        """Say the micro-batches of a full update."""
        text = f"{count(self.micro_batches, 'micro-batch', 'es')} of {self.micro_batch_size}"
        last = self.step_samples % self.micro_batch_size
        return f"{text} (the last of {last})" if last else text

    def describe_rest(self) -> str:
        """Say what becomes of the samples that make no full update, and what that does to the gradient."""
        rest, first = count(self.rest, "sample"), count(self.filled, "sample")
        if self.incomplete_step == "drop_last":
            return f"the last {rest} of a pass are not trained on (incomplete_step: drop_last)"
        if self.incomplete_step == "keep":
            return f"the last update of a pass has only {rest} (incomplete_step: keep)"
        if self.filled <= self.samples:
            twice = "which counts" if self.filled == 1 else "which count"
            return (
                f"the last update of a pass has {rest} left and is filled up with the first {first}, "
                f"{twice} twice in the gradient of each pass (incomplete_step: fill)"
            )
        times, more = divmod(self.step_samples, self.samples)
        often = f"{times} or {times + 1}" if more else f"{times}"
        return (
            f"an update needs {self.step_samples} samples and there are only {self.samples}: they are repeated "
            f"in order, so each counts {often} times in the gradient (incomplete_step: fill)"
        )


@dataclass(frozen=True)
class EpisodePlan:
    """The numbers of one episode, when every module returns as many samples as it gets.

    Example:
        >>> runtime = RuntimeConfig(sample_per_episode=512, num_inference_per_prompt=8,
        ...                         train_global_batch_size=128, train_micro_batch_size=8)
        >>> print(episode_plan(runtime, 1000).describe())
        1 episode = 64 prompts x 8 = 512 samples = 4 updates x 16 micro-batches of 8
    """

    prompts: int
    """Prompts that enter the episode, repeated ones counted as often as they come."""
    group_size: int
    """Samples of one prompt."""
    training: TrainPlan
    """The updates made of the episode's own samples."""

    @property
    def samples(self) -> int:
        """Count the samples of the episode."""
        return self.prompts * self.group_size

    def describe(self, *, updates: bool = True) -> str:
        """Say the episode in one line, and in a second one what becomes of a rest; `updates` too, or samples only."""
        line = "1 episode = "
        if self.group_size > 1:
            line += f"{count(self.prompts, 'prompt')} x {self.group_size} = "
        line += count(self.samples, "sample")
        if not updates:
            return line
        line += f" = {self.training.describe()}"
        return f"{line}\n{self.training.describe_rest()}" if self.training.rest else line


@dataclass(frozen=True)
class RunPlan:
    """The numbers of a whole run.

    Example:
        >>> print(run_plan(RuntimeConfig(num_episode=2, sample_per_episode=6), 8).describe())
        1 episode = 6 samples = 1 update x 1 micro-batch of 6
        1 run = 2 episodes = 12 samples = 2 updates
        12 prompts = 1.5 passes over a dataset of 8
    """

    episode: EpisodePlan
    episodes: int
    dataset_size: int | None
    """Rows of the dataset; None if that is unknown, or there are several."""
    updates: int | None
    """Updates of the run; None where nobody trains, or a replay sampler decides."""
    replays: bool = False
    """Whether an episode trains on samples of others too."""

    @property
    def samples(self) -> int:
        """Count the samples of the run."""
        return self.episodes * self.episode.samples

    @property
    def prompts(self) -> int:
        """Count the prompts of the run."""
        return self.episodes * self.episode.prompts

    @property
    def dataset_passes(self) -> float | None:
        """Tell how often the run goes through the dataset; None where its size is unknown."""
        return None if self.dataset_size is None else self.prompts / self.dataset_size

    def describe_episodes(self) -> str:
        """Say the episode and the run, a line each."""
        counts = [count(self.episodes, "episode"), count(self.samples, "sample")]
        if self.updates is not None:
            counts.append(count(self.updates, "update"))
        own = self.updates is not None and not self.replays
        return f"{self.episode.describe(updates=own)}\n1 run = {' = '.join(counts)}"

    def describe(self) -> str:
        """Say the episode, the run and how often it goes through the dataset, a line each."""
        if self.dataset_passes is None or self.dataset_size is None:
            return self.describe_episodes()
        passes = describe_passes(self.prompts, self.dataset_size)
        line = f"{count(self.prompts, 'prompt')} = {passes} over a dataset of {self.dataset_size}"
        return f"{self.describe_episodes()}\n{line}"


def train_plan(runtime: RuntimeConfig, samples: int) -> TrainPlan:
    """Work out the updates that are made of `samples` samples."""
    step = runtime.train_global_batch_size or samples or 1
    drops = runtime.incomplete_step == "drop_last"
    steps, rest = samples // step if drops else ceil(samples / step), samples % step
    if rest and steps == 1 and runtime.incomplete_step == "keep":
        step, rest = samples, 0
    return TrainPlan(
        samples=samples,
        passes=runtime.num_training_epoch,
        steps_per_pass=steps,
        step_samples=step,
        micro_batch_size=min(runtime.train_micro_batch_size or step, step),
        rest=rest,
        incomplete_step=runtime.incomplete_step,
    )


def episode_plan(runtime: RuntimeConfig, dataset_size: int | None) -> EpisodePlan:
    """Work out one episode; `dataset_size` may be None where `sample_per_episode` is set."""
    samples, group = _episode_samples(runtime, dataset_size), runtime.num_inference_per_prompt
    return EpisodePlan(
        prompts=samples // group, group_size=group, training=train_plan(runtime, samples)
    )


def check_updates(runtime: RuntimeConfig, dataset_size: int | None, place: str) -> None:
    """Refuse a run whose episodes, with whatever they replay, never make a full update.

    Args:
        runtime: the run's configuration.
        dataset_size: rows of the dataset, if they are known.
        place: who set `train_global_batch_size`.
    """
    samples = episode_plan(runtime, dataset_size).samples
    samples *= episodes_trained_on(runtime, max(runtime.num_episode - 1, 0))
    training = train_plan(runtime, samples)
    if training.updates == 0:
        raise ConfigError(
            f"no update is ever full: train_global_batch_size={training.step_samples} exceeds the episode's "
            f"{samples} samples, and incomplete_step is 'drop_last'",
            place=place,
            fix=f"use {samples} or less, or incomplete_step 'fill' or 'keep'",
        )


def run_plan(
    runtime: RuntimeConfig, dataset_size: int | None, *, trains: bool = True, chooses: bool = False
) -> RunPlan:
    """Work out the whole run.

    Args:
        runtime: its configuration.
        dataset_size: rows of the dataset, if they are known.
        trains: whether there is a trainer flow.
        chooses: whether a replay sampler decides what is trained on.
    """
    episode = episode_plan(runtime, dataset_size)
    return RunPlan(
        episode=episode,
        episodes=runtime.num_episode,
        dataset_size=dataset_size,
        updates=_run_updates(runtime, episode.samples) if trains and not chooses else None,
        replays=runtime.max_replay_episode != 0,
    )


def episodes_trained_on(runtime: RuntimeConfig, episode: int) -> int:
    """Count the episodes whose samples episode `episode` (from 0) trains on: its own, and those kept for replay."""
    most, kept = runtime.max_replay_episode, episode - runtime.replay_episode_offset + 1
    if most == 0 or kept < 1:
        return 1
    return kept if most == -1 else min(most, kept)


def is_due(episodes: int, interval: int | None) -> bool:
    """Tell whether what happens every `interval` episodes (None: never) is due after `episodes` of them."""
    return interval is not None and episodes % interval == 0


def times_due(episodes: int, interval: int | None) -> int:
    """Count how often `is_due` in a run of `episodes` episodes."""
    return 0 if interval is None else episodes // interval


def describe_passes(prompts: int, rows: int) -> str:
    """Say how often `prompts` prompts go through `rows` rows.

    Example:
        >>> describe_passes(12, 8)
        '1.5 passes'
    """
    passes = f"{prompts / rows:.2f}".rstrip("0").rstrip(".")
    return f"{passes} {'pass' if passes == '1' else 'passes'}"


def count(number: int, noun: str, plural: str = "s") -> str:
    """Put a number before its noun.

    Example:
        >>> count(2, "micro-batch", "es")
        '2 micro-batches'
    """
    return f"{number} {noun}{'' if number == 1 else plural}"


def _run_updates(runtime: RuntimeConfig, samples: int) -> int:
    lengths = Counter(episodes_trained_on(runtime, i) for i in range(runtime.num_episode))
    return sum(
        times * train_plan(runtime, length * samples).updates for length, times in lengths.items()
    )


def _episode_samples(runtime: RuntimeConfig, dataset_size: int | None) -> int:
    if dataset_size is not None and dataset_size < 1:
        raise DataError(
            "the dataset is empty",
            place="the dataset given to set_dataset()",
            fix="give at least one prompt",
        )
    if runtime.sample_per_episode is not None:
        return runtime.sample_per_episode
    if dataset_size is None:
        raise ConfigError(
            "the size of an episode is unknown: the dataset has no length",
            place="runtime.sample_per_episode",
            fix="set runtime.sample_per_episode",
        )
    return dataset_size * runtime.num_inference_per_prompt
