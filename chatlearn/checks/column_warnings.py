# SPDX-License-Identifier: Apache-2.0
"""What a program does in vain, as far as its columns show it: outputs and columns that nobody reads, idle syncs.

All of it would run, so these are warnings. What a module without declarations reads is not known: it reads everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from chatlearn.checks.columns import Followed, upstream
from chatlearn.columns import ROLLOUT_LOGPROBS
from chatlearn.flow.column_flow import NodeColumns, Origin, returned
from chatlearn.module import BaseModule, may_have_weights
from chatlearn.program import FlowWarning, Program

_Key = tuple[str, int, str]
_SYNC: Final = "set_parameter_sync"


def warn_of_columns(program: Program, flows: Sequence[Followed]) -> None:
    """Name outputs that nobody takes, columns that nobody reads at a cost, work that is replaced, idle policies."""
    everyone = [node for flow in flows for node in flow.nodes]
    named = set[_Key]().union(*(_keys(node.reads or ()) for node in everyone))
    used = _used(program, flows)
    seen: set[str] = set()
    for flow in flows:
        if flow.graph.name in seen:  # an evaluation flow on a further dataset
            continue
        seen.add(flow.graph.name)
        for node in flow.nodes:
            program.warnings += _warnings(flow, node, used, everyone)
            program.warnings += _replaced_wholes(flow, node, used, named)
    said: set[int] = set()
    program.warnings += _never_synced(program, flows, said)
    program.warnings += _never_taught(program, flows, said)


def _used(program: Program, flows: Sequence[Followed]) -> set[_Key]:
    """Return the columns that some step, or whoever gets what a flow returns, may read."""
    used: set[_Key] = set()
    for flow in flows:
        for node in flow.nodes:
            reads = node.reads
            used |= _keys(_all(node) if reads is None else reads)
        # What the trainer flow is fed with is read, or not, by its nodes, and what it returns goes to nobody.
        is_fed_on = flow.graph.name == "env_flow" and "trainer_flow" in program.graphs
        goes_on = flow.graph.name != "trainer_flow" and not is_fed_on
        if goes_on or (is_fed_on and program.replay_sampler is not None):
            results = returned(flow.graph, flow.nodes)
            used |= _keys(origin for origins in results.origins.values() for origin in origins)
    return used


def _all(node: NodeColumns) -> Iterator[Origin]:
    return (origin for origins in node.entering.origins.values() for origin in origins)


def _keys(origins: Iterable[Origin]) -> set[_Key]:
    return {(origin.flow, origin.node, origin.name) for origin in origins}


def _warnings(
    flow: Followed, node: NodeColumns, used: set[_Key], everyone: Sequence[NodeColumns]
) -> Iterator[FlowWarning]:
    made, said = node.makes, node.declaration
    if flow.graph.name == "trainer_flow" and not said.is_of_method:
        return
    index = node.node.index
    is_taken = index in flow.graph.outputs or any(index in o.inputs for o in flow.graph.nodes)
    if not is_taken:
        is_called_for = any(index in other.after for other in flow.graph.nodes)
        if not is_called_for and (made or _may_make(flow, node)):
            yield _untaken(node, made)
    elif not made or said.is_learned:
        return
    elif _keys(made).isdisjoint(used):
        if said.cost:
            yield _costly(node, everyone)
        elif rival := _rival(flow, node, made, used):
            yield _replaced(node, made, rival)


def _may_make(flow: Followed, node: NodeColumns) -> bool:
    """Tell whether a step may return columns for all that is known; what trains usually does not."""
    return node.declaration.writes is None and flow.graph.name != "trainer_flow"


def _untaken(node: NodeColumns, made: Iterable[Origin]) -> FlowWarning:
    name, either = node.node.name, "pass it to another call, or return it"
    if made:
        return FlowWarning(
            f"nothing takes the output of {name}, which makes {_names(made)}",
            node.node.place,
            fix=f"{either}; if only what the step logs is wanted, all is well",
        )
    return FlowWarning(
        f"nothing takes the output of {name}, if it has any",
        node.node.place,
        fix=f"{either}; a step that returns nothing on purpose says so: @declares(writes=())",
    )


def _replaced_wholes(
    flow: Followed, node: NodeColumns, used: set[_Key], named: set[_Key]
) -> Iterator[FlowWarning]:
    """Name a sum that is replaced unread, though its parts stay: `rewards` beside `rewards/score`.

    Who reads everything reads the parts, too; but if a step asks for one of them, the sum may not be wanted.
    """
    if not any("/" in name for name in node.declaration.writes or ()):
        return
    made = node.makes
    if _keys(made).isdisjoint(used):  # said of the whole node
        return
    for whole, parts in _sums(node).items():
        sums = frozenset(origin for origin in made if origin.name == whole)
        if not (_keys(sums) & used or _keys(parts) & named):
            rival = _rival(flow, node, sums, used)
            if rival is not None:
                yield _replaced(node, sums, rival)


def _sums(node: NodeColumns) -> dict[str, list[Origin]]:
    """Return the columns that the step makes together with parts of them, each with its parts."""
    made = node.makes
    found = {o.name: [p for p in made if p.name.startswith(f"{o.name}/")] for o in made}
    return {whole: parts for whole, parts in found.items() if parts}


def _replaced(node: NodeColumns, columns: Iterable[Origin], rival: NodeColumns) -> FlowWarning:
    kind, fix = type(node.node.module), "give one of the modules a namespace"
    if type(rival.node.module) is kind and _sums(node).keys() & _sums(rival).keys():
        fix = (
            f"give one {kind.__name__} both functions, with weights, or each of the two a namespace"
        )
    return FlowWarning(
        f"the columns of {node.node.name} are replaced before anything reads them: "
        f"{_names(columns)}, by {rival.node.name} ({rival.node.place})",
        node.node.place,
        fix=f"{fix}, or leave one of the calls out",
    )


def _costly(node: NodeColumns, nodes: Iterable[NodeColumns]) -> FlowWarning:
    names = _names(node.makes)
    would = [
        f"{other.node.module.name} would read it with {setting}"
        for other in nodes
        for name, setting in other.declaration.would_read.items()
        if name in (node.declaration.writes or ())
    ]
    return FlowWarning(
        f"{node.node.name} costs {node.declaration.cost}, and nothing reads its {names}",
        node.node.place,
        fix="leave the call out" + (f"; {' and '.join(would)}" if would else ""),
    )


def _rival(
    flow: Followed, node: NodeColumns, columns: Iterable[Origin], used: set[_Key]
) -> NodeColumns | None:
    """Return a later node of the flow that makes one of the columns, which somebody reads from there."""
    names = {origin.name for origin in columns}
    for other in flow.nodes[node.node.index + 1 :]:
        read = (o for o in other.makes if (o.flow, o.node, o.name) in used)
        if any(origin.name in names for origin in read):
            return other
    return None


def _never_synced(
    program: Program, flows: Sequence[Followed], said: set[int]
) -> Iterator[FlowWarning]:
    """Name policies whose log-probs a trainer learns from, and which never get what it learned."""
    trainer = next((flow for flow in flows if flow.graph.name == "trainer_flow"), None)
    if trainer is None:
        return
    taught = {id(module) for module in trainer.graph.modules}
    taught |= {id(destination) for _, destination in program.sync_pairs}
    for node in trainer.nodes:
        for origin in sorted(node.reads or (), key=_order):
            sampler = trainer.node(origin)
            is_sampled = origin.name.rsplit("/", maxsplit=1)[-1] == ROLLOUT_LOGPROBS
            if sampler is None or not is_sampled or id(sampler.node.module) in taught:
                continue
            if may_have_weights(sampler.node.module):
                taught.add(id(sampler.node.module))
                said.add(id(sampler.node.module))
                yield _unsynced(sampler, node)


def _unsynced(sampler: NodeColumns, trainer: NodeColumns) -> FlowWarning:
    policy, learner = sampler.node.module.name, trainer.node.module.name
    return FlowWarning(
        f"{policy} samples for {learner}, but no parameter sync leads into it: it never gets what {learner} learns",
        sampler.node.place,
        fix=f"write engine.{_SYNC}({learner}, {policy})",
    )


def _never_taught(
    program: Program, flows: Sequence[Followed], said: set[int]
) -> Iterator[FlowWarning]:
    """Name what samples in a flow that holds nothing a trainer changes: no sync leads there, and it is always the same.

    A sampler behind an undeclared step may be the judge of a policy that nobody knows, so it is left alone.
    """
    trainer = program.graphs.get("trainer_flow")
    learners = [m for m in trainer.modules if may_have_weights(m)] if trainer else []
    taught = [*learners, *(destination for _, destination in program.sync_pairs)]
    for flow in flows if learners else ():
        if flow.graph.name == "trainer_flow" or any(m in taught for m in flow.graph.modules):
            continue
        samplers = [node for node in flow.nodes if _samples_first(flow, node)]
        for node in samplers[:1]:
            if id(node.node.module) not in said:
                said.add(id(node.node.module))
                yield _untaught(flow, node, learners)


def _samples_first(flow: Followed, node: NodeColumns) -> bool:
    """Tell whether a step declares that it samples, and so do all steps before it what they make."""
    samples = ROLLOUT_LOGPROBS in (node.declaration.writes or ())
    if not samples or not may_have_weights(node.node.module):
        return False
    before = (flow.nodes[index] for index in upstream(flow.graph, node.node))
    said = [step.declaration for step in (node, *before)]
    return all(one.writes is not None and not one.is_learned for one in said)


def _untaught(flow: Followed, node: NodeColumns, learners: Sequence[BaseModule]) -> FlowWarning:
    policy, names = node.node.module.name, " and ".join(module.name for module in learners)
    is_evaluation = flow.graph.name == "eval_flow"
    what = (
        "so all evaluations measure the same weights"
        if is_evaluation
        else "and it samples the same way for ever"
    )
    return FlowWarning(
        f"nothing is ever synced into {policy}: {names} learns, {what}",
        node.node.place,
        fix=f"write engine.{_SYNC}({learners[0].name}, {policy})"
        + (", or evaluate a policy that learns" if is_evaluation else ""),
    )


def _order(origin: Origin) -> _Key:
    return origin.flow, origin.node, origin.name


def _names(origins: Iterable[Origin]) -> str:
    return ", ".join(map(repr, sorted(origin.name for origin in origins)))
