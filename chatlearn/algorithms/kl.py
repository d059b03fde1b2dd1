# SPDX-License-Identifier: Apache-2.0

"""Per-token estimates of KL(policy || reference) from samples of the policy: k1, k2, k3.

How it differs from the source (Schulman, "Approximating KL divergence", 2020): k3's exponent is
clamped to +-20 and its value to 10 at most, as verl's `kl_penalty_forward` does (numerical guards;
the gradient is zero beyond them). As a *loss* on fresh samples they differ: k1's gradient is zero
in expectation, k2's is that of the reverse KL, k3's (GRPO's choice) is that of KL(reference ||
policy), which is another objective with the same optimum.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlType = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Bound on |log ref - log pi| inside k3's `exp`."""
MAX_K3 = 10.0
"""Bound on the value of k3."""


def kl_penalty(logprobs_N: Tensor, ref_logprobs_N: Tensor, kind: KlType = "k3") -> Tensor:
    """Estimate KL(policy || reference) per token, in nats; the gradient flows to `logprobs_N` only.

    With `d = ref - logprobs`: k1 is `-d` (unbiased, may be negative), k2 is `d^2 / 2` (biased,
    never negative), k3 is `exp(d) - d - 1` (unbiased, never negative).

    Args:
        logprobs_N: `[N]` log-probs under the current policy.
        ref_logprobs_N: `[N]` log-probs under the reference, treated as constants.
        kind: which estimator.

    Raises:
        ValueError: `kind` is not one of the three.

    Example:
        >>> kl_penalty(torch.tensor([-1.0]), torch.tensor([-3.0]), "k2")
        tensor([2.])
    """
    d = ref_logprobs_N.detach() - logprobs_N
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (torch.expm1(d) - d).clamp(max=MAX_K3)
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', not {kind!r}")
