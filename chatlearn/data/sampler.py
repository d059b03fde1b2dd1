# SPDX-License-Identifier: Apache-2.0
"""Which prompt comes next: a pure function of how many were drawn, so resuming is remembering one number.

Several datasets take turns by quota: with `ratio` [1, 3], prompt 0 of every four comes from the first dataset and
prompts 1 to 3 from the second; each walks its own order, wraps on its own and reshuffles every pass.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chatlearn.errors import ConfigError


@dataclass(frozen=True)
class Draw:
    """One prompt: which dataset, and which row of it."""

    dataset: int
    row: int


class PromptSampler:
    """Walk through one or several datasets, wrapping around.

    Args:
        sizes: rows of each dataset, all positive.
        ratio: prompts per turn of each dataset; None takes one of each.
        shuffle: reshuffle every pass, with a seed derived from (seed, dataset, pass).
        seed: of the run.

    Example:
        >>> sampler = PromptSampler([2, 3], ratio=[1, 2], shuffle=False, seed=0)
        >>> [(d.dataset, d.row) for d in sampler.draw(6)]
        [(0, 0), (1, 0), (1, 1), (0, 1), (1, 2), (1, 0)]
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        ratio: Sequence[int] | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        quotas = [1] * len(sizes) if ratio is None else list(ratio)
        if len(quotas) != len(sizes):
            raise ConfigError(
                f"runtime.data_ratio has {_count(len(quotas), 'number')} for {_count(len(sizes), 'dataset')}",
                place="runtime.data_ratio",
                fix="give one positive number per dataset of set_multiple_datasets",
            )
        self._sizes = list(sizes)
        self._turn = [dataset for dataset, quota in enumerate(quotas) for _ in range(quota)]
        self._quotas = quotas
        self._firsts = [sum(quotas[:dataset]) for dataset in range(len(quotas))]
        self._shuffle = shuffle
        self._seed = seed
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self.drawn = 0

    def draw(self, count: int) -> list[Draw]:
        """Return the next `count` prompts."""
        draws = [self._at(index) for index in range(self.drawn, self.drawn + count)]
        self.drawn += count
        return draws

    def taken(self, start: int, count: int) -> list[int]:
        """Count, per dataset, the prompts among the `count` ones after the first `start`."""
        return [
            self._before(start + count, dataset) - self._before(start, dataset)
            for dataset in range(len(self._sizes))
        ]

    def _before(self, index: int, dataset: int) -> int:
        """Count the prompts of `dataset` before prompt `index`."""
        turns, within = divmod(index, len(self._turn))
        quota = self._quotas[dataset]
        return turns * quota + min(max(within - self._firsts[dataset], 0), quota)

    def _at(self, index: int) -> Draw:
        dataset = self._turn[index % len(self._turn)]
        cycle, position = divmod(self._before(index, dataset), self._sizes[dataset])
        return Draw(dataset, self._row(dataset, cycle, position))

    def _row(self, dataset: int, cycle: int, position: int) -> int:
        if not self._shuffle:
            return position
        known = self._orders.get(dataset)
        if known is None or known[0] != cycle:
            order = list(range(self._sizes[dataset]))
            random.Random(f"{self._seed}/{dataset}/{cycle}").shuffle(order)
            known = self._orders[dataset] = (cycle, order)
        return known[1][position]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
