# SPDX-License-Identifier: Apache-2.0
"""What a parameter sync moves: names matched, shapes and dtypes compared, before anything is copied. Pure.

A name that only one end has is no mistake where it is *tied* to one that both have: a head that is the embedding, which
one end keeps apart and the other leaves out of its state. `Ties` say which of an end's names are one tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from chatlearn.errors import SyncError

_SHOWN = 20
"""Problems of one kind that an error lists."""

Ties = Mapping[str, str]
"""Of every name of a model, the first of those that are the same tensor: `{"head": "embed", "embed": "embed"}`."""


@dataclass(frozen=True)
class SyncPlan:
    """Which tensor (or value) of the source every name of the destination gets.

    Example:
        >>> plan_sync({"embed": weight}, {"embed": a, "head": b}, pair="x -> y", source_ties=TIED).origins
        {'embed': 'embed', 'head': 'embed'}
    """

    origins: Mapping[str, str]
    """Name in the source, by name in the destination."""
    bytes: int
    """What all of it takes in the destination."""


def ties_of(named: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Tell which names are one tensor: the same object, or the same memory in the same shape.

    Args:
        named: names and tensors of a model, none left out because another name has the same tensor.
    """
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for name, value in named:
        if isinstance(value, Tensor):
            ties[name] = first.setdefault(_identity(value), name)
    return ties


def _identity(tensor: Tensor) -> object:
    """Return what two names of one tensor have in common."""
    if (
        tensor.layout is not torch.strided or tensor.data_ptr() == 0
    ):  # without memory: `meta`, empty
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def plan_sync(
    source: Mapping[str, Any],
    destination: Mapping[str, Any],
    *,
    pair: str,
    place: str = "",
    source_ties: Ties | None = None,
    destination_ties: Ties | None = None,
    trained: Collection[str] = (),
) -> SyncPlan:
    """Match the tensors of a source with those of a destination.

    Args:
        source: named tensors (and plain values) of the module that teaches; on the device `meta` their values are not
            compared.
        destination: named tensors of the module that receives them.
        pair: `source -> destination`, for errors.
        place: where the user paired them, for errors.
        source_ties: which names of the source's model are one tensor; None takes what `source` itself shows.
        destination_ties: the same of the destination.
        trained: names in the source whose tensors training changes, as far as they are known.

    Raises:
        SyncError: names are missing on either side, shapes differ, a dtype cannot be converted, or the destination ties
            what the source keeps apart; all of them at once.
    """
    matching = _Matching(
        source,
        destination,
        ties_of(source.items()) if source_ties is None else source_ties,
        ties_of(destination.items()) if destination_ties is None else destination_ties,
    )
    parted = _cut(matching.kept_apart(trained))
    problems = [*matching.problems(), *parted]
    if problems:
        fix = "give both modules the same architecture, or map names in state_dict() or load_state_dict()"
        if len(parted) == len(problems):
            fix = "tie them in both models or in neither (tie_word_embeddings in their configurations)"
        raise SyncError(
            f"parameters of {pair} do not match:\n" + "\n".join(f"  {line}" for line in problems),
            place=place,
            fix=fix,
        )
    moved = [value for value in destination.values() if isinstance(value, Tensor)]
    return SyncPlan(matching.origins, sum(t.numel() * t.element_size() for t in moved))


class _Matching:
    """Both ends' names, matched; what does not match stays in `missing` and `extra`."""

    def __init__(
        self,
        source: Mapping[str, Any],
        destination: Mapping[str, Any],
        source_ties: Ties,
        destination_ties: Ties,
    ) -> None:
        self.source, self.destination = source, destination
        self.source_ties, self.destination_ties = source_ties, destination_ties
        held = {source_ties[name]: name for name in reversed(list(source)) if name in source_ties}
        self.origins: dict[str, str] = {}
        for name in destination:
            origin = name if name in source else held.get(source_ties.get(name, ""))
            if origin is not None:
                self.origins[name] = origin
        self.missing = [name for name in destination if name not in self.origins]
        used = set(self.origins.values())
        self.unused = [name for name in source if name not in used]
        # What the destination's state leaves out may be one tensor with one that it shows.
        shown = {destination_ties[name] for name in self.origins if name in destination_ties}
        self.extra = [name for name in self.unused if destination_ties.get(name) not in shown]

    def problems(self) -> list[str]:
        """Say all that does not match, a line each."""
        return [
            *_unmatched(self.missing, self.destination, self.extra, self.source, "source"),
            *_unmatched(self.extra, self.source, self.missing, self.destination, "destination"),
            *_cut(self._different()),
        ]

    def _different(self) -> list[str]:
        """Say which tensors differ in shape, or in a dtype that cannot be converted."""
        lines: list[str] = []
        for name, origin in self.origins.items():
            sent, own = self.source[origin], self.destination[name]
            if not isinstance(sent, Tensor) or not isinstance(own, Tensor):
                continue
            called = name if name == origin else f"{name} (there: {origin})"
            if sent.shape != own.shape:
                shapes = (list(sent.shape), list(own.shape))
                lines.append(
                    f"{called} is {shapes[0]} in the source, {shapes[1]} in the destination"
                )
            elif not torch.can_cast(sent.dtype, own.dtype):
                kinds = (str(t.dtype).removeprefix("torch.") for t in (sent, own))
                lines.append(f"{called} is {' in the source, '.join(kinds)} in the destination")
        return lines

    def kept_apart(self, trained: Collection[str]) -> list[str]:
        """Say which names are one tensor in the destination, and differ in the source, or will after a train step."""
        lines: list[str] = []
        first_of: dict[str, str] = {}
        for name in [*self.destination, *self.unused]:
            origin, tie = self.origins.get(name, name), self.destination_ties.get(name)
            if tie is None or origin not in self.source:
                continue
            other = first_of.setdefault(tie, origin)
            one, two = self.source[origin], self.source[other]
            if origin == other:
                continue
            both = f"{origin} and {other} are one tensor in the destination"
            if not _equal(one, two):
                lines.append(f"{both}, and differ in the source")
            elif self._are_two(origin, other) and not {origin, other}.isdisjoint(trained):
                lines.append(f"{both}, and two in the source, which training makes differ")
        return lines

    def _are_two(self, one: str, other: str) -> bool:
        """Tell whether two names are known to be different tensors in the source."""
        ties = self.source_ties
        return one in ties and other in ties and ties[one] != ties[other]


def _unmatched(
    names: Sequence[str],
    here: Mapping[str, Any],
    others: Sequence[str],
    there: Mapping[str, Any],
    end: str,
) -> list[str]:
    """Say which names an end lacks; with each, the closest of its own that nobody asks for and that has the shape."""
    lines: list[str] = []
    for name in names[:_SHOWN]:
        shape = getattr(here[name], "shape", None)
        alike = [other for other in others if getattr(there[other], "shape", None) == shape]
        close = get_close_matches(name, alike, n=1)
        lines.append(f"{name} is missing in the {end}{f' (close: {close[0]})' if close else ''}")
    more = len(names) - len(lines)
    return lines + [f"and {more} more are missing in the {end}"] * bool(more)


def _cut(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], f"and {more} more like these"] if more > 0 else lines


def _equal(one: Any, two: Any) -> bool:
    """Tell whether two tensors have the same values, as far as they have any."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.is_meta or two.is_meta:
        return True
    if one.shape != two.shape:
        return False
    same = one.data_ptr() == two.data_ptr() and one.stride() == two.stride()
    return same or torch.equal(one, two.to(one))
