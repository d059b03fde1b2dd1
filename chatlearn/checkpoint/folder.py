# SPDX-License-Identifier: Apache-2.0
"""One atomic directory per checkpoint, and `latest`, which only ever names a whole one.

::

    checkpoints/
      latest                            the name of the newest whole checkpoint
      episode-000012/
        checkpoint.json                 counters (see `state.py`)
        rng.pt                          states of torch's and Python's generators
        replay.pt                       the episodes kept for replay, if there is any (columns per episode)
        modules/<name>/weights.safetensors
        modules/<name>/training.pt      optimiser and schedule
        modules/<name>/training-1.pt    what replica 1 keeps for itself, if it keeps anything

A checkpoint is written under a temporary name, flushed to disk and renamed, so a crash leaves the last one whole.
Nothing is ever unpickled: weights are safetensors, the rest is loaded with `weights_only=True`.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from chatlearn.checkpoint.state import RunState
from chatlearn.errors import CheckpointError
from chatlearn.module import BaseModule, call_hook

LATEST = "latest"
REPLACED = ".replaced-"
"""Begins the name of a checkpoint while a newer one of the same episode takes its place."""
_OLDER = "resume from an older one with runtime.resume=<path>"
_LOADABLE = {
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
}
"""With tensors and containers of them, what `weights_only=True` reads; subclasses of these it does not."""
_REPLAY = "replay.pt"

RngStates = dict[str, Any]


def save(
    root: Path,
    state: RunState,
    modules: Sequence[BaseModule],
    *,
    with_weights: Collection[str],
    rng: RngStates | None = None,
    replay: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint below `root` and make it the latest.

    Args:
        root: the folder of all checkpoints.
        state: the counters.
        modules: every replica of every module of the run; each one's `training_state()` is saved.
        with_weights: names of the modules whose `state_dict()` is saved too, of replica 0.
        rng: states of the random generators to go on from, if not the present ones.
        replay: the episodes kept for replay, if the run keeps any.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are untouched.
    """
    target = path_of(root, state.episode)
    partial = root / f".partial-{os.getpid()}"
    try:
        _make_way(root / LATEST)
        _clear(root)
        partial.mkdir(parents=True)
        for module in modules:
            _save_module(partial / "modules" / module.name, module, module.name in with_weights)
        torch.save(rng or rng_states(), partial / "rng.pt")
        if replay is not None:
            torch.save(list(replay), partial / _REPLAY)
        state.files = {name: path.stat().st_size for name, path in _files(partial)}
        (partial / "checkpoint.json").write_text(state.to_json(), encoding="utf-8")
        _flush(partial)
        if target.exists():  # saved anew after going on from an older one
            target.rename(root / f"{REPLACED}{os.getpid()}")
        partial.rename(target)
        _point_at(root, target.name)
        _clear(root)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(CheckpointError):
            restore(root)
        raise CheckpointError(
            f"the checkpoint of episode {state.episode} could not be written: {error}",
            place=str(root),
            fix="free space or choose another runtime.output_dir; earlier checkpoints are untouched",
        ) from error
    return target


def path_of(root: Path, episode: int) -> Path:
    """Return where the checkpoint after `episode` episodes lies."""
    return root / f"episode-{episode:06d}"


def set_aside(root: Path) -> dict[Path, Path]:
    """Find whole checkpoints that a crash kept from being replaced by a newer one of the same episode.

    Returns:
        Where each lies now, and where it belongs.
    """
    found: dict[Path, Path] = {}
    for path in root.glob(f"{REPLACED}*"):
        with suppress(CheckpointError):
            target = path_of(root, check(path).episode)
            if not target.exists():
                found[path] = target
    return found


def restore(root: Path) -> None:
    """Give checkpoints that were set aside for ones that never came their names back.

    Raises:
        CheckpointError: it cannot be written there.
    """
    for path, target in set_aside(root).items():
        try:
            path.rename(target)
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint that a crash has set aside cannot get its name back: {error}",
                place=str(path),
                fix=f"rename it to {target.name}",
            ) from error


def check(folder: Path) -> RunState:
    """Return the counters of a checkpoint that is whole, without reading its large files.

    Raises:
        CheckpointError: a file is missing or has another size than it was written with.
    """
    state = RunState.read(folder)
    for name, expected in state.files.items():
        try:
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint is damaged: {error}", place=str(folder), fix=_OLDER
            ) from error
        if found != expected:
            what = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise CheckpointError(
                f"the checkpoint is damaged: {name} {what}", place=str(folder / name), fix=_OLDER
            )
    return state


