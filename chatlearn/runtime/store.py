# SPDX-License-Identifier: Apache-2.0
"""Where a driver in this process keeps batches: outputs of calls, and the samples delivered to the trainer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from chatlearn.flow.batch import Batch, size, take
from chatlearn.flow.batching import merge, select
from chatlearn.runtime.protocol import Piece

_PLACE = "the samples delivered to the trainer flow"


class OutputStore:
    """Keep what calls returned until everybody who takes it has taken it.

    Example:
        >>> store = OutputStore()
        >>> store.put(7, {"x": [1, 2]}, takes=2)
        >>> store.take(Piece(7, 0, 1))
        {'x': [1, 2]}
        >>> store.take(Piece(7, 1, 2)), len(store)
        ({'x': [1, 2]}, 0)
    """

    def __init__(self) -> None:
        self._outputs: dict[int, tuple[Any, int]] = {}

    def __len__(self) -> int:
        return len(self._outputs)

    def __getitem__(self, call: int) -> Any:
        return self._outputs[call][0]

    def put(self, call: int, output: Any, takes: int) -> None:
        """Keep the output of a call until `takes` of its entries have been taken; every taker counts anew."""
        if takes:
            self._outputs[call] = (output, takes)

    def take(self, piece: Piece) -> Any:
        """Return the whole output that `piece` is of, and forget it if this was the last piece."""
        output, takes = self._outputs.pop(piece.call)
        self.put(piece.call, output, takes - (piece.stop - piece.start))
        return output


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
        start, stop = positions[0], positions[-1] + 1
        if list(positions) == list(range(start, stop)):
            return self._range(start, stop)
        return select(self.everything(), positions)

    def _range(self, start: int, stop: int) -> Batch:
        """Return neighbours; of what is still growing only the chunks that hold them are touched."""
        first = bisect_right(self._starts, start) - 1
        parts: list[Batch] = []
        for chunk, at in zip(self._chunks[first:], self._starts[first:], strict=False):
            if at >= stop:
                break
            parts.append(take(chunk, max(start - at, 0), stop - at))
        return merge(parts, _PLACE)

    def everything(self) -> Batch:
        """Return all samples as one batch."""
        self._consolidate()
        return self._chunks[0] if self._chunks else {}

    def _consolidate(self) -> None:
        if len(self._chunks) > 1:
            self._chunks = [merge(self._chunks, _PLACE)]
            self._starts = [0, self._starts[-1]]
