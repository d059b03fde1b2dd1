# SPDX-License-Identifier: Apache-2.0
"""The scheduler when calls fail: who is tried again, who is lost, what it costs, and that nothing depends on timing."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_clock import Fails, Seconds, VirtualClock, chain, node

from chatlearn.data.stream import StreamDataset
from chatlearn.flow.graph import FEED
from chatlearn.runtime.protocol import Call, NodeSpec, Recovery
from chatlearn.runtime.recovery import HOPELESS

MASK, DROP = Recovery("mask"), Recovery("drop_group")
Bad = dict[int, set[int]]
"""Uids that a node fails on whenever it gets them."""


def any_seconds(seed: int) -> Seconds:
    def seconds(call: Call) -> float:
        return 10 ** random.Random(f"{seed}/{call.node.index}/{call.uids}").uniform(-2, 2)

    return seconds


def raises_on(bad: Bad) -> Fails:
    return lambda call: call.step is None and bool(bad.get(call.node.index, set()) & {*call.uids})


def marks(bad: Bad) -> Fails:
    return lambda call: bad.get(call.node.index, set()) & {*call.uids}


def run(
    nodes: Sequence[NodeSpec], samples: int, fails: Fails, outputs: Sequence[int] = (), **more: Any
) -> VirtualClock:
    outputs = outputs or (len(nodes) - 1,)
    return VirtualClock(nodes, outputs, samples, fails=fails, **more).run()


def masked(clock: VirtualClock) -> list[int]:
    pairs = zip(clock.delivered_uids, clock.delivered, strict=True)
    return [uid for uid, value in pairs if value is None]


def sizes(clock: VirtualClock) -> list[int]:
    return [len(timed.uids) for timed in clock.calls if timed.call.step is None]


# ---- one bad sample -----------------------------------------------------------------------------------


def test_halves_find_the_culprit() -> None:
    clock = run([node(0, recovery=MASK)], 8, raises_on({0: {105}}))
    assert [t.uids for t in clock.calls] == [
        [*range(100, 108)],
        [*range(100, 104)],
        [*range(104, 108)],
        [104, 105],
        [104],
        [105],
        [106, 107],
    ]
    assert clock.delivered_uids == [*range(100, 108)]
    assert masked(clock) == [105]
    assert clock.lost == [(0, 105)]


def test_a_step_that_names_its_culprits_is_not_asked_again() -> None:
    clock = run([node(0, recovery=MASK)], 8, marks({0: {101, 105}}))
    assert sizes(clock) == [8]
    assert masked(clock) == [101, 105]


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 8, 64, 100])
@pytest.mark.parametrize("retries", [0, 3])
def test_one_bad_sample_costs_its_retries_and_two_calls_per_halving(
    samples: int, retries: int
) -> None:
    for bad in range(100, 100 + samples):
        recovery = Recovery("mask", retries)
        good = node(1, 0, batch_size=1)  # so that something is delivered, and lost last
        clock = run([node(0, recovery=recovery), good], samples, raises_on({0: {bad}}))
        calls = [t for t in clock.calls if t.call.node.index == 0]
        assert len(calls) <= 1 + retries + 2 * math.ceil(math.log2(samples))
        assert clock.lost == [(0, bad)]


def test_groups_are_not_cut() -> None:
    nodes = [node(0, batch_by="group", recovery=MASK)]
    clock = run(nodes, 12, raises_on({0: {105}}), group=4)
    assert [t.uids for t in clock.calls] == [
        [*range(100, 112)],
        [*range(100, 104)],
        [*range(104, 112)],
        [*range(104, 108)],
        [*range(108, 112)],
    ]
    assert masked(clock) == [104, 105, 106, 107]


@pytest.mark.parametrize("more", [{"filters": True}, {"batch_by": "episode"}])
def test_what_decides_on_samples_together_is_not_cut(more: dict[str, Any]) -> None:
    clock = run([node(0, recovery=MASK, batch_size=4, **more)], 4, raises_on({0: {101}}))
    assert sizes(clock) == [4]
    assert clock.delivered == []
    assert clock.scheduler.flow is not None
    assert clock.scheduler.flow.has_lost_everything


def test_a_failure_stops_the_run_unless_the_node_says_otherwise() -> None:
    clock = run([node(0, batch_size=2)], 8, raises_on({0: {103}}))
    assert clock.scheduler.has_failed
    assert sizes(clock) == [2, 2]
    assert clock.delivered_uids == [100, 101]


# ---- tries --------------------------------------------------------------------------------------------


class FailsAtFirst:
    """Fails `times` times on the samples of each call."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.failed: Counter[tuple[int, ...]] = Counter()

    def __call__(self, call: Call) -> bool:
        key = tuple(call.uids)
        self.failed[key] += 1
        return self.failed[key] <= self.times


