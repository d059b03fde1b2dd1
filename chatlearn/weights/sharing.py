# SPDX-License-Identifier: Apache-2.0
"""Shared storage in place of copies, where that gives the same.

Sharing means that a destination's parameters *are* the source's tensors. Nothing is moved then, but every train
step is visible to the destination at once. That equals copying exactly if nobody looks at the destination between
a train step and the next sync; the engine asks for sharing only then (see `may_share`). That a class changes its
weights at no other time only its author knows, so both classes must say so: `shares_weights = True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chatlearn.module import BaseModule, call_hook, has_model


def may_share(
    *,
    frequency: int,
    replicas: int,
    streams: bool,
    destination_trains: bool,
    destination_syncs: int,
) -> bool:
    """Tell whether shared storage gives the results of copying.

    A destination must be synced after every episode, from one source, have one replica, take no part in the trainer
    flow, and all of an episode's samples must exist before its first train step (no dynamic streaming).
    """
    once = frequency == 1 and replicas == 1 and destination_syncs == 1
    return once and not streams and not destination_trains


def are_plain(source: BaseModule, destination: BaseModule) -> bool:
    """Tell whether both classes allow sharing, and have a model whose state they leave as it is."""
    return all(
        vars(type(module)).get("shares_weights", False)
        and type(module).state_dict is BaseModule.state_dict
        and type(module).load_state_dict is BaseModule.load_state_dict
        and has_model(module)
        for module in (source, destination)
    )


def share(source: Mapping[str, Any], destination: BaseModule) -> bool:
    """Point the parameters of a plain destination at the source's storage, if both are alike in all.

    Args:
        source: what the source's `state_dict()` returned; the names are the destination's.
        destination: `are_plain` holds of it and the source.

    Returns:
        Whether they share now; if not, the destination is as it was, or has values that a copy overwrites.
    """
    target = call_hook(destination, "state_dict")
    alike = target.keys() == source.keys() and all(
        isinstance(t, Tensor) and t.dtype == source[n].dtype and t.device == source[n].device
        for n, t in target.items()
    )
    if not alike or destination.model is None:
        return False
    for name, parameter in destination.model.named_parameters():
        if name in source:
            parameter.data = source[name]
    for name, buffer in destination.model.named_buffers():
        if name in source:
            buffer.set_(source[name])  # pyright: ignore[reportArgumentType]
    if aliases(source, call_hook(destination, "state_dict")):
        return True
    own_storage(destination)  # e.g. tied on one side only
    return False


def aliases(source: Mapping[str, Any], destination: Mapping[str, Any]) -> bool:
    """Tell whether every tensor of the destination is the source's: the same bytes in the same order."""
    return destination.keys() == source.keys() and all(
        tensor.data_ptr() == source[name].data_ptr()
        and tensor.shape == source[name].shape
        and tensor.stride() == source[name].stride()
        and tensor.dtype == source[name].dtype
        for name, tensor in destination.items()
    )


def own_storage(module: BaseModule) -> None:
    """Give a module that shared another's storage its own again."""
    if has_model(module):
        for parameter in module.model.parameters():
            parameter.data = parameter.data.clone()
        for buffer in module.model.buffers():
            buffer.set_(buffer.clone())  # pyright: ignore[reportArgumentType]
