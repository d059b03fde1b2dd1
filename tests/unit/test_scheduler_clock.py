# SPDX-License-Identifier: Apache-2.0
"""The scheduler on a virtual clock: replicas that differ in speed, calls that finish in any order.

The same results in the same order, whoever finishes first; no replica idle while something could run on it; a
barrier nowhere but where `batch_by` asks for one.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_clock import Seconds, Timed, VirtualClock, chain, node

from chatlearn.data.stream import StreamDataset
from chatlearn.flow.graph import FEED
from chatlearn.runtime.protocol import Call, Finished, NodeSpec
from chatlearn.runtime.scheduler import Samples, Scheduler

FLOWS: dict[str, tuple[list[NodeSpec], tuple[int, ...]]] = {
    "chain": (chain(3, 2, 3, 1), (2,)),
    "diamond": (
        [
            node(0, batch_size=2),
            node(1, 0, batch_size=3),
            node(2, 0, batch_size=1),
            node(3, 1, 2, batch_size=4),
        ],
        (3,),
    ),
    "group barrier": ([node(0, batch_size=1), node(1, 0, batch_size=3, batch_by="group")], (1,)),
    "episode barrier": (
        [node(0, batch_size=1), node(1, 0, batch_by="episode"), node(2, 1, batch_size=2)],
        (2,),
    ),
    "control": (
        [node(0, batch_size=3), node(1, batch_size=2, after=(0,)), node(2, 1, FEED, batch_size=1)],
        (2, 0),
    ),
    "filter": (
        [
            node(0, batch_size=2),
            node(1, 0, batch_size=2, filters=True),
            node(2, 1, batch_size=2),
            node(3, 2, batch_size=1, batch_by="group"),
        ],
        (3,),
    ),
    "one module twice": (
        [node(0, batch_size=2), node(1, 0, batch_size=1), node(2, 1, module="m0", batch_size=3)],
        (2,),
    ),
}
SAMPLES, GROUP = 12, 3


def run(
    flow: str,
    *,
    seconds: Seconds = lambda call: 1.0,
    replicas: Mapping[str, int] | int = 1,
    **more: Any,
) -> VirtualClock:
    nodes, outputs = FLOWS[flow]
    if isinstance(replicas, int):
        replicas = {spec.module: replicas for spec in nodes}
    return VirtualClock(
        nodes,
        outputs,
        SAMPLES,
        group=GROUP,
        replicas=replicas,
        seconds=seconds,
        keeps=lambda uid: uid % 3 != 1,
        **more,
    ).run()


def any_seconds(seed: int) -> Seconds:
    """Make durations over four orders of magnitude, so that calls overtake each other in every way."""

    def seconds(call: Call) -> float:
        return 10 ** random.Random(f"{seed}/{call.node.index}/{call.uids}").uniform(-2, 2)

    return seconds


def first_in_last_out(call: Call) -> float:
    """Adversarial: the earlier a call was made, the later it finishes."""
    return 1000.0 / (1 + call.id)


def cuts(clock: VirtualClock) -> set[tuple[int, tuple[int, ...]]]:
    return {(t.call.node.index, tuple(t.uids)) for t in clock.calls}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_the_order_of_completion_changes_nothing(flow: str, replicas: int) -> None:
    expected = run(flow)
    assert expected.delivered
    for seconds in (first_in_last_out, *map(any_seconds, range(20))):
        clock = run(flow, seconds=seconds, replicas=replicas)
        assert clock.delivered == expected.delivered
        assert cuts(clock) == cuts(expected), "every call on the same samples"
        assert len(clock.calls) == len(expected.calls), "every sample once"
        assert clock.iterations == expected.iterations


@given(
    st.sampled_from(sorted(FLOWS)),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.integers(0, 2**32),
    st.none() | st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_any_order_with_any_replicas(
    flow: str, counts: list[int], seed: int, at_once: int | None
) -> None:
    replicas = {f"m{i}": count for i, count in enumerate(counts)}
    clock = run(flow, seconds=any_seconds(seed), replicas=replicas, at_once=at_once)
    assert clock.delivered == run(flow).delivered
    most = at_once or len(clock.calls)
    for timed in clock.calls:
        overlapping = [t for t in clock.calls if t.start <= timed.start < t.stop]
        assert len(overlapping) <= most


# ---- who gets the work ------------------------------------------------------------------------------


def test_a_slow_replica_gets_less() -> None:
    """Replica 0 takes 3 s per sample, the others 1 s: 21 samples are split 3 : 9 : 9, as fast as it can be."""

    def seconds(call: Call) -> float:
        return len(call.uids) * (3.0 if call.replica == 0 else 1.0)

    clock = VirtualClock(
        [node(0, batch_size=1)], (0,), 21, replicas={"m0": 3}, seconds=seconds
    ).run()
    assert clock.work("m0") == {0: 3, 1: 9, 2: 9}
    assert clock.now == 9.0


def test_round_robin_would_be_unfair() -> None:
    """Groups of 8 and of 1 in turn: dealt in turn, one replica of two would run 32 samples and the other 4."""
    groups = [g for g in range(8) for _ in range(8 if g % 2 == 0 else 1)]
    nodes = [node(0, batch_size=8, batch_by="group")]
    for at_once in (1, None):
        clock = VirtualClock(
            nodes,
            (0,),
            len(groups),
            group=groups,
            replicas={"m0": 2},
            seconds=lambda call: len(call.uids),
            at_once=at_once,
        )
        work = clock.run().work("m0")
        assert sum(work.values()) == 36
        assert max(work.values()) - min(work.values()) <= 8, f"by load, at_once={at_once}: {work}"


def test_among_free_replicas_the_one_that_did_least_is_asked() -> None:
    """Replica 1 ran the last, smaller call of the first node, so it begins with the second."""
    nodes = [node(0, batch_size=3), node(1, 0, module="m0", batch_by="episode")]
    clock = VirtualClock(nodes, (1,), 5, replicas={"m0": 2}, seconds=lambda c: 1.0).run()
    assert [(t.call.replica, len(t.uids)) for t in clock.calls] == [(0, 3), (1, 2), (1, 5)]


def test_nothing_starves() -> None:
    """One module behind itself: early samples leave while late ones still wait for their first call."""
    nodes = [node(0, batch_size=1), node(1, 0, module="m0", batch_size=1)]
    clock = VirtualClock(nodes, (1,), 50, seconds=lambda c: 1.0).run()
    assert clock.delivered_at == [2.0 * (i + 1) for i in range(50)]


# ---- no barrier, no idleness ------------------------------------------------------------------------


def ready_at(clock: VirtualClock, timed: Timed) -> float:
    """When a call's inputs, and what it has to wait for, were there: in a flow without filters."""
    uids = set(timed.uids)
    waits = [s for s in (*timed.call.node.inputs, *timed.call.node.after) if s != FEED]
    return max((t.stop for s in waits for t in clock.of(s) if uids & set(t.uids)), default=0.0)


