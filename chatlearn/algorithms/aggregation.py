# SPDX-License-Identifier: Apache-2.0

"""From the losses of tokens to one number, exactly the same for any split into micro-batches.

How it differs from the papers: they average over what is at hand; here every scheme is a weight per
sample that depends on the *global* batch alone, so micro-batches just add up: `loss = sum_n
weight[sample of n] * loss_n`. token-mean is DAPO's (arXiv:2503.14476), seq-mean-token-mean GRPO's
(arXiv:2402.03300), seq-mean-token-sum-norm that of Dr.GRPO (arXiv:2503.20783), whose length L is a
constant given by the user (elsewhere often the padded length, which changes from batch to batch).
Samples without any trained token (empty or fully masked) do not count as sequences.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]


class Denominators(NamedTuple):
    """Count what a global batch is averaged over; sums over all ranks, if there are several.

    Attributes:
        tokens: tokens that are trained on.
        sequences: samples with at least one such token.
    """

    tokens: int
    sequences: int


def count_denominators(tokens_B: Tensor) -> Denominators:
    """Count trained tokens and the samples that have any, from `tokens_B`, `[B]` trained tokens per
    sample.
    """
    return Denominators(int(tokens_B.sum()), int((tokens_B > 0).sum()))


def sample_weights(
    kind: Aggregation,
    tokens_B: Tensor,
    denominators: Denominators,
    *,
    norm_length: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `[B]` the weight that every trained token of a sample has in the loss.

    `token-mean` 1/tokens; `seq-mean-token-mean` 1/(sequences * own tokens); `seq-mean-token-sum`
    1/sequences; `seq-mean-token-sum-norm` 1/(sequences * norm_length).

    Args:
        kind: the scheme.
        tokens_B: `[B]` trained tokens per sample; any part of the global batch.
        denominators: of the whole global batch.
        norm_length: the constant L of `seq-mean-token-sum-norm`, in tokens.
        dtype: of the result.

    Raises:
        ValueError: an unknown scheme, or no positive `norm_length` where it is needed.

    Example:
        >>> tokens = torch.tensor([1, 3, 0])
        >>> sample_weights("seq-mean-token-mean", tokens, count_denominators(tokens))
        tensor([0.5000, 0.1667, 0.5000])
    """
    tokens = max(denominators.tokens, 1)
    sequences = max(denominators.sequences, 1)
    ones = torch.ones(tokens_B.shape, dtype=dtype, device=tokens_B.device)
    if kind == "token-mean":
        return ones / tokens
    if kind == "seq-mean-token-mean":
        return ones / (sequences * tokens_B.clamp(min=1))
    if kind == "seq-mean-token-sum":
        return ones / sequences
    if kind == "seq-mean-token-sum-norm":
        if norm_length is None or norm_length <= 0:
            raise ValueError("seq-mean-token-sum-norm needs a positive norm_length")
        return ones / (sequences * norm_length)
    raise ValueError(f"unknown aggregation {kind!r}")


def aggregate(loss_N: Tensor, sample_N: Tensor, weights_B: Tensor) -> Tensor:
    """Sum token losses with their samples' weights: a scalar; over micro-batches these add up to
    the loss.

    Args:
        loss_N: `[N]` losses of the trained tokens; masked tokens are left out, not zeroed.
        sample_N: `[N]` int64, the sample that each token belongs to.
        weights_B: `[B]` from `sample_weights`.

    Example:
        >>> aggregate(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), torch.tensor([0.5, 0.25]))
        tensor(1.)
    """
    return torch.dot(loss_N, weights_B.to(loss_N.dtype)[sample_N])
