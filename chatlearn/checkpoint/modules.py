# SPDX-License-Identifier: Apache-2.0
"""One module's part of a checkpoint: its weights, and whatever else it needs to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatlearn.checkpoint import files
from chatlearn.checkpoint.state import RunState
from chatlearn.errors import ChatLearnError, CheckpointError
from chatlearn.module import BaseModule, call_hook
from chatlearn.weights.digest import digests

WEIGHTS = "weights.safetensors"


def save_module(folder: Path, module: BaseModule, with_weights: bool) -> None:
    """Write what `training_state()` returns and, of replica 0 and `with_weights`, what `state_dict()` returns.

    Raises:
        CheckpointError: it holds something that could not be loaded again.
    """
    state: Mapping[str, Any] = (
        call_hook(module, "state_dict") if with_weights and not module.replica_id else {}
    )
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in state.items() if name not in weights}
    training: dict[str, Any] = {"training": call_hook(module, "training_state"), "plain": plain}
    _refuse_unloadable(training, module)
    if weights or any(training.values()):
        folder.mkdir(parents=True, exist_ok=True)
    if weights:
        files.write_weights(folder / WEIGHTS, weights)
    if any(training.values()):
        files.write_values(folder / _training_file(module.replica_id), training)


def load_module(
    folder: Path, state: RunState, module: BaseModule, *, required: bool, mixes: bool
) -> bool:
    """Bring a replica to the state of a checkpoint.

    Args:
        folder: the checkpoint.
        state: its counters.
        module: gets the weights of replica 0, and the training state of its own id, if there is one.
        required: whether its weights must be there.
        mixes: whether its `load_state_dict` may make something of its own of what it gets (see `_take_back`).

    Returns:
        Whether its weights are what was saved; always, unless it `mixes`.

    Raises:
        CheckpointError: a file is damaged, the weights are missing, or the module does not fit.
    """
    own = f"modules/{module.name}"
    weights, training = f"{own}/{WEIGHTS}", f"{own}/{_training_file(0)}"
    replica = f"{own}/{_training_file(module.replica_id)}"
    exact = True
    try:
        other: dict[str, Any] = {}
        if training in state.files:
            other = files.read(folder / training, files.read_values)
        if replica != training and replica in state.files:
            other["training"] = files.read(folder / replica, files.read_values)["training"]
        values: dict[str, Any] = dict(other.get("plain", {}))
        if weights in state.files:
            values |= files.read(folder / weights, files.read_weights)
        if values and mixes:
            exact = _take_back(module, values)
        elif values:
            module.load_state_dict(values)
        elif required and module.state_dict():
            raise CheckpointError(
                f"the checkpoint holds no weights of module {module.name!r}",
                place=str(folder),
                fix="resume with the modules that the run was started with",
            )
        if other.get("training"):
            module.load_training_state(other["training"])
    except ChatLearnError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint does not fit module {module.name!r}: {type(error).__name__}: {error}",
            place=str(folder / own),
            fix="resume with the model and optimiser that the run was started with",
        ) from error
    return exact


def _take_back(module: BaseModule, values: Mapping[str, Any]) -> bool:
    """Bring a module whose `load_state_dict` mixes what it gets with what it has to its exact weights.

    What that method left otherwise is put right in place, which works where `state_dict()` returns the tensors
    themselves.

    Returns:
        Whether `state_dict()` now gives what was saved.
    """
    saved = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    mine = {name: value.clone() for name, value in saved.items()}  # the method may change its own
    try:
        with torch.no_grad():
            module.load_state_dict({**values, **mine})
    except Exception:  # noqa: BLE001 - it may know only the names that its source uses
        return False
    wanted, held = _digests(saved), module.state_dict()
    found = _digests(held)
    if found.keys() != wanted.keys() or any(held[n].shape != t.shape for n, t in saved.items()):
        return False
    with torch.no_grad():
        for name in wanted:
            if found[name] != wanted[name]:
                held[name].copy_(saved[name])
    return _digests(module.state_dict()) == wanted


def _digests(state: Mapping[str, Any]) -> dict[str, int]:
    return digests((name, value) for name, value in state.items() if isinstance(value, Tensor))


def _training_file(replica: int) -> str:
    return f"training-{replica}.pt" if replica else "training.pt"


def _refuse_unloadable(value: Any, module: BaseModule) -> None:
    """Refuse at once what could not be read again."""
    if found := files.find_unloadable(value):
        path, kind = found
        raise CheckpointError(
            f"the state of module {module.name!r} holds a {kind}, which a checkpoint cannot keep",
            place=f"{type(module).__name__}, at {path}",
            fix="return tensors, numbers, strings, lists and dicts from state_dict() and training_state()",
        )
