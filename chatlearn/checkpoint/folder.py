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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from chatlearn.checkpoint.state import RunState
from chatlearn.errors import CheckpointError
from chatlearn.module import BaseModule

_LATEST = "latest"
_OLDER = "resume from an older one with runtime.resume=<path>"
_LOADABLE = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

RngStates = dict[str, Any]


def save(
    root: Path,
    state: RunState,
    modules: Sequence[BaseModule],
    *,
    with_weights: Collection[str],
    rng: RngStates | None = None,
) -> Path:
    """Write a checkpoint below `root` and make it the latest.

    Args:
        root: the folder of all checkpoints.
        state: the counters.
        modules: every module of the run; each one's `training_state()` is saved.
        with_weights: names of the modules whose `state_dict()` is saved too.
        rng: states of the random generators to go on from, if not the present ones.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are untouched.
    """
    target = root / f"episode-{state.episode:06d}"
    partial = root / f".partial-{os.getpid()}"
    try:
        _clear(root)
        partial.mkdir(parents=True)
        for module in modules:
            _save_module(partial / "modules" / module.name, module, module.name in with_weights)
        torch.save(rng or rng_states(), partial / "rng.pt")
        state.files = {name: path.stat().st_size for name, path in _files(partial)}
        (partial / "checkpoint.json").write_text(state.to_json(), encoding="utf-8")
        _flush(partial)
        if target.exists():  # saved anew after going on from an older one
            target.rename(root / f".replaced-{os.getpid()}")
        partial.rename(target)
        _point_at(root, target.name)
        _clear(root)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of episode {state.episode} could not be written: {error}",
            place=str(root),
            fix="free space or choose another runtime.output_dir; earlier checkpoints are untouched",
        ) from error
    return target


def newest(root: Path) -> Path | None:
    """Return the newest whole checkpoint below `root`, if there is one: what `latest` names, else the last one."""
    pointer = root / _LATEST
    if pointer.is_file():
        target = root / pointer.read_text(encoding="utf-8").strip()
        if (target / "checkpoint.json").is_file():
            return target
    whole = [path.parent for path in root.glob("episode-*/checkpoint.json")]
    return max(whole, default=None)


def load(
    folder: Path, modules: Sequence[BaseModule], *, required: Collection[str] = ()
) -> RunState:
    """Bring modules and random generators to the state of a checkpoint; return its counters.

    Raises:
        CheckpointError: a file is missing or damaged, a module does not fit, or the weights of a module named in
            `required` are not there.
    """
    state = RunState.read(folder)
    for name, expected in state.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != expected:
            what = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise CheckpointError(
                f"the checkpoint is damaged: {name} {what}", place=str(folder / name), fix=_OLDER
            )
    for module in modules:
        _load_module(folder / "modules" / module.name, module, module.name in required)
    restore_rng(_read(folder / "rng.pt", _load_tensors))
    return state


def _files(folder: Path) -> list[tuple[str, Path]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [(path.relative_to(folder).as_posix(), path) for path in files]


def _clear(root: Path) -> None:
    """Remove what a crash left half-written, and what a checkpoint of the same episode has replaced."""
    for leftover in (*root.glob(".partial-*"), *root.glob(".replaced-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _save_module(folder: Path, module: BaseModule, with_weights: bool) -> None:
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    state: Mapping[str, Any] = module.state_dict() if with_weights else {}
    weights = _unshared({k: v for k, v in state.items() if isinstance(v, Tensor)})
    plain = {name: value for name, value in state.items() if name not in weights}
    training: dict[str, Any] = {"training": module.training_state(), "plain": plain}
    _refuse_unloadable(training, module)
    if weights or any(training.values()):
        folder.mkdir(parents=True)
    if weights:
        save_file(weights, folder / "weights.safetensors")
    if any(training.values()):
        torch.save(training, folder / "training.pt")


def _refuse_unloadable(value: Any, module: BaseModule, path: str = "") -> None:
    """Refuse at once what could not be read again: only tensors and plain values are loaded, nothing is unpickled."""
    if isinstance(value, dict):
        for key, part in cast("dict[Any, Any]", value).items():
            _refuse_unloadable(part, module, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple | set):
        for part in cast("Iterable[Any]", value):
            _refuse_unloadable(part, module, f"{path}[...]")
    elif not isinstance(value, _LOADABLE):
        raise CheckpointError(
            f"the state of module {module.name!r} holds a {type(value).__name__}, which a checkpoint cannot keep",
            place=f"{type(module).__name__}, at {path}",
            fix="return tensors, numbers, strings, lists and dicts from state_dict() and training_state()",
        )


def _load_module(folder: Path, module: BaseModule, required: bool) -> None:
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    weights = folder / "weights.safetensors"
    try:
        other: dict[str, Any] = {}
        if (folder / "training.pt").exists():
            other = _read(folder / "training.pt", _load_tensors)
        state: dict[str, Any] = {
            **(
                _read(weights, cast("Callable[[Path], Any]", load_file)) if weights.exists() else {}
            ),
            **other.get("plain", {}),
        }
        if state:
            module.load_state_dict(state)
        elif required and module.state_dict():
            raise CheckpointError(
                f"the checkpoint holds no weights of module {module.name!r}",
                place=str(folder),
                fix="resume with the modules that the run was started with",
            )
        if other.get("training"):
            module.load_training_state(other["training"])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
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
            fix=_OLDER,
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


def rng_states() -> RngStates:
    """Return the states of torch's, Python's and numpy's generators."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = legacy
    states: RngStates = {
        "torch": torch.get_rng_state(),
        "python": (version, list(numbers), gauss),
        "numpy": (str(kind), torch.tensor(keys.astype("int64")), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: RngStates) -> None:
    """Bring the generators to `states`."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def seed_all(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


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
