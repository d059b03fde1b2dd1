# SPDX-License-Identifier: Apache-2.0
"""Which columns stand where in a flow: joined, written, passed on, dropped, under a namespace."""

from __future__ import annotations

from typing import Any

import pytest

from chatlearn import BaseModule
from chatlearn.flow.column_flow import (
    OPEN,
    Columns,
    NodeColumns,
    Origin,
    feed_columns,
    join,
    through,
)
from chatlearn.flow.declaration import Declaration, Need
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.flow.passage import enter, leave

TEXT, NUMBER = frozenset({"text"}), frozenset({"number"})
MODULE = BaseModule("m")


def columns(*certain: str, maybe: tuple[str, ...] = (), node: int = 0) -> Columns:
    origins = {name: frozenset({Origin("f", node, name)}) for name in (*certain, *maybe)}
    return Columns(origins, frozenset(certain))


def makers(found: Columns, name: str) -> set[int]:
    return {origin.node for origin in found.find(name)}


def follow(
    said: dict[int, Declaration], *inputs: tuple[int, ...], **more: Any
) -> list[NodeColumns]:
    nodes = tuple(
        Node(i, f"m.step#{i}", MODULE, "step", given, ()) for i, given in enumerate(inputs)
    )
    namespaces = more.get("namespaces", {})
    return through(
        FlowGraph("f", nodes, (len(nodes) - 1,)),
        more.get("feed", feed_columns("f", {"prompt": TEXT})),
        lambda node: said.get(node.index, Declaration()),
        lambda node: namespaces.get(node.index),
    )


def test_the_later_of_two_inputs_hides_the_earlier_if_it_is_there_for_certain() -> None:
    first = columns("a", "b", "c", node=0)
    joined = join([first, columns("a", maybe=("b",), node=1)])
    assert [makers(joined, name) for name in "abc"] == [{1}, {0, 1}, {0}]
    assert joined.certain == {"a", "b", "c"}
    assert not joined.is_open
    assert join([first, OPEN]).is_open


def test_the_feed_has_its_columns_and_numbers_and_may_have_an_outcome() -> None:
    feed = feed_columns("f", {"prompt": TEXT})
    assert feed.certain == {"prompt", "uid", "prompt_uid"}
    assert set(feed.origins) == {"prompt", "uid", "prompt_uid", "outcome"}
    assert {origin.kinds for origin in feed.find("prompt")} == {TEXT}
    assert makers(feed, "uid") == {FEED}
    assert feed_columns("f", None).is_open


@pytest.mark.parametrize(
    ("said", "there", "certain", "is_open"),
    [
        (Declaration(), {"prompt", "uid"}, set(), True),
        (Declaration.of(writes={"a"}), {"prompt", "uid", "a"}, {"a"}, False),
        (Declaration.of(writes={"a"}, passes_on=True), {"prompt", "a"}, {"prompt", "a"}, False),
        (Declaration.of(writes={"a"}, passes_on=False), {"a"}, {"a"}, False),
        (Declaration.of(passes_on=False), set(), set(), True),
    ],
)
def test_what_leaves_a_step(
    said: Declaration, there: set[str], certain: set[str], is_open: bool
) -> None:
    (node,) = follow({0: said}, (FEED,))
    assert there <= set(node.leaving.origins)
    assert certain <= node.leaving.certain
    assert node.leaving.is_open == is_open
    if said.passes_on is False:
        assert set(node.leaving.origins) == there


def test_dropped_columns_are_gone_and_replaced_ones_are_the_steps() -> None:
    said = Declaration(writes={"uid": NUMBER}, passes_on=True, drops=frozenset({"prompt"}))
    (node,) = follow({0: said}, (FEED,))
    assert "prompt" not in node.leaving.origins
    assert makers(node.leaving, "uid") == {0}
    assert {origin.name for origin in node.makes} == {"uid"}


def test_what_an_open_set_lets_through_stays_open_unless_a_step_passes_nothing_on() -> None:
    passes = Declaration.of(reads=(), writes={"a"}, passes_on=True)
    drops = Declaration.of(reads=(), writes={"a"}, passes_on=False)
    first, second, third = follow({1: passes, 2: drops}, (FEED,), (0,), (1,))
    assert [node.leaving.is_open for node in (first, second, third)] == [True, True, False]


def test_a_part_is_found_under_the_whole_that_a_step_writes() -> None:
    (node,) = follow({0: Declaration.of(writes={"rewards"}, passes_on=True)}, (FEED,))
    assert makers(node.leaving, "rewards/score") == {0}
    assert makers(node.leaving, "rewards/score/first") == {0}
    assert makers(node.leaving, "rewarded") == set()
    assert makers(node.leaving, "prompt/first") == set(), "a dataset's column has no parts"


NAMESPACED = ["answer", "completion", "rewards", "solver/completion", "uid", "judge/rewards"]


@pytest.mark.parametrize(
    "writes", [frozenset[str](), frozenset({"rewards"}), frozenset({"a", "b"})]
)
def test_a_namespace_shows_and_renames_as_it_does_with_real_batches(writes: frozenset[str]) -> None:
    batch = {name: [name] for name in NAMESPACED}
    seen = enter(dict(batch), "solver", writes)
    said = Declaration.of(reads=(), writes=writes, passes_on=True)
    feed = columns(*NAMESPACED, node=FEED)
    (node,) = follow({0: said}, (FEED,), feed=feed, namespaces={0: ("solver", writes)})
    assert set(node.seen.origins) == set(seen)
    assert {name: {o.name for o in origins} for name, origins in node.seen.origins.items()} == {
        name: {column[0]} for name, column in seen.items()
    }
    left = leave({**seen, **{name: ["new"] for name in writes}}, batch, "solver", writes)
    assert set(node.leaving.origins) == set(left)
    assert {origin.name for origin in node.makes} == {n for n, c in left.items() if c == ["new"]}


def test_a_plain_column_may_show_where_the_own_one_is_not_certain() -> None:
    feed = columns("completion", maybe=("solver/completion",), node=FEED)
    (node,) = follow({}, (FEED,), feed=feed, namespaces={0: ("solver", frozenset())})
    assert {origin.name for origin in node.seen.find("completion")} == {
        "completion",
        "solver/completion",
    }


def test_what_a_step_reads() -> None:
    either = Need.of({"a", "prompt"})
    said = Declaration.of(needs=[either], optional={"uid", "missing"}, writes={"b"}, passes_on=True)
    everything = Declaration.of(reads={"prompt"}, reads_all=True, writes=())
    one, silent, greedy = follow({0: said, 2: everything}, (FEED,), (0,), (0,))
    assert {origin.name for origin in one.reads or ()} == {"prompt", "uid"}
    assert silent.reads is None
    assert greedy.reads is None
