# SPDX-License-Identifier: Apache-2.0
"""What can be wrong in how flows, configuration and data of a program go together; all of it known before setup."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import TopologicalSorter
from typing import Any, cast

from chatlearn.columns import PROMPT
from chatlearn.data.prompts import Rows
from chatlearn.data.sampler import PromptSampler
from chatlearn.errors import (
    ChatLearnError,
    ConfigError,
    DataError,
    FlowError,
    describe_function,
)
from chatlearn.module import BaseModule, resolved_config
from chatlearn.program import Executor, Program, SyncPair, name_of


def check_syncs(program: Program) -> None:
    """Refuse pairs of strangers, and pairs that undo each other; carry a pair that is given twice once."""
    for source, destination in program.sync_pairs:
        for module in (source, destination):
            if program.graphs and module not in program.modules:
                raise FlowError(
                    f"set_parameter_sync names {module!r}, which stands in no flow",
                    place="set_parameter_sync",
                    fix="call it in a flow, or take the pair away",
                )
        if source is destination:
            raise FlowError(
                f"set_parameter_sync pairs {source!r} with itself",
                place="set_parameter_sync",
                fix="take the pair away: a module has its own weights already",
            )
    pairs = list({(id(a), id(b)): (a, b) for a, b in program.sync_pairs}.values())
    program.notes += [
        f"set_parameter_sync({_arrow((a, b))}) is given {times} times and carried once"
        for a, b in pairs
        if (times := sum(x is a and y is b for x, y in program.sync_pairs)) > 1
    ]
    circle = _circle(pairs)
    program.sync_pairs = pairs if circle else _in_order(pairs)
    for destination in {id(receiver): receiver for _, receiver in pairs}.values():
        into = [pair for pair in pairs if pair[1] is destination]
        # A load_state_dict of the user's own may give each source a place.
        plain = type(destination).load_state_dict is BaseModule.load_state_dict
        if len(into) > 1 and plain:
            program.problems.append(
                FlowError(
                    f"{len(into)} modules sync into {destination.name!r}, which would keep the weights of the last "
                    f"only: {'; '.join(map(_arrow, into))}",
                    place="set_parameter_sync",
                    fix="leave one pair, or override load_state_dict() to give each source its place",
                )
            )
    if circle:
        names = " -> ".join(module.name for module in [*circle, circle[0]])
        program.problems.append(
            FlowError(
                f"parameter syncs go in a circle, so modules overwrite what they learned: {names}",
                place="set_parameter_sync",
                fix="take one of the pairs away: weights travel from who learns to who samples",
            )
        )


def _arrow(pair: SyncPair) -> str:
    return f"{pair[0].name} -> {pair[1].name}"


def _circle(pairs: Sequence[SyncPair]) -> list[BaseModule]:
    """Return the modules of a circle of pairs, in order, or none."""
    ways = [[source] for source, _ in pairs]
    while ways:
        way = ways.pop()
        for source, target in pairs:
            if source is way[-1] and target is way[0]:
                return way
            if source is way[-1] and target not in way:
                ways.append([*way, target])
    return []


def _in_order(pairs: Sequence[SyncPair]) -> list[SyncPair]:
    """Sort pairs so that in a chain (a -> b, b -> c) weights reach the end in one sync, however it was declared."""
    before = TopologicalSorter[int]()
    for source, destination in pairs:
        before.add(id(destination), id(source))
    place = {module: number for number, module in enumerate(before.static_order())}
    chained = {id(destination) for _, destination in pairs} & {id(source) for source, _ in pairs}
    return sorted(pairs, key=lambda pair: place[id(pair[0])]) if chained else list(pairs)


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
    known = [(number, columns) for number, r in enumerate(rows) if (columns := _columns(r))]
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


def _columns(rows: Rows) -> set[str] | None:
    """Tell the columns that rows show at once; None of a dataset that makes its items when they are asked for."""
    names: Any = getattr(rows, "column_names", None)
    if isinstance(names, list):
        return {str(name) for name in cast("list[Any]", names)}
    if not isinstance(rows, list | tuple):
        return None
    first = cast("Sequence[Any]", rows)[0]
    return set(map(str, cast("dict[Any, Any]", first))) if isinstance(first, dict) else {PROMPT}


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
