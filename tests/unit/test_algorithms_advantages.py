# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.algorithms.advantages import group_advantages


def advantages(rewards, groups, **options):
    return group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), **options
    ).advantages_B


def test_mean_and_unbiased_deviation_of_each_group():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    got = advantages([1.0, 2.0, 4.0, 8.0], [0, 0, 1, 1])
    for part in (slice(0, 2), slice(2, 4)):
        expected = (rewards[part] - rewards[part].mean()) / (rewards[part].std() + 1e-6)
        assert torch.allclose(got[part], expected, atol=1e-12)


def test_order_and_contiguity_of_groups_do_not_matter():
    together = advantages([1.0, 2.0, 4.0, 8.0], [5, 5, 3, 3])
    mixed = advantages([4.0, 1.0, 8.0, 2.0], [3, 5, 3, 5])
    assert torch.equal(mixed, together[[2, 0, 3, 1]])


def test_without_normalisation_it_is_the_centred_reward():
    assert advantages([1.0, 0.0, 0.5], [0, 0, 0], normalise_std=False).tolist() == [0.5, -0.5, 0.0]


def test_leave_one_out_compares_with_the_others():
    got = advantages([1.0, 0.0, 2.0], [0, 0, 0], normalise_std=False, leave_one_out=True)
    assert torch.allclose(got, torch.tensor([0.0, -1.5, 1.5], dtype=torch.float64))


def test_a_group_of_one_keeps_its_reward():
    for options in ({}, {"normalise_std": False}, {"leave_one_out": True}):
        assert advantages([3.0], [0], **options).tolist() == [3.0]


def test_equal_rewards_give_exactly_zero_and_are_counted():
    result = group_advantages(
        torch.tensor([0.1] * 7 + [1.0, 2.0]), torch.tensor([0] * 7 + [1] * 2), leave_one_out=True
    )
    assert result.advantages_B[:7].tolist() == [0.0] * 7
    assert (result.groups, result.flat_groups) == (2, 1)


def test_no_samples():
    result = group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert result.advantages_B.shape == (0,)


@given(
    st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 3)), min_size=1, max_size=20),
    st.booleans(),
    st.booleans(),
)
def test_always_finite_and_centred_in_groups_of_two_or_more(samples, normalise, leave_one_out):
    rewards = torch.tensor([r for r, _ in samples], dtype=torch.float64)
    groups = torch.tensor([g for _, g in samples])
    got = group_advantages(
        rewards, groups, normalise_std=normalise, leave_one_out=leave_one_out
    ).advantages_B
    assert got.isfinite().all()
    for group in groups.unique():
        members = groups == group
        if members.sum() > 1:
            assert abs(float(got[members].sum())) < 1e-6 * max(1, float(got[members].abs().max()))
