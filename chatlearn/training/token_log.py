# SPDX-License-Identifier: Apache-2.0
"""What an update did with each token: probability ratio, clip and weight, for the record of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chatlearn import columns
from chatlearn.algorithms.grpo import PolicyLoss
from chatlearn.training.packing import Rows
from chatlearn.training.samples import TrainSamples, is_lost


class TokenLog:
    """Takes the numbers of every response token down while an update is made.

    Example:
        >>> log = TokenLog(samples)
        >>> train_step(model, optimiser, samples, settings, log)
        >>> log.columns(micro_batches)[0]["ratio"]
        [tensor([1.0000, 0.9871]), tensor([1.0132])]
    """

    def __init__(self, samples: TrainSamples) -> None:
        self._samples = samples
        lengths = [len(response) for response in samples.response_ids]
        self._ratio = [torch.full((length,), math.nan) for length in lengths]
        self._clipped = [torch.zeros(length, dtype=torch.int8) for length in lengths]
        self._weight = torch.zeros(len(lengths))

    def weigh(self, weights_B: Tensor) -> None:
        """Take the weight of each sample's tokens in the loss, `[B]`."""
        self._weight = weights_B.float().cpu()

    def add(self, rows: Rows, policy: PolicyLoss) -> None:
        """Take the tokens of one micro-batch, in the order of its layout: `[N]` each."""
        ratio_N = policy.ratio_N.float().cpu()
        clipped_N = policy.clipped_high_N.cpu().to(torch.int8) - policy.clipped_low_N.cpu().to(
            torch.int8
        )
        start = 0
        for sample in (sample for row in rows for sample in row):
            mask = self._samples.loss_mask
            trained = slice(None) if mask is None else mask[sample].cpu()
            tokens = len(self._ratio[sample][trained])
            self._ratio[sample][trained] = ratio_N[start : start + tokens]
            self._clipped[sample][trained] = clipped_N[start : start + tokens]
            start += tokens

    def columns(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return `ratio`, `clipped` and `loss_weight` per micro-batch that the step was given.

        A token that was not trained on has a ratio of NaN, and a lost sample has none.
        """
        following = iter(range(len(self._ratio)))
        return [self._of_batch(batch, following) for batch in batches]

    def _of_batch(self, batch: Mapping[str, Any], following: Iterator[int]) -> dict[str, Any]:
        lost = is_lost(batch)
        places = [None if gone else next(following) for gone in lost]
        none = torch.zeros(0)
        return {
            columns.RATIO: [none if at is None else self._ratio[at] for at in places],
            columns.CLIPPED: [
                none.to(torch.int8) if at is None else self._clipped[at] for at in places
            ],
            columns.LOSS_WEIGHT: torch.tensor(
                [0.0 if at is None else float(self._weight[at]) for at in places]
            ),
        }
