# SPDX-License-Identifier: Apache-2.0
"""Which columns a program's calls cannot find, or find of the wrong kind: known before anything is set up.

An error is reported only where the first call is certain to fail. What a module without declarations adds or leaves
out is not known, so behind it nothing is missing for certain (see `flow/column_flow.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from chatlearn.columns import COLUMNS, KINDS, MAKERS, OUTCOME
from chatlearn.data.row_columns import row_columns
from chatlearn.errors import ChatLearnError, DataError, FlowError
from chatlearn.flow.column_flow import (
    OPEN,
    Columns,
    NodeColumns,
    Origin,
    Origins,
    feed_columns,
    returned,
    through,
)
from chatlearn.flow.declaration import Declaration, Kinds, Need, declaration_of
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.module import BaseModule, resolved_config, written_columns
from chatlearn.program import Executor, Program, name_of

Learned = Mapping[tuple[str, int], Declaration]
"""What a dry run has found out of undeclared steps, by flow and node."""


@dataclass(frozen=True)
class Followed:
    """The columns of a flow, from what feeds it to what it returns."""

    graph: FlowGraph
    nodes: list[NodeColumns]
    dataset: str = ""
    """Which one feeds it, where the flow runs on several datasets, one after the other."""
    source: Followed | None = None
    """The environment flow, if that feeds it."""

    def node(self, origin: Origin) -> NodeColumns | None:
        """Return the node that made a column; None if the dataset did."""
        if origin.node == FEED:
            return None
        if origin.flow == self.graph.name:
            return self.nodes[origin.node]
        return self.source.node(origin) if self.source is not None else None


def follow(program: Program, learned: Learned | None = None) -> list[Followed]:
    """Follow the columns through every flow of a program; an evaluation flow once per dataset."""
    found: list[Followed] = []
    env, trainer, evaluation = (
        program.graphs.get(name) for name in ("env_flow", "trainer_flow", "eval_flow")
    )
    source: Followed | None = None
    if env is not None and program.environment is not None:
        source = _through(program, env, _feeds(program.environment, env)[0], learned)
        found.append(source)
    if trainer is not None and program.trainer is not None:
        if program.environment is None:
            feed = _feeds(program.trainer, trainer)[0]
        else:
            feed = _delivered(program, source)
        found.append(_through(program, trainer, feed, learned, source=source))
    if evaluation is not None and program.evaluator is not None:
        feeds = _feeds(program.evaluator, evaluation)
        names = [name_of(program.evaluator, n) for n in range(len(program.evaluator.sources))]
        found += [
            _through(program, evaluation, feed, learned, dataset=name if len(names) > 1 else "")
            for feed, name in zip(feeds, names or [""], strict=True)
        ]
    return found


def _through(
    program: Program,
    graph: FlowGraph,
    feed: Columns,
    learned: Learned | None,
    *,
    dataset: str = "",
    source: Followed | None = None,
) -> Followed:
    def declared(node: Node) -> Declaration:
        found = (learned or {}).get((graph.name, node.index))
        return declared_step(program, node) if found is None else found

    return Followed(graph, through(graph, feed, declared, _namespace), dataset, source)


def declared_step(program: Program, node: Node) -> Declaration:
    """Return what a step declares; nothing, if it says so wrongly or its configuration is wrong."""
    try:
        resolved_config(node.module)
        return declaration_of(node.module, node.method)
    except ChatLearnError as error:
        if str(error) not in map(str, program.problems):
            program.problems.append(error)
        return Declaration()


def _namespace(node: Node) -> tuple[str, frozenset[str]] | None:
    try:
        name = resolved_config(node.module).namespace
    except ChatLearnError:  # a problem already
        return None
    return None if name is None else (name, written_columns(node.module))


def _feeds(executor: Executor, graph: FlowGraph) -> list[Columns]:
    """Return what each dataset of a flow feeds it; of one that the user's own code makes, nothing is known."""
    first = graph.nodes[0].module
    makes_own = type(first).build_dataset is not BaseModule.build_dataset
    try:
        rows = executor.rows()
    except ChatLearnError:  # a problem already
        rows = []
    if makes_own or "build_dataset" in vars(first) or not rows:
        return [feed_columns(graph.name, None)] * max(len(executor.sources), 1)
    return [feed_columns(graph.name, row_columns(dataset)) for dataset in rows]


