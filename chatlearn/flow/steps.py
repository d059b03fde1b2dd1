# SPDX-License-Identifier: Apache-2.0
"""Train steps as positions: what a source of global batches hands to the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Step:
    """One global batch: positions in the episode's delivered samples, per micro-batch.

    Example:
        Eight samples, global batches of four, micro-batches of two: the second step is
        `Step(index=1, micro_batches=((4, 5), (6, 7)))`.
    """

    index: int
    micro_batches: tuple[tuple[int, ...], ...]


class StepSource(Protocol):
    """Cuts delivered samples into global batches; `data.stream.StreamDataset` is the one we ship."""

    def extend(self, samples: int) -> list[Step]:
        """Take note that `samples` more samples have been delivered; return the steps now ready, in order."""
        ...

    def close(self) -> list[Step]:
        """Take note that the episode is complete; return the remaining steps, in order."""
        ...
