# SPDX-License-Identifier: Apache-2.0
"""What a runtime is asked to run, what it tells while it does, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chatlearn.flow.batch import Batch
from chatlearn.flow.graph import FlowGraph, Node
from chatlearn.flow.steps import StepSource
from chatlearn.runtime.protocol import Call
from chatlearn.runtime.store import SampleStore


class Feed(Protocol):
    """The samples that enter a flow."""

    @property
    def uids(self) -> Sequence[int]: ...
    @property
    def groups(self) -> Sequence[int]: ...

    def batch(self, start: int, stop: int) -> Batch:
        """Return samples `start` to `stop`, for the taker to change as it likes."""
        ...


@dataclass(frozen=True)
class CallReport:
    """What an observer learns of a finished call, or of samples that have been given up."""

    module: str
    method: str
    samples: int
    """Those that the step succeeded on."""
    seconds: float
    metrics: Mapping[str, float]
    is_training: bool
    outcomes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Samples by what became of them: `cut`, `failed`, `timed_out`; and `retried`, those that were tried once more."""
    cause: str = ""
    """Why samples were given up."""


Observer = Callable[[CallReport], None]
Starting = Callable[[str, str, bool, Sequence[int]], None]
"""Told of a call before it is made: its module, its method, whether it trains, and the uids of its samples."""


@dataclass
class FlowWork:
    """An environment or evaluation flow to run over a feed."""

    graph: FlowGraph
    feed: Feed
    needs_output: bool = True
    """Whether somebody reads what the flow returns."""
    keeps_batches: bool = False
    """Whether to hand the returned nodes' batches out as they are (`Outcome.results`) instead of merged samples."""


@dataclass
class TrainWork:
    """A trainer flow to run over global batches; `samples` are given when no flow delivers them."""

    graph: FlowGraph
    source: StepSource
    samples: Batch | None = None


@dataclass
class Outcome:
    """What a run of flows gave."""

    samples: SampleStore = field(default_factory=SampleStore)
    """Merged columns of the environment flow's returned nodes, in order."""
    results: dict[int, list[Batch]] = field(default_factory=dict[int, list[Batch]])
    """Per returned node, its batches in order, if the flow keeps them."""
    uids: list[int] = field(default_factory=list[int])
    """Uids of the delivered samples, in order."""
    steps: int = 0
    """Train steps finished."""
    module_seconds: float = 0.0
    """Time spent inside modules."""
    losses: dict[str, int] = field(default_factory=dict[str, int])
    """`masked_samples`, `dropped_samples` and `dropped_groups`; empty where no module may lose any."""


class Tap(Protocol):
    """Sees what goes into and comes out of every call, for recording; it changes no batch and keeps no reference."""

    def beginning(self, flow: FlowWork | None, trainer: TrainWork | None) -> None:
        """Take note of what is about to run; `trainer.samples` are seen here if no flow delivers them."""
        ...

    def fed(self, flow: str, start: int, stop: int, batch: Batch) -> None:
        """Look at samples `start` to `stop` of the flow's own batch, which a call takes next."""
        ...

    def entering(self, flow: str, node: Node, call: Call, data: Batch | list[Batch]) -> None:
        """Look at a call's inputs before the module gets them: columns as they are outside any namespace.

        `call` has the replica, the iteration, the uids and, in a trainer flow, the step; `data` is one batch, or of a
        train step the list of micro-batches.
        """
        ...

    def returned(
        self,
        flow: str,
        node: Node,
        call: Call,
        output: Batch | list[Batch],
        metrics: Mapping[str, float],
    ) -> None:
        """Look at what a call returned, checked and with its columns' outside names, and the numbers that it logged.

        `output` is `{}` where a step returned nothing, and of a train step a batch per micro-batch, or nothing. Of
        samples that the step says it failed on there is neither a row in it nor a uid in `call`; a call that raised
        is not seen here, and the one that tries its samples again is entered anew.
        """
        ...

    def lost(
        self,
        flow: str,
        node: Node,
        outcomes: Mapping[int, str],
        cause: str,
        *,
        drops_groups: bool,
    ) -> None:
        """Take note of samples that are given up: what became of each, by uid, and why.

        `drops_groups` says whether their groups go with them.
        """
        ...

    def delivered(self, flow: str, uids: Sequence[int], samples: Batch) -> None:
        """Look at samples that leave a flow for the trainer, in order, as the trainer's positions count them."""
        ...
