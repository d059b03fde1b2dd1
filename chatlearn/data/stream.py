# SPDX-License-Identifier: Apache-2.0
"""`StreamDataset`: cuts an episode's samples into global batches of micro-batches for the trainer flow.

Both loader types make the same steps in the same order; they differ in when a step is handed out: `fixed` when the
episode is complete, `dynamic` as soon as the step's samples are. The first pass is in order; later passes
(`num_training_epoch`) are shuffled by seed, which needs the whole episode.
"""

from __future__ import annotations

import random
from typing import Literal

from chatlearn.flow.steps import Step


class StreamDataset:
    """Hand out the global batches of one episode.

    Args:
        loader_type: `fixed` or `dynamic`.
        global_batch_size: samples per train step; None trains on the whole episode at once.
        micro_batch_size: samples per micro-batch; None makes the global batch one micro-batch.
        epochs: passes over the episode's samples.
        incomplete_step: what becomes of a rest smaller than a global batch: `fill` it up from the episode's first
            samples, `drop_last`, or `keep` it smaller.
        seed: of the shuffles of later passes; derive it from (run seed, episode).

    Example:
        >>> stream = StreamDataset("dynamic", global_batch_size=2, micro_batch_size=1)
        >>> stream.extend(3)
        [Step(index=0, micro_batches=((0,), (1,)))]
        >>> stream.close()
        [Step(index=1, micro_batches=((2,), (0,)))]
    """

    def __init__(
        self,
        loader_type: Literal["fixed", "dynamic"] = "fixed",
        *,
        global_batch_size: int | None = None,
        micro_batch_size: int | None = None,
        epochs: int = 1,
        incomplete_step: Literal["fill", "drop_last", "keep"] = "fill",
        seed: int | str = 0,
    ) -> None:
        self._streams = loader_type == "dynamic" and global_batch_size is not None
        self._global = global_batch_size
        self._micro = micro_batch_size
        self._epochs = epochs
        self._incomplete = incomplete_step
        self._seed = seed
        self._samples = 0
        self._cut = 0
        self._steps = 0

    def extend(self, samples: int) -> list[Step]:
        """Take note of `samples` more samples, in order; return the steps that are complete with them."""
        self._samples += samples
        ready: list[Step] = []
        while self._streams and self._global and self._samples - self._cut >= self._global:
            ready.append(self._step(list(range(self._cut, self._cut + self._global))))
            self._cut += self._global
        return ready

    def close(self) -> list[Step]:
        """Return the remaining steps of all passes; the number of samples is final now."""
        order = list(range(self._samples))
        steps = self._steps_of(order[self._cut :])
        for epoch in range(1, self._epochs):
            shuffled = list(order)
            random.Random(f"{self._seed}/{epoch}").shuffle(shuffled)
            steps += self._steps_of(shuffled)
        return steps

    def _steps_of(self, order: list[int]) -> list[Step]:
        size = self._global or self._samples
        steps: list[Step] = []
        for start in range(0, len(order), size or 1):
            chosen = order[start : start + size]
            if len(chosen) < size and self._incomplete == "drop_last":
                break
            if len(chosen) < size and self._incomplete == "fill":
                chosen += [i % self._samples for i in range(size - len(chosen))]
            steps.append(self._step(chosen))
        return steps

    def _step(self, positions: list[int]) -> Step:
        micro = self._micro or len(positions)
        parts = tuple(tuple(positions[i : i + micro]) for i in range(0, len(positions), micro))
        self._steps += 1
        return Step(self._steps - 1, parts)
