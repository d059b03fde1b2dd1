# SPDX-License-Identifier: Apache-2.0
"""Parameter sync within one process: a copy that is compared afterwards, or shared storage where that is the same.

Sharing means that a destination's parameters *are* the source's tensors. Nothing is moved then, but every train
step is visible to the destination at once. That equals copying exactly if nobody looks at the destination between
a train step and the next sync; the engine asks for sharing only then (see `may_share`). That a class changes its
weights at no other time only its author knows, so both classes must say so: `shares_weights = True`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chatlearn.errors import SyncError
from chatlearn.module import BaseModule, call_hook, has_model
from chatlearn.weights.plan import plan_sync


@dataclass(frozen=True)
class SyncReport:
    """What one sync did."""

    pair: str
    tensors: int
    bytes: int
    seconds: float
    shared: bool


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


class ParameterSync:
    """Carry the weights of one module to all replicas of another.

    Example:
        >>> sync = ParameterSync(learner, [policy], share=False)
        >>> sync.run().bytes
        3200000
    """

    def __init__(
        self, source: BaseModule, destinations: Sequence[BaseModule], *, share: bool
    ) -> None:
        self.pair = f"{source.name} -> {destinations[0].name}"
        self._source = source
        self._destinations = destinations
        self._share = share
        self._shared = False

    def release(self) -> None:
        """Give destinations that share storage their own again."""
        if self._shared:
            for destination in self._destinations:
                _own_storage(destination)
            self._shared = False

    @property
    def moves_nothing(self) -> bool:
        """Whether neither side has any parameters (yet)."""
        return not call_hook(self._source, "state_dict") and not any(
            _receives(d) for d in self._destinations
        )

    def run(self) -> SyncReport:
        """Bring every destination to the source's weights, and prove that they arrived.

        Raises:
            SyncError: names or shapes do not match, or a tensor differs after the sync.
        """
        start = time.perf_counter()
        source = call_hook(self._source, "state_dict")
        total = 0
        for destination in self._destinations:
            if self._shared and not _aliases(source, call_hook(destination, "state_dict")):
                self._shared = self._share = False  # the source made new tensors: copy from now on
                _own_storage(destination)
            if self._share and not self._shared:
                self._shared = self._try_to_share(source, destination)
            if not self._shared:
                self._copy(source, destination)
            total += self._verify(source, destination)
            destination.policy_version += 1
        return SyncReport(
            self.pair, len(source), total, time.perf_counter() - start, shared=self._shared
        )

    def _copy(self, source: Mapping[str, Any], destination: BaseModule) -> None:
        if bool(source) != _receives(destination):
            empty = destination if source else self._source
            raise SyncError(
                f"{empty!r} has no parameters to sync",
                place=self.pair,
                fix="make self.model in setup(), or override state_dict() and load_state_dict()",
            )
        keeps = type(destination).load_state_dict is not BaseModule.load_state_dict
        own = call_hook(destination, "state_dict")
        if own and not keeps:  # an overridden one may map names
            plan_sync(source, own, pair=self.pair)
        with torch.no_grad():  # a load_state_dict of the user's may keep what it is given
            call_hook(destination, "load_state_dict", isolate_state(source) if keeps else source)

    def _try_to_share(self, source: Mapping[str, Any], destination: BaseModule) -> bool:
        """Point the destination's parameters at the source's storage, if both are plain modules alike in all."""
        plain = all(
            vars(type(m)).get("shares_weights", False)
            and type(m).state_dict is BaseModule.state_dict
            and type(m).load_state_dict is BaseModule.load_state_dict
            and has_model(m)
            for m in (self._source, destination)
        )
        if not plain:
            return False
        target = call_hook(destination, "state_dict")
        plan_sync(source, target, pair=self.pair)
        alike = all(
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
        if _aliases(source, call_hook(destination, "state_dict")):
            return True
        _own_storage(destination)  # e.g. tied on one side only
        return False

    def _verify(self, source: Mapping[str, Any], destination: BaseModule) -> int:
        arrived = call_hook(destination, "state_dict")
        moved = 0
        for name, tensor in arrived.items():
            if name not in source:
                continue  # a load_state_dict that maps names; else the plan has refused it
            sent = source[name]
            if not isinstance(tensor, Tensor) or not isinstance(sent, Tensor):
                _verify_plain(name, sent, tensor, self.pair)
                continue
            if self._shared:
                continue  # the very same storage: `run` has looked
            if not torch.equal(tensor, sent.to(tensor)):
                is_nan = bool(torch.isnan(sent).any())  # which equals nothing, itself included
                raise SyncError(
                    f"tensor {name!r} of the source holds NaN"
                    if is_nan
                    else f"tensor {name!r} differs after the sync",
                    place=self.pair,
                    fix="look at the last train steps: lower the learning rate, clip gradients"
                    if is_nan
                    else "have load_state_dict() copy every tensor it is given",
                )
            moved += tensor.numel() * tensor.element_size()
        return moved


def _receives(module: BaseModule) -> bool:
    """Tell whether a module can take parameters: it has some, or its own way of loading them."""
    overridden = type(module).load_state_dict is not BaseModule.load_state_dict
    return overridden or bool(call_hook(module, "state_dict"))


def isolate_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state that shares nothing with `state`."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


def _verify_plain(name: str, sent: object, arrived: object, pair: str) -> None:
    """Compare plain values of overridden state dicts, as far as they can be compared."""
    comparable = isinstance(sent, bool | int | float | str | type(None))
    if type(sent) is not type(arrived) or (comparable and sent != arrived):
        raise SyncError(
            f"{name!r} is {arrived!r} after the sync, not {sent!r}",
            place=pair,
            fix="have load_state_dict() take over every value it is given",
        )


def _aliases(source: Mapping[str, Any], destination: Mapping[str, Any]) -> bool:
    """Tell whether every tensor of the destination is the source's."""
    return destination.keys() == source.keys() and all(
        tensor.data_ptr() == source[name].data_ptr() and tensor.shape == source[name].shape
        for name, tensor in destination.items()
    )


def _own_storage(module: BaseModule) -> None:
    """Give a module that shared another's storage its own again."""
    if has_model(module):
        for parameter in module.model.parameters():
            parameter.data = parameter.data.clone()
        for buffer in module.model.buffers():
            buffer.set_(buffer.clone())  # pyright: ignore[reportArgumentType]
