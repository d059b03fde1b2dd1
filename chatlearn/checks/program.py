# SPDX-License-Identifier: Apache-2.0
"""What can be wrong in how flows, configuration and data of a program go together; all of it known before setup."""

from __future__ import annotations

from collections.abc import Sequence

from chatlearn.data.prompts import Rows
from chatlearn.data.row_columns import row_columns
from chatlearn.data.sampler import PromptSampler
from chatlearn.errors import (
    ChatLearnError,
    ConfigError,
    DataError,
    FlowError,
    describe_function,
)
from chatlearn.module import BaseModule, resolved_config
from chatlearn.program import Executor, FlowWarning, Program, name_of


def check_data(program: Program) -> None:
    """Refuse datasets that are missing, that do not go together, or that nobody would train on."""
    evaluator, owner = program.evaluator, program.data_owner
    if evaluator is not None and not evaluator.sources:
        program.problems.append(
            DataError(
                "the evaluator has no dataset",
                fix="write Evaluator(eval_flow).set_dataset(prompts)",
            )
        )
    elif evaluator is not None:
        try:
            evaluator.rows()
        except ChatLearnError as error:
            program.problems.append(error)
    if owner is None:
        return
    if not owner.sources:
        raise DataError("the engine has no dataset", fix="write engine.set_dataset(prompts)")
    rows = owner.rows()
    try:
        PromptSampler([len(r) for r in rows], ratio=program.config.runtime.data_ratio)
    except ConfigError as error:
        place = program.place_of("runtime.data_ratio")
        program.problems.append(ConfigError(error.cause, place=place, fix=error.fix))
    _check_columns(program, owner, rows)
    graph = program.graphs.get("env_flow")
    if program.trainer is not None and graph is not None and not graph.outputs:
        raise FlowError(
            "the environment flow returns nothing, but the trainer flow needs its samples",
            place=graph.nodes[-1].place,
            fix="return the node whose columns the trainer reads, e.g. `return advantages`",
        )


def _check_columns(program: Program, owner: Executor, rows: Sequence[Rows]) -> None:
    """Refuse several datasets of different columns, whose rows meet in one micro-batch.

    A module with a `build_dataset` of its own makes the columns itself; and in evaluation no two datasets meet.
    """
    first = program.first_module
    if first is None or type(first).build_dataset is not BaseModule.build_dataset:
        return
    shown = [(number, row_columns(r)) for number, r in enumerate(rows)]
    known = [(number, set(columns)) for number, columns in shown if columns]
    for number, columns in known[1:]:
        number_0, columns_0 = known[0]
        if differing := columns ^ columns_0:
            one, other = name_of(owner, number_0), name_of(owner, number)
            raise DataError(
                f"{one} and {other} have different columns, but their rows share micro-batches: "
                + _which(one, columns_0 - columns, other, columns - columns_0),
                place=f"the datasets of {owner.flow_name}",
                fix=f"give both {' and '.join(map(repr, sorted(differing)))}, with None where there is no value",
            )


def _which(one: str, only_one: set[str], other: str, only_other: set[str]) -> str:
    parts = [(one, only_one), (other, only_other)]
    return "; ".join(
        f"only {name} has {', '.join(map(repr, sorted(columns)))}"
        for name, columns in parts
        if columns
    )


def check_replay(program: Program) -> None:
    """Refuse replay settings that would silently do nothing."""
    runtime = program.config.runtime
    if runtime.max_replay_episode:
        return
    if program.replay_sampler is not None:
        program.problems.append(
            ConfigError(
                f"the replay sampler {describe_function(program.replay_sampler)} would never be asked: "
                "no episodes are kept",
                place=program.place_of("runtime.max_replay_episode"),
                fix="set runtime.max_replay_episode, e.g. to 4 (-1 keeps all), or take set_replay_sampler away",
            )
        )
    if runtime.replay_episode_offset:
        program.problems.append(
            ConfigError(
                f"runtime.replay_episode_offset={runtime.replay_episode_offset} has no effect: no episodes are kept",
                place=program.place_of("runtime.replay_episode_offset"),
                fix="set runtime.max_replay_episode, e.g. to 4 (-1 keeps all), or take the offset out",
            )
        )


def check_failures(program: Program) -> None:
    """Refuse to try train steps again, or to go on without them: half a step cannot be taken back."""
    trainer = program.graphs.get("trainer_flow")
    for module in trainer.modules if trainer else ():
        key, asked = f"models.{module.name}.on_failure", resolved_config(module).on_failure
        if asked != "stop":
            program.problems.append(
                ConfigError(
                    f"{key}={asked}, but {module.name} stands in the trainer flow, and a train step that failed "
                    "half-way can neither be repeated nor left out",
                    place=program.place_of(key),
                    fix="take the key out, and set it on modules that stand in the environment flow alone",
                )
            )


def warn_of_groups(program: Program) -> None:
    """Name steps that compare the samples of a prompt where every prompt has one sample."""
    runtime, seen = program.config.runtime, set[int]()
    for name, graph in program.graphs.items():
        key = "eval_num_inference_per_prompt" if name == "eval_flow" else "num_inference_per_prompt"
        for node in graph.nodes:
            module = node.module
            if module.batch_by != "group" or id(module) in seen:
                continue
            seen.add(id(module))  # where it trains counts, not that it is evaluated one by one, too
            if getattr(runtime, key) == 1:
                program.warnings.append(
                    FlowWarning(
                        f"{module.name} compares the samples of a prompt, but every prompt has one sample",
                        node.place,
                        fix=f"set runtime.{key}, e.g. to 8",
                    )
                )


def check_placement(program: Program) -> None:
    """Refuse names that do not exist; note what has no effect here, or another one than it seems."""
    config, names = program.config, [module.name for module in program.modules]
    for name in (name for group in config.runtime.colocation for name in group):
        if name not in names:
            raise ConfigError(
                f"runtime.colocation names {name!r}, which is no module of the flows",
                place=program.place_of("runtime.colocation"),
                fix=f"the modules are {', '.join(names)}",
            )
    trainer = program.graphs.get("trainer_flow")
    trained = {module.name for module in (trainer.modules if trainer else ())}
    for module in program.modules:
        resolved = resolved_config(module)
        key = f"models.{module.name}"
        if program.is_set(f"{key}.trainable") and resolved.trainable != (module.name in trained):
            where = "stands in" if module.name in trained else "is not in"
            program.problems.append(
                ConfigError(
                    f"{key}.trainable={resolved.trainable}, but the module {where} the trainer flow",
                    place=program.place_of(f"{key}.trainable"),
                    fix="take the key out: a module is trained if the trainer flow calls it",
                )
            )
        idle = [k for k in ("num_process", "num_gpu") if program.is_set(f"{key}.{k}")]
        if idle:
            program.notes.append(
                f"{', '.join(f'{key}.{k}' for k in idle)}: no effect in one process (runtime.backend=local)"
            )
    if config.runtime.colocation:
        program.notes.append("runtime.colocation: no effect in one process (runtime.backend=local)")
