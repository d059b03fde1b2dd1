# SPDX-License-Identifier: Apache-2.0
"""What a parameter sync moves: names matched, shapes checked, before anything is copied. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from chatlearn.errors import SyncError

_SHOWN = 5


@dataclass(frozen=True)
class SyncPlan:
    """The tensors of one pair, by name."""

    names: tuple[str, ...]
    bytes: int


def plan_sync(source: Mapping[str, Any], destination: Mapping[str, Any], *, pair: str) -> SyncPlan:
    """Match the tensors of a source with those of a destination.

    Args:
        source: named tensors of the trainer.
        destination: named tensors of the module that receives them.
        pair: `source -> destination`, for errors.

    Raises:
        SyncError: a name is missing on either side, or shapes differ.
    """
    problems = [f"{name} is missing in the source" for name in destination if name not in source]
    problems += [
        f"{name} is missing in the destination" for name in source if name not in destination
    ]
    tensors = {name: t for name, t in destination.items() if isinstance(t, Tensor)}
    problems += [
        f"{name} is {list(source[name].shape)} in the source, {list(tensor.shape)} in the destination"
        for name, tensor in tensors.items()
        if isinstance(source.get(name), Tensor) and source[name].shape != tensor.shape
    ]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise SyncError(
            f"parameters of {pair} do not match: " + "; ".join(problems[:_SHOWN] + more),
            fix="give both modules the same architecture, or map names in state_dict()/load_state_dict()",
        )
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    return SyncPlan(tuple(destination), moved)
