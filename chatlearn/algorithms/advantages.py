# SPDX-License-Identifier: Apache-2.0

"""Group-relative advantages: how much better a sample is than its siblings, the other samples of
its prompt.

How it differs from the papers: GRPO (arXiv:2402.03300) does not say which standard deviation it
divides by; this one is unbiased (`G - 1`), with 1e-6 added to it. Dr.GRPO (arXiv:2503.20783) is
`normalise_std=False`; RLOO (arXiv:2402.14740) is `leave_one_out=True, normalise_std=False`. Two
cases the papers leave open: a group of one has nothing to compare with and keeps its reward as
advantage (mean 0, deviation 1, as in verl); a group of equal rewards gets exactly 0, not what
rounding leaves over.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor


class GroupAdvantages(NamedTuple):
    """Hold advantages and how many groups taught nothing.

    Attributes:
        advantages_B: `[B]`, in the dtype of the rewards.
        groups: number of groups.
        flat_groups: groups of two or more samples whose rewards are all equal, so that every
            advantage is 0.
    """

    advantages_B: Tensor
    groups: int
    flat_groups: int


def group_advantages(
    rewards_B: Tensor,
    group_B: Tensor,
    *,
    normalise_std: bool = True,
    leave_one_out: bool = False,
    eps: float = 1e-6,
) -> GroupAdvantages:
    """Compute `(R - mean of the group) / (std of the group + eps)` for every sample.

    Args:
        rewards_B: `[B]` finite rewards, a floating dtype.
        group_B: `[B]` int64; equal numbers make a group; order and contiguity do not matter.
        normalise_std: divide by the group's unbiased standard deviation.
        leave_one_out: compare with the mean of the *other* samples, which is `G / (G - 1)` times as
            much.
        eps: added to the standard deviation.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([7, 7, 9])).advantages_B
        tensor([ 0.7071, -0.7071,  3.0000])
    """
    if rewards_B.numel() == 0:
        return GroupAdvantages(rewards_B.clone(), 0, 0)
    ids, index = cast("tuple[Tensor, Tensor]", torch.unique(group_B, return_inverse=True))
    zeros = rewards_B.new_zeros(ids.numel())
    sizes = zeros.index_add(0, index, torch.ones_like(rewards_B))
    centred = rewards_B - (zeros.index_add(0, index, rewards_B) / sizes)[index]

    lowest = zeros.scatter_reduce(0, index, rewards_B, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, rewards_B, "amax", include_self=False)
    flat = (lowest == highest) & (sizes > 1)

    others = (sizes - 1).clamp(min=1)
    advantages = centred
    if leave_one_out:
        advantages = advantages * (sizes / others)[index]
    if normalise_std:
        variance = zeros.index_add(0, index, centred.square()) / others
        advantages = advantages / (variance.sqrt() + eps)[index]
    advantages = torch.where(flat[index], 0.0, advantages)
    advantages = torch.where((sizes == 1)[index], rewards_B, advantages)
    return GroupAdvantages(advantages, ids.numel(), int(flat.sum()))
