# SPDX-License-Identifier: Apache-2.0
"""Which recorded nodes run again, and which answer from the record."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from chatlearn.columns import RESPONSE_IDS
from chatlearn.config_problems import closest
from chatlearn.errors import RecordError
from chatlearn.flow.graph import FlowGraph
from chatlearn.program import Program
from chatlearn.record.nodes import NodeRecord
from chatlearn.record.reading import EpisodeRecord, FlowRecord
from chatlearn.rerun.weights import checkpoint_of, resumed_from

ENV: Final = "env_flow"
TRAINER: Final = "trainer_flow"
EVAL: Final = "eval_flow"


@dataclass
class Selection:
    """Which nodes run again; the others that these need answer from the record."""

    env: set[str] = field(default_factory=set[str])
    trainer: set[str] = field(default_factory=set[str])
    evaluation: set[str] = field(default_factory=set[str])
    notes: list[str] = field(default_factory=list[str])
    left_out: list[str] = field(default_factory=list[str])
    """Nodes that belong to what was asked for and cannot run."""

    @property
    def trains(self) -> bool:
        """Whether train steps are made."""
        return bool(self.trainer)


def select_node(
    program: Program, episode: EpisodeRecord, name: str, *, evaluation: bool
) -> Selection:
    """Choose one node, named as `chatlearn graph` shows it, or by its module alone.

    Raises:
        RecordError: the script has no such node, or several.
    """
    flows = (EVAL,) if evaluation else (ENV, TRAINER)
    nodes = [
        (flow, n) for flow in flows if flow in program.graphs for n in program.graphs[flow].nodes
    ]
    found = [(flow, n) for flow, n in nodes if n.name == name] or [
        (flow, n) for flow, n in nodes if n.module.name == name
    ]
    if len(found) != 1:
        raise _no_such_node(name, [n.name for _, n in found or nodes], episode, flows, bool(found))
    flow, node = found[0]
    chosen = {node.name}
    if flow == EVAL:
        return Selection(evaluation=chosen)
    return Selection(env=chosen) if flow == ENV else Selection(trainer=chosen)


def _no_such_node(
    name: str, names: Sequence[str], episode: EpisodeRecord, flows: Sequence[str], several: bool
) -> RecordError:
    if several:
        return RecordError(
            f"module {name!r} has several nodes: {', '.join(names)}", fix="name one of them in full"
        )
    recorded = [
        node for flow in flows if flow in episode.flows for node in episode.flow(flow).nodes
    ]
    near = closest(name, [*names, *(n.split(".")[0] for n in names)])
    fix = f"did you mean {near!r}?" if near else "choose one of these"
    cause = f"the script has no node {name!r}; it has {', '.join(names)}"
    if any(name in (node.name, node.module) for node in recorded):
        cause = f"node {name!r} is in the record, but no longer in the script, which has {', '.join(names)}"
        fix = "name the node as it is called now, or give the script as it was with --script"
    return RecordError(cause, place=str(episode.path), fix=fix)


def select_episode(program: Program, episode: EpisodeRecord, keep: Collection[str]) -> Selection:
    """Choose all nodes but those that sampled, what these took, and those that are to be kept.

    A node sampled if the record says that it made a column `response_ids`, in whatever namespace.

    Raises:
        RecordError: a node to keep is not in the record, or nothing is left to run.
    """
    selection = Selection()
    graph = program.graphs.get(ENV)
    kept: set[str] = set()
    if graph is not None and ENV in episode.flows:
        record = episode.flow(ENV)
        names = {node.name for node in graph.nodes}
        asked = {_node_to_keep(record, graph, name) for name in keep}
        kept = {n.name for n in record.nodes if _sampled(n) and n.name in names} | asked
        for node in reversed(graph.nodes):  # what only these took would be made for nothing
            if node.name in kept:
                kept |= {graph.nodes[source].name for source in node.inputs if source >= 0}
        selection.env = names - kept
        if not kept:
            selection.notes.append(
                f"no node of {ENV} made a column {RESPONSE_IDS!r}, so all of them run again; "
                "--keep NODE takes one from the record"
            )
    if (trainer := program.graphs.get(TRAINER)) is not None and TRAINER in episode.flows:
        selection.trainer = {node.name for node in trainer.nodes}
    done = episode.number - 1
    if selection.env and selection.trains and done and not checkpoint_of(episode, done).is_dir():
        selection.left_out, selection.trainer = sorted(selection.trainer), set()
        elsewhere = resumed_from(episode, done)
        advice = elsewhere or "runtime.save_episode_interval=1 keeps one after every episode"
        selection.notes.append(
            f"train steps are left out: there is no checkpoint of episode {done} to begin them from; {advice}"
        )
    if not selection.env and not selection.trainer:
        why = selection.notes[0] if selection.notes else f"it has {', '.join(episode.flows)}"
        raise RecordError(
            f"nothing of episode {episode.number} can run again from its rollouts: {why}",
            place=str(episode.path),
            fix="name a node; one of an evaluation with --eval",
        )
    if kept:
        selection.notes.append(f"taken from the record: {', '.join(sorted(kept))}")
    return selection


def _sampled(node: NodeRecord) -> bool:
    return any(name.split("/")[-1] == RESPONSE_IDS for name in node.made)


def _node_to_keep(record: FlowRecord, graph: FlowGraph, name: str) -> str:
    named = [n.name for n in graph.nodes if n.name == name or n.module.name == name]
    return record.node(named[0] if len(named) == 1 else name).name
