# SPDX-License-Identifier: Apache-2.0
"""Whether two values are the same, bit for bit, and how far two columns are apart. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from chatlearn.flow.batch import Column

_SHOWN = 5
_EXACT: frozenset[type] = frozenset({int, str, bool, bytes, type(None)})
"""Types whose `==` tells everything."""


def same(first: Any, second: Any) -> bool:
    """Tell whether two values have the same type and content; NaN is the same as NaN, 0.0 is not -0.0.

    Tensors: the same dtype, shape and content; devices may differ.
    """
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and _same_tensors(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return _same_arrays(cast("Any", first), second)
    if isinstance(first, list | tuple):
        ours, theirs = cast("Sequence[Any]", first), cast("Sequence[Any]", second)
        kinds = list(map(type, ours))
        if kinds != list(map(type, theirs)):
            return False
        return first == second if _EXACT.issuperset(kinds) else all(map(same, ours, theirs))
    if isinstance(first, dict):
        ours, theirs = cast("Mapping[Any, Any]", first), cast("Mapping[Any, Any]", second)
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(first, float):
        return _bits(first) == _bits(second)
    return first is second or bool(first == second)


def _bits(number: float) -> Any:
    return "nan" if math.isnan(number) else (number, math.copysign(1.0, number))


def _same_tensors(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    first, second = first.detach().cpu(), second.detach().cpu()
    if torch.equal(first, second) and not (first.is_floating_point() and bool((first == 0).any())):
        return True
    if first.is_complex():
        first, second = torch.view_as_real(first), torch.view_as_real(second)
    if not first.is_floating_point():
        return torch.equal(first, second)
    if first.element_size() < 4:  # narrow floats lack some operations
        first, second = first.float(), second.float()
    equal = (first == second) & (first.signbit() == second.signbit())
    return bool((equal | (first.isnan() & second.isnan())).all())


def _same_arrays(first: Any, second: Any) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.dtype.kind == "O":
        return all(map(same, first.ravel().tolist(), second.ravel().tolist()))
    return first.tobytes() == second.tobytes()


def same_column(first: Column, second: Column) -> bool:
    """Tell whether two columns hold the same cells, one stacked and the other listed or not."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _same_tensors(first, second)
    if len(first) != len(second) or isinstance(first, Tensor) or isinstance(second, Tensor):
        return len(first) == len(second) and all(map(same, first, second))
    if {*map(type, first), *map(type, second)} == {
        Tensor
    }:  # as one comparison: there may be thousands
        shapes = [[cell.shape for cell in column] for column in (first, second)]
        kinds = [{(cell.dtype, cell.device) for cell in column} for column in (first, second)]
        if shapes[0] == shapes[1] and len(kinds[0]) == len(kinds[1]) == 1:
            return _same_tensors(_flat(first), _flat(second))
    return same(first, second)


def _flat(cells: list[Tensor]) -> Tensor:
    return torch.cat([cell.reshape(-1) for cell in cells])


@dataclass(frozen=True)
class Difference:
    """How a column that was made again differs from the recorded one."""

    column: str
    samples: int
    """Samples compared: those that both have."""
    differing: int = 0
    largest: float | None = None
    """Largest absolute difference of a number; None where no numbers of equal shape are compared."""
    uids: list[int] = field(default_factory=list[int])
    """Of the first samples that differ."""
    note: str = ""
    """What cannot be said in numbers: a column that only one side has, a change of dtype."""

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differing and not self.note


def compare_columns(
    column: str, uids: Sequence[int], recorded: Sequence[Any], made: Sequence[Any]
) -> Difference:
    """Compare a column's cells, sample by sample.

    Args:
        column: its name.
        uids: of the samples.
        recorded: cells of the record.
        made: cells that were made again.
    """
    apart = [i for i in range(len(uids)) if not same(recorded[i], made[i])]
    distances = [_distance(recorded[i], made[i]) for i in apart]
    known = [distance for distance in distances if distance is not None]
    kinds = {(_kind(recorded[i]), _kind(made[i])) for i in apart}
    changed = sorted(f"{old} became {new}" for old, new in kinds if old != new)
    return Difference(
        column,
        len(uids),
        len(apart),
        max(known) if known else None,
        [uids[i] for i in apart[:_SHOWN]],
        "; ".join(changed),
    )


def _distance(recorded: Any, made: Any) -> float | None:
    """Return the largest difference of two cells' numbers; infinite where only one is NaN."""
    try:
        first, second = torch.as_tensor(recorded), torch.as_tensor(made)
    except (TypeError, ValueError, RuntimeError):
        return None
    if (
        first.shape != second.shape
        or first.numel() == 0
        or first.is_complex()
        or second.is_complex()
    ):
        return None
    first, second = first.detach().cpu().double(), second.detach().cpu().double()
    gaps = torch.where(first == second, 0.0, (first - second).abs())
    gaps = torch.where(first.isnan() & second.isnan(), 0.0, gaps)
    return float(torch.where(gaps.isnan(), math.inf, gaps).max())


def _kind(cell: Any) -> str:
    if isinstance(cell, Tensor):
        return f"{str(cell.dtype).removeprefix('torch.')} of {cell.dim()} dimensions"
    return type(cell).__name__
