# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of episodes: how many prompts, samples and updates a configuration means.

Pure functions of `RuntimeConfig` and the size of the dataset; the engine takes its numbers from
here, and `chatlearn explain` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from chatlearn.config import RuntimeConfig
from chatlearn.errors import ConfigError, DataError


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
    samples: int
    """Samples of the episode: `prompts * group_size`."""
    generation_batch_size: int
    """Samples per call at most, of a module that sets no size of its own."""
    generation_calls: int
    """Calls that one node needs for the episode at that size."""
    passes: int
    """Passes of the trainer flow over the samples."""
    steps_per_pass: int
    """Updates of one pass."""
    step_samples: int
    """Samples of a full update."""
    micro_batch_size: int
    """Samples of a full micro-batch."""
    micro_batches: int
    """Micro-batches of a full update; the last may be smaller."""
    rest: int
    """Samples of a pass that make no full update; 0 if all do."""
    incomplete_step: Literal["fill", "drop_last", "keep"]
    """What becomes of the rest."""

    @property
    def updates(self) -> int:
        """Count the updates of the episode."""
        return self.steps_per_pass * self.passes

    def step_sizes(self) -> list[int]:
        """List the samples of each update of one pass."""
        sizes = [self.step_samples] * self.steps_per_pass
        if self.rest and self.incomplete_step == "keep":
            sizes[-1] = self.rest
        return sizes

    def describe(self) -> str:
        """Say the episode in one line, and in a second one what becomes of a rest."""
        line = "1 episode = "
        if self.group_size > 1:
            line += f"{_count(self.prompts, 'prompt')} x {self.group_size} = "
        line += f"{_count(self.samples, 'sample')} = "
        if self.passes > 1:
            line += f"{self.passes} passes x "
        line += f"{_count(self.steps_per_pass, 'update')} x "
        line += f"{_count(self.micro_batches, 'micro-batch', 'es')} of {self.micro_batch_size}"
        if last := self.step_samples % self.micro_batch_size:
            line += f" (the last of {last})"
        return f"{line}\n{self._describe_rest()}" if self.rest else line

    def _describe_rest(self) -> str:
        rest = _count(self.rest, "sample")
        if self.incomplete_step == "drop_last":
            return f"the last {rest} of a pass are not trained on (incomplete_step: drop_last)"
        if self.incomplete_step == "keep":
            return f"the last update of a pass has only {rest} (incomplete_step: keep)"
        missing = self.step_samples - self.rest
        return (
            f"the last update of a pass has {rest} left and is filled up with the episode's first "
            f"{missing} (incomplete_step: fill)"
        )


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

    @property
    def samples(self) -> int:
        """Count the samples of the run."""
        return self.episodes * self.episode.samples

    @property
    def prompts(self) -> int:
        """Count the prompts of the run."""
        return self.episodes * self.episode.prompts

    @property
    def updates(self) -> int:
        """Count the updates of the run."""
        return self.episodes * self.episode.updates

    @property
    def dataset_passes(self) -> float | None:
        """Tell how often the run goes through the dataset; None where its size is unknown."""
        return None if self.dataset_size is None else self.prompts / self.dataset_size

    def describe(self) -> str:
        """Say the episode and the run, a line each."""
        counts = [
            _count(self.episodes, "episode"),
            _count(self.samples, "sample"),
            _count(self.updates, "update"),
        ]
        lines = [self.episode.describe(), f"1 run = {' = '.join(counts)}"]
        if self.dataset_passes is not None:
            passes = f"{self.dataset_passes:.2f}".rstrip("0").rstrip(".")
            noun = "pass" if passes == "1" else "passes"
            lines.append(
                f"{_count(self.prompts, 'prompt')} = {passes} {noun} over a dataset of "
                f"{self.dataset_size}"
            )
        return "\n".join(lines)


def episode_plan(runtime: RuntimeConfig, dataset_size: int | None) -> EpisodePlan:
    """Work out one episode; `dataset_size` may be None where `sample_per_episode` is set."""
    group = runtime.num_inference_per_prompt
    samples = _episode_samples(runtime, dataset_size)
    step = runtime.train_global_batch_size or samples
    micro = min(runtime.train_micro_batch_size or step, step)
    call = runtime.generation_batch_size or samples
    steps = samples // step if runtime.incomplete_step == "drop_last" else ceil(samples / step)
    if steps == 0:
        raise ConfigError(
            f"no update is ever full: train_global_batch_size={step} exceeds the episode's "
            f"{samples} samples, and incomplete_step is 'drop_last'",
            place="runtime.train_global_batch_size",
            fix=f"use {samples} or less, or incomplete_step 'fill' or 'keep'",
        )
    rest = samples % step
    if rest and steps == 1 and runtime.incomplete_step == "keep":
        step, rest = samples, 0
        micro = min(micro, step)
    return EpisodePlan(
        prompts=samples // group,
        group_size=group,
        samples=samples,
        generation_batch_size=call,
        generation_calls=ceil(samples / call),
        passes=runtime.num_training_epoch,
        steps_per_pass=steps,
        step_samples=step,
        micro_batch_size=micro,
        micro_batches=ceil(step / micro),
        rest=rest,
        incomplete_step=runtime.incomplete_step,
    )


def run_plan(runtime: RuntimeConfig, dataset_size: int | None) -> RunPlan:
    """Work out the whole run."""
    return RunPlan(episode_plan(runtime, dataset_size), runtime.num_episode, dataset_size)


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


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
