# SPDX-License-Identifier: Apache-2.0
"""Where a driver in this process keeps batches: outputs of calls, and the samples delivered to the trainer."""

from __future__ import annotations

from collections.abc import Sequence

from chatlearn.flow.batching import Batch, merge, select, size, take


class SampleStore:
    """Keep an episode's delivered samples in order and hand out any positions of them.

    Example:
        >>> store = SampleStore()
        >>> store.append({"x": [1, 2]})
        >>> store.append({"x": [3]})
        >>> store.gather((2, 0))
        {'x': [3, 1]}
    """

    def __init__(self) -> None:
        self._chunks: list[Batch] = []
        self._starts: list[int] = [0]

    def __len__(self) -> int:
        return self._starts[-1]

    def append(self, batch: Batch) -> None:
        """Add samples behind the ones already there."""
        self._chunks.append(batch)
        self._starts.append(self._starts[-1] + size(batch))

    def gather(self, positions: Sequence[int]) -> Batch:
        """Return the samples at `positions`, in that order."""
        self._consolidate()
        whole = self._chunks[0]
        start, stop = positions[0], positions[-1] + 1
        if list(positions) == list(range(start, stop)):
            return take(whole, start, stop)
        return select(whole, positions)

    def everything(self) -> Batch:
        """Return all samples as one batch."""
        self._consolidate()
        return self._chunks[0] if self._chunks else {}

    def _consolidate(self) -> None:
        if len(self._chunks) > 1:
            self._chunks = [merge(self._chunks, "the samples delivered to the trainer flow")]
            self._starts = [0, self._starts[-1]]
