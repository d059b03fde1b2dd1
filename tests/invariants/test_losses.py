# SPDX-License-Identifier: Apache-2.0
"""The oracles that every per-token loss and penalty has to pass, in float64."""

import pytest
import torch

from chatlearn.algorithms.aggregation import aggregate, count_denominators, sample_weights
from chatlearn.algorithms.grpo import grpo_loss
from chatlearn.algorithms.kl import kl_penalty

KINDS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
TOKENS = torch.tensor([5, 1, 0, 7, 3])


def draw():
    torch.manual_seed(0)
    count = int(TOKENS.sum())
    old = -torch.rand(count, dtype=torch.float64)
    # ratios on both sides of the clips, none within 0.01 of a kink
    ratio = torch.tensor([0.5, 0.75, 0.85, 1.0, 1.15, 1.25, 1.5], dtype=torch.float64)
    logprobs = old + ratio[torch.arange(count) % 7].log()
    advantages = torch.randn(count, dtype=torch.float64)
    reference = logprobs + 0.5 * torch.randn(count, dtype=torch.float64)
    return logprobs, old, advantages, reference


LOSSES = {
    "grpo": lambda lp, old, adv, ref: grpo_loss(lp, old, adv).loss_N,
    "clip-higher": lambda lp, old, adv, ref: grpo_loss(lp, old, adv, clip_high=0.28).loss_N,
    "k1": lambda lp, old, adv, ref: kl_penalty(lp, ref, "k1"),
    "k2": lambda lp, old, adv, ref: kl_penalty(lp, ref, "k2"),
    "k3": lambda lp, old, adv, ref: kl_penalty(lp, ref, "k3"),
    "grpo+k3": lambda lp, old, adv, ref: (
        grpo_loss(lp, old, adv).loss_N + 0.1 * kl_penalty(lp, ref, "k3")
    ),
}


def weights(kind):
    return sample_weights(
        kind, TOKENS, count_denominators(TOKENS), norm_length=8.0, dtype=torch.float64
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_finite_differences_agree_with_autograd(name, kind):
    logprobs, *others = draw()
    sample = torch.repeat_interleave(TOKENS)

    def value(lp):
        return aggregate(LOSSES[name](lp, *others), sample, weights(kind))

    leaf = logprobs.clone().requires_grad_()
    value(leaf).backward()
    for place in range(len(logprobs)):
        step = torch.zeros_like(logprobs)
        step[place] = 1e-6
        numeric = (value(logprobs + step) - value(logprobs - step)) / 2e-6
        assert abs(float(numeric) - float(leaf.grad[place])) < 1e-8


def test_clipped_sides_have_exactly_no_gradient_and_the_others_have_one():
    logprobs, old, advantages, _ = draw()
    leaf = logprobs.clone().requires_grad_()
    result = grpo_loss(leaf, old, advantages)
    result.loss_N.sum().backward()
    clipped = result.clipped_low_N | result.clipped_high_N
    assert clipped.any()
    assert (leaf.grad[clipped] == 0).all()
    assert (leaf.grad[~clipped] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_gradient_is_the_policy_gradient_up_to_weights(kind):
    logprobs, _, advantages, _ = draw()
    sample = torch.repeat_interleave(TOKENS)
    leaf = logprobs.clone().requires_grad_()
    aggregate(grpo_loss(leaf, logprobs, advantages).loss_N, sample, weights(kind)).backward()
    assert torch.allclose(leaf.grad, -advantages * weights(kind)[sample], atol=1e-15, rtol=0)


def test_on_policy_loss_of_centred_advantages_is_zero():
    logprobs, _, advantages, _ = draw()
    loss = grpo_loss(logprobs, logprobs, advantages - advantages.mean()).loss_N.mean()
    assert abs(float(loss)) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_by_samples_gives_the_same_loss(kind):
    logprobs, old, advantages, _ = draw()
    sample = torch.repeat_interleave(TOKENS)
    losses = grpo_loss(logprobs, old, advantages).loss_N
    whole = aggregate(losses, sample, weights(kind))
    for cut in range(len(TOKENS) + 1):
        left, right = sample < cut, sample >= cut
        parts = [aggregate(losses[m], sample[m], weights(kind)) for m in (left, right)]
        assert abs(float(sum(parts) - whole)) < 1e-12
