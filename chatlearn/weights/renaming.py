# SPDX-License-Identifier: Apache-2.0
"""The proof of a sync to a destination that loads in a way of its own: tensors renamed, merged, left out.

Names that are kept, or that all gained or lost one prefix, are proved as those of a plain destination are. All others
are found again by their digests: what holds a tensor of the source is proved, what holds none is unproven, and what is
found nowhere is lost. Which tensor a name held is kept, so that names that trade places later are seen. Tensors of one
value (fresh biases and norms) and tensors that are alike say nothing about names, so nothing is decided by them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chatlearn.errors import SyncError
from chatlearn.module import BaseModule, call_hook
from chatlearn.weights.digest import digests, total_digest
from chatlearn.weights.proof import Sent, numbers_of, verify

_SHOWN = 4
"""Names that an error lists."""
_COPY_NAMED = "have load_state_dict() copy every tensor it is given, always to the same name"


@dataclass(frozen=True)
class Arrival:
    """What was found in one destination after it was given the state of a source."""

    proved: Mapping[str, Tensor]
    """Tensors of the destination that hold one of the source's, by the destination's name."""
    unproven: tuple[str, ...]
    """Tensors that the destination's state shows and that hold none of the source's."""
    lost: tuple[str, ...]
    """Tensors of the source that the destination holds under no name."""
    digest: str
    """Of what is proved; where nothing is, of all that the destination's state shows."""


class Renaming:
    """Find what one destination makes of the names it is given, sync after sync.

    Example:
        >>> renaming = Renaming()
        >>> renaming.look(destination)
        >>> destination.load_state_dict(state)
        >>> renaming.prove(sent, destination, where="learner -> policy").lost
        ()
    """

    def __init__(self) -> None:
        self._origins: dict[str, str] = {}
        """Name in the source of what a name held when that could first be told."""
        self._expected: dict[str, int] = {}
        """Digests of these origins at the sync before."""
        self._had: dict[str, int] | None = None
        """Digests of the destination's tensors after the sync before; None before the first."""
        self._untouched: dict[str, int] = {}
        """Digests of its tensors before the first load; empty after it."""

    def look(self, destination: BaseModule) -> None:
        """Remember, before the first load, what the destination holds."""
        if self._had is None:
            shown = _tensors(call_hook(destination, "state_dict"))
            self._untouched = digests((_hidden(destination, shown) | shown).items())

    def prove(self, sent: Sent, destination: BaseModule, *, where: str) -> Arrival:
        """Prove what can be compared, after the load.

        Raises:
            SyncError: a tensor that kept its name, or its name but for a prefix, is not what was sent; names traded
                their tensors; a tensor stayed what it was though its origin changed; or the load did nothing.
        """
        arrived = call_hook(destination, "state_dict")
        shown = _tensors(arrived)
        kept = _kept_names(sent, arrived)
        numbers = verify(sent, arrived, kept, where=where)
        held = _Held(sent, {name: t for name, t in shown.items() if name not in kept})
        found = {kept[name] for name in numbers}.union(*held.origins.values())
        lost = _lost(sent, found)
        hidden: dict[str, Tensor] = {}
        if lost:  # a state may leave out what the model holds
            hidden = _hidden(destination, shown)
            inside = _Held(sent, hidden)
            found = found.union(*inside.origins.values())
            lost = _lost(sent, found)
            held.add(inside)
        proved = {n: t for n, t in (hidden | shown).items() if n in kept or held.origins.get(n)}
        if lost and held.fits and self._is_idle(held, proved.values()):
            raise SyncError(
                f"nothing arrived: load_state_dict() of {destination!r} changed none of its tensors, and none is what "
                f"was sent ({_listed(lost)})",
                place=where,
                fix="have load_state_dict() copy every tensor it is given",
            )
        self._refuse_moved(sent, held, found, where)
        self._had, self._untouched = held.numbers, {}
        numbers |= held.numbers
        compared = proved or shown
        return Arrival(
            proved,
            tuple(n for n in shown if n not in proved),
            tuple(lost),
            total_digest(compared, numbers),
        )

    def _is_idle(self, held: _Held, proved: Iterable[Tensor]) -> bool:
        """Tell whether the first load changed nothing, and nothing of the source is there but what may be by chance.

        This says something only where no tensor can be merged from several (`held.fits`): one that is may have been
        right before.
        """
        same = held.numbers.items() <= self._untouched.items()
        return same and bool(held.numbers) and all(map(_is_constant, proved))

    def _refuse_moved(self, sent: Sent, held: _Held, found: Collection[str], where: str) -> None:
        """Refuse names that hold another tensor than at first, or an old one; then keep what names hold now."""
        moved: list[str] = []
        tied = {sent.ties.get(name, name) for name in found}
        wanted = {
            name: (origin, held.tensors[name].dtype)
            for name, origin in self._origins.items()
            if name in held.tensors and origin in sent.state
        }
        expected = sent.digests_as(wanted)
        for name, (origin, _) in wanted.items():
            number, now = held.numbers[name], held.origins[name]
            if number == expected[name]:
                continue
            if now and not _is_constant(held.tensors[name]):
                moved.append(f"{name!r} holds what the source calls {now[0]!r}, not {origin!r}")
            elif (
                (self._had or {}).get(name) == number
                and expected[name] != self._expected.get(name)
                and sent.ties.get(origin, origin) not in tied
            ):
                moved.append(f"{name!r} is as it was before, and {origin!r} of the source is not")
        if moved:
            more = f"; and {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else ""
            raise SyncError(
                "tensors did not arrive where they did before: " + "; ".join(moved[:_SHOWN]) + more,
                place=where,
                fix=_COPY_NAMED,
            )
        new = held.decided(sent, self._origins)
        self._origins |= new
        kinds = {name: (origin, held.tensors[name].dtype) for name, origin in new.items()}
        self._expected |= expected | sent.digests_as(kinds)


