# SPDX-License-Identifier: Apache-2.0
import torch

from chatlearn.algorithms.grpo import grpo_loss


def loss(ratio: float, advantage: float, **clips: float) -> tuple[float, float]:
    """Return the loss of one token and its gradient with respect to the log-prob."""
    logprob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    zero = torch.zeros(1, dtype=torch.float64)
    result = grpo_loss(logprob, zero, torch.tensor([advantage], dtype=torch.float64), **clips)
    result.loss_N.sum().backward()
    return float(result.loss_N.detach()), float(logprob.grad)


def test_inside_the_clip_it_is_minus_advantage_times_ratio():
    value, gradient = loss(1.1, 2.0)
    assert abs(value + 2.2) < 1e-12
    assert abs(gradient + 2.2) < 1e-12


def test_the_clipped_sides_have_exactly_no_gradient():
    assert loss(1.3, 2.0) == (-2.4, 0.0)
    assert loss(0.7, -2.0) == (1.6, 0.0)


def test_the_other_sides_are_not_clipped():
    assert loss(0.7, 2.0)[1] != 0.0
    assert loss(1.3, -2.0)[1] != 0.0


def test_clip_higher_moves_the_upper_bound_alone():
    assert loss(1.25, 1.0, clip_high=0.28)[1] != 0.0
    assert loss(1.25, 1.0, clip_high=0.2)[1] == 0.0
    assert loss(0.75, -1.0, clip_high=0.28)[1] == 0.0


def test_on_policy_the_gradient_is_that_of_minus_advantage_times_logprob():
    torch.manual_seed(0)
    logprobs = torch.randn(7, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(7, dtype=torch.float64)
    grpo_loss(logprobs, logprobs.detach(), advantages).loss_N.sum().backward()
    assert torch.equal(logprobs.grad, -advantages)


def test_extreme_ratios_stay_finite_and_stop_the_gradient():
    logprobs = torch.tensor([0.0, -2000.0], requires_grad=True)
    old = torch.tensor([-2000.0, 0.0])
    result = grpo_loss(logprobs, old, torch.tensor([-1.0, 1.0]))
    result.loss_N.sum().backward()
    assert result.loss_N.isfinite().all()
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_statistics_name_the_side_that_was_clipped_and_carry_no_gradient():
    logprobs = torch.tensor([1.5, 0.5, 1.0, 1.5]).log().requires_grad_()
    result = grpo_loss(logprobs, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert result.clipped_high_N.tolist() == [True, False, False, False]
    assert result.clipped_low_N.tolist() == [False, True, False, False]
    assert torch.allclose(result.ratio_N, torch.tensor([1.5, 0.5, 1.0, 1.5]))
    assert (result.approx_kl_N >= 0).all()
    assert not result.approx_kl_N.requires_grad
    assert not result.ratio_N.requires_grad


def test_no_gradient_reaches_old_logprobs_or_advantages():
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    grpo_loss(*tensors).loss_N.sum().backward()
    assert tensors[1].grad is None
    assert tensors[2].grad is None


def test_empty_input_gives_an_empty_loss():
    empty = torch.empty(0)
    assert grpo_loss(empty, empty, empty).loss_N.shape == (0,)