def test_who_fails_and_then_succeeds_leaves_no_trace() -> None:
    nodes = [node(0, batch_size=3, recovery=Recovery("stop", retries=2)), node(1, 0, batch_size=2)]
    calm = run(nodes, 10, lambda call: False)
    fails = FailsAtFirst(2)
    clock = run(nodes, 10, lambda call: call.node.index == 0 and fails(call))
    assert clock.delivered == calm.delivered
    assert sorted(clock.finished) == sorted(calm.finished)
    assert clock.iterations == calm.iterations
    given = {tuple(t.uids): t.call.iteration for t in calm.calls if t.call.node.index == 0}
    for timed in clock.calls:
        if timed.call.node.index == 0:
            assert timed.call.iteration == given[tuple(timed.uids)], "a try has its call's number"
    assert clock.lost == []


def test_tries_are_counted_and_end() -> None:
    clock = run([node(0, recovery=Recovery("stop", retries=2))], 4, lambda call: True)
    assert clock.scheduler.has_failed
    assert [t.call.attempt for t in clock.calls] == [0, 1, 2]
    assert [t.call.origin for t in clock.calls] == [-1, 0, 0]


def test_a_marked_sample_is_tried_again_alone() -> None:
    fails = FailsAtFirst(1)

    def first_marks(call: Call) -> Collection[int]:
        return [u for u in (102, 105) if u in call.uids] if fails(call) else []

    nodes = [node(0, recovery=Recovery("mask", retries=1)), node(1, 0)]
    clock = run(nodes, 8, lambda call: call.node.index == 0 and first_marks(call))
    assert [t.uids for t in clock.calls[:2]] == [[*range(100, 108)], [102, 105]]
    assert masked(clock) == [102, 105], "they failed again: FailsAtFirst counts by samples"
    clock = run(nodes, 8, lambda call: call.node.index == 0 and not call.attempt and [102, 105])
    assert masked(clock) == []
    assert [value[0][1] for value in clock.delivered] == [*range(100, 108)], "in the feed's order"


def test_a_replica_that_failed_does_not_get_the_same_samples_again() -> None:
    nodes = [node(0, batch_size=2, recovery=Recovery("stop", retries=1))]
    clock = run(
        nodes, 8, lambda call: call.replica == 0, replicas={"m0": 2}, seconds=lambda call: 1.0
    )
    assert not clock.scheduler.has_failed
    assert len(clock.delivered) == 8
    assert all(t.call.replica == 1 for t in clock.calls if t.call.attempt)


def test_a_broken_step_does_not_fail_for_hours() -> None:
    clock = run([node(0, recovery=MASK)], 1024, lambda call: True)
    assert clock.scheduler.has_failed
    assert len(clock.lost) == HOPELESS
    assert len(clock.calls) <= 2 * HOPELESS + 10
    one_good = run([node(0, batch_size=1, recovery=MASK)], 100, lambda call: 100 not in call.uids)
    assert not one_good.scheduler.has_failed
    assert len(masked(one_good)) == 99