@pytest.mark.parametrize("flow", sorted(set(FLOWS) - {"filter"}))
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_call_starts_as_soon_as_its_own_samples_are_there_and_a_replica_is_free(
    flow: str, replicas: int
) -> None:
    waited = 0
    for seed in range(20):
        clock = run(flow, seconds=any_seconds(seed), replicas=replicas)
        for timed in clock.calls:
            ready = ready_at(clock, timed)
            assert timed.start >= ready, "started before its samples were there"
            moments = [ready, *(t.stop for t in clock.calls if ready < t.stop < timed.start)]
            for moment in moments if timed.start > ready else ():
                waited += 1
                module = timed.call.node.module
                busy = [
                    t
                    for t in clock.calls
                    if t.call.node.module == module and t.start <= moment < t.stop
                ]
                assert len(busy) == replicas, "it could have run"
    assert waited or replicas > 1, "the check looked at calls that had to wait"


def test_a_group_is_scored_while_the_next_one_generates() -> None:
    clock = run("group barrier")
    assert [(t.start, t.stop) for t in clock.of(1)] == [(3, 4), (6, 7), (9, 10), (12, 13)]
    assert clock.delivered_at == [4.0] * 3 + [7.0] * 3 + [10.0] * 3 + [13.0] * 3


def test_an_episode_is_waited_for_by_the_node_that_asks_for_it_alone() -> None:
    nodes = [node(0, batch_size=1), node(1, 0, batch_by="episode"), node(2, 0, batch_size=1)]
    clock = VirtualClock(nodes, (1,), 4).run()
    assert [t.start for t in clock.of(1)] == [4.0]
    assert [t.start for t in clock.of(2)] == [1.0, 2.0, 3.0, 4.0]


