# SPDX-License-Identifier: Apache-2.0
"""What an engine is about to run, traced and validated before anything expensive starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from chatlearn.arithmetic import EpisodePlan, episode_plan
from chatlearn.config import Config, ModuleConfig
from chatlearn.data.prompts import Rows, Source
from chatlearn.data.replay import ReplaySampler
from chatlearn.data.sampler import PromptSampler
from chatlearn.errors import (
    ChatLearnError,
    CheckpointError,
    ConfigError,
    DataError,
    FlowError,
    OutputError,
)
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
    replay_sampler: ReplaySampler | None = None
    """Chooses what is trained on; None takes all samples of the kept episodes."""
    graphs: dict[str, FlowGraph] = field(default_factory=dict[str, FlowGraph])
    modules: list[BaseModule] = field(default_factory=list[BaseModule])
    problems: list[ChatLearnError] = field(default_factory=list[ChatLearnError])
    notes: list[str] = field(default_factory=list[str])
    """What is no mistake, but may surprise."""

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
    replay_sampler: ReplaySampler | None = None,
) -> Program:
    """Trace and validate flows; what is wrong stands in `problems`, all of it at once."""
    program = Program(config, environment, trainer, evaluator, sync_pairs, replay_sampler)
    for check in (_trace, _check_modules, _check_backend, _check_syncs, _check_data, _check_places):
        _collect(program, check)
    _collect(program, _check_arithmetic)
    if not program.problems:  # what needs a module's configuration, or whole graphs
        _collect(program, _check_graphs)
        _collect(program, _check_placement)
    return program


def _collect(program: Program, check: Callable[[Program], None]) -> None:
    try:
        check(program)
    except ChatLearnError as error:
        program.problems.append(error)


def raise_problems(problems: Sequence[ChatLearnError]) -> None:
    """Raise what was found: the only problem as it is, several as one error that lists them all."""
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise first
    numbered = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
    raise type(first)(f"{len(problems)} problems:\n{numbered}") from first


def _at(config: Config, key: str) -> str:
    return f"{config.provenance(key)} {key}"


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
    if len(program.graphs) == _count_executors(program):
        has_training = program.environment is not None or program.trainer is not None
        names = [module.name for module in program.modules]
        # One file serves training and evaluation: alone, an evaluator refuses only what looks like a typo.
        program.config.check_modules(names, only_typos=not has_training)


def _count_executors(program: Program) -> int:
    return sum(e is not None for e in (program.environment, program.trainer, program.evaluator))


def _check_backend(program: Program) -> None:
    if program.config.runtime.backend != "local":
        raise ConfigError(
            f"runtime.backend={program.config.runtime.backend!r} is not available in this version",
            place=_at(program.config, "runtime.backend"),
            fix="use runtime.backend=local",
        )
    for key in ("max_replay_episode", "replay_episode_offset"):
        if getattr(program.config.runtime, key):
            raise ConfigError(
                f"runtime.{key} is not available in this version: episodes are not replayed",
                place=_at(program.config, f"runtime.{key}"),
                fix="take it out",
            )
    if program.config.runtime.max_staleness:
        raise ConfigError(
            "runtime.max_staleness is not available in this version: in one process samples are never stale",
            place=_at(program.config, "runtime.max_staleness"),
            fix="leave it at 0",
        )


def _check_placement(program: Program) -> None:
    """Refuse names that do not exist; note what has no effect here, or another one than it seems."""
    config, names = program.config, [module.name for module in program.modules]
    for name in (name for group in config.runtime.colocation for name in group):
        if name not in names:
            raise ConfigError(
                f"runtime.colocation names {name!r}, which is no module of the flows",
                place=_at(program.config, "runtime.colocation"),
                fix=f"the modules are {', '.join(names)}",
            )
    trainer = program.graphs.get("trainer_flow")
    trained = {module.name for module in (trainer.modules if trainer else ())}
    for module in program.modules:
        resolved = resolved_config(module)
        key = f"models.{module.name}"
        if config.provenance(f"{key}.trainable") != "default" and resolved.trainable != (
            module.name in trained
        ):
            where = "stands in" if module.name in trained else "is not in"
            program.problems.append(
                ConfigError(
                    f"{key}.trainable={resolved.trainable}, but the module {where} the trainer flow",
                    place=_at(program.config, f"{key}.trainable"),
                    fix="take the key out: a module is trained if the trainer flow calls it",
                )
            )
        idle = [
            k for k in ("num_process", "num_gpu") if config.provenance(f"{key}.{k}") != "default"
        ]
        if idle:
            program.notes.append(
                f"{', '.join(f'{key}.{k}' for k in idle)}: no effect in one process (runtime.backend=local)"
            )
    grouped = [module.name for module in program.modules if module.batch_by == "group"]
    if grouped and config.runtime.num_inference_per_prompt == 1:
        program.notes.append(
            f"{', '.join(grouped)} compares the samples of a prompt, but every prompt has one sample: "
            "set runtime.num_inference_per_prompt, e.g. to 8"
        )
    if config.runtime.colocation:
        program.notes.append("runtime.colocation: no effect in one process (runtime.backend=local)")


def _check_places(program: Program) -> None:
    """Refuse an output folder that cannot be made, and a checkpoint that is not there."""
    runtime = program.config.runtime
    if (
        runtime.resume not in ("never", "auto")
        and not Path(runtime.resume, "checkpoint.json").is_file()
    ):
        raise CheckpointError(
            f"runtime.resume={runtime.resume!r} names no checkpoint",
            place=_at(program.config, "runtime.resume"),
            fix="name a folder such as <output_dir>/checkpoints/episode-000012, or use auto",
        )
    if runtime.output_dir is None:
        return
    parent = next(
        p for p in (runtime.output_dir, *runtime.output_dir.absolute().parents) if p.exists()
    )
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"the output folder cannot be used: {parent} is no folder that can be written",
            place=_at(program.config, "runtime.output_dir"),
            fix="choose another folder with runtime.output_dir=...",
        )


def _check_graphs(program: Program) -> None:
    """Refuse what a graph alone tells will not run: replicas that train, inputs on both sides of a filter."""
    trainer = program.graphs.get("trainer_flow")
    for module in trainer.modules if trainer else ():
        if resolved_config(module).num_replica > 1:
            program.problems.append(
                ConfigError(
                    f"module {module.name!r} is in the trainer flow and cannot have replicas",
                    place=_at(program.config, f"models.{module.name}.num_replica"),
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
