# SPDX-License-Identifier: Apache-2.0
import io

import pytest
import torch
from torch import nn

from chatlearn.errors import NonFiniteError
from chatlearn.training.optimiser import Optimiser, lr_factor


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    return model, Optimiser(model, lr=0.1, **options)


def set_gradients(model, value=1.0):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize(
    ("schedule", "warmup", "total", "expected"),
    [
        ("constant", 0, None, [1, 1, 1, 1]),
        ("constant", 3, None, [0.25, 0.5, 0.75, 1]),
        ("linear", 0, 4, [1, 0.75, 0.5, 0.25, 0, 0]),
        ("linear", 1, 3, [0.5, 1, 0.5, 0]),
        ("cosine", 0, 2, [1, 0.5, 0, 0]),
        ("cosine", 2, 2, [1 / 3, 2 / 3, 1]),
    ],
)
def test_schedules(schedule, warmup, total, expected):
    got = [
        lr_factor(step, schedule, warmup_steps=warmup, total_steps=total)
        for step in range(len(expected))
    ]
    assert got == pytest.approx(expected)


def test_schedules_that_cannot_be_are_refused_at_once():
    with pytest.raises(ValueError, match="total_steps"):
        make(schedule="cosine")
    with pytest.raises(ValueError, match="staircase"):
        lr_factor(0, "staircase", total_steps=1)


def test_only_matrices_decay():
    model, optimiser = make(weight_decay=0.5, max_grad_norm=None)
    before = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 0.0)
    optimiser.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.allclose(new, old * 0.95 if old.ndim == 2 else old)


def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    model, optimiser = make(max_grad_norm=1.0)
    set_gradients(model)
    expected = sum(p.numel() for p in model.parameters()) ** 0.5
    assert optimiser.step() == pytest.approx(expected)
    after = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(after) == pytest.approx(1.0, abs=1e-5)


def test_small_gradients_are_left_alone():
    model, optimiser = make(max_grad_norm=1e6)
    set_gradients(model)
    optimiser.step()
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    model, optimiser = make()
    before = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, value)
    with pytest.raises(NonFiniteError, match="gradient norm is"):
        optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimiser.steps == 0


def test_skipping_counts():
    model, optimiser = make(non_finite="skip")
    before = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, float("nan"))
    optimiser.step()
    assert (optimiser.steps, optimiser.skipped) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_state_resumes_exactly_and_loads_without_pickled_code():
    options = {"schedule": "linear", "warmup_steps": 2, "total_steps": 9}
    model, optimiser = make(**options)
    for step in range(3):
        set_gradients(model, 0.1 * step)
        optimiser.step()
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    other, resumed = make(seed=1, **options)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3):
        for part, updater in ((model, optimiser), (other, resumed)):
            set_gradients(part, 0.3 - 0.1 * step)
            updater.step()
        assert optimiser.lr == resumed.lr
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_loaded_state_is_a_copy():
    model, optimiser = make()
    set_gradients(model)
    optimiser.step()
    _, other = make()
    other.load_state_dict(optimiser.state_dict())
    ours = optimiser.state_dict()["adam"]["state"][0]["exp_avg"]
    theirs = other.state_dict()["adam"]["state"][0]["exp_avg"]
    assert torch.equal(ours, theirs)
    assert ours.data_ptr() != theirs.data_ptr()
