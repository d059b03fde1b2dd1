# SPDX-License-Identifier: Apache-2.0
"""The scheduler against tables and random flows: every sample once, in order, nothing too early, no deadlock."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.data.stream import StreamDataset
from chatlearn.errors import EngineError, FlowError
from chatlearn.flow.graph import FEED
from chatlearn.runtime.protocol import (
    Call,
    Command,
    Deliver,
    Failed,
    Finished,
    NodeSpec,
    Piece,
    ReplicaJoined,
    ReplicaLeft,
)
from chatlearn.runtime.scheduler import Samples, Scheduler


def node(index: int, *inputs: int, **more: object) -> NodeSpec:
    return NodeSpec(index, f"m{index}.step", f"m{index}", "step", inputs or (FEED,), **more)  # type: ignore[arg-type]


@dataclass
class Driver:
    """Carries commands out on plain uids, in random order, and checks every rule on the way."""

    nodes: list[NodeSpec]
    outputs: tuple[int, ...]
    uids: list[int]
    groups: list[int]
    trainer: list[NodeSpec] = field(default_factory=list)
    source: StreamDataset | None = None
    replicas: dict[str, int] = field(default_factory=dict)
    keeps: int = 2
    """A filter keeps samples whose uid is no multiple of this."""
    chooser: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        modules = {spec.module for spec in [*self.nodes, *self.trainer]}
        self.scheduler = Scheduler(
            {name: range(self.replicas.get(name, 1)) for name in modules},
            Counter(),
            flow=(self.nodes, self.outputs, Samples(self.uids, self.groups)),
            trainer=(self.trainer, self.source) if self.source else None,
        )
        self.returned: dict[int, list[int]] = {}
        self.covered: dict[int, list[int]] = {spec.index: [] for spec in self.nodes}
        self.finished: dict[int, set[int]] = {spec.index: set() for spec in self.nodes}
        self.steps: dict[int, list[tuple[int, ...]]] = {spec.index: [] for spec in self.trainer}
        self.done_steps: dict[int, int] = {spec.index: 0 for spec in self.trainer}
        self.delivered: list[int] = []
        self.waiting: list[Call] = []
        self.busy: set[tuple[str, int]] = set()
        self.calls: list[Call] = []

    def run(self) -> Driver:
        self._take(self.scheduler.start())
        while self.waiting:
            call = self.waiting.pop(self.chooser.randrange(len(self.waiting)))
            self.busy.discard((call.node.module, call.replica))
            self._take(self.scheduler.on(self._finish(call)))
        assert self.scheduler.complete, "deadlock"
        return self

    def _take(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Deliver):
                assert not command.lost
                for pieces in command.inputs:
                    assert self._gather(pieces) == list(command.uids)
                self.delivered += command.uids
            else:
                self._start(command)

    def _start(self, call: Call) -> None:
        replica = (call.node.module, call.replica)
        assert replica not in self.busy, "a replica takes one call at a time"
        self.busy.add(replica)
        self.waiting.append(call)
        self.calls.append(call)
        if call.step is not None:
            for part in call.step.micro_batches:
                assert max(part) < len(self.delivered), "trained before it was delivered"
            for wait in (*call.node.inputs, *call.node.after):
                assert wait == FEED or self.done_steps[wait] > call.step.index
            return
        for pieces, source in zip(call.inputs, call.node.inputs, strict=True):
            assert self._gather(pieces) == list(call.uids), "inputs are this call's samples"
            assert source == FEED or all(p.call in self.returned for p in pieces)
        for before in call.node.after:
            done = self.finished[before]
            assert done >= {u for u in call.uids if u in self._sees(before)}

    def _sees(self, index: int) -> set[int]:
        """The uids that a node gets at all: those no filter upstream takes away."""
        spec = self.nodes[index]
        uids = set(self.uids)
        for source in spec.inputs:
            if source != FEED:
                uids &= {
                    u for u in self._sees(source) if not self.nodes[source].filters or self._keep(u)
                }
        return uids

    def _keep(self, uid: int) -> bool:
        return uid % self.keeps != 0

    def _gather(self, pieces: tuple[Piece, ...]) -> list[int]:
        found: list[int] = []
        for piece in pieces:
            whole = self.uids if piece.call == FEED else self.returned[piece.call]
            found += whole[piece.start : piece.stop]
        return found

    def _finish(self, call: Call) -> Finished:
        index = call.node.index
        if call.step is not None:
            self.steps[index].append(tuple(i for p in call.step.micro_batches for i in p))
            self.done_steps[index] += 1
            return Finished(call.id)
        self.covered[index] += call.uids
        self.finished[index] |= set(call.uids)
        if not call.node.filters:
            self.returned[call.id] = list(call.uids)
            return Finished(call.id)
        kept = tuple(i for i, uid in enumerate(call.uids) if self._keep(uid))
        self.returned[call.id] = [call.uids[i] for i in kept]
        return Finished(call.id, kept)


def uids_of(samples: int, group: int = 1) -> tuple[list[int], list[int]]:
    return list(range(100, 100 + samples)), [i // group for i in range(samples)]


# ---- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [(8, 3, [3, 3, 2]), (8, None, [8]), (8, 8, [8]), (8, 9, [8]), (1, 4, [1]), (4, 1, [1] * 4)],
)
def test_sizes_of_calls(samples: int, size: int | None, expected: list[int]) -> None:
    driver = Driver([node(0, batch_size=size)], (0,), *uids_of(samples)).run()
    assert [len(call.uids) for call in driver.calls] == expected


@pytest.mark.parametrize(
    ("batch_by", "size", "expected"),
    [
        ("group", 1, [4, 4, 4]),
        ("group", 4, [4, 4, 4]),
        ("group", 8, [8, 4]),
        ("group", 9, [8, 4]),
        ("group", None, [12]),
        ("episode", 1, [12]),
    ],
)
def test_group_and_episode_barriers(batch_by: str, size: int | None, expected: list[int]) -> None:
    nodes = [node(0, batch_size=3), node(1, 0, batch_size=size, batch_by=batch_by)]
    driver = Driver(nodes, (1,), *uids_of(12, group=4)).run()
    assert [len(call.uids) for call in driver.calls if call.node.index == 1] == expected


def test_groups_go_on_while_others_generate() -> None:
    nodes = [node(0, batch_size=2), node(1, 0, batch_size=2, batch_by="group")]
    scheduler = Scheduler(
        {"m0": [0], "m1": [0]}, Counter(), flow=(nodes, (1,), Samples(*uids_of(6, 2)))
    )
    (first,) = scheduler.start()
    assert isinstance(first, Call)
    names = [c.node.name for c in scheduler.on(Finished(first.id)) if isinstance(c, Call)]
    assert sorted(names) == ["m0.step", "m1.step"]


def test_replicas_share_by_load() -> None:
    nodes = [node(0, batch_size=1)]
    scheduler = Scheduler({"m0": [0, 1, 2]}, Counter(), flow=(nodes, (0,), Samples(*uids_of(9))))
    running = [c for c in scheduler.start() if isinstance(c, Call)]
    assert [call.replica for call in running] == [0, 1, 2]
    slow, *rest = running
    work = Counter(call.replica for call in running)
    while rest:
        more = [c for c in scheduler.on(Finished(rest.pop(0).id)) if isinstance(c, Call)]
        work.update(call.replica for call in more)
        rest += more
    assert work[slow.replica] == 1
    assert work[1] == work[2] == 4
    scheduler.on(Finished(slow.id))
    assert scheduler.complete


def test_iterations_count_each_module_and_method_and_go_on() -> None:
    counts: Counter[tuple[str, str]] = Counter({("m0", "step"): 7})
    nodes = [node(0, batch_size=2)]
    scheduler = Scheduler({"m0": [0, 1]}, counts, flow=(nodes, (0,), Samples(*uids_of(4))))
    assert [c.iteration for c in scheduler.start() if isinstance(c, Call)] == [7, 8]
    assert counts["m0", "step"] == 9


def test_nothing_follows_a_failure() -> None:
    nodes = [node(0, batch_size=1), node(1, 0, batch_size=1)]
    scheduler = Scheduler(
        {"m0": [0, 1], "m1": [0]}, Counter(), flow=(nodes, (1,), Samples(*uids_of(4)))
    )
    first, second = scheduler.start()
    assert isinstance(first, Call)
    assert isinstance(second, Call)
    assert scheduler.on(Failed(first.id)) == []
    assert scheduler.on(Finished(second.id)) == []
    assert not scheduler.complete


def test_replicas_join_and_leave() -> None:
    nodes = [node(0, batch_size=1)]
    scheduler = Scheduler({"m0": [0]}, Counter(), flow=(nodes, (0,), Samples(*uids_of(4))))
    (first,) = scheduler.start()
    assert isinstance(first, Call)
    (second,) = scheduler.on(ReplicaJoined("m0", 5))
    assert isinstance(second, Call)
    assert second.replica == 5
    scheduler.on(ReplicaLeft("m0", 0))
    assert scheduler.on(Finished(first.id)) == [Deliver(((Piece(0, 0, 1),),), [100])]
    with pytest.raises(EngineError, match="last replica"):
        scheduler.on(ReplicaLeft("m0", 5))


def test_inputs_on_both_sides_of_a_filter_are_refused() -> None:
    nodes = [node(0, filters=True), node(1, FEED, 0)]
    with pytest.raises(FlowError, match="both sides of a filter"):
        Driver(nodes, (1,), *uids_of(4))


@pytest.mark.parametrize("keeps", [1, 2, 3])
def test_filters_in_a_row_keep_the_order(keeps: int) -> None:
    nodes = [
        node(0, batch_size=2, filters=True),
        node(1, 0, batch_size=3, filters=True),
        node(2, 1, batch_size=2, batch_by="episode"),
    ]
    driver = Driver(nodes, (2,), *uids_of(11), keeps=keeps).run()
    assert driver.delivered == [u for u in driver.uids if u % keeps]


def test_groups_behind_a_filter_are_cut_alike_whenever_it_finishes() -> None:
    nodes = [node(0, batch_size=1, filters=True), node(1, 0, batch_size=2, batch_by="group")]
    seen = set()
    for seed in range(20):
        driver = Driver(
            nodes, (1,), *uids_of(7), replicas={"m0": 3}, keeps=50, chooser=random.Random(seed)
        ).run()
        seen.add(frozenset(tuple(c.uids) for c in driver.calls if c.node.index == 1))
    assert seen == {frozenset({(101, 102), (103, 104), (105, 106)})}


# ---- random flows ---------------------------------------------------------------------------------


@st.composite
def drivers(draw: st.DrawFn) -> Driver:
    count = draw(st.integers(1, 6))
    group = draw(st.integers(1, 3))
    samples = draw(st.integers(0, 5)) * group
    spaces: list[int] = []  # which space each node's output lies in; FEED is space -1
    nodes: list[NodeSpec] = []
    for index in range(count):
        space = draw(st.sampled_from([FEED, *spaces]))
        candidates = [i for i in range(index) if spaces[i] == space] + ([FEED] * (space == FEED))
        inputs = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=3))
        after = draw(st.lists(st.integers(0, index - 1), max_size=2)) if index else []
        filters = draw(st.integers(0, 4)) == 0
        module = draw(st.integers(0, index))  # several nodes may call one module
        spec = NodeSpec(
            index,
            f"m{module}.s{index}",
            f"m{module}",
            f"s{index}",
            tuple(inputs),
            tuple(sorted(set(after))),
            draw(st.none() | st.integers(1, 6)),
            draw(st.sampled_from(["sample", "sample", "group", "episode"])),
            filters,
        )
        nodes.append(spec)
        spaces.append(index if filters else space)
    space = draw(st.sampled_from(spaces))
    outputs = draw(
        st.lists(st.sampled_from([i for i in range(count) if spaces[i] == space]), max_size=2)
    )
    trains = bool(outputs) and draw(st.booleans())
    trainer = [
        NodeSpec(0, "t0.train", "t0", "train", (FEED,)),
        NodeSpec(1, "t1.train", draw(st.sampled_from(["t0", "t1"])), "train", (FEED,), (0,)),
    ]
    source = StreamDataset(
        draw(st.sampled_from(["fixed", "dynamic"])),
        global_batch_size=draw(st.none() | st.integers(1, 5)),
        micro_batch_size=draw(st.none() | st.integers(1, 3)),
        epochs=draw(st.integers(1, 2)),
        incomplete_step="keep",
    )
    return Driver(
        nodes,
        tuple(dict.fromkeys(outputs)),
        *uids_of(samples, group),
        trainer=trainer if trains else [],
        source=source if trains else None,
        replicas={f"m{i}": draw(st.integers(1, 3)) for i in range(count)},
        keeps=draw(st.integers(1, 3)),
        chooser=random.Random(draw(st.integers(0, 2**16))),
    )


@given(drivers())
@settings(max_examples=400, deadline=None)
def test_random_flows(driver: Driver) -> None:
    driver.run()
    for spec in driver.nodes:
        expected = sorted(driver._sees(spec.index))
        assert sorted(driver.covered[spec.index]) == expected, "every sample exactly once"
        if spec.batch_by == "episode":
            assert sum(c.node is spec for c in driver.calls) <= 1
        elif spec.batch_by == "sample" and spec.batch_size:
            calls = [c for c in driver.calls if c.node is spec]
            assert all(len(c.uids) <= spec.batch_size for c in calls)
            assert sum(len(c.uids) < spec.batch_size for c in calls) <= 1
        elif spec.batch_by == "group":
            group_of = dict(zip(driver.uids, driver.groups, strict=True))
            seen = Counter(
                g for c in driver.calls if c.node is spec for g in {group_of[u] for u in c.uids}
            )
            assert all(count == 1 for count in seen.values()), "groups stay whole"
    if driver.outputs:
        last = driver.nodes[driver.outputs[0]]
        kept = [u for u in driver._sees(last.index) if not last.filters or driver._keep(u)]
        assert driver.delivered == sorted(kept), "delivered in the dataset's order"
    for steps in driver.steps.values():
        assert Counter(i for step in steps for i in step) == Counter(
            dict.fromkeys(range(len(driver.delivered)), driver.source._epochs)  # type: ignore[union-attr]
        )
    assert len({tuple(steps) for steps in driver.steps.values()}) <= 1


@given(drivers(), st.integers(0, 2**16))
@settings(max_examples=100, deadline=None)
def test_cuts_do_not_depend_on_the_order_of_completion(driver: Driver, seed: int) -> None:
    def cuts(chooser: random.Random) -> set[tuple[int, tuple[int, ...]]]:
        again = Driver(
            driver.nodes,
            driver.outputs,
            driver.uids,
            driver.groups,
            replicas=driver.replicas,
            keeps=driver.keeps,
            chooser=chooser,
        ).run()
        return {(c.node.index, tuple(c.uids)) for c in again.calls}

    assert cuts(random.Random(seed)) == cuts(random.Random(seed + 1))
