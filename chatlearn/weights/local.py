# SPDX-License-Identifier: Apache-2.0
"""Parameter sync within one process: a copy, or shared storage where that is the same; proved every time.

source's state --adapters merged?--> plan: names, shapes, dtypes
                                       |  every replica: share storage, or load what it has not
                                       v
          digests of what was sent = digests of what arrived?  --probe now and then--> same log-probs?
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from chatlearn.errors import SyncError
from chatlearn.module import BaseModule, call_hook
from chatlearn.weights.digest import digests, total_digest
from chatlearn.weights.plan import plan_sync, ties_of
from chatlearn.weights.probe import ProbeReport, probe
from chatlearn.weights.proof import Sent, Stopwatch, named_tensors, verify
from chatlearn.weights.renaming import Renaming
from chatlearn.weights.sharing import aliases, are_plain, own_storage, share

_SHOWN = 4
"""Names that an error lists."""


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    Example:
        `SyncReport("learner -> policy", tensors=69, bytes=19020288, skipped=0, shared=False, digest="9f0c...", ...)`
    """

    pair: str
    tensors: int
    """Tensors and values that the source holds."""
    bytes: int
    """Moved, to all replicas together; by a `load_state_dict` of the user's, those of the tensors that were found to
    hold one of the source's."""
    skipped: int
    """Tensors not moved, since they take no gradient and every replica had them; 0 where storage is shared."""
    seconds: float
    """All of the sync, its proof included."""
    proof_seconds: float
    """Of these: for looking for NaN and infinities, and for digests."""
    shared: bool
    """Whether both ends have the same storage."""
    digest: str
    """16 hexadecimal digits of all that was compared, the same in two runs whose destinations got the same bytes."""
    unproven: tuple[str, ...] = ()
    """Tensors of the destination that a `load_state_dict` of the user's made of something else than one of the source's
    tensors: their digests cannot be compared."""
    lost: tuple[str, ...] = ()
    """Tensors of the source that such a destination holds under no name: merged into others, or left out."""
    proved: int = 0
    """Tensors of the (first) destination that were found to hold what was sent."""