def _delivered(program: Program, env: Followed | None) -> Columns:
    """Return what the trainer flow gets; a replay sampler may give any column."""
    if env is None or not env.graph.outputs:  # a problem already
        return OPEN
    columns = returned(env.graph, env.nodes)
    chosen = program.replay_sampler is not None
    return Columns(columns.origins, is_open=True) if chosen else columns


def check_columns(program: Program, flows: Sequence[Followed]) -> None:
    """Report every column that a call needs and cannot get, and every one of the wrong kind."""
    said: set[tuple[str, ...]] = set()
    for flow in flows:
        for node in flow.nodes:
            for key, problem in _node_problems(flow, node):
                if (node.node.place, node.node.module.name, *key) not in said:
                    said.add((node.node.place, node.node.module.name, *key))
                    program.problems.append(problem)


Problem = tuple[tuple[str, ...], ChatLearnError]


def _node_problems(flow: Followed, node: NodeColumns) -> Iterator[Problem]:
    """Yield the problems of one node, each with what tells it from others at the same place."""
    if node.declaration.trains and flow.graph.name != "trainer_flow":
        yield ("trains",), _misplaced(flow, node)
        return
    if node.seen.is_open:
        return
    missing: list[Need] = []
    for need in node.declaration.needs or ():
        found = node.seen.meeting(need)
        if not found:
            # Who misses `completion` need not hear of the functions that miss it.
            if not any(need.columns.keys() & other.columns.keys() for other in missing):
                missing.append(need)
        elif (wrong := _mistyped(flow, node, need, found)) is not None:
            yield (*found, "kind"), wrong
    by_fix: dict[tuple[str, str], list[Need]] = {}
    for need in missing:
        by_fix.setdefault((need.reader, _fix(flow, node, need)), []).append(need)
    for (_, fix), needs in by_fix.items():
        names = tuple(name for need in needs for name in need.columns)
        yield names, _missing(flow, node, needs, fix)


def _misplaced(flow: Followed, node: NodeColumns) -> FlowError:
    name, where = node.node.name, flow.graph.name
    return FlowError(
        f"{name} is an update on a global batch, and {where} has none: it gives one micro-batch of samples a call",
        place=node.node.place,
        fix=f"call it in the trainer flow, Trainer(lambda batch: {name.partition('#')[0]}(batch)), "
        f"and return from {where} what it learns from",
    )


# ---- a missing column ---------------------------------------------------------------------------------------------


def _missing(flow: Followed, node: NodeColumns, needs: Sequence[Need], fix: str) -> FlowError:
    first = needs[0]
    who = (
        f"{node.node.name}: {first.reader} asks for" if first.reader else f"{node.node.name} reads"
    )
    because = f" (needed because {first.because})" if first.because else ""
    names = first.spellings(name for name in node.seen.origins if name not in _UNLISTED)
    if flow.source is not None and set(node.node.inputs) == {FEED}:
        where = f"which {flow.source.graph.name} does not return; it returns {names}"
    else:
        where = f"which its input does not have; there are {names}"
    dataset = f" on {flow.dataset}" if flow.dataset else ""
    return FlowError(
        f"{who} {_labels(needs)}{because}, {where}{dataset}", place=node.node.place, fix=fix
    )


_UNLISTED: Final = frozenset({OUTCOME})
"""What the engine may add to any batch is not what somebody meant."""


def _labels(needs: Sequence[Need]) -> str:
    """Name columns: `'prompt_ids' and ('rollout_logprobs' or 'old_logprobs')`."""
    labels: list[str] = []
    for need in needs:
        names = [*map(repr, need.columns)][: 1 if need.reader else None]
        label = " or ".join(names)
        labels.append(f"({label})" if len(names) > 1 and len(needs) > 1 else label)
    return " and ".join(labels)


def _fix(flow: Followed, node: NodeColumns, need: Need) -> str:
    """Say where the column could come from: a typo, a call that makes it already, a step of ours, the dataset."""
    tail = f", or {need.instead}" if need.instead else ""
    if close := _closest(node, need):
        return f"did you mean {close!r}?{_or_declare(node, need)}"
    for name in need.columns:
        if (maker := _maker(flow, node, name)) is not None:
            return _pass_on(flow, node, maker) + tail
    usual = MAKERS.get(next(iter(need.columns)))
    if usual is None:
        what = "add the column to the dataset, or call a module before this step that makes it"
        return what + tail + _or_declare(node, need)
    source = f"return its output from {flow.source.graph.name}" if flow.source is not None else ""
    if flow.source is None and set(node.node.inputs) == {FEED}:
        return f"add the column to the dataset, or call {usual} before this step, which usually makes it{tail}"
    return f"{usual} usually makes it: call it before this step and {source or 'pass its output on'}{tail}"