def load(
    folder: Path, modules: Sequence[BaseModule], *, required: Collection[str] = ()
) -> RunState:
    """Bring modules and random generators to the state of a checkpoint; return its counters.

    Every replica of a module gets the weights that were saved, and the training state of its own id (of replica 0, if
    the run had fewer replicas when it was saved).

    Raises:
        CheckpointError: a file is missing or damaged, a module does not fit, or the weights of a module named in
            `required` are not there.
    """
    state = check(folder)
    for module in modules:
        _load_module(folder / "modules" / module.name, module, module.name in required)
    restore_rng(_read(folder / "rng.pt", _load_tensors))
    return state


def load_replay(folder: Path) -> list[dict[str, Any]] | None:
    """Return the episodes that a checkpoint kept for replay, None if its run kept none."""
    path = folder / _REPLAY
    return _read(path, _load_where_it_was) if path.exists() else None


def _files(folder: Path) -> list[tuple[str, Path]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [(path.relative_to(folder).as_posix(), path) for path in files]


def _clear(root: Path) -> None:
    """Remove what a crash left half-written, and what a checkpoint of the same episode has replaced."""
    restore(root)
    for leftover in (*root.glob(".partial-*"), *root.glob(f"{REPLACED}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _save_module(folder: Path, module: BaseModule, with_weights: bool) -> None:
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    state: Mapping[str, Any] = (
        call_hook(module, "state_dict") if with_weights and not module.replica_id else {}
    )
    weights = _unshared({k: v for k, v in state.items() if isinstance(v, Tensor)})
    plain = {name: value for name, value in state.items() if name not in weights}
    training: dict[str, Any] = {"training": call_hook(module, "training_state"), "plain": plain}
    _refuse_unloadable(training, module)
    if weights or any(training.values()):
        folder.mkdir(parents=True, exist_ok=True)
    if weights:
        save_file(weights, folder / "weights.safetensors")
    if any(training.values()):
        torch.save(training, _training_file(folder, module))


def _training_file(folder: Path, module: BaseModule) -> Path:
    return folder / (f"training-{module.replica_id}.pt" if module.replica_id else "training.pt")


def _refuse_unloadable(value: Any, module: BaseModule) -> None:
    """Refuse at once what could not be read again."""
    if found := find_unloadable(value):
        path, kind = found
        raise CheckpointError(
            f"the state of module {module.name!r} holds a {kind}, which a checkpoint cannot keep",
            place=f"{type(module).__name__}, at {path}",
            fix="return tensors, numbers, strings, lists and dicts from state_dict() and training_state()",
        )


def find_unloadable(value: Any) -> tuple[str, str] | None:
    """Find a value that no checkpoint can keep: only tensors and plain values are loaded, nothing is unpickled.

    Returns:
        Its path within `value` and the name of its type, or None.

    Example:
        >>> find_unloadable({"rows": [1, object()]})
        ("['rows'][...]", 'object')
    """
    kind = type(cast("object", value))
    if kind in _LOADABLE or isinstance(value, Tensor):
        return None
    if kind in (dict, OrderedDict, Counter):
        entries = cast("dict[Any, Any]", value).items()
        found = ((f"[{key!r}]", find_unloadable(key) or find_unloadable(v)) for key, v in entries)
    elif kind in (list, tuple, set):
        found = (("[...]", find_unloadable(v)) for v in cast("Iterable[Any]", value))
    else:
        return "", kind.__name__
    return next(((f"{step}{inner[0]}", inner[1]) for step, inner in found if inner), None)


def _load_module(folder: Path, module: BaseModule, required: bool) -> None:
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    weights = folder / "weights.safetensors"
    try:
        other: dict[str, Any] = {}
        if (folder / "training.pt").exists():
            other = _read(folder / "training.pt", _load_tensors)
        if module.replica_id and (own := _training_file(folder, module)).exists():
            other = {**other, "training": _read(own, _load_tensors)["training"]}
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


def _load_where_it_was(path: Path) -> Any:
    """Samples come back to the device that new ones are made on, if this machine has it."""
    where = None if torch.cuda.is_available() else "cpu"
    return torch.load(path, weights_only=True, map_location=where)


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


def _make_way(latest: Path) -> None:
    """Have nothing stand where `latest` is written; a folder with files in it is somebody's, and stays."""
    if latest.is_symlink() or not latest.is_dir():
        return
    try:
        latest.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint can be written: {latest.name} is a folder, and names the newest checkpoint as a file",
            place=str(latest),
            fix="move that folder elsewhere, or choose another runtime.output_dir",
        ) from error


def _point_at(root: Path, name: str) -> None:
    temporary = root / f".{LATEST}-{os.getpid()}"
    temporary.write_text(name + "\n", encoding="utf-8")
    os.replace(temporary, root / LATEST)
