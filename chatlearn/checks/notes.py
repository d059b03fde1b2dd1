# SPDX-License-Identifier: Apache-2.0
"""What is no mistake in a program, but may surprise: settings that do nothing here, or more than they seem to."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from chatlearn.module import BaseModule, resolved_config, written_columns
from chatlearn.program import Program, unprobed_ends

_OF_TRAINING = (
    "train_global_batch_size",
    "train_micro_batch_size",
    "num_training_epoch",
    "incomplete_step",
    "stream_data_loader_type",
    "max_replay_episode",
    "replay_episode_offset",
)
_OF_EVALUATION = (
    "eval_episode_interval",
    "enable_eval_before_training",
    "eval_num_inference_per_prompt",
    "eval_pass_at_k",
    "eval_pass_threshold",
)


def note_what_is_idle(program: Program) -> None:
    """Name settings that somebody made and that have no effect in this program.

    A program that only evaluates reads the same file as the one that trains, so there nothing is named.
    """
    runtime, owner = program.config.runtime, program.data_owner
    if owner is None:
        return
    if program.trainer is None:
        _note_set(program, _OF_TRAINING, "no effect without a trainer flow")
    if program.evaluator is None:
        _note_set(program, _OF_EVALUATION, "no effect without an evaluator")
    elif runtime.eval_num_inference_per_prompt == 1 and not runtime.eval_pass_at_k:
        why = "no effect while runtime.eval_num_inference_per_prompt is 1"
        _note_set(program, ("eval_pass_threshold",), why)
    if (
        program.evaluator is not None
        and runtime.num_episode
        and runtime.eval_episode_interval > runtime.num_episode
        and not runtime.enable_eval_before_training
    ):
        program.notes.append(
            f"the evaluator is never asked: runtime.eval_episode_interval={runtime.eval_episode_interval} exceeds "
            f"runtime.num_episode={runtime.num_episode}"
        )
    if runtime.keep_last is None:
        _note_set(program, ("keep_best",), "no effect without runtime.keep_last, which keeps all")
    if runtime.keep_best is None:
        _note_set(program, ("best_metric",), "no effect without runtime.keep_best")
    if len(owner.sources) == 1:
        _note_set(program, ("data_ratio",), "no effect with one dataset")
    if not program.sync_pairs:
        _note_set(program, ("verify_every",), "no effect without a parameter sync")
    elif runtime.verify_every and all(map(unprobed_ends, program.sync_pairs)):
        blind = dict.fromkeys(name for pair in program.sync_pairs for name in unprobed_ends(pair))
        why = f"no effect, since {', '.join(blind)} cannot tell: no probe_logprobs()"
        _note_set(program, ("verify_every",), why)
    if runtime.train_global_batch_size is None and program.trainer is not None:
        if runtime.stream_data_loader_type == "dynamic":
            program.notes.append(
                "runtime.stream_data_loader_type=dynamic: no effect without runtime.train_global_batch_size, "
                "since one update takes the whole episode"
            )
        _note_set(
            program,
            ("incomplete_step",),
            "no effect without runtime.train_global_batch_size, since no sample is left over",
        )
    if not runtime.record:
        _note_set(program, ("record_last",), "no effect without runtime.record")
    _note_idle_modules(program)


def _note_set(program: Program, names: Iterable[str], why: str) -> None:
    keys = [key for name in names if program.is_set(key := f"runtime.{name}")]
    if keys:
        program.notes.append(f"{', '.join(keys)}: {why}")


def _note_idle_modules(program: Program) -> None:
    receivers = [destination for _, destination in program.sync_pairs]
    for module in program.modules:
        key = f"models.{module.name}.sync_frequency"
        if program.is_set(key) and module not in receivers:
            program.notes.append(
                f"{key}: no effect, since no parameter sync leads into {module.name}"
            )
        _note_idle_replicas(program, module)
        _note_idle_tries(program, module)
        key = f"models.{module.name}.generation_batch_size"
        if program.is_set(key) and module.batch_by == "episode":
            program.notes.append(
                f"{key}: no effect, since {module.name} takes the whole episode at once"
            )


def _note_idle_tries(program: Program, module: BaseModule) -> None:
    config, start = resolved_config(module), f"models.{module.name}."
    keys = [start + name for name in ("max_retries", "after_retries")]
    idle = [key for key in keys if program.is_set(key)]
    if idle and config.on_failure != "retry":
        program.notes.append(f"{', '.join(idle)}: no effect without {start}on_failure=retry")
    flow = program.graphs.get("env_flow")
    drops = "drop_group" in (config.on_failure, config.after_retries)
    if drops and (flow is None or module not in flow.modules):
        program.notes.append(
            f"models.{module.name}, drop_group: it stands in no environment flow, so no group is dropped; samples that "
            "it fails on stay in the results of evaluations, without values"
        )


def _note_idle_replicas(program: Program, module: BaseModule) -> None:
    config = resolved_config(module)
    size = config.generation_batch_size or program.config.runtime.generation_batch_size
    if config.num_replica > 1 and (size is None or module.batch_by == "episode"):
        why = (
            "it takes the whole episode at once"
            if module.batch_by == "episode"
            else "without a generation_batch_size each of its calls takes all samples at once"
        )
        program.notes.append(
            f"models.{module.name}.num_replica={config.num_replica}: one replica does all the work, since {why}"
        )


def note_what_may_surprise(program: Program) -> None:
    """Name what settings do beyond what they seem to."""
    _note_groups(program)
    _note_replay(program)
    _note_shared_columns(program)
    trainer, env = program.graphs.get("trainer_flow"), program.graphs.get("env_flow")
    trained = trainer.modules if trainer else []
    runtime = program.config.runtime
    if runtime.stream_data_loader_type == "dynamic" and runtime.train_global_batch_size:
        program.notes += [
            f"{module.name} stands in both flows: with runtime.stream_data_loader_type=dynamic it makes the later "
            "samples of an episode with what it learned from the earlier ones"
            for module in (env.modules if env else ())
            if module in trained and not runtime.max_replay_episode
        ]
    for source, destination in program.sync_pairs:
        if destination in trained:
            program.notes.append(
                f"{destination.name} is trained itself, and every sync from {source.name} overwrites what it learned"
            )


def _note_shared_columns(program: Program) -> None:
    """Name policies that are taught by different trainers and write the same columns."""
    graph = program.graphs.get("env_flow")
    taught = [destination for _, destination in program.sync_pairs]
    policies = [module for module in (graph.modules if graph else ()) if module in taught]
    for first, second in combinations(policies, 2):
        same = written_columns(first) & written_columns(second)
        if same and resolved_config(first).namespace == resolved_config(second).namespace:
            program.notes.append(
                f"{first.name} and {second.name} write the same columns ({', '.join(sorted(same))}), and where they "
                "meet the later ones stay: give every policy and what belongs to it a `namespace` of its own"
            )


def _note_groups(program: Program) -> None:
    runtime = program.config.runtime
    graph = program.graphs.get("env_flow")
    sampling = graph.modules if graph else []
    for module in (module for module in program.modules if module.batch_by == "group"):
        size = resolved_config(module).generation_batch_size or runtime.generation_batch_size
        if module in sampling and size is not None and size < runtime.num_inference_per_prompt:
            program.notes.append(
                f"{module.name} is called with {runtime.num_inference_per_prompt} samples, not "
                f"{size} (generation_batch_size): a group is never cut"
            )


def _note_replay(program: Program) -> None:
    runtime = program.config.runtime
    kept, offset = runtime.max_replay_episode, runtime.replay_episode_offset
    if kept == 0 or program.trainer is None:
        return
    if runtime.num_episode and offset >= runtime.num_episode:
        program.notes.append(
            f"replay never begins: runtime.replay_episode_offset={offset}, and there are "
            f"{runtime.num_episode} episodes"
        )
        return
    if kept == 1 and program.replay_sampler is None:
        program.notes.append(
            "runtime.max_replay_episode=1 keeps only the episode that is trained on anyway: give more, or choose "
            "samples with engine.set_replay_sampler(fn)"
        )
    if kept == -1:
        program.notes.append(
            "runtime.max_replay_episode=-1: memory and checkpoints grow with every episode"
        )
    if runtime.stream_data_loader_type == "dynamic" and runtime.train_global_batch_size:
        since = f" from episode {offset + 1} on" if offset else ""
        program.notes.append(
            f"runtime.stream_data_loader_type=dynamic: with replay, training waits for the end of an episode{since}"
        )
