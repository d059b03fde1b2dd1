# SPDX-License-Identifier: Apache-2.0
"""The fields of `runtime` and of `models.<name>`, each with its default and meaning. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from chatlearn.config_problems import closest, contradiction


class ModuleConfig(BaseModel):
    """Fields of `models.<name>` that every module has; a module class derives from this."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    trainable: bool = False
    """Whether the module's weights are trained; trainers of ours set it themselves."""
    generation_batch_size: int | None = Field(default=None, ge=1)
    """Samples per call at most; None takes `runtime.generation_batch_size`."""
    sync_frequency: int = Field(default=1, ge=1)
    """Episodes between two parameter syncs into this module."""
    namespace: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.\-]+$")
    """Name put before the columns that this module makes (`<namespace>/rewards`); it reads columns of that name before
    plain ones. For several policies in one flow; needs a class that says what it `writes`."""
    num_replica: int = Field(default=1, ge=1)
    """Independent copies of the module that share its work by load."""
    num_gpu: float = Field(default=0, ge=0)
    """GPUs of one replica."""
    num_cpu: float = Field(default=1, ge=0)
    """CPU cores of one replica."""
    num_process: int = Field(default=1, ge=1)
    """Processes (ranks) of one replica."""
    on_failure: Literal["stop", "retry", "drop_group", "mask"] = "stop"
    """What a sample that a step fails on, or gets no answer for in time, does: end the run; be tried again; take its
    whole group out of training; or stay in its group without being trained on. Always counted, never a zero."""
    max_retries: int = Field(default=2, ge=1)
    """Further tries of a sample with `on_failure: retry`."""
    after_retries: Literal["stop", "drop_group", "mask"] = "stop"
    """What a sample does that failed all of them."""
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds that one call of a step may take; None lets it take as long as it does."""


class RuntimeConfig(BaseModel):
    """Fields of `runtime`: the arithmetic of episodes and where the run keeps its things.

    Example:
        >>> RuntimeConfig(num_episode=3, sample_per_episode=512, num_inference_per_prompt=8)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_episode: int = Field(default=1, ge=0)
    """Rounds of env flow and trainer flow."""
    sample_per_episode: int | None = Field(default=None, ge=1)
    """Samples of one episode after repetition; None takes every prompt once, as a group."""
    num_inference_per_prompt: int = Field(default=1, ge=1)
    """Samples of one prompt: the group size."""
    train_global_batch_size: int | None = Field(default=None, ge=1)
    """Samples of one update; None takes all samples of the episode."""
    train_micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per micro-batch of an update; None takes the whole global batch."""
    generation_batch_size: int | None = Field(default=None, ge=1)
    """Samples per call of a module at most; None takes everything that is ready."""
    output_dir: Path | None = None
    """Folder of the run (metrics, report, checkpoints, model); None writes to `runs/<script>`."""
    seed: int = 0
    """Seed of sampling, shuffles and initial weights."""
    resume: Annotated[str, BeforeValidator(lambda v: str(v) if isinstance(v, Path) else v)] = (
        "never"
    )
    """`never`, `auto` (the newest whole checkpoint of `output_dir`) or the path of one."""
    save_episode_interval: int | None = Field(default=None, ge=1)
    """Episodes between two checkpoints; None saves only when the run ends or is interrupted."""
    keep_last: int | None = Field(default=None, ge=1)
    """Checkpoints that stay, the newest ones; None keeps all. The one that a run resumed from stays besides."""
    keep_best: int | None = Field(default=None, ge=1)
    """Checkpoints that stay besides, those with the best `best_metric`; None keeps none for that reason."""
    best_metric: str | None = None
    """Metric that `keep_best` goes by, named as in `metrics.jsonl`: `eval/reward/rewards`. Higher is better; with `-`
    before the name, lower is. None takes what the evaluation is for: its accuracy or pass@1, else its first reward."""
    verify_every: int = Field(default=10, ge=0)
    """Parameter syncs between two probes: log-probs of a fixed prompt, compared between both ends; 0 never probes.
    That every tensor arrived is verified after every sync."""
    record: bool = False
    """Whether to keep what went into and came out of every node, for `chatlearn replay` and `chatlearn why`."""
    record_last: int | None = Field(default=None, ge=1)
    """Episodes whose record stays, the newest ones; None keeps all. It needs `record`."""
    eval_episode_interval: int = Field(default=1, ge=1)
    """Episodes between two evaluations, if there is an evaluator; to have none, set no evaluator."""
    enable_eval_before_training: bool = False
    """Whether to evaluate once before the first episode."""
    eval_num_inference_per_prompt: int = Field(default=1, ge=1)
    """Samples of one prompt in evaluation; above 1, `avg@k` and `pass@k` of the rewards are measured."""
    eval_pass_at_k: list[PositiveInt] | None = None
    """The k of `pass@k`; None takes the powers of two up to the samples of a prompt, and that number itself."""
    eval_pass_threshold: float = Field(default=1.0, allow_inf_nan=False)
    """Reward from which on a sample counts as passed in `pass@k`."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=["tensorboard"])
    """Where metrics go besides the run folder's `metrics.jsonl`; `wandb` needs the extra `wandb`."""
    num_training_epoch: int = Field(default=1, ge=1)
    """Passes of the trainer flow over the samples of an episode."""
    incomplete_step: Literal["fill", "drop_last", "keep"] = "fill"
    """Whether a rest smaller than a global batch is filled with first samples, dropped or kept."""
    data_shuffle: bool = False
    """Whether to reshuffle the dataset on every pass."""
    data_ratio: list[PositiveInt] | None = Field(default=None, min_length=1)
    """Prompts taken per turn from each of several datasets; None takes one of each."""
    stream_data_loader_type: Literal["fixed", "dynamic"] = "fixed"
    """Whether training starts when the episode is complete, or as soon as a global batch is."""
    max_staleness: int = Field(default=0, ge=0)
    """Versions by which the weights that sampled may be older than those that train."""
    max_replay_episode: int = Field(default=0, ge=-1)
    """Episodes kept for replay; -1 keeps all."""
    replay_episode_offset: int = Field(default=0, ge=0)
    """Episodes that train as they come before replay starts to keep any."""
    backend: Literal["local", "ray"] = "local"
    """Whether modules run in this process or on a Ray cluster."""
    colocation: list[list[str]] = Field(default_factory=list[list[str]])
    """Groups of module names that share their devices."""

    @model_validator(mode="after")
    def _fits_together(self) -> RuntimeConfig:
        samples, group = self.sample_per_episode, self.num_inference_per_prompt
        if samples is not None and samples % group:
            below, above = samples // group * group, (samples // group + 1) * group
            raise contradiction(
                "sample_per_episode",
                f"sample_per_episode={samples} is no multiple of num_inference_per_prompt={group}",
                f"use {below} or {above}" if below else f"use {above}",
            )
        micro, step = self.train_micro_batch_size, self.train_global_batch_size
        if micro is not None and step is not None and micro > step:
            raise contradiction(
                "train_micro_batch_size",
                f"train_micro_batch_size={micro} is larger than train_global_batch_size={step}",
                f"use {step} or less",
            )
        most = self.eval_num_inference_per_prompt
        if (largest := max(self.eval_pass_at_k or (), default=0)) > most:
            raise contradiction(
                "eval_pass_at_k",
                f"eval_pass_at_k has {largest}, more than eval_num_inference_per_prompt={most}",
                f"use {most} or less, or set eval_num_inference_per_prompt to {largest} or more",
            )
        meant = closest(self.resume.lower(), ("auto", "never"))
        if self.resume not in ("auto", "never") and (meant or not self.resume):
            raise contradiction(
                "resume",
                f"resume={self.resume!r} is neither 'auto', 'never' nor the path of a checkpoint",
                f"did you mean {meant or 'never'!r}?",
            )
        return self