@given(st.integers(0, 2**32), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_control_dependencies_hold_per_batch(seed: int, replicas: int) -> None:
    clock = run("control", seconds=any_seconds(seed), replicas=replicas)
    for timed in clock.of(1):
        before = [t for t in clock.of(0) if set(t.uids) & set(timed.uids)]
        assert all(t.stop <= timed.start for t in before)
    early = min(t.start for t in clock.of(1))
    last = max(t.stop for t in clock.of(0))
    assert replicas > 1 or early < last, "it waits for its own batch and no longer"


def test_behind_a_filter_calls_start_once_earlier_ones_are_known() -> None:
    nodes = [node(0, batch_size=1, filters=True), node(1, 0, batch_size=1)]
    seconds = {100: 1.0, 101: 9.0, 102: 2.0, 103: 3.0}
    clock = VirtualClock(
        nodes,
        (1,),
        4,
        replicas={"m0": 4, "m1": 4},
        seconds=lambda c: seconds[c.uids[0]] if c.node.index == 0 else 1.0,
        keeps=lambda uid: uid != 102,
    ).run()
    assert [(t.uids, t.start) for t in clock.of(1)] == [([100], 1.0), ([101], 9.0), ([103], 9.0)]


# ---- train steps under any order --------------------------------------------------------------------


@given(st.sampled_from(sorted(FLOWS)), st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_steps_are_the_same_whatever_finishes_first(
    flow: str, seed: int, replicas: int, size: int
) -> None:
    def trained(kind: str, **more: Any) -> tuple[list[Any], Sequence[Any]]:
        source = StreamDataset(kind, global_batch_size=size, micro_batch_size=2, epochs=2)  # type: ignore[arg-type]
        trainer = [node(0, module="t0"), node(1, module="t1")]
        clock = run(flow, trainer=trainer, source=source, **more)
        assert clock.trained("t0") == clock.trained("t1")
        return clock.trained("t0"), clock.delivered

    expected = trained("fixed")
    for kind in ("fixed", "dynamic"):
        assert trained(kind, seconds=any_seconds(seed), replicas=replicas) == expected


# ---- nothing waits for more than its inputs --------------------------------------------------------------


class Watchful(VirtualClock):
    """Fails as soon as a call has all its inputs and was not handed out."""

    def _take(self, commands: Sequence[Any]) -> None:
        super()._take(commands)
        flow = self.scheduler.flow
        assert flow is not None
        for own in flow.nodes:
            for task in own.tasks:
                missing = [
                    source
                    for source in (*own.spec.inputs, *own.spec.after)
                    if not flow._has(source, task)
                ]
                assert task.started or missing, f"{own.spec.name} {task} could run"


@st.composite
def any_flow(draw: Any) -> tuple[list[NodeSpec], tuple[int, ...]]:
    """Draw a flow of up to five nodes, filters and barriers in any place."""
    spaces, nodes = {FEED: 0}, []
    for index in range(draw(st.integers(1, 5))):
        first = draw(st.sampled_from(sorted(spaces)))
        mates = [source for source in spaces if spaces[source] == spaces[first]]
        inputs = dict.fromkeys([first, *draw(st.lists(st.sampled_from(mates), max_size=2))])
        filters = draw(st.booleans())
        nodes.append(
            node(
                index,
                *inputs,
                batch_size=draw(st.sampled_from([None, 1, 2, 3, 8])),
                batch_by=draw(st.sampled_from(["sample", "group", "group", "episode"])),
                filters=filters,
            )
        )
        spaces[index] = index + 1 if filters else spaces[first]
    return nodes, (len(nodes) - 1,)


@given(any_flow(), st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_a_call_is_handed_out_once_its_inputs_exist(
    flow: tuple[list[NodeSpec], tuple[int, ...]], seed: int, samples: int, group: int
) -> None:
    nodes, outputs = flow
    Watchful(
        nodes,
        outputs,
        samples,
        group=group,
        replicas={spec.module: samples + 1 for spec in nodes},
        seconds=any_seconds(seed),
        keeps=lambda uid: random.Random(f"{seed}/{uid}").random() < 0.7,
    ).run()


def test_groups_behind_a_filter_run_as_soon_as_they_are_known_to_be_whole() -> None:
    nodes = [
        node(0, batch_size=8, filters=True),
        node(1, 0, batch_size=4, batch_by="group"),
    ]
    seconds = {0: 1.0, 1: 0.25}
    clock = VirtualClock(
        nodes, (1,), 32, group=4, seconds=lambda call: seconds[call.node.index]
    ).run()
    assert [t.start for t in clock.of(1)] == [1.0, 2.0, 2.25, 3.0, 3.25, 4.0, 4.25, 4.5]


@pytest.mark.parametrize(("slow", "shares"), [(0.0, [4, 4, 4]), (0.2, [2, 5, 5])])
def test_one_call_at_a_time_goes_to_the_replica_that_has_been_busy_least(
    slow: float, shares: list[int]
) -> None:
    """In one process a replica that takes long gets less; where all are as quick, samples decide."""
    scheduler = Scheduler(
        {"m": range(3)},
        Counter(),
        flow=([node(0, module="m", batch_size=1)], (0,), Samples(range(12), range(12))),
        at_once=1,
    )
    calls, commands = Counter[int](), scheduler.start()
    while calls_left := [c for c in commands if isinstance(c, Call)]:
        (call,) = calls_left
        calls[call.replica] += 1
        seconds = slow if call.replica == 0 else slow / 3
        commands = scheduler.on(Finished(call.id, seconds=seconds))
    assert [calls[replica] for replica in range(3)] == shares


# ---- cost ---------------------------------------------------------------------------------------------


def _lines_per_sample(samples: int, filters: bool) -> float:
    """Count the lines of Python that a run executes: a measure of work that no other process disturbs."""
    nodes = [
        node(i, i - 1 if i else FEED, batch_size=1, filters=filters and i == 1) for i in range(5)
    ]
    source = StreamDataset("dynamic", global_batch_size=4)
    clock = VirtualClock(
        nodes, (4,), samples, trainer=[node(0, module="t")], source=source, at_once=1
    )
    lines = 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        clock.run()
    finally:
        sys.settrace(before)
    assert Counter(t.call.node.index for t in clock.calls if t.call.step is None)[4] == samples
    return lines / samples


@pytest.mark.parametrize("filters", [False, True])
def test_the_work_per_call_does_not_grow_with_their_number(filters: bool) -> None:
    """Eight times as many calls; a quadratic part would make each of them dearer by as much."""
    few, many = _lines_per_sample(200, filters), _lines_per_sample(1600, filters)
    assert many < 1.25 * few, f"{few:.0f} -> {many:.0f} lines per sample"
