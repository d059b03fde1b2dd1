# SPDX-License-Identifier: Apache-2.0

"""The clipped policy-gradient loss of PPO and GRPO, per token.

How it differs from the papers: GRPO (arXiv:2402.03300, eq. 3) averages inside the loss and adds its
KL term there; here averaging is `aggregation.py` and KL is `kl.py`, so one function serves GRPO,
Dr.GRPO and DAPO, which are choices of parameters (DAPO, arXiv:2503.14476, eq. 8: `clip_high=0.28`
with `token-mean`). PPO's dual clip is not applied. The log-ratio is clamped to +-20 before `exp`
(no paper has this); beyond it the gradient is zero.

Legend: `N` tokens that are trained on, all samples concatenated; nothing is padded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound on |log pi - log pi_old| before `exp`, so that a single outlier cannot overflow float32."""


class PolicyLoss(NamedTuple):
    """Hold the loss of every token and what it was computed from; all but `loss_N` are detached.

    Attributes:
        loss_N: `[N]`, to be minimised; carries the gradient.
        ratio_N: `[N]`, pi / pi_old.
        clipped_low_N: `[N]` bool, held back by the lower clip (negative advantage, ratio below `1 -
            clip_low`).
        clipped_high_N: `[N]` bool, held back by the upper clip (positive advantage, ratio above `1
            + clip_high`).
        approx_kl_N: `[N]`, the k3 estimate of KL(old || current), in nats, never negative.
    """

    loss_N: Tensor
    ratio_N: Tensor
    clipped_low_N: Tensor
    clipped_high_N: Tensor
    approx_kl_N: Tensor


def grpo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PolicyLoss:
    """Compute `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` with `r = exp(logprobs - old)`
    per token.

    At `logprobs == old` its gradient is that of `-A * logprobs`; on a clipped side it is exactly
    zero. Source: Schulman et al., arXiv:1707.06347, eq. 7; separate bounds from DAPO.

    Args:
        logprobs_N: `[N]` log-probs under the current policy, nats.
        old_logprobs_N: `[N]` log-probs at the start of the step (or the sampler's), treated as
            constants.
        advantages_N: `[N]`, treated as constants.
        clip_low: how far below 1 the ratio may push, at least 0.
        clip_high: how far above 1 the ratio may push, at least 0.

    Example:
        >>> zeros = torch.zeros(2)
        >>> grpo_loss(zeros, zeros, torch.tensor([1.0, -1.0])).loss_N
        tensor([-1.,  1.])
    """
    advantages = advantages_N.detach()
    log_ratio = (logprobs_N - old_logprobs_N.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    with torch.no_grad():
        clipped_low = (advantages < 0) & (ratio < 1.0 - clip_low)
        clipped_high = (advantages > 0) & (ratio > 1.0 + clip_high)
        approx_kl = torch.expm1(log_ratio) - log_ratio
    return PolicyLoss(loss, ratio.detach(), clipped_low, clipped_high, approx_kl)