# ---- what becomes of lost samples ---------------------------------------------------------------------


def test_a_node_beside_the_one_that_lost_a_sample_still_gets_it() -> None:
    nodes = [node(0), node(1, 0, recovery=MASK), node(2, 0), node(3, 1, 2)]
    clock = run(nodes, 4, marks({1: {101}}))
    seen = {
        index: sorted(u for i, uids in clock.finished if i == index for u in uids)
        for index in range(4)
    }
    assert seen[2] == [100, 101, 102, 103]
    assert seen[1] == seen[3] == [100, 102, 103]


def test_a_node_whose_output_is_not_used_loses_nothing() -> None:
    nodes = [node(0), node(1, 0, recovery=DROP)]
    clock = run(nodes, 4, marks({1: {101}}), outputs=(0,), group=2)
    assert clock.delivered_uids == [100, 101, 102, 103]
    assert masked(clock) == []
    assert clock.lost == [(1, 101)]


def test_who_waits_for_a_node_does_not_get_what_it_lost() -> None:
    nodes = [node(0, recovery=MASK), node(1, after=(0,)), node(2, 0)]
    clock = run(nodes, 4, marks({0: {101}}), outputs=(2,))
    assert [uids for index, uids in clock.finished if index == 1] == [(100, 102, 103)]


def test_a_call_of_none_is_not_made() -> None:
    nodes = [
        node(0, batch_size=2, recovery=MASK),
        node(1, 0, batch_size=2),
        node(2, 1, batch_size=4),
    ]
    clock = run(nodes, 8, marks({0: {102, 103}}))
    assert [uids for index, uids in clock.finished if index == 1] == [
        (100, 101),
        (104, 105),
        (106, 107),
    ]
    assert [uids for index, uids in clock.finished if index == 2] == [
        (100, 101),
        (104, 105, 106, 107),
    ]
    assert clock.delivered_uids == [*range(100, 108)]
    assert masked(clock) == [102, 103]


def test_a_group_goes_whole_even_if_its_last_sample_fails_late() -> None:
    nodes = [node(0, batch_size=1, recovery=DROP)]
    source = StreamDataset("dynamic", global_batch_size=2)
    clock = run(
        nodes, 8, raises_on({0: {103}}), group=4, trainer=[node(0, module="t")], source=source
    )
    assert clock.delivered_uids == [104, 105, 106, 107]
    assert clock.trained("t") == [[[104, 105]], [[106, 107]]]
    assert clock.scheduler.flow is not None
    assert clock.scheduler.flow.dropped_samples == 4


def test_lost_samples_wait_for_one_that_is_not() -> None:
    """What a column looks like is known only once a step has succeeded."""
    nodes = [node(0, batch_size=1, recovery=MASK)]
    source = StreamDataset("dynamic", global_batch_size=1)
    clock = run(nodes, 4, raises_on({0: {100, 101}}), trainer=[node(0, module="t")], source=source)
    assert clock.delivered_uids == [100, 101, 102, 103]
    assert clock.delivered_at[:3] == [3.0, 3.0, 3.0]
    assert len(clock.steps("t")) == 4


def test_a_filter_never_gets_a_lost_sample_and_so_does_not_keep_it() -> None:
    nodes = [node(0, recovery=MASK), node(1, 0, filters=True, batch_size=2), node(2, 1)]
    clock = run(nodes, 8, marks({0: {101, 104, 105}}), keeps=lambda uid: uid != 106)
    assert clock.delivered_uids == [100, 102, 103, 107]
    assert masked(clock) == []


def test_behind_a_filter_the_mates_of_a_lost_sample_are_dropped() -> None:
    nodes = [
        node(0, batch_size=1, recovery=DROP),
        node(1, 0, filters=True, batch_size=1),
        node(2, 1),
    ]
    for seed in range(20):
        clock = run(
            nodes,
            9,
            marks({0: {105}}),
            group=3,
            seconds=any_seconds(seed),
            replicas={"m0": 3, "m1": 2},
        )
        assert clock.delivered_uids == [100, 101, 102, 106, 107, 108]