class ParameterSync:
    """Carry the weights of one module to all replicas of another.

    Args:
        source: the module that teaches.
        destinations: the replicas of the module that receives.
        share: whether shared storage would do (see `sharing.py`).
        place: the user's line that paired them, for errors.
        source_trains: whether train steps change what of the source takes a gradient.

    Example:
        >>> sync = ParameterSync(learner, [policy], share=False)
        >>> sync.run().bytes
        3200000
    """

    def __init__(
        self,
        source: BaseModule,
        destinations: Sequence[BaseModule],
        *,
        share: bool,
        place: str = "",
        source_trains: bool = False,
    ) -> None:
        self.pair = f"{source.name} -> {destinations[0].name}"
        self._source = source
        self._destinations = destinations
        self._share = share
        self._shared = False
        self._place = place
        self._source_trains = source_trains
        self._had: list[dict[str, int]] = [{} for _ in destinations]
        """Digests of every plain replica's tensors after the sync before."""
        self._renamings = [Renaming() for _ in destinations]

    def release(self) -> None:
        """Give destinations that share storage their own again."""
        if self._shared:
            for destination in self._destinations:
                own_storage(destination)
            self._shared = False

    @property
    def moves_nothing(self) -> bool:
        """Whether neither side has any parameters (yet)."""
        return not call_hook(self._source, "state_dict") and not any(
            _receives(d) for d in self._destinations
        )

    def go_on(self) -> None:
        """Take what destinations have as what the last sync brought, as a resumed run finds them."""
        for number, destination in enumerate(self._destinations):
            state = call_hook(destination, "state_dict")
            named = ((name, t) for name, t in state.items() if isinstance(t, Tensor))
            self._had[number] = digests(named)

    def run(self) -> SyncReport:
        """Bring every destination to the source's weights, and prove that they arrived.

        Raises:
            SyncError: names, shapes or dtypes do not match, or the source holds NaN or infinite parameters (before
                anything is moved); or a tensor differs after the sync.
        """
        start, proof = time.perf_counter(), Stopwatch()
        sent = Sent(self._source, self._destinations[0])
        with proof.running():
            sent.refuse_non_finite(self.pair)
        done: list[_Transfer] = []
        for number, destination in enumerate(self._destinations):
            if not self._share_with(sent, destination):
                done.append(self._copy(sent, destination, number, proof))
            destination.policy_version += 1
        digest, proved = (done[0].digest, done[0].proved) if done else ("", 0)
        if self._shared:
            tensors = {name: t for name, t in sent.state.items() if isinstance(t, Tensor)}
            with proof.running():
                digest, proved = total_digest(tensors, digests(tensors.items())), len(tensors)
        return SyncReport(
            self.pair,
            tensors=len(sent.state),
            bytes=sum(transfer.bytes for transfer in done),
            skipped=min((transfer.skipped for transfer in done), default=0),
            seconds=time.perf_counter() - start,
            proof_seconds=proof.seconds,
            shared=self._shared,
            digest=digest,
            unproven=done[0].unproven if done else (),
            lost=done[0].lost if done else (),
            proved=proved,
        )

    def probe(self) -> ProbeReport | None:
        """Compare the log-probs that both ends give to the same tokens; None where one of them cannot tell.

        Raises:
            SyncError: they differ by more than the precision of the two allows.
        """
        return probe(self._source, self._destinations, pair=self.pair)

    def _share_with(self, sent: Sent, destination: BaseModule) -> bool:
        """Let a destination share the source's storage, if that is possible (still)."""
        state = sent.state
        if self._shared and not aliases(state, call_hook(destination, "state_dict")):
            self._shared = self._share = False  # the source made new tensors: copy from now on
            own_storage(destination)
        may_begin = self._share and not self._shared and not sent.is_merged
        if may_begin and are_plain(self._source, destination):
            self._plan(sent, destination, call_hook(destination, "state_dict"))
            self._shared = share(state, destination)
        return self._shared

    def _plan(
        self, sent: Sent, destination: BaseModule, own: Mapping[str, Any]
    ) -> Mapping[str, str]:
        """Return what every name of a plain destination gets."""
        ties = ties_of(chain(own.items(), named_tensors(destination)))
        return plan_sync(
            sent.state,
            own,
            pair=self.pair,
            place=self._place,
            source_ties=sent.ties,
            destination_ties=ties,
            trained=sent.trained if self._source_trains else (),
        ).origins

    def _copy(
        self, sent: Sent, destination: BaseModule, number: int, proof: Stopwatch
    ) -> _Transfer:
        """Load what a destination has not, and compare all of it with what was sent."""
        if bool(sent.state) != _receives(destination):
            empty = destination if sent.state else self._source
            raise SyncError(
                f"{empty!r} has no parameters to sync",
                place=self.pair,
                fix="make self.model in setup(), or override state_dict() and load_state_dict()",
            )
        where = f"{self.pair}, replica {number}" if len(self._destinations) > 1 else self.pair
        if type(destination).load_state_dict is not BaseModule.load_state_dict:
            return self._hand_over(sent, destination, number, where, proof)
        own = call_hook(destination, "state_dict")
        origins = self._plan(sent, destination, own)
        had = self._had[number]
        with proof.running():
            wanted = {
                name: (origin, own[name].dtype)
                for name, origin in origins.items()
                if name in had and sent.may_skip(origin)
            }
            expected = sent.digests_as(wanted)
        has = {name for name in wanted if expected[name] == had[name]}
        _load(destination, sent, origins, set(origins) - has)
        arrived = call_hook(destination, "state_dict")
        with proof.running():  # somebody else may have changed them since
            found = digests((name, arrived[name]) for name in has)
        changed = {name for name in has if found[name] != expected[name]}
        if changed:
            _load(destination, sent, origins, changed)
            arrived = call_hook(destination, "state_dict")
        new = {name: origin for name, origin in origins.items() if name not in has - changed}
        with proof.running():
            found |= verify(sent, arrived, new, where=where)
            digest = total_digest({name: arrived[name] for name in found}, found)
        self._had[number] = found
        return _Transfer(_bytes(arrived[n] for n in new), len(has - changed), len(found), digest)

    def _hand_over(
        self, sent: Sent, destination: BaseModule, number: int, where: str, proof: Stopwatch
    ) -> _Transfer:
        """Give all of the state to a `load_state_dict` of the user's, which may map names, keep or merge tensors."""
        renaming = self._renamings[number]
        with proof.running():
            renaming.look(destination)
        with torch.no_grad():
            call_hook(destination, "load_state_dict", isolate_state(sent.state))
        with proof.running():
            arrival = renaming.prove(sent, destination, where=where)
        proved = arrival.proved
        return _Transfer(
            _bytes(proved.values()), 0, len(proved), arrival.digest, arrival.unproven, arrival.lost
        )


@dataclass(frozen=True)
class _Transfer:
    """What was done for one replica."""

    bytes: int
    skipped: int
    proved: int
    digest: str
    unproven: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def isolate_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state that shares nothing with `state`."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


def _receives(module: BaseModule) -> bool:
    """Tell whether a module can take parameters: it has some, or its own way of loading them."""
    overridden = type(module).load_state_dict is not BaseModule.load_state_dict
    return overridden or bool(call_hook(module, "state_dict"))


def _load(destination: BaseModule, sent: Sent, origins: Mapping[str, str], names: set[str]) -> None:
    """Load tensors into a plain destination: those named, or all where its model loads in a way of its own."""
    if not names:
        return
    model = destination.model
    with torch.no_grad():
        if (
            isinstance(model, nn.Module)
            and type(model).load_state_dict is nn.Module.load_state_dict
            and "load_state_dict" not in vars(model)
        ):
            some = {n: sent.state[origin] for n, origin in origins.items() if n in names}
            found: Any = model.load_state_dict(some, strict=False)
            if unknown := ", ".join(found.unexpected_keys[:_SHOWN]):
                raise SyncError(
                    f"the model of {destination.name} has no {unknown}, which its state_dict() names",
                    fix=f"override load_state_dict() of {type(destination).__name__} as well, to map names back",
                )
        else:
            whole = {name: sent.state[origin] for name, origin in origins.items()}
            call_hook(destination, "load_state_dict", whole)


def _bytes(values: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))
