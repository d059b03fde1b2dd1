# SPDX-License-Identifier: Apache-2.0
"""Samples of a node by their number: the calls it is planned in, and what of a call runs at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Task:
    """One call to come: samples `start` to `stop` of a node, in the node's input space."""

    node: int
    ordinal: int
    start: int
    stop: int
    started: bool = False
    left: int = 0
    """Once started: samples that are neither finished nor lost."""

    @property
    def is_done(self) -> bool:
        """Whether all its samples are finished or lost."""
        return self.started and not self.left


@dataclass(slots=True)
class Portion:
    """Samples of a task for one call: all that were not lost before it, or some of them once more after a failure."""

    task: Task
    positions: Sequence[int]
    attempt: int = 0
    """How many calls that held these samples have failed."""
    origin: int = -1
    """The first call that held them, if it failed."""
    iteration: int = -1
    """Of that call, and so of every further one for its samples."""
    replica: int = -1
    """The replica that failed last; it gets them again only if it is the only one."""


def runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield stretches of neighbours as (start, stop).

    Example:
        >>> list(runs([3, 4, 7]))
        [(3, 5), (7, 8)]
    """
    if isinstance(positions, range):
        if positions:
            yield positions.start, positions.stop
        return
    start = 0
    for end in range(1, len(positions) + 1):
        if end == len(positions) or positions[end] != positions[end - 1] + 1:
            yield positions[start], positions[end - 1] + 1
            start = end


def without(positions: Sequence[int], offsets: Sequence[int]) -> Sequence[int]:
    """Return the positions but for those at some offsets."""
    if not offsets:
        return positions
    left_out = set(offsets)
    return [at for offset, at in enumerate(positions) if offset not in left_out]
