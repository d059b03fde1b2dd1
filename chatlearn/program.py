# SPDX-License-Identifier: Apache-2.0
"""What an engine is about to run, traced and validated before anything expensive starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from chatlearn.arithmetic import EpisodePlan, episode_plan
from chatlearn.config import Config, ModuleConfig
from chatlearn.data.prompts import Rows, Source
from chatlearn.data.sampler import PromptSampler
from chatlearn.errors import ChatLearnError, ConfigError, DataError, FlowError
from chatlearn.flow.graph import FlowGraph
from chatlearn.flow.trace import check_names
from chatlearn.module import BaseModule, resolve_config, resolved_config
from chatlearn.runtime.flow_run import FlowRun
from chatlearn.runtime.protocol import node_specs


class Executor(Protocol):
    """A flow function with the datasets it runs on (see `executors.py`)."""

    flow_name: ClassVar[str]
    sources: list[Source]

    def trace(self) -> FlowGraph:
        """Return the flow's graph."""
        ...

    def rows(self) -> list[Rows]:
        """Return the datasets' rows."""
        ...


SyncPair = tuple[BaseModule, BaseModule]


@dataclass
class Program:
    """The flows of an engine as graphs, with everything that was found wrong with them."""

    config: Config
    environment: Executor | None
    trainer: Executor | None
    evaluator: Executor | None
    sync_pairs: Sequence[SyncPair]
    graphs: dict[str, FlowGraph] = field(default_factory=dict[str, FlowGraph])
    modules: list[BaseModule] = field(default_factory=list[BaseModule])
    problems: list[ChatLearnError] = field(default_factory=list[ChatLearnError])

    @property
    def data_owner(self) -> Executor | None:
        """Whose datasets an episode walks through: the environment's, or a lone trainer's."""
        return self.environment or self.trainer

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

    def plan(self, dataset_size: int | None = None) -> EpisodePlan:
        """Return the arithmetic of an episode over `dataset_size` rows (of the given dataset, if None)."""
        return episode_plan(self.config.runtime, dataset_size or self.dataset_size)


def compile_program(
    config: Config,
    environment: Executor | None,
    trainer: Executor | None,
    evaluator: Executor | None,
    sync_pairs: Sequence[SyncPair] = (),
) -> Program:
    """Trace and validate flows; what is wrong stands in `problems`, all of it at once."""
    program = Program(config, environment, trainer, evaluator, sync_pairs)
    checks = [_trace, _check_modules, _check_backend, _check_syncs, _check_data, _check_arithmetic]
    for check in checks:
        try:
            check(program)
        except ChatLearnError as error:
            program.problems.append(error)
    if not program.problems:
        try:
            _check_graphs(program)
        except ChatLearnError as error:
            program.problems.append(error)
    return program


def raise_problems(problems: Sequence[ChatLearnError]) -> None:
    """Raise what was found: the only problem as it is, several as one error that lists them all."""
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise first
    numbered = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
    raise type(first)(f"{len(problems)} problems:\n{numbered}") from first


def _trace(program: Program) -> None:
    executors = (program.environment, program.trainer, program.evaluator)
    given = [executor for executor in executors if executor is not None]
    if not given:
        raise FlowError(
            "the engine has no flow", fix="give it an Environment, a Trainer or an Evaluator"
        )
    for executor in given:
        try:
            program.graphs[executor.flow_name] = executor.trace()
        except ChatLearnError as error:
            program.problems.append(error)
    program.modules = check_names(program.graphs.values())


def _check_modules(program: Program) -> None:
    for module in program.modules:
        try:
            resolve_config(module, program.config)
        except ChatLearnError as error:
            program.problems.append(error)
        else:
            program.problems += module.check_config()
    has_training = program.environment is not None or program.trainer is not None
    if has_training and len(program.graphs) == _count_executors(program):
        program.config.check_modules([module.name for module in program.modules])


def _count_executors(program: Program) -> int:
    return sum(e is not None for e in (program.environment, program.trainer, program.evaluator))


def _check_backend(program: Program) -> None:
    if program.config.runtime.backend != "local":
        raise ConfigError(
            f"runtime.backend={program.config.runtime.backend!r} is not available in this version",
            place=program.config.provenance("runtime.backend"),
            fix="use runtime.backend=local",
        )
    for key in ("max_replay_episode", "replay_episode_offset"):
        if getattr(program.config.runtime, key):
            raise ConfigError(
                f"runtime.{key} is not available in this version: episodes are not replayed",
                place=program.config.provenance(f"runtime.{key}"),
                fix="take it out",
            )


def _check_graphs(program: Program) -> None:
    """Refuse what a graph alone tells will not run: replicas that train, inputs on both sides of a filter."""
    trainer = program.graphs.get("trainer_flow")
    for module in trainer.modules if trainer else ():
        if resolved_config(module).num_replica > 1:
            program.problems.append(
                ConfigError(
                    f"module {module.name!r} is in the trainer flow and cannot have replicas",
                    place=program.config.provenance(f"models.{module.name}.num_replica"),
                    fix=f"leave models.{module.name}.num_replica at 1",
                )
            )
    for name in ("env_flow", "eval_flow"):
        if graph := program.graphs.get(name):
            FlowRun(node_specs(graph), graph.outputs, (), ())


def _check_syncs(program: Program) -> None:
    for source, destination in program.sync_pairs:
        for module in (source, destination):
            if program.graphs and module not in program.modules:
                raise FlowError(
                    f"set_parameter_sync names {module!r}, which stands in no flow",
                    fix="call it in a flow, or take the pair away",
                )
        if source is destination:
            raise FlowError(f"set_parameter_sync pairs {source!r} with itself")


def _check_data(program: Program) -> None:
    owner = program.data_owner
    if program.evaluator is not None and not program.evaluator.sources:
        program.problems.append(
            DataError(
                "the evaluator has no dataset",
                fix="write Evaluator(eval_flow).set_dataset(prompts)",
            )
        )
    elif program.evaluator is not None:
        try:
            program.evaluator.rows()
        except ChatLearnError as error:
            program.problems.append(error)
    if owner is None:
        return
    if not owner.sources:
        raise DataError("the engine has no dataset", fix="write engine.set_dataset(prompts)")
    rows = owner.rows()
    PromptSampler([len(r) for r in rows], ratio=program.config.runtime.data_ratio)
    graph = program.graphs.get("env_flow")
    if program.trainer is not None and graph is not None and not graph.outputs:
        raise FlowError(
            "the environment flow returns nothing, but the trainer flow needs its samples",
            place=graph.nodes[-1].place,
            fix="return the node whose columns the trainer reads, e.g. `return advantages`",
        )


def _check_arithmetic(program: Program) -> None:
    if program.data_owner is not None and program.dataset_size is not None:
        program.plan()
