# SPDX-License-Identifier: Apache-2.0
"""pass@k against exact binomials and against every subset; what an evaluation makes of its batches."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.flow.graph import FlowGraph, Node
from chatlearn.module import BaseModule
from chatlearn.observability.evaluation import EvaluationMetrics
from chatlearn.observability.pass_at_k import Tally, default_ks, pass_at_k


def exact(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 16, 33])
def test_it_is_the_quotient_of_binomials(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(float(exact(n, c, k)), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(2000, 3, 1000), (100_000, 50_000, 17), (10**6, 1, 10)])
def test_large_numbers_neither_overflow_nor_lose_digits(n: int, c: int, k: int) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(float(exact(n, c, k)), rel=1e-9)


@pytest.mark.parametrize("n", range(1, 8))
def test_it_is_the_share_of_subsets_with_a_pass(n: int) -> None:
    for c in range(n + 1):
        samples = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in itertools.combinations(samples, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets))


def test_edges() -> None:
    for n in (1, 2, 9):
        for k in range(1, n + 1):
            assert pass_at_k(n, 0, k) == 0.0
            assert pass_at_k(n, n, k) == 1.0
        for c in range(n + 1):
            assert pass_at_k(n, c, n) == float(c > 0)
            assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    for wrong in ((4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)):
        with pytest.raises(ValueError, match="cannot"):
            pass_at_k(*wrong)


@given(st.integers(1, 400), st.data())
def test_it_grows_with_k_and_with_passes_and_stays_a_probability(n: int, data: Any) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    here = pass_at_k(n, c, k)
    assert 0.0 <= here <= 1.0
    if k < n:
        assert pass_at_k(n, c, k + 1) >= here
    if c < n:
        assert pass_at_k(n, c + 1, k) >= here


@given(st.integers(1, 40), st.data())
def test_its_mean_over_draws_is_the_probability(n: int, data: Any) -> None:
    """Unbiased: over all outcomes of n independent samples that pass with probability p."""
    k, p = data.draw(st.integers(1, n)), Fraction(data.draw(st.integers(0, 10)), 10)
    outcomes = (math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1))
    mean = sum(float(weight) * pass_at_k(n, c, k) for c, weight in enumerate(outcomes))
    assert mean == pytest.approx(float(1 - (1 - p) ** k), abs=1e-9)


def test_default_ks() -> None:
    assert {n: default_ks(n) for n in (1, 2, 3, 8, 12)} == {
        1: [1],
        2: [1, 2],
        3: [1, 2, 3],
        8: [1, 2, 4, 8],
        12: [1, 2, 4, 8, 12],
    }


# ---- from batches to metrics --------------------------------------------------------------------


def graph_of(*returned: str) -> FlowGraph:
    """Nodes named `module.method`; all of them are returned."""
    modules = {name.split(".")[0]: BaseModule(name.split(".")[0]) for name in returned}
    nodes = tuple(
        Node(i, name, modules[name.split(".")[0]], name.split(".")[1].split("#")[0], (), ())
        for i, name in enumerate(returned)
    )
    return FlowGraph("eval_flow", nodes, tuple(range(len(nodes))))


def measure(
    batches: list[dict[str, Any]], prompts: int, n: int = 4, **settings: Any
) -> tuple[dict[str, float], list[str]]:
    measured = EvaluationMetrics(graph_of("reward.eval_step"), ["d"], n, **settings)
    measured.begin("d")
    measured.returned({0: batches}, prompts)
    return measured.summary(), measured.notes


REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
EXPECTED = {
    "reward/avg@4": 0.5,
    "reward/pass@1": 0.5,
    "reward/pass@2": 0.75,  # 1 - C(3,2)/C(4,2) = 0.5, and 1
    "reward/pass@4": 1.0,
}


@pytest.mark.parametrize(
    "columns",
    [
        {"rewards": torch.tensor(REWARDS)},
        {"rewards": REWARDS},
        {"rewards": torch.tensor(REWARDS).bool()},
        {"rewards": torch.tensor(REWARDS).int()},
        {"rewards": torch.tensor(REWARDS), "prompt_uid": torch.tensor([5] * 4 + [3] * 4)},
        {"rewards": torch.tensor(REWARDS), "prompt_uid": ["a"] * 4 + ["b"] * 4},
        {"rewards": torch.tensor(REWARDS), "uid": torch.arange(40, 48)},
    ],
)
@pytest.mark.parametrize("cut", [8, 3, 1])
def test_prompts_are_told_apart_by_prompt_uid_else_uid_else_position(columns, cut) -> None:
    batches = [
        {name: column[i : i + cut] for name, column in columns.items()} for i in range(0, 8, cut)
    ]
    metrics, notes = measure(batches, prompts=2)
    assert metrics == pytest.approx(EXPECTED)
    assert notes == []


def test_prompt_uid_need_not_be_adjacent() -> None:
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    batch = {
        "rewards": torch.tensor(REWARDS)[order],
        "prompt_uid": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])[order],
    }
    assert measure([batch], prompts=2)[0] == pytest.approx(EXPECTED)


def test_one_sample_per_prompt_measures_the_mean_reward_and_pass_at_1_only_if_asked() -> None:
    batch = {"rewards": torch.tensor([1.0, 0.0])}
    assert measure([batch], prompts=2, n=1) == ({"reward/rewards": 0.5}, [])
    assert measure([batch], prompts=2, n=1, ks=[1])[0] == {
        "reward/avg@1": 0.5,
        "reward/pass@1": 0.5,
    }


@dataclass
class Call:
    module: str
    metrics: dict[str, float]
    method: str = "eval_step"
    samples: int = 2
    outcomes: dict[str, int] = field(default_factory=dict)
    cause: str = ""


def test_the_mean_reward_of_one_sample_per_prompt_where_the_module_logged_none() -> None:
    measured = EvaluationMetrics(graph_of("a.eval_step", "b.eval_step"), ["x", "y"])
    for dataset, low in (("x", 0.0), ("y", 0.5)):
        measured.begin(dataset)
        measured.call(Call("b", {"rewards": 0.75, "length": 3.0}))
        first = {"solver/rewards": torch.tensor([1.0, low]), "rewards": ["no", "numbers"]}
        second = {"solver/rewards": torch.tensor([low, low]), "rewards": ["no", "numbers"]}
        own = {"rewards": torch.tensor([9.0, 9.0])}
        measured.returned({0: [first, second, {}], 1: [own]}, prompts=2)
    assert measured.summary() == {
        "b/rewards": 0.75,
        "b/length": 3.0,
        "a/solver/rewards": 0.4375,
        "x/b/rewards": 0.75,
        "x/b/length": 3.0,
        "x/a/solver/rewards": 0.25,
        "y/b/rewards": 0.75,
        "y/b/length": 3.0,
        "y/a/solver/rewards": 0.625,
    }
    assert measured.notes == []


def test_ks_and_threshold_as_configured() -> None:
    batch = {"rewards": torch.tensor([0.9, 0.2, 0.9, 0.9])}
    metrics, _ = measure([batch], prompts=1, ks=[3, 1, 3], threshold=0.9)  # float32's 0.9 counts
    assert list(metrics) == ["reward/avg@4", "reward/pass@1", "reward/pass@3"]
    assert metrics["reward/pass@1"] == pytest.approx(0.75)
    metrics, _ = measure([batch], prompts=1, ks=[1], threshold=0.91)
    assert metrics["reward/pass@1"] == 0.0


def test_a_namespace_has_metrics_of_its_own() -> None:
    batch = {
        "solver/rewards": torch.tensor(REWARDS[:4]),
        "rewards/exact": torch.tensor(REWARDS[:4]),  # a part of the reward: none of its own
        "rewards/rewards": torch.tensor(REWARDS[:4]),  # a part that is called so
    }
    metrics, _ = measure([batch], prompts=1, ks=[1])
    assert metrics == {"reward/solver/avg@4": 0.25, "reward/solver/pass@1": 0.25}


def test_a_prompt_with_fewer_samples_than_k_is_left_out_and_counted() -> None:
    uids = [0, 1, 2, 3, 4, 5]  # of 12: the second prompt lost two samples, the third all
    batch = {
        "uid": torch.tensor(uids),
        "prompt_uid": torch.tensor([uid // 4 for uid in uids]),
        "rewards": torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]),
    }
    for kept in (batch, {k: v for k, v in batch.items() if k != "prompt_uid"}):
        metrics, notes = measure([kept], prompts=3)
        assert metrics == pytest.approx(
            {
                "reward/avg@4": 0.5,
                "reward/pass@1": (0.25 + 1) / 2,
                "reward/pass@1_left_out": 1,
                "reward/pass@2": (0.5 + 1) / 2,
                "reward/pass@2_left_out": 1,
                "reward/pass@4": 1.0,
                "reward/pass@4_left_out": 2,
            }
        )
        assert notes == []


def test_nothing_left_by_a_filter() -> None:
    metrics, _ = measure([{"uid": [], "rewards": []}], prompts=2, n=2, ks=[1])
    assert metrics == {"reward/pass@1_left_out": 2}


def test_dropped_samples_that_nothing_tells_apart_are_noted() -> None:
    metrics, notes = measure([{"rewards": torch.tensor(REWARDS)[:6]}], prompts=2)
    assert metrics == {}
    assert "reward.eval_step: it returned 6 of 8 samples" in notes[0]


@pytest.mark.parametrize("column", [torch.ones(4, 2), ["a"] * 4, [torch.ones(2)] * 4, None])
def test_rewards_that_are_no_numbers_are_noted(column: Any) -> None:
    batch = {"text": ["x"] * 4} if column is None else {"rewards": column}
    metrics, notes = measure([batch], prompts=1)
    assert metrics == {}
    assert "no returned node" in notes[0]


def test_a_nan_reward_makes_its_pass_rate_nan_and_never_a_failure() -> None:
    metrics, _ = measure([{"rewards": torch.tensor([math.nan, 1.0, 1.0, 1.0])}], 1, ks=[1])
    assert all(math.isnan(value) for value in metrics.values())
    infinite, _ = measure([{"rewards": torch.tensor([math.inf, 1.0, 1.0, 1.0])}], 1, ks=[1])
    assert infinite == {"reward/avg@4": math.inf, "reward/pass@1": 1.0}


def test_two_returned_nodes_of_one_module_are_measured_apart() -> None:
    measured = EvaluationMetrics(graph_of("r.eval_step", "r.eval_step#2"), ["d"], 2, [1])
    measured.begin("d")
    first, second = {"rewards": torch.tensor([1.0, 0.0])}, {"rewards": torch.tensor([1.0, 1.0])}
    measured.returned({0: [first], 1: [second]}, prompts=1)
    assert measured.summary() == {
        "r.eval_step/avg@2": 0.5,
        "r.eval_step/pass@1": 0.5,
        "r.eval_step#2/avg@2": 1.0,
        "r.eval_step#2/pass@1": 1.0,
    }


def test_over_several_datasets_every_prompt_counts_alike() -> None:
    measured = EvaluationMetrics(graph_of("r.eval_step"), ["a", "b"], 2, [1])
    measured.begin("a")
    measured.returned({0: [{"rewards": torch.tensor([1.0, 1.0])}]}, prompts=1)
    measured.begin("b")
    measured.returned({0: [{"rewards": torch.tensor([0.0, 0.0] * 3)}]}, prompts=3)
    assert measured.summary() == {
        "r/avg@2": 0.25,
        "r/pass@1": 0.25,
        "a/r/avg@2": 1.0,
        "a/r/pass@1": 1.0,
        "b/r/avg@2": 0.0,
        "b/r/pass@1": 0.0,
    }
    assert Tally.together([]).metrics(2, [1]) == {}
