# SPDX-License-Identifier: Apache-2.0
"""Which columns may stand before and behind every call of a flow, and who made them. Pure functions over names.

Nothing is known of what an undeclared step adds or leaves out, so what follows it is *open*: any column may be there.
Only where a set is not open can it be said that a column is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from chatlearn.columns import OUTCOME, PROMPT_UID, UID
from chatlearn.flow.declaration import ANYTHING, Declaration, Kinds, Need
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.flow.namespace import SHARED, doors


@dataclass(frozen=True)
class Origin:
    """Who made a column: a node of a flow, or what feeds the flow (`node` is `FEED`)."""

    flow: str
    node: int
    name: str
    """What the column is called outside any namespace."""
    kinds: Kinds = ANYTHING


Origins = frozenset[Origin]


@dataclass(frozen=True)
class Columns:
    """The columns that a batch may have at one point of a flow."""

    origins: Mapping[str, Origins] = field(default_factory=dict[str, Origins])
    """Who may have made each of them."""
    certain: frozenset[str] = frozenset()
    """Those that are there whatever happens."""
    is_open: bool = False
    """Whether there may be further ones."""

    def find(self, name: str) -> Origins:
        """Return who may have made a column, or the one that it is a part of (`rewards` of `rewards/score`)."""
        if name in self.origins:
            return self.origins[name]
        parts = name.split("/")
        wholes = ("/".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        for whole in wholes:
            made = frozenset(o for o in self.origins.get(whole, ()) if o.node != FEED)
            if made:
                return frozenset(Origin(o.flow, o.node, o.name) for o in made)
        return frozenset()

    def meeting(self, need: Need) -> dict[str, Origins]:
        """Return the columns that will do for a need, whatever their kinds."""
        found = {name: origins for name in need.columns if (origins := self.find(name))}
        others = {n: o for n, o in self.origins.items() if n not in found and need.is_met_by(n)}
        return {**found, **others}


OPEN = Columns(is_open=True)


@dataclass(frozen=True)
class NodeColumns:
    """The columns around one node."""

    flow: str
    node: Node
    declaration: Declaration
    namespace: str | None
    seen: Columns
    """What the step gets, as it calls the columns."""
    entering: Columns
    """The same, as they are called outside the module's namespace."""
    leaving: Columns

    @cached_property
    def reads(self) -> Origins | None:
        """What the step may read; None if it may read everything."""
        said = self.declaration
        if said.needs is None or said.reads_all:
            return None
        needed = (o for need in said.needs for o in self.seen.meeting(need).values())
        optional = (self.seen.find(name) for name in said.optional)
        return frozenset(origin for origins in (*needed, *optional) for origin in origins)

    def outside(self, name: str) -> str:
        """Return what a column that the step writes is called outside the module's namespace."""
        return _outside(name, self.namespace)

    @cached_property
    def makes(self) -> Origins:
        """The columns that the step makes, as far as it declares them."""
        found = (o for origins in self.leaving.origins.values() for o in origins)
        return frozenset(o for o in found if (o.flow, o.node) == (self.flow, self.node.index))


def feed_columns(flow: str, kinds: Mapping[str, Kinds] | None) -> Columns:
    """Return what feeds a flow whose datasets have columns of these kinds; None if nobody knows them.

    The outcome of a sample may have been written by the time somebody looks at it.
    """
    number: Kinds = frozenset({"number"})
    known = {**(kinds or {}), UID: number, PROMPT_UID: number}
    origins = {name: frozenset({Origin(flow, FEED, name, k)}) for name, k in known.items()}
    outcome = {OUTCOME: frozenset({Origin(flow, FEED, OUTCOME)})}
    return Columns(outcome | origins, frozenset(origins), is_open=kinds is None)


def join(parts: Iterable[Columns]) -> Columns:
    """Return what a node gets of several inputs: on equal names the later one wins, if it is there for certain."""
    origins: dict[str, Origins] = {}
    certain: set[str] = set()
    is_open = False
    for part in parts:
        for name, found in part.origins.items():
            hidden = frozenset[Origin]() if name in part.certain else origins.get(name, frozenset())
            origins[name] = found | hidden
        certain |= part.certain
        is_open |= part.is_open
    return Columns(origins, frozenset(certain), is_open)


def through(
    graph: FlowGraph,
    feed: Columns,
    declared: Callable[[Node], Declaration],
    namespace: Callable[[Node], tuple[str, frozenset[str]] | None],
) -> list[NodeColumns]:
    """Follow the columns of `feed` through a flow.

    Args:
        graph: the flow.
        feed: what its batch has.
        declared: what is known of a node's step.
        namespace: of a node's module, if it has one, with the columns that its class declares as written.
    """
    found: list[NodeColumns] = []
    for node in graph.nodes:
        sources = (feed if i == FEED else found[i].leaving for i in node.inputs)
        entering, said, inner = join(sources), declared(node), namespace(node)
        seen = entering if inner is None else _inside(entering, *inner)
        name = None if inner is None else inner[0]
        leaving = _leaving(graph.name, node, said, entering, name)
        found.append(NodeColumns(graph.name, node, said, name, seen, entering, leaving))
    return found


def returned(graph: FlowGraph, nodes: Sequence[NodeColumns]) -> Columns:
    """Return what leaves a flow: the merged columns of the nodes that it returns."""
    return join(nodes[index].leaving for index in graph.outputs)


def _inside(columns: Columns, namespace: str, writes: frozenset[str]) -> Columns:
    """Return what a module of a namespace sees."""
    outside = columns.origins
    seen: dict[str, Origins] = {}
    certain: set[str] = set()
    for inner, outer in doors(outside, namespace, writes).items():
        source = outer if outer in outside else inner  # a copy of the plain one
        plain = outside.get(inner, frozenset())
        # Where its own may be missing, the step would see the plain one.
        seen[inner] = outside[source] | (frozenset() if source in columns.certain else plain)
        if source in columns.certain:
            certain.add(inner)
    return Columns(seen, frozenset(certain), columns.is_open)


def _leaving(
    flow: str, node: Node, said: Declaration, entering: Columns, namespace: str | None
) -> Columns:
    """Return what a step gives, by the names that the columns have outside."""
    passed = {} if said.passes_on is False else dict(entering.origins)
    for name in said.drops:
        passed.pop(name, None)
    certain = {n for n in entering.certain if n in passed} if said.passes_on else set[str]()
    for name, kinds in (said.writes or {}).items():
        outside = _outside(name, namespace)
        passed[outside] = frozenset({Origin(flow, node.index, outside, kinds)})
        certain.add(outside)
    may_add = said.writes is None
    may_pass = entering.is_open and said.passes_on is not False
    return Columns(passed, frozenset(certain), may_add or may_pass)


def _outside(name: str, namespace: str | None) -> str:
    return name if namespace is None or name in SHARED else f"{namespace}/{name}"
