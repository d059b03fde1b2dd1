# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one sample's advantage, with its numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from chatlearn.columns import PROMPT_UID, REWARDS
from chatlearn.record.nodes import ABSENT, NodeRecord

_GROUP: Final = "chatlearn.models.advantage.GroupAdvantage"
_RELATIVE: Final = 1e-5


@dataclass
class Advantage:
    """What a node made of a sample's reward."""

    node: str
    column: str
    result: Any
    rewards: dict[int, float] = field(default_factory=dict[int, float])
    """Of the samples that it was compared with, itself included, by uid; empty where the module is not ours."""
    absent: list[int] = field(default_factory=list[int])
    """Samples of its group that the node did not get."""
    mean: float = math.nan
    """Of the group."""
    std: float = math.nan
    """Of the group, unbiased."""
    eps: float = 0.0
    normalise_std: bool = False
    leave_one_out: bool = False
    computed: float | None = None
    """The result as this arithmetic gives it; None where the module is not ours."""
    inputs: dict[str, float] = field(default_factory=dict[str, float])
    """Numbers that an unknown module got of the sample."""

    @property
    def agrees(self) -> bool:
        """Whether the arithmetic gives what is recorded."""
        if self.computed is None or not isinstance(self.result, float):
            return False
        return math.isclose(self.computed, self.result, rel_tol=_RELATIVE, abs_tol=1e-7)

    @property
    def is_flat(self) -> bool:
        """Whether all rewards of a group of several are equal."""
        return len(self.rewards) > 1 and len(set(self.rewards.values())) == 1


def explain_advantage(
    node: NodeRecord, uid: int, column: str, result: Any, settings: Mapping[str, Any]
) -> Advantage:
    """Do the arithmetic of `GroupAdvantage` again; of other modules give what they got and returned."""
    row = node.row_of[uid]
    call = next(c for c in node.calls if c.start <= row < c.start + c.entry.rows)
    found = Advantage(node.name, column, result)
    names = [place.name for place in call.input_layouts[0]]
    space = settings.get("namespace")
    own = f"{space}/{REWARDS}"
    name = own if space and own in names else REWARDS
    if node.kind != _GROUP or name not in names or PROMPT_UID not in names:
        cells = {n: node.input(n)[row] for n in names}
        found.inputs = {n: number for n, c in cells.items() if (number := _number(c)) is not None}
        return found
    groups, rewards = node.input(PROMPT_UID), node.input(name)
    group = int(groups[row])
    rows = [r for r in call.parts[0] if int(groups[r]) == group]
    found.rewards = {int(node.uids[r] or 0): float(rewards[r]) for r in rows}
    found.eps = float(settings["eps"])
    found.normalise_std = bool(settings["normalise_std"])
    found.leave_one_out = bool(settings["leave_one_out"])
    _compute(found, uid)
    return found


def _compute(found: Advantage, uid: int) -> None:
    values = list(found.rewards.values())
    count = len(values)
    found.mean = statistics.fmean(values)
    found.std = statistics.stdev(values) if count > 1 else math.nan
    if count == 1:
        found.computed = values[0]
    elif found.is_flat:
        found.computed = 0.0
    else:
        computed = found.rewards[uid] - found.mean
        if found.leave_one_out:
            computed *= count / (count - 1)
        if found.normalise_std:
            computed /= found.std + found.eps
        found.computed = computed


def _number(cell: Any) -> float | None:
    if cell is ABSENT or isinstance(cell, bool | str):
        return None
    if isinstance(cell, Tensor):
        return float(cell) if cell.numel() == 1 and cell.dim() == 0 else None
    return float(cell) if isinstance(cell, int | float) else None
