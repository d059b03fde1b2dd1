# SPDX-License-Identifier: Apache-2.0
"""The calls that are foretold are the calls that are made."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from chatlearn.flow.graph import FEED
from chatlearn.runtime.call_plan import planned_calls
from chatlearn.runtime.flow_run import FlowRun
from chatlearn.runtime.protocol import NodeSpec


@st.composite
def flows(draw: st.DrawFn) -> tuple[list[NodeSpec], list[int]]:
    """A chain or a fan of nodes, each behind one that came before, and the group of each sample."""
    specs = [
        NodeSpec(
            index,
            f"node{index}",
            f"node{index}",
            "forward_step",
            inputs=(draw(st.integers(FEED, index - 1)),),
            batch_size=draw(st.none() | st.integers(1, 7)),
            batch_by=draw(st.sampled_from(["sample", "group", "episode"])),
            filters=draw(st.sampled_from([False, False, True])),
        )
        for index in range(draw(st.integers(1, 4)))
    ]
    group = draw(st.integers(1, 4))
    return specs, [i // group for i in range(group * draw(st.integers(1, 8)))]


def drive(specs: list[NodeSpec], groups: list[int], seed: int, keeps: float) -> dict[int, Any]:
    """Run a flow whose calls finish in any order and whose filters keep any samples; return sizes by node."""
    chance = random.Random(seed)
    run = FlowRun(specs, (), range(len(groups)), groups)
    waiting, sizes, call = list(run.start()), defaultdict[int, dict[int, int]](dict), 0
    while waiting:
        portion = waiting.pop(chance.randrange(len(waiting)))
        task, count = portion.task, len(portion.positions)
        sizes[task.node][task.ordinal] = count
        kept = None
        if specs[task.node].filters:
            kept = tuple(i for i in range(count) if chance.random() < keeps)
        waiting += run.finish(portion, call, kept)
        call += 1
    assert run.complete
    return {node: tuple(of[i] for i in sorted(of)) for node, of in sizes.items()}


@given(flows(), st.integers(0, 99))
def test_what_is_planned_is_what_runs(flow: tuple[list[NodeSpec], list[int]], seed: int) -> None:
    specs, groups = flow
    made = drive(specs, groups, seed, keeps=0.6)
    for planned in planned_calls(specs, groups):
        if planned.is_exact:
            assert made[planned.spec.index] == planned.sizes
        else:
            assert len(made.get(planned.spec.index, ())) <= len(planned.sizes)


@given(flows(), st.integers(0, 99))
def test_behind_filters_that_keep_all_the_plan_is_exact_too(
    flow: tuple[list[NodeSpec], list[int]], seed: int
) -> None:
    specs, groups = flow
    made = drive(specs, groups, seed, keeps=1.1)
    assert [planned.sizes for planned in planned_calls(specs, groups)] == [
        made[spec.index] for spec in specs
    ]


def test_a_group_is_never_cut() -> None:
    spec = NodeSpec(0, "a", "a", "forward_step", (FEED,), batch_size=4, batch_by="group")
    sizes = [planned.sizes for planned in planned_calls([spec], [0] * 8 + [1] * 3 + [2])]
    assert sizes == [(8, 4)]


def test_only_nodes_behind_a_filter_are_uncertain() -> None:
    def spec(index: int, source: int, *, filters: bool = False) -> NodeSpec:
        return NodeSpec(index, f"{index}", f"{index}", "step", (source,), filters=filters)

    specs = [spec(0, FEED), spec(1, 0, filters=True), spec(2, 1), spec(3, 2), spec(4, FEED)]
    assert [p.is_exact for p in planned_calls(specs, [0, 1])] == [True, True, False, False, True]
