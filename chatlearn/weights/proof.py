# SPDX-License-Identifier: Apache-2.0
"""What a source sent in one parameter sync, and the proof, tensor by tensor, that it is what a destination has."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from itertools import chain
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from chatlearn.errors import SyncError
from chatlearn.module import BaseModule, call_hook
from chatlearn.weights.adapters import has_adapters, merged_state
from chatlearn.weights.digest import digests
from chatlearn.weights.plan import Ties, ties_of

_KEEP_FINITE = "look at the last train steps: lower the learning rate, clip gradients"
_COPY_ALL = "have load_state_dict() copy every tensor it is given"


class Stopwatch:
    """Add up the seconds of several blocks.

    Example:
        >>> watch = Stopwatch()
        >>> with watch.running():
        ...     prove()
        >>> watch.seconds
        0.004
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Generator[None]:
        """Count the time of the block."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - start


class Sent:
    """The state of a source at one sync: what it holds, what of it trains, and its digests.

    Args:
        source: the module that teaches.
        destination: one of the replicas that receive; where its model has no adapters and the source's has, the state
            is that of the model with its adapters merged.
    """

    def __init__(self, source: BaseModule, destination: BaseModule) -> None:
        model = source.model
        plain = type(source).state_dict is BaseModule.state_dict and isinstance(model, nn.Module)
        self.is_merged = plain and has_adapters(model) and not has_adapters(destination.model)
        state: Mapping[str, Any] = (
            merged_state(cast("nn.Module", model))
            if self.is_merged
            else call_hook(source, "state_dict")
        )
        self.state = state
        own = () if self.is_merged else named_tensors(source)
        self.ties: Ties = ties_of(chain(state.items(), own))
        self._trained: set[str] | None = None
        if plain:
            self._trained = {name for name, tensor in named_tensors(source) if tensor.requires_grad}
        self._digests: dict[tuple[str, torch.dtype], int] = {}

    def may_skip(self, name: str) -> bool:
        """Tell whether a tensor takes no gradient now, so that the destination may have it already."""
        return self._trained is not None and name not in self._trained

    @torch.no_grad()
    def refuse_nan(self, pair: str) -> None:
        """Refuse to send NaN, which would be found nowhere but in what is sampled.

        Raises:
            SyncError: naming the first such tensor.
        """
        floating = {
            name: tensor
            for name, tensor in self.state.items()
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel()
        }
        for name in _suspects(floating):
            if bool(torch.isnan(floating[name]).any()):
                raise SyncError(
                    f"tensor {name!r} of the source holds NaN", place=pair, fix=_KEEP_FINITE
                )

    @torch.no_grad()
    def digests_as(self, wanted: Mapping[str, tuple[str, torch.dtype]]) -> dict[str, int]:
        """Return digests of tensors as they are after a conversion.

        Args:
            wanted: name here and dtype there, by name there.
        """
        new = dict.fromkeys(key for key in wanted.values() if key not in self._digests)
        self._digests |= digests(((name, dtype), self.state[name].to(dtype)) for name, dtype in new)
        return {name: self._digests[key] for name, key in wanted.items()}


def named_tensors(module: BaseModule) -> list[tuple[str, Tensor]]:
    """Return every parameter and buffer of a module's model under each of its names."""
    model = module.model
    if not isinstance(model, nn.Module):
        return []
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def verify(
    sent: Sent, arrived: Mapping[str, Any], origins: Mapping[str, str], *, where: str
) -> dict[str, int]:
    """Prove that what a destination has is what the source sent.

    Args:
        sent: the source's state.
        arrived: the destination's state after the sync.
        origins: name in the source, by name in the destination; names left out are not compared.
        where: the pair and the replica, for errors.

    Returns:
        The digests of the destination's tensors, by name.

    Raises:
        SyncError: naming the first tensor or value that is not what was sent.
    """
    compared: dict[str, tuple[str, torch.dtype]] = {}
    for name, origin in origins.items():
        own, source = arrived[name], sent.state[origin]
        if not isinstance(own, Tensor) or not isinstance(source, Tensor):
            _verify_plain(name, source, own, where)
        elif own.shape != source.shape:
            raise _differs(name, f"it is {list(own.shape)} now, not {list(source.shape)}", where)
        else:
            compared[name] = (origin, own.dtype)
    expected = sent.digests_as(compared)
    found = digests((name, arrived[name]) for name in compared)
    for name, number in found.items():
        if number != expected[name]:
            raise _differs(name, _explain(sent, compared[name], arrived[name], number), where)
    return found


def _differs(name: str, why: str, where: str) -> SyncError:
    return SyncError(f"tensor {name!r} differs after the sync: {why}", place=where, fix=_COPY_ALL)


@torch.no_grad()
def _explain(sent: Sent, key: tuple[str, torch.dtype], arrived: Tensor, number: int) -> str:
    """Say what a tensor is that is not what was sent."""
    origin, dtype = key
    source = sent.state[origin].to(device=arrived.device, dtype=dtype)
    if source.ndim >= 2 and torch.equal(source.transpose(-1, -2).reshape(arrived.shape), arrived):
        return "it is transposed"
    alike = {
        name: (name, dtype)
        for name, other in sent.state.items()
        if isinstance(other, Tensor) and other.shape == arrived.shape and name != origin
    }
    for name, other in sent.digests_as(alike).items():
        if other == number:
            return f"it is what the source calls {name!r}"
    if not arrived.is_floating_point():
        return f"{int((source != arrived).sum())} of {arrived.numel()} elements are others"
    largest = float((source.double() - arrived.double()).abs().max())
    return (
        f"by up to {largest:.3g}; its largest element is {float(source.double().abs().max()):.3g}"
    )


def _verify_plain(name: str, sent: object, arrived: object, where: str) -> None:
    """Compare plain values of overridden state dicts, as far as they can be compared."""
    comparable = isinstance(sent, bool | int | float | str | type(None))
    if type(sent) is not type(arrived) or (comparable and sent != arrived):
        raise SyncError(
            f"{name!r} is {arrived!r} after the sync, not {sent!r}",
            place=where,
            fix="have load_state_dict() take over every value it is given",
        )


def _suspects(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors whose sum is NaN: those that hold NaN, or infinities of both signs."""
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    found: set[str] = set()
    for names in by_device.values():
        sums = torch.stack([_sum(tensors[name]) for name in names])
        flags = cast("list[bool]", torch.isnan(sums).tolist())
        found |= {name for name, flag in zip(names, flags, strict=True) if flag}
    return [name for name in tensors if name in found]


def _sum(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    return (plain if plain.element_size() > 1 else plain.float()).sum().double()
