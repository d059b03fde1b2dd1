# SPDX-License-Identifier: Apache-2.0
"""What a record needs to see of a run: calls, flows and samples, whoever makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from chatlearn.flow.batch import Batch
from chatlearn.flow.graph import FlowGraph
from chatlearn.flow.steps import Step


class Piece(Protocol):
    """Samples of what call `call` returned, or of what entered the flow."""

    @property
    def call(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class Call(Protocol):
    """One call of a node."""

    @property
    def id(self) -> int: ...
    @property
    def replica(self) -> int: ...
    @property
    def iteration(self) -> int: ...
    @property
    def inputs(self) -> tuple[tuple[Piece, ...], ...]: ...
    @property
    def uids(self) -> Sequence[int]: ...
    @property
    def step(self) -> Step | None: ...
    @property
    def origin(self) -> int: ...


class Feed(Protocol):
    """The samples that enter a flow."""

    @property
    def uids(self) -> Sequence[int]: ...
    @property
    def groups(self) -> Sequence[int]: ...


class FlowWork(Protocol):
    """An environment or evaluation flow to run over a feed."""

    @property
    def graph(self) -> FlowGraph: ...
    @property
    def feed(self) -> Feed: ...


class TrainWork(Protocol):
    """A trainer flow to run; `samples` are given when no flow delivers them."""

    @property
    def graph(self) -> FlowGraph: ...
    @property
    def samples(self) -> Batch | None: ...
