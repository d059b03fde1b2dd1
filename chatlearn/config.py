# SPDX-License-Identifier: Apache-2.0
"""Typed configuration: `chatlearn.init`, YAML, overrides, and who set each value. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ModuleConfig(BaseModel):
    """Fields of `models.<name>` that every module has; a module class adds its own by deriving from this."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    trainable: bool = False
    """Whether the module's weights are trained; trainers of ours set it themselves."""
    num_replica: int = Field(default=1, ge=1)
    """Independent copies of the module that share its work by load."""
    num_process: int = Field(default=1, ge=1)
    """Processes (ranks) of one replica."""
    num_gpu: float = Field(default=0, ge=0)
    """GPUs of one replica."""
    num_cpu: float = Field(default=1, ge=0)
    """CPU cores of one replica."""
    generation_batch_size: int | None = Field(default=None, ge=1)
    """Samples per call at most; None takes `runtime.generation_batch_size`."""
    sync_frequency: int = Field(default=1, ge=1)
    """Episodes between two parameter syncs into this module."""


class RuntimeConfig(BaseModel):
    """Fields of `runtime`: the arithmetic of episodes and where the run keeps its things."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    backend: Literal["local", "ray"] = "local"
    seed: int = 0
    num_episode: int = Field(default=1, ge=0)
    sample_per_episode: int | None = Field(default=None, ge=1)
    num_inference_per_prompt: int = Field(default=1, ge=1)
    generation_batch_size: int | None = Field(default=None, ge=1)
    train_micro_batch_size: int | None = Field(default=None, ge=1)
    train_global_batch_size: int | None = Field(default=None, ge=1)
    num_training_epoch: int = Field(default=1, ge=1)
    stream_data_loader_type: Literal["fixed", "dynamic"] = "fixed"
    incomplete_step: Literal["fill", "drop_last", "keep"] = "fill"
    max_staleness: int = Field(default=0, ge=0)
    data_ratio: list[int] | None = None
    data_shuffle: bool = False
    max_replay_episode: int = Field(default=0, ge=-1)
    replay_episode_offset: int = Field(default=0, ge=0)
    eval_episode_interval: int = Field(default=1, ge=1)
    enable_eval_before_training: bool = False
    save_episode_interval: int | None = Field(default=None, ge=1)
    output_dir: Path | None = None
    resume: str = "never"
    colocation: list[list[str]] = Field(default_factory=list)


class Config:
    """The resolved configuration of a run (skeleton; see the module docstring)."""

    runtime: RuntimeConfig

    def module(
        self, name: str, config_class: type[ModuleConfig], settings: Mapping[str, Any]
    ) -> ModuleConfig:
        """Resolve `models.<name>`: defaults < constructor settings < YAML < overrides."""
        return config_class(**settings)


def init(
    config: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Set the active configuration from a path, a dict or nothing, plus `"runtime.num_episode=3"` strings."""
    raise NotImplementedError


def active() -> Config:
    """Return the configuration that `init` set last, or the default one."""
    return Config()
