# SPDX-License-Identifier: Apache-2.0
"""What an engine is about to run: its flows as graphs, and what was found wrong with them (`compilation.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from chatlearn.arithmetic import EpisodePlan, RunPlan, episode_plan, run_plan
from chatlearn.config import Config, ModuleConfig
from chatlearn.data.prompts import Rows, Source
from chatlearn.errors import ChatLearnError
from chatlearn.flow.graph import FlowGraph
from chatlearn.module import BaseModule, resolved_config

if TYPE_CHECKING:
    from chatlearn.data.replay import ReplaySampler


class Executor(Protocol):
    """A flow function with the datasets it runs on (see `executors.py`)."""

    flow_name: ClassVar[str]
    sources: list[Source]
    names: list[str]

    def trace(self) -> FlowGraph:
        """Return the flow's graph."""
        ...

    def rows(self) -> list[Rows]:
        """Return the datasets' rows."""
        ...


@dataclass(frozen=True)
class SyncPair:
    """Who teaches whom, and the user's line that says so; unpacks into source and destination."""

    source: BaseModule
    destination: BaseModule
    place: str = ""

    def __iter__(self) -> Iterator[BaseModule]:
        yield from (self.source, self.destination)

    @property
    def arrow(self) -> str:
        """The pair for people: `learner -> policy`."""
        return f"{self.source.name} -> {self.destination.name}"

    @property
    def said_at(self) -> str:
        """Where the pair was declared, for errors."""
        return f"set_parameter_sync at {self.place}"


@dataclass(frozen=True)
class FlowWarning:
    """What will run, and is very likely not meant: work that is lost, weights that never arrive."""

    cause: str
    place: str
    fix: str

    def __str__(self) -> str:
        return f"{self.cause}\n  at: {self.place}\n  fix: {self.fix}"


@dataclass
class Program:
    """The flows of an engine as graphs, with everything that was found wrong with them."""

    config: Config
    environment: Executor | None
    trainer: Executor | None
    evaluator: Executor | None
    sync_pairs: Sequence[SyncPair]
    replay_sampler: ReplaySampler | None = None
    """Chooses what is trained on; None takes all samples of the kept episodes."""
    graphs: dict[str, FlowGraph] = field(default_factory=dict[str, FlowGraph])
    modules: list[BaseModule] = field(default_factory=list[BaseModule])
    problems: list[ChatLearnError] = field(default_factory=list[ChatLearnError])
    warnings: list[FlowWarning] = field(default_factory=list[FlowWarning])
    """What will run, and is very likely not meant."""
    notes: list[str] = field(default_factory=list[str])
    """What is no mistake, but may surprise."""

    @property
    def remarks(self) -> list[str]:
        """What is said when a run starts: the warnings, then the notes."""
        return [*(f"warning: {warning}" for warning in self.warnings), *self.notes]

    @property
    def data_owner(self) -> Executor | None:
        """Whose datasets an episode walks through: the environment's, or a lone trainer's."""
        return self.environment or self.trainer

    @property
    def first_module(self) -> BaseModule | None:
        """The module that is asked for the training datasets; None where no flow could be traced."""
        owner = self.data_owner
        graph = self.graphs.get(owner.flow_name) if owner is not None else None
        return graph.nodes[0].module if graph is not None else None

    @property
    def training_rows(self) -> list[Rows]:
        """The datasets that episodes walk through."""
        return self.data_owner.rows() if self.data_owner is not None else []

    @property
    def dataset_size(self) -> int | None:
        """Rows of the training datasets together, as far as it is known without building them."""
        try:
            return sum(len(rows) for rows in self.training_rows) or None
        except ChatLearnError:
            return None

    @property
    def module_configs(self) -> dict[str, ModuleConfig]:
        """The resolved configuration of every module."""
        return {module.name: resolved_config(module) for module in self.modules}

    def place_of(self, key: str) -> str:
        """Say who set `key`, and the key: the place of errors about it."""
        return f"{self.config.provenance(key)} {key}"

    def is_set(self, key: str) -> bool:
        """Tell whether anybody set `key`; the default otherwise."""
        return self.config.provenance(key) != "default"

    def plan(self, dataset_size: int | None = None) -> EpisodePlan:
        """Return the arithmetic of an episode over `dataset_size` rows (of the given dataset, if None)."""
        return episode_plan(self.config.runtime, dataset_size or self.dataset_size)

    def run_plan(self) -> RunPlan:
        """Return the arithmetic of the whole run, as far as it is known before it."""
        size, several = self.dataset_size, len(self.training_rows) > 1
        plan = run_plan(
            self.config.runtime,
            size,
            trains="trainer_flow" in self.graphs,
            chooses=self.replay_sampler is not None,
        )
        return replace(plan, dataset_size=None) if several else plan


def unprobed_ends(pair: SyncPair) -> list[str]:
    """Name the ends of a pair whose classes tell no log-probs, so that a sync between them has no probe."""
    plain = BaseModule.probe_logprobs
    return [module.name for module in pair if type(module).probe_logprobs is plain]


def raise_problems(problems: Sequence[ChatLearnError]) -> None:
    """Raise what was found: the only problem as it is, several as one error that lists them all."""
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise first
    numbered = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
    raise type(first)(f"{len(problems)} problems:\n{numbered}") from first


def name_of(executor: Executor, number: int) -> str:
    """Name one of an executor's datasets in messages: its path, unless it has another name."""
    source, name = executor.sources[number], executor.names[number]
    is_path = isinstance(source, str | Path) and Path(source).stem == name
    return str(source) if is_path else name
