# SPDX-License-Identifier: Apache-2.0
"""What of a run goes into its checkpoints, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatlearn.checkpoint import folder as checkpoints
from chatlearn.checkpoint.state import RunState
from chatlearn.data.feed import Dataset
from chatlearn.data.sampler import PromptSampler
from chatlearn.errors import ConfigError
from chatlearn.module import BaseModule, has_model, resolved_config
from chatlearn.program import Program
from chatlearn.stage import Stage


class Checkpointing:
    """Find, save and resume checkpoints of one run."""

    def __init__(self, program: Program, stage: Stage) -> None:
        self._program = program
        self._stage = stage
        self._resume = program.config.runtime.resume
        self._saved_episode = -1

    def to_resume(self, root: Path) -> Path | None:
        """Return the checkpoint to go on from, `root` being the output folder's checkpoints."""
        if self._resume == "auto":
            return checkpoints.newest(root)
        return None if self._resume == "never" else Path(self._resume)

    def goes_on_in(self, folder: Path) -> bool:
        """Tell whether the run to resume lies in `folder`; what else lies there belongs to an earlier run."""
        checkpoint = self.to_resume(folder / "checkpoints")
        return checkpoint is not None and checkpoint.resolve().is_relative_to(folder.resolve())

    def save(
        self,
        root: Path,
        state: RunState,
        sampler: PromptSampler,
        datasets: Sequence[Dataset],
        rng: checkpoints.RngStates | None,
    ) -> Path | None:
        """Write a checkpoint below `root`, unless the one of this episode is there already."""
        if self._saved_episode == state.episode:
            return None
        modules = self._stage.modules
        state.prompts_drawn = sampler.drawn
        state.dataset_sizes = [len(dataset) for dataset in datasets]
        state.iterations = {f"{m}.{s}": n for (m, s), n in self._stage.iterations.items()}
        state.policy_versions = {module.name: module.policy_version for module in modules}
        state.sampling = self._sampling()
        state.config_digest = self._program.config.digest(self._program.module_configs)
        self._hook("save_checkpoint", state)
        path = checkpoints.save(root, state, modules, with_weights=self._weights_to_save(), rng=rng)
        self._saved_episode = state.episode
        return path

    def resume(self, path: Path, sampler: PromptSampler, datasets: Sequence[Dataset]) -> RunState:
        """Bring modules, sampler and counts to the state of a checkpoint, and return the run's."""
        modules = self._stage.modules
        state = checkpoints.load(path, modules, required=self._own_weights())
        sizes = [len(dataset) for dataset in datasets]
        if state.dataset_sizes != sizes:
            raise ConfigError(
                f"the datasets have {sizes} rows, but {state.dataset_sizes} when the run was saved",
                place=str(path),
                fix="resume with the same datasets, or start anew with runtime.resume=never",
            )
        changed = [k for k, v in self._sampling().items() if v != state.sampling.get(k)]
        if changed:
            new = ", ".join(f"{k}={self._sampling()[k]}" for k in changed)
            old = ", ".join(f"{k}={state.sampling.get(k)}" for k in changed)
            raise ConfigError(
                f"the run cannot go on with other samples than it began with: {new}, but it was {old}",
                place=str(path),
                fix="resume with the values the run was started with, or start anew: runtime.resume=never",
            )
        sampler.drawn = state.prompts_drawn
        self._stage.iterations.update(state.counts())
        for module in modules:
            module.policy_version = state.policy_versions.get(module.name, 0)
        self._hook("load_checkpoint", state)
        self._saved_episode = state.episode
        return state

    def _sampling(self) -> dict[str, Any]:
        """What decides which sample has which number, and its random numbers."""
        runtime = self._program.config.runtime
        keys = ("seed", "num_inference_per_prompt", "data_shuffle", "data_ratio")
        return {key: getattr(runtime, key) for key in keys}

    def _hook(self, name: str, state: RunState) -> None:
        self._stage.runtime.hook(name, state.train_iteration, episode=state.episode)

    def _own_weights(self) -> set[str]:
        """Modules whose weights a resumed run cannot get elsewhere: trained ones, sources, and those synced rarely."""
        trainer = self._program.graphs.get("trainer_flow")
        own = {module.name for module in (trainer.modules if trainer else ())}
        for source, destination in self._program.sync_pairs:
            own.add(source.name)
            if resolved_config(destination).sync_frequency > 1:
                own.add(destination.name)
        return own

    def _weights_to_save(self) -> set[str]:
        """Besides `_own_weights`, modules outside all pairs that hold more than frozen weights."""
        received = {destination.name for _, destination in self._program.sync_pairs}
        others = {m.name for m in self._stage.modules if m.name not in received and _may_change(m)}
        return self._own_weights() | others


def _may_change(module: BaseModule) -> bool:
    """Tell whether a module holds more than frozen weights."""
    if type(module).state_dict is not BaseModule.state_dict:
        return True
    return has_model(module) and any(p.requires_grad for p in module.model.parameters())
