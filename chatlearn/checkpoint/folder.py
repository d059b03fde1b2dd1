# SPDX-License-Identifier: Apache-2.0
"""One atomic directory per checkpoint, and `latest`, which only ever names a whole one.

::

    checkpoints/
      latest                            the name of the newest whole checkpoint
      episode-000012/
        checkpoint.json                 counters (see `state.py`)
        rng.pt                          states of torch's and Python's generators
        modules/<name>/weights.safetensors
        modules/<name>/training.pt      optimiser and schedule

A checkpoint is written under a temporary name, flushed to disk and renamed, so a crash leaves the last one whole.
Nothing is ever unpickled: weights are safetensors, the rest is loaded with `weights_only=True`.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatlearn.checkpoint.state import RunState
from chatlearn.errors import CheckpointError
from chatlearn.module import BaseModule

_LATEST = "latest"


def save(root: Path, state: RunState, modules: Sequence[BaseModule]) -> Path:
    """Write a checkpoint below `root` and make it the latest.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are untouched.
    """
    target = root / f"episode-{state.episode:06d}"
    partial = root / f".partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for module in modules:
            _save_module(partial / "modules" / module.name, module)
        torch.save(_rng_states(), partial / "rng.pt")
        (partial / "checkpoint.json").write_text(state.to_json(), encoding="utf-8")
        _flush(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _point_at(root, target.name)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of episode {state.episode} could not be written: {error}",
            place=str(root),
            fix="free space or choose another runtime.output_dir; earlier checkpoints are untouched",
        ) from error
    return target


def newest(root: Path) -> Path | None:
    """Return the newest whole checkpoint below `root`, if there is one."""
    pointer = root / _LATEST
    if not pointer.is_file():
        return None
    target = root / pointer.read_text(encoding="utf-8").strip()
    return target if (target / "checkpoint.json").is_file() else None


def load(folder: Path, modules: Sequence[BaseModule]) -> RunState:
    """Bring modules and random generators to the state of a checkpoint; return its counters.

    Raises:
        CheckpointError: a file is missing or damaged, or a module does not fit.
    """
    state = RunState.read(folder)
    for module in modules:
        _load_module(folder / "modules" / module.name, module)
    _restore_rng(_read(folder / "rng.pt", _load_tensors))
    return state


def _save_module(folder: Path, module: BaseModule) -> None:
    from safetensors.torch import save_file

    state = module.state_dict()
    weights = _unshared({k: v for k, v in state.items() if isinstance(v, Tensor)})
    plain = {name: value for name, value in state.items() if name not in weights}
    training = {"training": module.training_state(), "plain": plain}
    folder.mkdir(parents=True)
    if weights:
        save_file(weights, folder / "weights.safetensors")
    if any(training.values()):
        torch.save(training, folder / "training.pt")


def _load_module(folder: Path, module: BaseModule) -> None:
    from safetensors.torch import load_file

    weights = folder / "weights.safetensors"
    try:
        other: dict[str, Any] = {}
        if (folder / "training.pt").exists():
            other = _read(folder / "training.pt", _load_tensors)
        state = {
            **(_read(weights, load_file) if weights.exists() else {}),
            **other.get("plain", {}),
        }
        if state:
            module.load_state_dict(state)
        elif module.state_dict():
            raise CheckpointError(
                f"the checkpoint holds no weights of module {module.name!r}",
                place=str(folder),
                fix="resume with the modules that the run was started with",
            )
        if other.get("training"):
            module.load_training_state(other["training"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit module {module.name!r}: {error}",
            place=str(folder),
            fix="resume with the model and optimiser that the run was started with",
        ) from error


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint is damaged: {type(error).__name__}: {error}",
            place=str(path),
            fix="resume from an older one with runtime.resume=<path>",
        ) from error


def _load_tensors(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every name storage of its own: safetensors refuses tensors that share it (tied embeddings)."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return tensors


def _rng_states() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": (version, list(numbers), gauss),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _flush(folder: Path) -> None:
    """Have everything below `folder` on disk before its rename makes it visible."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _point_at(root: Path, name: str) -> None:
    temporary = root / f".{_LATEST}-{os.getpid()}"
    temporary.write_text(name + "\n", encoding="utf-8")
    os.replace(temporary, root / _LATEST)