def _or_declare(node: NodeColumns, need: Need) -> str:
    if need.reader:
        return " (or give the parameter a default)"
    if need.because:
        return ""
    kind = type(node.node.module)
    ours = kind.__module__.startswith("chatlearn.")
    return "" if ours else f" (or correct what {kind.__name__} declares)"


def _closest(node: NodeColumns, need: Need) -> str | None:
    """Return the column that was probably meant; names of ours are no typos of each other."""
    wanted = next(iter(need.columns))
    names = [n for n in node.seen.origins if wanted not in COLUMNS or n not in COLUMNS]
    return next(iter(difflib.get_close_matches(wanted, need.spellings(names), 1, 0.75)), None)


def _maker(flow: Followed, node: NodeColumns, name: str) -> NodeColumns | None:
    """Return a node whose step makes a column that this one misses."""
    wanted = {name, node.outside(name)}
    for follower in (flow, flow.source):
        for other in follower.nodes if follower is not None else ():
            made = map(other.outside, other.declaration.writes or ())
            if other is not node and not wanted.isdisjoint(made):
                return other
    return None


def _pass_on(flow: Followed, node: NodeColumns, maker: NodeColumns) -> str:
    made = f"{maker.node.name} ({maker.node.place}) makes it"
    if maker.flow != flow.graph.name:
        return f"{made}: return its output from {maker.flow}, too"
    if maker.node.index > node.node.index:
        return f"{made}: call it before this step, and pass its output on"
    if maker.node.index in upstream(flow.graph, node.node):
        return f"{made}, but a step between does not pass it on: return it there, or give this step both outputs"
    return f"{made}: give this step its output, too"


def upstream(graph: FlowGraph, node: Node) -> set[int]:
    """Return the nodes that a node's inputs come from, directly or through others."""
    found: set[int] = set()
    ways = list(node.inputs)
    while ways:
        index = ways.pop()
        if index != FEED and index not in found:
            found.add(index)
            ways += graph.nodes[index].inputs
    return found


# ---- a column of the wrong kind -----------------------------------------------------------------------------------

_TAKEN_FOR: Final = {
    "floats": frozenset({"floats", "tokens", "flags"}),
    "flags": frozenset({"flags", "tokens", "floats"}),
}
"""Further kinds that can be read as one."""


def _fits(wanted: Kinds, given: Kinds) -> bool:
    """Tell whether a column of one of the kinds `given` may be read as one of `wanted`."""
    if not wanted or not given:
        return True
    taken = frozenset[str]().union(*(_TAKEN_FOR.get(kind, {kind}) for kind in wanted))
    return bool(taken & given)


def _mistyped(
    flow: Followed, node: NodeColumns, need: Need, found: Mapping[str, Origins]
) -> ChatLearnError | None:
    """Return the error if no column that is there can be read as what the step needs."""
    first: tuple[str, Origin] | None = None
    for name, origins in found.items():
        wanted = need.columns.get(name, frozenset())
        for origin in origins:
            if _fits(wanted, origin.kinds):
                return None
            first = first or (name, origin)
    assert first is not None, "something was found"
    name, origin = first
    maker, given = flow.node(origin), _words(origin.kinds)
    reads = f"{node.node.name} reads {name!r} as {_words(need.columns[name])}"
    if maker is None:
        dataset = flow.dataset or "the dataset"
        return DataError(
            f"{reads}, but in {dataset} it is {given}",
            place=node.node.place,
            fix=f"give the column as {_words(need.columns[name])}: {_meanings(need.columns[name])}",
        )
    return FlowError(
        f"{reads}, but {maker.node.name} ({maker.node.place}) makes it {given}",
        place=node.node.place,
        fix=f"have {type(maker.node.module).__name__} make {_words(need.columns[name])} of it, or name it otherwise",
    )


def _words(kinds: Kinds) -> str:
    return " or ".join(kind for kind in KINDS if kind in kinds)


def _meanings(kinds: Kinds) -> str:
    return ", or ".join(meaning for kind, meaning in KINDS.items() if kind in kinds)
