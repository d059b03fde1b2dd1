# SPDX-License-Identifier: Apache-2.0
"""Parameter sync within one process: a copy that is compared afterwards, or shared storage where that is the same.

Sharing means that a destination's parameters *are* the source's tensors. Nothing is moved then, but every train
step is visible to the destination at once. That equals copying exactly if nobody looks at the destination between
a train step and the next sync; the engine asks for sharing only then (see `may_share`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chatlearn.errors import SyncError
from chatlearn.module import BaseModule
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

    @property
    def moves_nothing(self) -> bool:
        """Whether neither side has any parameters (yet)."""
        return not self._source.state_dict() and not any(_receives(d) for d in self._destinations)

    def run(self) -> SyncReport:
        """Bring every destination to the source's weights, and prove that they arrived.

        Raises:
            SyncError: names or shapes do not match, or a tensor differs after the sync.
        """
        start = time.perf_counter()
        source = self._source.state_dict()
        total = 0
        for destination in self._destinations:
            if self._share and not self._shared:
                self._shared = self._try_to_share(source, destination)
            if not self._shared:
                self._copy(source, destination)
            total += self._verify(source, destination)
            destination.policy_version += 1
        return SyncReport(
            self.pair, len(source), total, time.perf_counter() - start, shared=self._shared
        )

    def _copy(self, source: Mapping[str, Tensor], destination: BaseModule) -> None:
        if bool(source) != _receives(destination):
            empty = destination if source else self._source
            raise SyncError(
                f"{empty!r} has no parameters to sync",
                place=self.pair,
                fix="make self.model in setup(), or override state_dict() and load_state_dict()",
            )
        own = destination.state_dict()
        if own:
            plan_sync(source, own, pair=self.pair)
        with torch.no_grad():
            destination.load_state_dict(source)

    def _try_to_share(self, source: Mapping[str, Tensor], destination: BaseModule) -> bool:
        """Point the destination's parameters at the source's storage, if both are plain modules alike in all."""
        plain = all(
            type(m).state_dict is BaseModule.state_dict and m.model is not None
            for m in (self._source, destination)
        )
        if not plain:
            return False
        target = destination.state_dict()
        plan_sync(source, target, pair=self.pair)
        alike = all(
            t.dtype == source[n].dtype and t.device == source[n].device for n, t in target.items()
        )
        if not alike or destination.model is None:
            return False
        for name, parameter in destination.model.named_parameters():
            if name in source:
                parameter.data = source[name]
        for name, buffer in destination.model.named_buffers():
            if name in source:
                buffer.set_(source[name])  # pyright: ignore
        return True

    def _verify(self, source: Mapping[str, Tensor], destination: BaseModule) -> int:
        arrived = destination.state_dict()
        moved = 0
        for name, tensor in arrived.items():
            sent = source.get(name)
            if not isinstance(tensor, Tensor) or not isinstance(sent, Tensor):
                continue  # overridden state_dicts may carry plain values
            if self._shared and tensor.data_ptr() == sent.data_ptr():
                continue
            if not torch.equal(tensor, sent.to(tensor)):
                raise SyncError(
                    f"tensor {name!r} differs after the sync",
                    place=self.pair,
                    fix="have load_state_dict() copy every tensor it is given",
                )
            moved += tensor.numel() * tensor.element_size()
        return moved


def _receives(module: BaseModule) -> bool:
    """Tell whether a module can take parameters: it has some, or its own way of loading them."""
    overridden = type(module).load_state_dict is not BaseModule.load_state_dict
    return overridden or bool(module.state_dict())