def test_a_filter_whose_marked_samples_are_tried_again_keeps_the_order() -> None:
    nodes = [node(0, filters=True, batch_size=4, recovery=Recovery("mask", retries=1))]
    clock = run(
        nodes, 8, lambda call: not call.attempt and [u for u in (101, 106) if u in call.uids]
    )
    assert clock.delivered_uids == [*range(100, 108)]
    assert masked(clock) == []


def test_everything_lost() -> None:
    for recovery in (MASK, DROP):
        clock = run(
            [node(0, recovery=recovery), node(1, 0)], 6, lambda call: call.node.index == 0, group=2
        )
        assert clock.delivered == []
        assert clock.scheduler.flow is not None
        assert clock.scheduler.flow.has_lost_everything
    one_of_each = run([node(0, recovery=DROP)], 6, marks({0: {100, 103, 104}}), group=2)
    assert one_of_each.scheduler.flow is not None
    assert one_of_each.scheduler.flow.has_lost_everything


# ---- any flow, any failures ---------------------------------------------------------------------------


@st.composite
def troubled_flow(draw: Any) -> tuple[list[NodeSpec], tuple[int, ...], Bad, Bad]:
    """Draw a flow without filters, what its nodes raise on, and what they mark."""
    nodes: list[NodeSpec] = []
    raising, marking = Bad(), Bad()
    some = st.sets(st.integers(100, 115), max_size=3)
    for index in range(draw(st.integers(1, 5))):
        sources = st.sampled_from([FEED, *range(index)])
        inputs = dict.fromkeys(draw(st.lists(sources, min_size=1, max_size=3)))
        fate = draw(st.sampled_from(["mask", "drop_group"]))
        nodes.append(
            node(
                index,
                *inputs,
                after=tuple(draw(st.sets(st.integers(0, index - 1), max_size=1)) if index else ()),
                batch_size=draw(st.sampled_from([None, 1, 2, 3, 8])),
                batch_by=draw(st.sampled_from(["sample", "sample", "group", "episode"])),
                recovery=Recovery(fate, draw(st.integers(0, 2))),
            )
        )
        if nodes[-1].batch_by != "episode":
            raising[index] = draw(some)
        marking[index] = draw(some)
    outputs = tuple(draw(st.sets(st.integers(0, len(nodes) - 1), min_size=1, max_size=2)))
    return nodes, outputs, raising, marking


def expected(
    nodes: Sequence[NodeSpec],
    groups: dict[int, int],
    raising: Bad,
    marking: Bad,
    outputs: Sequence[int],
) -> tuple[dict[int, set[int]], list[int], list[int]]:
    """Say per node which samples succeed, and what is delivered and masked, without any scheduling."""
    succeeds: dict[int, set[int]] = {FEED: set(groups)}
    lost: dict[int, set[int]] = {}
    for spec in nodes:
        sees = set.intersection(*(succeeds[s] for s in (*spec.inputs, *spec.after)))
        fails = {uid for uid in raising.get(spec.index, set()) if uid in sees}
        if spec.batch_by == "group":  # a group fails together
            fails = {uid for uid in sees if any(groups[uid] == groups[bad] for bad in fails)}
        lost[spec.index] = fails | (marking[spec.index] & sees)
        succeeds[spec.index] = sees - lost[spec.index]
    before, ways = set[int](), [*outputs]
    while ways:
        if (index := ways.pop()) not in (*before, FEED):
            before.add(index)
            ways += [*nodes[index].inputs, *nodes[index].after]
    dropped = {groups[u] for i in before if nodes[i].recovery.fate == "drop_group" for u in lost[i]}
    delivered = [uid for uid in groups if groups[uid] not in dropped]
    live = set.intersection(*(succeeds[output] for output in outputs))
    return succeeds, delivered, [uid for uid in delivered if uid not in live]


