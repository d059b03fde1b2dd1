# SPDX-License-Identifier: Apache-2.0
"""What passes between the scheduler and a driver: events in, commands out. Plain integers, no tensors, no clock.

Example:
    The scheduler says `Call(id=7, node=NodeSpec(policy.forward_step), replica=0, uids=[8, 9], ...)`; the driver
    fetches the inputs, calls the method and answers `Finished(7)`, whereupon the scheduler says what follows.
    Had the step raised, and were its node's `Recovery` not to stop, the driver would answer `Failed(7, "failed")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from chatlearn.config import ModuleConfig
from chatlearn.errors import FlowError
from chatlearn.flow.graph import FlowGraph
from chatlearn.flow.steps import Step
from chatlearn.module import BatchBy, resolved_config
from chatlearn.runtime.promises import promised_columns

Fate = Literal["stop", "drop_group", "mask"]
"""What a sample that is given up does: end the run, take its group out of what is delivered, or stay without values."""


@dataclass(frozen=True)
class Recovery:
    """What follows when a step fails on samples: how often they are tried again, and what then."""

    fate: Fate = "stop"
    retries: int = 0

    @classmethod
    def of(cls, config: ModuleConfig) -> Recovery:
        """Return what a module's `on_failure`, `max_retries` and `after_retries` say."""
        if config.on_failure == "retry":
            return cls(config.after_retries, config.max_retries)
        return cls(config.on_failure)

    @property
    def stops_at_once(self) -> bool:
        """Whether the first failure ends the run, so that nothing has to be kept for another try."""
        return self.fate == "stop" and not self.retries


@dataclass(frozen=True)
class NodeSpec:
    """What the scheduler knows of a node; `inputs` and `after` name nodes of the same flow (`FEED` = the batch)."""

    index: int
    name: str
    module: str
    method: str
    inputs: tuple[int, ...]
    after: tuple[int, ...] = ()
    batch_size: int | None = None
    """Samples per call at most; None puts everything into one call."""
    batch_by: BatchBy = "sample"
    filters: bool = False
    place: str = ""
    """`file:line` of the call in the user's code, for errors."""
    recovery: Recovery = Recovery()
    promised: frozenset[str] = frozenset()
    """Columns that `@declares` says the step writes, as the module calls them."""
    namespace: str | None = None


def node_specs(graph: FlowGraph, batch_size: int | None = None) -> list[NodeSpec]:
    """Describe a graph's nodes; `batch_size` is for modules that set none of their own.

    Raises:
        FlowError: a module's class declares a `batch_by` that does not exist.
    """
    for node in graph.nodes:
        if node.module.batch_by not in get_args(BatchBy):
            raise FlowError(
                f"{type(node.module).__name__}.batch_by is {node.module.batch_by!r}, which is no granularity",
                place=node.place,
                fix=f"declare one of {', '.join(map(repr, get_args(BatchBy)))} on the class",
            )
    return [
        NodeSpec(
            index=node.index,
            name=node.name,
            module=node.module.name,
            method=node.method,
            inputs=node.inputs,
            after=node.after,
            batch_size=resolved_config(node.module).generation_batch_size or batch_size,
            batch_by=node.module.batch_by,
            filters=node.module.filters_samples,
            place=node.place,
            recovery=Recovery.of(resolved_config(node.module)),
            promised=promised_columns(node),
            namespace=resolved_config(node.module).namespace,
        )
        for node in graph.nodes
    ]


class Piece(NamedTuple):
    """Samples `start` to `stop` of what call `call` returned (of the feed, if `call` is `FEED`)."""

    call: int
    start: int
    stop: int


@dataclass(frozen=True)
class Call:
    """Command: call `node` on replica `replica` with the joined `inputs`; answer `Finished` or `Failed`."""

    id: int
    node: NodeSpec
    replica: int
    iteration: int
    inputs: tuple[tuple[Piece, ...], ...]
    """Per input of the node, the pieces that make up its samples, in order (for a train step: whole calls)."""
    uids: Sequence[int]
    step: Step | None = None
    """The global batch, for nodes of a trainer flow."""
    attempt: int = 0
    """How many calls that held these samples have failed."""
    origin: int = -1
    """Of a call that tries samples again, the first one that held them; it has taken the inputs already."""


class Deliver(NamedTuple):
    """Command: append the joined `inputs` to the samples that the trainer flow (or the caller) receives."""

    inputs: tuple[tuple[Piece, ...], ...]
    """Per returned node, the pieces that hold the samples that are not lost."""
    uids: Sequence[int]
    """Of all samples, the lost ones that stay included."""
    lost: tuple[int, ...] = ()
    """Where, among `uids`, the lost ones stand."""


class Lost(NamedTuple):
    """Command: samples of a call have been given up; no later call gets them."""

    call: int
    """The call that failed on them."""
    uids: Sequence[int]


Command = Call | Deliver | Lost


class Finished(NamedTuple):
    """Event: a call returned. `kept` are the offsets of the samples a filter let through, else None."""

    call: int
    kept: tuple[int, ...] | None = None
    seconds: float = 0.0
    """How long it took, so that a slow replica gets less to do."""
    failed: tuple[int, ...] = ()
    """Offsets of the samples that the step says it failed on; they are no part of what is kept of its output."""


class Failed(NamedTuple):
    """Event: a call raised, gave no answer in time, or its replica died."""

    call: int
    seconds: float = 0.0


@dataclass(frozen=True)
class ReplicaJoined:
    """Event: a replica can take calls."""

    module: str
    replica: int


@dataclass(frozen=True)
class ReplicaLeft:
    """Event: a replica takes no further calls."""

    module: str
    replica: int


Event = Finished | Failed | ReplicaJoined | ReplicaLeft
