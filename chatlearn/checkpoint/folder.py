# SPDX-License-Identifier: Apache-2.0
"""One atomic directory per checkpoint, and `latest`, which only ever names a whole one.

::

    checkpoints/
      latest                            the name of the newest whole checkpoint
      episode-000012/
        checkpoint.json                 counters, configuration, versions, digests (see `state.py`)
        rng.pt                          states of torch's and Python's generators
        metrics.jsonl                   the run's rows so far, the one of this episode included
        replay.pt                       the episodes kept for replay, if there is any (columns per episode)
        modules/<name>/weights.safetensors
        modules/<name>/training.pt      optimiser and schedule
        modules/<name>/training-1.pt    what replica 1 keeps for itself, if it keeps anything

A checkpoint is written under a temporary name, flushed to disk and renamed, so a crash leaves the last one whole. What
is deleted is renamed first, so that half of it is never taken for a checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, cast

from chatlearn.checkpoint import files
from chatlearn.checkpoint.modules import WEIGHTS, load_module, save_module
from chatlearn.checkpoint.rng import RngStates, restore_rng, rng_states
from chatlearn.checkpoint.state import RunState
from chatlearn.errors import CheckpointError
from chatlearn.module import BaseModule

LATEST = "latest"
REPLACED = ".replaced-"
"""Begins the name of a checkpoint while a newer one of the same episode takes its place."""
_PARTIAL = ".partial-"
_REMOVED = ".removed-"
_METRICS = "metrics.jsonl"
_RNG = "rng.pt"
_REPLAY = "replay.pt"


def save(
    root: Path,
    state: RunState,
    modules: Sequence[BaseModule],
    *,
    with_weights: Collection[str],
    rng: RngStates | None = None,
    replay: Sequence[Mapping[str, Any]] | None = None,
    metrics: str = "",
) -> Path:
    """Write a checkpoint below `root` and make it the latest.

    Args:
        root: the folder of all checkpoints.
        state: the counters; its `files` and `digests` are filled in.
        modules: every replica of every module of the run; each one's `training_state()` is saved.
        with_weights: names of the modules whose `state_dict()` is saved too, of replica 0.
        rng: states of the random generators to go on from, if not the present ones.
        replay: the episodes kept for replay, if the run keeps any.
        metrics: the lines of `metrics.jsonl` up to this episode.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are untouched.
    """
    target = path_of(root, state.episode)
    partial = root / f"{_PARTIAL}{os.getpid()}"
    try:
        with files.writing(f"the checkpoint of episode {state.episode} could not be written", root):
            _make_way(root / LATEST)
            clear(root)
            root.mkdir(
                exist_ok=True
            )  # and not its parents: a run folder that vanished is no new one
            partial.mkdir()
            for module in modules:
                save_module(partial / "modules" / module.name, module, module.name in with_weights)
            files.write_values(partial / _RNG, rng or rng_states())
            if replay is not None:
                files.write_values(partial / _REPLAY, list(replay))
            (partial / _METRICS).write_text(metrics, encoding="utf-8", newline="\n")
            _seal(partial, state)
            _publish(root, partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(CheckpointError):
            restore(root)
        raise
    with suppress(CheckpointError):  # it is written; what it replaced goes with the next one
        clear(root)
    return target


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


def _seal(partial: Path, state: RunState) -> None:
    """Take every file's size and digest down."""
    state.files, state.digests = {}, {}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        name = path.relative_to(partial).as_posix()
        state.files[name], state.digests[name] = path.stat().st_size, files.digest(path)
    (partial / "checkpoint.json").write_text(state.to_json(), encoding="utf-8")


def _publish(root: Path, partial: Path, target: Path) -> None:
    """Have all of a checkpoint on disk, then give it its name, then have `latest` name it.

    A disk is waited for twice only: when all is written, what `latest` will say included, and behind the renames.
    """
    pointer = root / f".{LATEST}-{os.getpid()}"
    try:
        pointer.write_text(target.name + "\n", encoding="utf-8")
        for path in [*partial.rglob("*"), partial, pointer, root]:
            files.flush(path)
        if target.exists():  # saved anew after going on from an older one
            target.rename(root / f"{REPLACED}{os.getpid()}")
        partial.rename(target)
        pointer.replace(root / LATEST)
        files.flush(root)
    finally:
        pointer.unlink(missing_ok=True)


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


