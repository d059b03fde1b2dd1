# SPDX-License-Identifier: Apache-2.0
"""Which prompt comes next: turns, wraps, shuffles; a pure function of how many were drawn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.data.sampler import PromptSampler
from chatlearn.errors import ConfigError


def rows(sampler: PromptSampler, count: int) -> list[tuple[int, int]]:
    return [(draw.dataset, draw.row) for draw in sampler.draw(count)]


def test_turns_by_quota() -> None:
    sampler = PromptSampler([2, 3], ratio=[1, 2])
    assert rows(sampler, 4) == [(0, 0), (1, 0), (1, 1), (0, 1)]
    assert rows(sampler, 5) == [(1, 2), (1, 0), (0, 0), (1, 1), (1, 2)]


def test_without_ratio_one_of_each() -> None:
    assert rows(PromptSampler([1, 2]), 4) == [(0, 0), (1, 0), (0, 0), (1, 1)]


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=3),
    st.booleans(),
    st.lists(st.integers(0, 7), max_size=6),
)
def test_drawing_in_parts_is_drawing_at_once(
    datasets: list[tuple[int, int]], shuffle: bool, parts: list[int]
) -> None:
    def make() -> PromptSampler:
        sizes, ratio = zip(*datasets, strict=True)
        return PromptSampler(sizes, ratio=ratio, shuffle=shuffle, seed=1)

    whole = rows(make(), sum(parts))
    stepwise = make()
    assert [row for part in parts for row in rows(stepwise, part)] == whole
    resumed = make()
    resumed.drawn = sum(parts)
    assert rows(resumed, 5) == rows(stepwise, 5)
    for dataset, (size, _) in enumerate(datasets):
        mine = [row for d, row in whole if d == dataset]
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(size)), "each pass is whole"


def test_shuffles_differ_by_pass_dataset_and_seed() -> None:
    one = rows(PromptSampler([20, 20], shuffle=True, seed=1), 80)
    orders = [tuple(r for d, r in one if d == k)[i : i + 20] for k in (0, 1) for i in (0, 20)]
    other = rows(PromptSampler([20, 20], shuffle=True, seed=2), 80)
    assert len({*orders}) == 4
    assert one != other
    assert Counter(one) == Counter(other)


datasets_ = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=3)


@given(datasets_, st.integers(0, 40), st.integers(0, 40))
def test_taken_counts_what_is_drawn(datasets: list[tuple[int, int]], before: int, n: int) -> None:
    sizes, ratio = zip(*datasets, strict=True)
    sampler = PromptSampler(sizes, ratio=ratio)
    sampler.draw(before)
    counted = Counter(draw.dataset for draw in sampler.draw(n))
    assert sampler.taken(before, n) == [counted[dataset] for dataset in range(len(sizes))]


@given(datasets_, st.integers(1, 4))
def test_every_turn_keeps_the_quotas(datasets: list[tuple[int, int]], turns: int) -> None:
    sizes, ratio = zip(*datasets, strict=True)
    drawn = rows(PromptSampler(sizes, ratio=ratio), turns * sum(ratio))
    turn = [dataset for dataset, quota in enumerate(ratio) for _ in range(quota)]
    assert [dataset for dataset, _ in drawn] == turn * turns


@given(datasets_, st.booleans(), st.integers(0, 60))
def test_others_do_not_change_a_dataset_s_own_order(
    datasets: list[tuple[int, int]], shuffle: bool, n: int
) -> None:
    sizes, ratio = zip(*datasets, strict=True)
    drawn = rows(PromptSampler(sizes, ratio=ratio, shuffle=shuffle, seed=4), n)
    # the same datasets with other quotas: how fast a dataset is walked through changes, its order does not
    other = rows(PromptSampler(sizes, ratio=ratio[::-1], shuffle=shuffle, seed=4), 3 * n + 9)
    for dataset, size in enumerate(sizes):
        mine, its = ([r for d, r in way if d == dataset] for way in (drawn, other))
        assert mine[: len(its)] == its[: len(mine)]
        if not shuffle:
            assert mine == [i % size for i in range(len(mine))]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_dataset_shorter_than_an_episode_repeats_within_it(shuffle: bool) -> None:
    drawn = [row for _, row in rows(PromptSampler([3], shuffle=shuffle, seed=1), 8)]
    assert [sorted(drawn[:3]), sorted(drawn[3:6])] == [[0, 1, 2], [0, 1, 2]]
    assert len(set(drawn[6:])) == 2


def test_a_ratio_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 number for 2 datasets") as raised:
        PromptSampler([1, 2], ratio=[1])
    assert raised.value.place == "runtime.data_ratio"
    assert "one positive number per dataset" in raised.value.fix
