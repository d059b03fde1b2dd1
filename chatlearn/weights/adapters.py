# SPDX-License-Identifier: Apache-2.0
"""The state of a model with adapters (peft) as the plain model would have it: adapters merged, under the plain names.

What merging means is peft's own definition: which adapters are active, how several add up, what DoRA does to norms. A
copy of one layer after the other is merged, so the model itself is not changed by a bit, and no second model is made.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from chatlearn.errors import SyncError


def has_adapters(model: Any) -> bool:
    """Tell whether a model is, or contains, layers of peft; imports nothing."""
    if "peft" not in sys.modules or not isinstance(model, nn.Module):
        return False  # a model with such layers has imported it
    return next(_adapted(model), None) is not None


def plain_state(model: Any) -> dict[str, Tensor] | None:
    """Return the tensors of a model's state, on the device `meta`; names of one tensor have one there, too.

    None for what is no model, and for one with adapters, whose names are those of the plain model only once merged.
    """
    if not isinstance(model, nn.Module) or has_adapters(model):
        return None
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    made = {
        id(t): torch.empty_like(t, device="meta", requires_grad=t.requires_grad)
        for t in tensors.values()
    }
    return {name: made[id(t)] for name, t in tensors.items()}


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state with its active adapters merged, under the names of the plain model.

    Args:
        model: is, or contains, layers of peft.

    Returns:
        Tensors of their own where an adapter is merged, the model's everywhere else.

    Raises:
        SyncError: an adapter cannot be merged into the weights.
    """
    layers = dict(_adapted(model))
    state = {
        key: value
        for key, value in model.state_dict().items()
        if "" not in layers
        and not any(parent in layers for parent in accumulate(key.split("."), "{}.{}".format))
    }
    for name, layer in layers.items():
        merged = _merged(name, layer).state_dict()
        state |= {f"{name}.{key}" if name else key: value for key, value in merged.items()}
    for prefix in _wrappers(model):
        inner = f"{prefix}base_model.model."
        state = {
            prefix + key.removeprefix(inner) if key.startswith(inner) else key: value
            for key, value in state.items()
        }
    return state


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the outermost layers that peft has put around others, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    outer: str | None = None  # modules come in depth-first order: those inside follow at once
    modules: Iterator[tuple[str, nn.Module]] = cast("Any", model).named_modules()
    for name, module in modules:
        inside = outer is not None and name.startswith(f"{outer}.")
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
            outer = name
            yield name, module


def _wrappers(model: nn.Module) -> list[str]:
    """Return the prefixes of peft's models around models, the innermost first."""
    from peft import PeftModel

    modules: Iterator[tuple[str, nn.Module]] = cast("Any", model).named_modules()
    names = [name for name, module in modules if isinstance(module, PeftModel)]
    return [f"{name}." if name else "" for name in reversed(names)]


def _merged(name: str, layer: Any) -> nn.Module:
    """Return the layer that a wrapper stands for: a copy, its active adapters merged."""
    copied = copy.deepcopy(layer)
    enabled = not copied.disable_adapters
    merges = enabled and not set(copied.active_adapters) <= set(copied.merged_adapters)
    try:
        if not enabled and copied.merged_adapters:
            copied.unmerge()
        if hasattr(copied, "original_module") and not enabled:
            return copied.original_module
        if hasattr(copied, "unload_and_optionally_merge_module"):
            return copied.unload_and_optionally_merge_module(
                merge=merges, safe_merge=False, adapter_names=None
            )
        if merges:
            copied.merge()
        return copied.get_base_layer()
    except (NotImplementedError, ValueError, RuntimeError, AttributeError) as error:
        raise SyncError(
            f"the adapters of {name} cannot be merged into its weights: {error}",
            place=name,
            fix="use adapters that peft can merge, or let the destination have the same adapters",
        ) from error
