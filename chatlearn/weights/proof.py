# SPDX-License-Identifier: Apache-2.0
"""What a source sent in one parameter sync, and the proof, tensor by tensor, that it is what a destination has."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from itertools import chain
from reprlib import repr as shortened
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from chatlearn.errors import SyncError
from chatlearn.module import BaseModule, call_hook
from chatlearn.weights.adapters import has_adapters, merged_state
from chatlearn.weights.digest import digests, tensor_digest
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
        self._parameters = self._find_parameters(source)
        self._trained: set[str] | None = None
        if plain:
            self._trained = {name for name, tensor in named_tensors(source) if tensor.requires_grad}
        self._digests: dict[tuple[str, torch.dtype], int] = {}

    def _find_parameters(self, source: BaseModule) -> set[str]:
        """Return which names of the state are parameters: known of those of `source.model`, not of other tensors."""
        if not isinstance(source.model, nn.Module):
            return set()
        if self.is_merged:  # merged parameters are new tensors, buffers are the model's
            buffers = {buffer.data_ptr() for buffer in source.model.buffers()}
            return {name for name, t in self.state.items() if t.data_ptr() not in buffers}
        names = (name for name, _ in source.model.named_parameters(remove_duplicate=False))
        parameters = {self.ties[name] for name in names}
        return {name for name in self.state if self.ties.get(name) in parameters}

    @property
    def trained(self) -> Collection[str]:
        """The names of what takes a gradient, as far as they are known."""
        return self._trained or ()

    def may_skip(self, name: str) -> bool:
        """Tell whether a tensor takes no gradient now, so that the destination may have it already."""
        return self._trained is not None and name not in self._trained

    @torch.no_grad()
    def refuse_non_finite(self, pair: str) -> None:
        """Refuse to send NaN, or parameters that are infinite, which would be found nowhere but in what is sampled.

        Buffers may hold infinities: masks do.

        Raises:
            SyncError: naming the first such tensor.
        """
        inexact = {
            name: tensor
            for name, tensor in self.state.items()
            if isinstance(tensor, Tensor)
            and (tensor.is_floating_point() or tensor.is_complex())
            and tensor.numel()
        }
        for name in _suspects(inexact):
            numbers = numbers_of(inexact[name])
            if bool(torch.isnan(numbers).any()):
                what = "NaN"
            elif name in self._parameters and bool(torch.isinf(numbers).any()):
                what = "an infinity"
            else:
                continue
            raise SyncError(
                f"tensor {name!r} of the source holds {what}", place=pair, fix=_KEEP_FINITE
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
    if not _is_same(sent, arrived):
        raise SyncError(
            f"{name!r} is {shortened(arrived)} after the sync, not {shortened(sent)}",
            place=where,
            fix="have load_state_dict() take over every value it is given",
        )


def _is_same(sent: object, arrived: object) -> bool:
    """Tell whether values are alike: containers by what they hold, tensors by value, unknown objects by type."""
    if isinstance(sent, Tensor) and isinstance(arrived, Tensor):
        alike = sent.shape == arrived.shape and torch.can_cast(sent.dtype, arrived.dtype)
        return alike and int(tensor_digest(sent.to(arrived.dtype))) == int(tensor_digest(arrived))
    if type(sent) is not type(arrived):
        return False
    if isinstance(sent, Mapping):
        one, other = cast("Mapping[Any, Any]", sent), cast("Mapping[Any, Any]", arrived)
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(sent, list | tuple):
        ours, theirs = cast("list[Any]", sent), cast("list[Any]", arrived)
        return len(ours) == len(theirs) and all(map(_is_same, ours, theirs))
    if isinstance(sent, float | complex):
        return sent == arrived or (sent != sent and arrived != arrived)
    if isinstance(sent, int | str | bytes | bytearray | set | frozenset):
        return sent == arrived
    return True


def _suspects(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors whose sum is not finite: all that hold NaN or an infinity, and huge ones."""
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    found: set[str] = set()
    for names in by_device.values():
        sums = torch.stack([_sum(tensors[name]) for name in names])
        flags = cast("list[bool]", torch.isfinite(sums).logical_not().tolist())
        found |= {name for name, flag in zip(names, flags, strict=True) if flag}
    return [name for name in tensors if name in found]


def _sum(tensor: Tensor) -> Tensor:
    plain = numbers_of(tensor)
    half = plain.dtype is torch.float16  # whose sum would soon be infinite
    return plain.sum(dtype=torch.float32 if half else None).double()


def numbers_of(tensor: Tensor) -> Tensor:
    """Return a tensor's elements as real numbers that can be added and compared: dense, of 16 bits or more."""
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    return plain.float() if plain.element_size() == 1 else plain
