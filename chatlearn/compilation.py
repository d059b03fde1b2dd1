# SPDX-License-Identifier: Apache-2.0
"""Trace and validate what an engine is about to run, before anything expensive starts; all problems at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from chatlearn.arithmetic import check_updates
from chatlearn.checks.column_warnings import warn_of_columns
from chatlearn.checks.columns import check_columns, follow
from chatlearn.checks.notes import note_what_is_idle, note_what_may_surprise
from chatlearn.checks.program import (
    check_data,
    check_failures,
    check_placement,
    check_replay,
    warn_of_groups,
)
from chatlearn.checks.syncs import check_sync_parameters, check_syncs
from chatlearn.config import Config
from chatlearn.errors import ChatLearnError, CheckpointError, ConfigError, FlowError, OutputError
from chatlearn.flow.trace import check_names
from chatlearn.module import call_hook, resolve_config, resolved_config
from chatlearn.program import Executor, Program, SyncPair
from chatlearn.ranking import check_best_metric
from chatlearn.runtime.flow_run import FlowRun
from chatlearn.runtime.protocol import node_specs

if TYPE_CHECKING:
    from chatlearn.data.replay import ReplaySampler


def compile_program(
    config: Config,
    environment: Executor | None,
    trainer: Executor | None,
    evaluator: Executor | None,
    sync_pairs: Sequence[SyncPair] = (),
    replay_sampler: ReplaySampler | None = None,
    *,
    dry_run: bool = False,
) -> Program:
    """Trace and validate flows; what is wrong stands in `problems`, all of it at once.

    With `dry_run`, steps that declare no columns are called once on made-up samples, to learn theirs.
    """
    program = Program(config, environment, trainer, evaluator, sync_pairs, replay_sampler)
    for check in (
        _trace,
        _check_modules,
        _check_backend,
        check_syncs,
        check_data,
        check_replay,
        partial(_check_columns, dry_run=dry_run),
        _check_places,
        _check_arithmetic,
    ):
        _collect(program, check)
    if not any(isinstance(problem, ConfigError) for problem in program.problems):
        _collect(program, check_sync_parameters)
    if not program.problems:  # what needs a module's configuration, or whole graphs
        for check in (
            _check_graphs,
            check_placement,
            check_failures,
            check_best_metric,
            warn_of_groups,
            note_what_is_idle,
            note_what_may_surprise,
        ):
            _collect(program, check)
    return program


def _collect(program: Program, check: Callable[[Program], None]) -> None:
    try:
        check(program)
    except ChatLearnError as error:
        program.problems.append(error)


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
            program.problems += call_hook(module, "check_config") or ()
    if len(program.graphs) == _count_executors(program):
        has_training = program.environment is not None or program.trainer is not None
        names = [module.name for module in program.modules]
        # One file serves training and evaluation: alone, an evaluator refuses only what looks like a typo.
        program.config.check_modules(names, only_typos=not has_training)


def _count_executors(program: Program) -> int:
    return sum(e is not None for e in (program.environment, program.trainer, program.evaluator))


def _check_columns(program: Program, *, dry_run: bool) -> None:
    """Find missing and mistyped columns, and what is made in vain."""
    learned = None
    if dry_run:
        from chatlearn.checks.dry_run import try_steps

        trial = try_steps(program)
        program.notes += trial.notes
        learned = trial.learned
    flows = follow(program, learned)
    check_columns(program, flows)
    warn_of_columns(program, flows)


def _check_backend(program: Program) -> None:
    if program.config.runtime.backend != "local":
        raise ConfigError(
            f"runtime.backend={program.config.runtime.backend!r} is not available in this version",
            place=program.place_of("runtime.backend"),
            fix="use runtime.backend=local",
        )
    if program.config.runtime.max_staleness:
        raise ConfigError(
            "runtime.max_staleness is not available in this version: in one process samples are never stale",
            place=program.place_of("runtime.max_staleness"),
            fix="leave it at 0",
        )


def _check_places(program: Program) -> None:
    """Refuse an output folder that cannot be made, and a checkpoint that is not there."""
    runtime = program.config.runtime
    if (
        runtime.resume not in ("never", "auto")
        and not Path(runtime.resume, "checkpoint.json").is_file()
    ):
        raise CheckpointError(
            f"runtime.resume={runtime.resume!r} names no checkpoint",
            place=program.place_of("runtime.resume"),
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
            place=program.place_of("runtime.output_dir"),
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
                    place=program.place_of(f"models.{module.name}.num_replica"),
                    fix=f"leave models.{module.name}.num_replica at 1",
                )
            )
    for name in ("env_flow", "eval_flow"):
        if graph := program.graphs.get(name):
            FlowRun(node_specs(graph), graph.outputs, (), ())


def _check_arithmetic(program: Program) -> None:
    if program.data_owner is None or program.dataset_size is None:
        return
    program.plan()
    if program.trainer is not None and program.replay_sampler is None:
        place = program.place_of("runtime.train_global_batch_size")
        check_updates(program.config.runtime, program.dataset_size, place)