def remove(path: Path) -> None:
    """Delete a checkpoint; a crash on the way leaves nothing that could be taken for one.

    Raises:
        OSError: it cannot be written there.
    """
    gone = path.with_name(f"{_REMOVED}{os.getpid()}-{path.name}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear(root: Path) -> None:
    """Remove what a crash left half-written or half-deleted, and what a checkpoint of the same episode has replaced."""
    restore(root)
    for start in (_PARTIAL, REPLACED, _REMOVED):
        for leftover in root.glob(f"{start}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in root.glob(f".{LATEST}-*"):
        with suppress(OSError):
            leftover.unlink()


# ---- reading ------------------------------------------------------------------------------------------------------


def check(folder: Path) -> RunState:
    """Return the counters of a checkpoint whose files have the sizes they were written with; none is opened.

    Raises:
        CheckpointError: a file is missing, has another size, or lies elsewhere.
    """
    state = RunState.read(folder)
    for name, expected in state.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise _damaged(f"it names a file outside of it: {name!r}", folder)
        try:
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
        except (OSError, ValueError) as error:
            raise _damaged(str(error), folder) from error
        if found != expected:
            what = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise _damaged(f"{name} {what}", folder / name)
    return state


def verify(folder: Path) -> RunState:
    """Return the counters of a checkpoint that is whole: every byte is read once, and every file can be loaded.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    state = check(folder)
    for name in state.files:
        path = folder / name
        if state.digests and files.read(path, files.digest) != state.digests.get(name):
            raise _damaged(f"{name} has other content than was written", path)
        if path.suffix == ".pt":
            files.read(path, lambda path: files.read_values(path, skim=True))
        elif path.suffix == ".safetensors":
            files.read(path, files.weight_shapes)
    return state


def load(
    folder: Path,
    modules: Sequence[BaseModule],
    *,
    required: Collection[str] = (),
    mixing: Collection[str] = (),
    refused: Callable[[str], object] = lambda _: None,
) -> RunState:
    """Bring modules and random generators to the state of a checkpoint; return its counters.

    Every replica of a module gets the weights that were saved, and the training state of its own id (of replica 0, if
    the run had fewer replicas when it was saved). Modules named in `mixing` may make something of their own of
    what they load: they are brought to the exact weights, and `refused` is told the names of those that cannot be.

    Raises:
        CheckpointError: a file is missing or damaged, a module does not fit, or the weights of a module named in
            `required` are not there. Modules may have been changed by then: set them up anew before another try.
    """
    state = check(folder)
    for module in modules:
        is_required, mixes = module.name in required, module.name in mixing
        if not load_module(folder, state, module, required=is_required, mixes=mixes):
            refused(module.name)
    try:
        restore_rng(files.read(folder / _RNG, files.read_values))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(f"{_RNG} holds no states of random generators", folder / _RNG) from error
    return state


def load_replay(folder: Path) -> list[dict[str, Any]] | None:
    """Return the episodes that a checkpoint kept for replay, None if its run kept none."""
    from torch.cuda import is_available

    if _REPLAY not in check(folder).files:
        return None
    # Samples come back to the device that new ones are made on, if this machine has it.
    where = None if is_available() else "cpu"
    kept: Any = files.read(folder / _REPLAY, lambda path: files.read_values(path, where=where))
    parts = cast("list[Any]", kept if isinstance(kept, list) else [None])
    if not all(isinstance(part, dict) and {"episode_id", "columns"} <= {*part} for part in parts):
        raise _damaged(f"{_REPLAY} holds no episodes", folder / _REPLAY)
    return parts


def load_metrics(folder: Path) -> str | None:
    """Return the lines of `metrics.jsonl` up to a checkpoint, None if its version did not keep them."""
    path = folder / _METRICS
    if _METRICS not in check(folder).files:
        return None
    return files.read(path, lambda path: path.read_text(encoding="utf-8"))


def saved_shapes(folder: Path, state: RunState) -> dict[str, files.Shapes]:
    """Return names and shapes of the weights that a checkpoint holds, per module."""
    weights = [PurePosixPath(name) for name in state.files if name.endswith(f"/{WEIGHTS}")]
    return {
        "/".join(path.parts[1:-1]): files.read(folder / path, files.weight_shapes)
        for path in weights
    }


def _damaged(what: str, place: Path) -> CheckpointError:
    return CheckpointError(f"the checkpoint is damaged: {what}", place=str(place), fix=files.OLDER)
