# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from chatlearn.algorithms.kl import kl_penalty


@pytest.mark.parametrize(
    ("kind", "expected", "slope"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5))],
)
def test_values_and_slopes(kind, expected, slope):
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    value = kl_penalty(logprobs, torch.tensor([-1.5], dtype=torch.float64), kind)
    value.sum().backward()
    assert abs(float(value) - expected) < 1e-12
    assert abs(float(logprobs.grad) - slope) < 1e-12


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_equal_policies_have_no_divergence(kind):
    logprobs = torch.randn(5)
    assert kl_penalty(logprobs, logprobs, kind).abs().max() == 0


def test_k2_and_k3_are_never_negative():
    logprobs, reference = torch.randn(2, 1000, dtype=torch.float64)
    assert (kl_penalty(logprobs, reference, "k2") >= 0).all()
    assert (kl_penalty(logprobs, reference, "k3") >= 0).all()


def test_k1_and_k3_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, dtype=torch.float64, generator=generator).log_softmax(-1)
    exact = float((policy.exp() * (policy - reference)).sum())
    for kind in ("k1", "k3"):
        assert (
            abs(float((policy.exp() * kl_penalty(policy, reference, kind)).sum()) - exact) < 1e-12
        )


def test_k3_is_bounded():
    logprobs = torch.tensor([-1000.0], requires_grad=True)
    value = kl_penalty(logprobs, torch.zeros(1), "k3")
    value.backward()
    assert float(value) == 10.0
    assert float(logprobs.grad) == 0.0


def test_the_reference_gets_no_gradient():
    reference = torch.zeros(1, requires_grad=True)
    kl_penalty(torch.ones(1, requires_grad=True), reference).sum().backward()
    assert reference.grad is None


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