class _Held:
    """Tensors of a destination under names that the source does not have, and which of the source's each one is."""

    def __init__(self, sent: Sent, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.numbers = digests(tensors.items())
        shapes: dict[torch.Size, list[str]] = {}
        for name, tensor in _tensors(sent.state).items():
            shapes.setdefault(tensor.shape, []).append(name)
        self.fits = all(
            any(torch.can_cast(sent.state[n].dtype, t.dtype) for n in shapes.get(t.shape, []))
            for t in tensors.values()
        )
        """Whether each one could be a tensor of the source, by shape and dtype."""
        known: dict[tuple[torch.Size, torch.dtype], dict[int, list[str]]] = {}
        self.origins: dict[str, list[str]] = {}
        """Names in the source of all tensors that each one may be; none where it is none of them."""
        for name, tensor in tensors.items():
            kind = tensor.shape, tensor.dtype
            if kind not in known:
                known[kind] = _by_digest(sent, shapes.get(tensor.shape, []), tensor.dtype)
            self.origins[name] = known[kind].get(self.numbers[name], [])

    def add(self, other: _Held) -> None:
        """Take in tensors found elsewhere."""
        self.tensors |= other.tensors
        self.numbers |= other.numbers
        self.origins |= other.origins
        self.fits = self.fits and other.fits

    def decided(self, sent: Sent, known: Collection[str]) -> dict[str, str]:
        """Return the origin of every new name that has one only, shared with no name, and more than one value."""
        single = {
            name: origins[0]
            for name, origins in self.origins.items()
            if len({sent.ties.get(origin, origin) for origin in origins}) == 1
        }
        taken = Counter(single.values())
        return {
            name: origin
            for name, origin in single.items()
            if name not in known and taken[origin] == 1 and not _is_constant(self.tensors[name])
        }


def _by_digest(sent: Sent, names: Collection[str], dtype: torch.dtype) -> dict[int, list[str]]:
    """Return which of the source's tensors have a digest, once they are of a dtype."""
    castable = {n: (n, dtype) for n in names if torch.can_cast(sent.state[n].dtype, dtype)}
    found: dict[int, list[str]] = {}
    for name, number in sent.digests_as(castable).items():
        found.setdefault(number, []).append(name)
    return found


def _kept_names(sent: Sent, arrived: Mapping[str, Any]) -> dict[str, str]:
    """Return the name in the source of every name that was kept, or that all differ from by one prefix."""
    kept = {name: name for name in arrived if name in sent.state}
    source = list(_tensors(sent.state))
    if kept or not source:
        return kept
    first = source[0]
    longer = {name.removesuffix(first) for name in arrived if name.endswith(first)}
    shorter = {first.removesuffix(name) for name in arrived if first.endswith(name)}
    ways = [{prefix + name: name for name in source} for prefix in longer]
    ways += [
        {name.removeprefix(prefix): name for name in source}
        for prefix in shorter
        if all(name.startswith(prefix) for name in source)
    ]
    fitting = [way for way in ways if len(way) == len(source) and _fits(sent, arrived, way)]
    return fitting[0] if len(fitting) == 1 else {}


def _fits(sent: Sent, arrived: Mapping[str, Any], way: Mapping[str, str]) -> bool:
    return all(
        isinstance(own := arrived.get(name), Tensor) and own.shape == sent.state[origin].shape
        for name, origin in way.items()
    )


def _lost(sent: Sent, found: Collection[str]) -> list[str]:
    """Return the tensors of the source that are not found, nor one tensor with one that is."""
    held = {sent.ties.get(name, name) for name in found}
    return [
        n for n, t in _tensors(sent.state).items() if sent.ties.get(n, n) not in held and t.numel()
    ]


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _hidden(destination: BaseModule, shown: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of all models that a module holds, under whatever attribute, that its state does not show."""
    models: dict[str, Any] = {"": destination.model}
    models |= {f"{name}.": value for name, value in vars(destination).items()}
    if isinstance(destination, nn.Module):
        models["self."] = destination
    seen = {id(tensor) for tensor in shown.values()}
    seen |= {t.data_ptr() for t in shown.values() if t.layout is torch.strided}
    hidden: dict[str, Tensor] = {}
    for prefix, model in models.items():
        if not isinstance(model, nn.Module):
            continue
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            key = tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)
            if key not in seen and not tensor.is_meta:
                seen.add(key)
                hidden[prefix + name] = tensor
    return {name: tensor for name, tensor in hidden.items() if name not in shown}


@torch.no_grad()
def _is_constant(tensor: Tensor) -> bool:
    """Tell whether all elements are one number, as those of fresh biases and norms are."""
    plain = numbers_of(tensor)
    return plain.numel() < 2 or bool((plain == plain.flatten()[0]).all())


def _listed(names: Collection[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(list(names)[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