@given(troubled_flow(), st.integers(1, 16), st.integers(1, 4), st.integers(0, 2**32), st.data())
@settings(max_examples=400, deadline=None)
def test_every_sample_is_delivered_masked_or_dropped_whatever_the_timing(
    flow: tuple[list[NodeSpec], tuple[int, ...], Bad, Bad],
    samples: int,
    group: int,
    seed: int,
    data: Any,
) -> None:
    nodes, outputs, raising, marking = flow

    def fails(call: Call) -> bool | Collection[int]:
        if call.step is not None:
            return False
        bad = raising.get(call.node.index, set()) & {*call.uids}
        return bool(bad) or marking[call.node.index] & {*call.uids}

    groups = {100 + i: i // group for i in range(samples)}
    # Who fails is lost, also where a step marks others of a call that raises for another reason.
    succeeds, delivered, without_values = expected(nodes, groups, raising, marking, outputs)
    clock = VirtualClock(
        nodes,
        outputs,
        samples,
        group=group,
        fails=fails,
        seconds=any_seconds(seed),
        replicas={spec.module: data.draw(st.integers(1, 3)) for spec in nodes},
        at_once=data.draw(st.none() | st.integers(1, 3)),
        trainer=[node(0, module="t")],
        source=StreamDataset(data.draw(st.sampled_from(["fixed", "dynamic"])), global_batch_size=2),
    ).run()
    assert not clock.scheduler.has_failed
    done = defaultdict(list)
    for index, uids in clock.finished:
        done[index] += uids
    for spec in nodes:
        assert Counter(done[spec.index]) == Counter(succeeds[spec.index]), "each succeeds once"
    if set(without_values) == set(delivered):
        assert clock.delivered == []
        assert clock.scheduler.flow is not None
        assert clock.scheduler.flow.has_lost_everything == bool(clock.lost)
        return
    assert clock.delivered_uids == delivered
    assert masked(clock) == without_values
    assert {uid for step in clock.trained("t") for part in step for uid in part} == set(delivered)
    check_cost(clock, raising)


def check_cost(clock: VirtualClock, raising: Bad) -> None:
    """No call and the tries that follow from it cost more than is promised."""
    tries = defaultdict[int, list[Call]](list)
    for timed in clock.calls:
        if timed.call.step is None:
            tries[timed.call.id if timed.call.origin < 0 else timed.call.origin].append(timed.call)
    for calls in tries.values():
        count, spec = len(calls[0].uids), calls[0].node
        bad = len(raising.get(spec.index, set()) & {*calls[0].uids})
        halvings = min(2 * count - 2, 2 * bad * math.ceil(math.log2(max(count, 2))))
        # Marked samples are tried again by themselves: at most once per call that returned.
        marked = spec.recovery.retries * (halvings + 1)
        assert len(calls) <= 1 + spec.recovery.retries + halvings + marked


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_both_loaders_train_on_the_same_steps(kind: Any) -> None:
    nodes = chain(3, 2, 3, 1)
    nodes[1] = node(1, 0, batch_size=3, recovery=DROP)
    nodes[2] = node(2, 1, batch_size=2, recovery=MASK)
    steps = []
    for seed in range(10):
        clock = VirtualClock(
            nodes,
            (2,),
            24,
            group=4,
            fails=lambda call: (
                call.step is None
                and bool({1: {105}, 2: {110, 121}}.get(call.node.index, set()) & {*call.uids})
            ),
            seconds=any_seconds(seed),
            replicas={"m1": 3},
            trainer=[node(0, module="t")],
            source=StreamDataset(kind, global_batch_size=8, epochs=2, incomplete_step="fill"),
        ).run()
        steps.append(clock.trained("t"))
    assert steps == steps[:1] * 10
    assert [sum(map(len, step)) for step in steps[0]] == [8] * 6
    assert 105 not in {uid for step in steps[0] for part in step for uid in part}
