# SPDX-License-Identifier: Apache-2.0
"""Settings that do nothing, or more than they seem to, are named before a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer


class Module(BaseModule):
    def forward_step(self, data: Any) -> Any:
        return data

    def train_step(self, data: Any) -> None: ...


def env(*modules: BaseModule) -> Environment:
    def env_flow(batch: Any) -> Any:
        for module in modules or (Module("m"),):
            batch = module.forward_step(batch)  # type: ignore[attr-defined]
        return batch

    return Environment(env_flow)


def trainer(module: BaseModule | None = None) -> Trainer:
    module = module or Module("t")
    return Trainer(lambda batch: module.train_step(batch))  # type: ignore[attr-defined]


def newest(buffers: Any) -> Any:
    return buffers[-1].samples


def engine(*parts: Any) -> Engine:
    return Engine(*parts).set_dataset(["p"])


def evaluated() -> Evaluator:
    return Evaluator(lambda batch: Module("e").forward_step(batch))


M, T = Module("m"), Module("t")


class Grouped(Module):
    batch_by = "group"


class Whole(Module):
    batch_by = "episode"


class OwnDatasets(Module):
    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        return [{"prompt": "p"} for _ in prompts]


Notes = tuple[dict[str, Any], Callable[[], Engine], list[str]]
NOTED: dict[str, Notes] = {
    "nothing": ({}, lambda: engine(env(M), trainer(T)).set_parameter_sync(T, M), []),
    "training settings without a trainer": (
        {"runtime": {"num_training_epoch": 2, "train_global_batch_size": 4}},
        lambda: engine(env()),
        [
            "runtime.train_global_batch_size, runtime.num_training_epoch: no effect without a trainer flow"
        ],
    ),
    "replay without a trainer": (
        {"runtime": {"max_replay_episode": 2}},
        lambda: engine(env()),
        ["runtime.max_replay_episode: no effect without a trainer flow"],
    ),
    "evaluation settings without an evaluator": (
        {"runtime": {"eval_num_inference_per_prompt": 2, "eval_episode_interval": 3}},
        lambda: engine(env()),
        [
            "runtime.eval_episode_interval, runtime.eval_num_inference_per_prompt: no effect without an evaluator"
        ],
    ),
    "a threshold that nothing is held against": (
        {"runtime": {"eval_pass_threshold": 0.5}},
        lambda: engine(env(), None, evaluated().set_dataset(["e"])),
        ["runtime.eval_pass_threshold: no effect while runtime.eval_num_inference_per_prompt is 1"],
    ),
    "pass@1 of one sample": (
        {"runtime": {"eval_pass_at_k": [1], "eval_pass_threshold": 0.5}},
        lambda: engine(env(), None, evaluated().set_dataset(["e"])),
        [],
    ),
    "an evaluator that is never asked": (
        {"runtime": {"eval_episode_interval": 4, "num_episode": 3}},
        lambda: engine(env(), None, evaluated().set_dataset(["e"])),
        [
            "the evaluator is never asked: runtime.eval_episode_interval=4 exceeds runtime.num_episode=3"
        ],
    ),
    "replicas that never get anything to do": (
        {"models": {"m": {"num_replica": 3}}},
        lambda: engine(env(M)),
        [
            "models.m.num_replica=3: one replica does all the work, since without a generation_batch_size each of "
            "its calls takes all samples at once"
        ],
    ),
    "replicas that share the work": (
        {"runtime": {"generation_batch_size": 1}, "models": {"m": {"num_replica": 3}}},
        lambda: engine(env(M)),
        [],
    ),
    "an evaluator that is asked before training only": (
        {
            "runtime": {
                "eval_episode_interval": 4,
                "num_episode": 3,
                "enable_eval_before_training": True,
            }
        },
        lambda: engine(env(), None, evaluated().set_dataset(["e"])),
        [],
    ),
    "a ratio of one dataset": (
        {"runtime": {"data_ratio": [3]}},
        lambda: engine(env()),
        ["runtime.data_ratio: no effect with one dataset"],
    ),
    "streaming of one update": (
        {"runtime": {"stream_data_loader_type": "dynamic", "incomplete_step": "keep"}},
        lambda: engine(env(), trainer()),
        [
            "runtime.stream_data_loader_type=dynamic: no effect without runtime.train_global_batch_size, since one "
            "update takes the whole episode",
            "runtime.incomplete_step: no effect without runtime.train_global_batch_size, since no sample is left over",
        ],
    ),
    "a frequency at the wrong end of a sync": (
        {"models": {"t": {"sync_frequency": 2}}},
        lambda: engine(env(M), trainer(T)).set_parameter_sync(T, M),
        ["models.t.sync_frequency: no effect, since no parameter sync leads into t"],
    ),
    "a batch size of whole episodes": (
        {"models": {"w": {"generation_batch_size": 2}}},
        lambda: engine(env(Whole("w"))),
        ["models.w.generation_batch_size: no effect, since w takes the whole episode at once"],
    ),
    "a batch size below a group": (
        {
            "runtime": {"num_inference_per_prompt": 8, "generation_batch_size": 16},
            "models": {"g": {"generation_batch_size": 4}},
        },
        lambda: engine(env(M, Grouped("g"), Grouped("h"))),
        ["g is called with 8 samples, not 4 (generation_batch_size): a group is never cut"],
    ),
    "a pair given twice": (
        {},
        lambda: (
            engine(env(M), trainer(T))
            .set_parameter_sync(T, M)
            .set_parameter_sync(T, M)
            .set_parameter_sync(T, M)
        ),
        ["set_parameter_sync(t -> m) is given 3 times and carried once"],
    ),
    "a sync into who learns": (
        {},
        lambda: engine(env(M), trainer(T)).set_parameter_sync(M, T),
        ["t is trained itself, and every sync from m overwrites what it learned"],
    ),
    "replay of one episode": (
        {"runtime": {"max_replay_episode": 1}},
        lambda: engine(env(), trainer()),
        [
            "runtime.max_replay_episode=1 keeps only the episode that is trained on anyway: give more, or choose "
            "samples with engine.set_replay_sampler(fn)"
        ],
    ),
    "a sampler over one episode": (
        {"runtime": {"max_replay_episode": 1}},
        lambda: engine(env(), trainer()).set_replay_sampler(newest),
        [],
    ),
    "replay of everything": (
        {"runtime": {"max_replay_episode": -1}},
        lambda: engine(env(), trainer()),
        ["runtime.max_replay_episode=-1: memory and checkpoints grow with every episode"],
    ),
    "replay that never begins": (
        {"runtime": {"max_replay_episode": -1, "replay_episode_offset": 2, "num_episode": 2}},
        lambda: engine(env(), trainer()),
        ["replay never begins: runtime.replay_episode_offset=2, and there are 2 episodes"],
    ),
    "replay and streaming": (
        {
            "runtime": {
                "max_replay_episode": 4,
                "replay_episode_offset": 2,
                "num_episode": 9,
                "stream_data_loader_type": "dynamic",
                "train_global_batch_size": 1,
            }
        },
        lambda: engine(env(), trainer()),
        [
            "runtime.stream_data_loader_type=dynamic: with replay, training waits for the end of an episode from "
            "episode 3 on"
        ],
    ),
    "streaming into a module that samples too": (
        {"runtime": {"stream_data_loader_type": "dynamic", "train_global_batch_size": 1}},
        lambda: engine(env(M, T), trainer(T)),
        [
            "t stands in both flows: with runtime.stream_data_loader_type=dynamic it makes the later samples of an "
            "episode with what it learned from the earlier ones"
        ],
    ),
    "datasets that a module builds": (
        {},
        lambda: Engine(env(OwnDatasets("m"))).set_multiple_datasets([["p"], [{"text": "q"}]]),
        [],
    ),
}


@pytest.mark.parametrize("case", NOTED, ids=str)
def test_what_may_surprise_is_noted(case: str) -> None:
    config, make, notes = NOTED[case]
    chatlearn.init(config)
    program = make().check()
    assert program.problems == []
    assert program.notes == notes


def test_a_pair_given_twice_is_synced_once() -> None:
    class Learner(Module):
        def setup(self) -> None:
            self.model = torch.nn.Linear(1, 1)

    policy, learner = Learner("policy"), Learner("learner")
    made = engine(env(policy), trainer(learner))
    for _ in range(2):
        made.set_parameter_sync(learner, policy)
    made.learn()
    assert policy.policy_version == 2  # before the first and after the only episode


def test_a_program_that_only_evaluates_may_read_the_file_of_the_training() -> None:
    chatlearn.init(
        {"runtime": {"train_global_batch_size": 2, "num_training_epoch": 2, "data_ratio": [1, 2]}}
    )
    program = evaluated().set_dataset(["e"]).check()
    assert (program.problems, program.notes) == ([], [])
