# SPDX-License-Identifier: Apache-2.0
"""What can be wrong, or surprise, in how flows, configuration and data of a program go together."""

from __future__ import annotations

from chatlearn.data.sampler import PromptSampler
from chatlearn.errors import ChatLearnError, ConfigError, DataError, FlowError
from chatlearn.module import resolved_config
from chatlearn.program import Program


def check_syncs(program: Program) -> None:
    for source, destination in program.sync_pairs:
        for module in (source, destination):
            if program.graphs and module not in program.modules:
                raise FlowError(
                    f"set_parameter_sync names {module!r}, which stands in no flow",
                    fix="call it in a flow, or take the pair away",
                )
        if source is destination:
            raise FlowError(f"set_parameter_sync pairs {source!r} with itself")


def check_data(program: Program) -> None:
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
        if config.provenance(f"{key}.trainable") != "default" and resolved.trainable != (
            module.name in trained
        ):
            where = "stands in" if module.name in trained else "is not in"
            program.problems.append(
                ConfigError(
                    f"{key}.trainable={resolved.trainable}, but the module {where} the trainer flow",
                    place=program.place_of(f"{key}.trainable"),
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
