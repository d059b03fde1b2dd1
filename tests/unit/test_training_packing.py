# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.errors import ConfigError
from chatlearn.training.packing import length_buckets, micro_batches, pack

LENGTHS = st.lists(st.integers(0, 50), max_size=60)
BUDGETS = st.integers(1, 120)


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 10, []),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([2, 9, 3, 8], 18, [[1, 3], [2, 0]]),
        ([30, 5], 10, [[0], [1]]),  # too long for the budget: alone
        ([5, 30, 5], 10, [[1], [0, 2]]),
        ([0, 0], 1, [[0, 1]]),
    ],
)
def test_length_buckets(lengths, budget, expected):
    assert length_buckets(lengths, budget) == expected


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 10, []),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([2, 9, 3, 8], 11, [[1, 0], [3, 2]]),
        ([30, 5], 10, [[0], [1]]),
        ([5, 5, 6, 4], 10, [[2, 3], [0, 1]]),
    ],
)
def test_pack(lengths, budget, expected):
    assert pack(lengths, budget) == expected


@given(LENGTHS, BUDGETS)
def test_buckets_hold_everything_once_within_the_budget(lengths, budget):
    buckets = length_buckets(lengths, budget)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        assert bucket
        cost = len(bucket) * max(lengths[i] for i in bucket)
        assert cost <= budget or len(bucket) == 1


@given(LENGTHS, BUDGETS)
def test_bins_hold_everything_once_and_no_two_could_be_joined(lengths, budget):
    bins = pack(lengths, budget)
    sums = sorted(sum(lengths[i] for i in members) for members in bins)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(
        total <= budget or len(members) == 1
        for members in bins
        for total in [sum(lengths[i] for i in members)]
    )
    assert len(sums) < 2 or sums[0] + sums[1] > budget


@given(LENGTHS, BUDGETS, st.booleans())
def test_micro_batches_hold_everything_once_within_the_budget(lengths, budget, packing):
    batches = micro_batches(lengths, budget, packing=packing)
    assert sorted(i for b in batches for row in b for i in row) == list(range(len(lengths)))
    for batch in batches:
        widest = max(sum(lengths[i] for i in row) for row in batch)
        assert len(batch) * widest <= budget or len(batch) == 1
        assert packing or all(len(row) == 1 for row in batch)
        assert widest <= max(lengths)
    assert batches == micro_batches(lengths, budget, packing=packing)


def test_packing_fills_rows():
    assert micro_batches([6, 2, 2, 2], 100, packing=True) == [[[0], [1, 2, 3]]]


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one token"):
        micro_batches([1], 0)
