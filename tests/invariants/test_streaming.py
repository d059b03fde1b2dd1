# SPDX-License-Identifier: Apache-2.0
"""`fixed` and `dynamic` train the same steps on the same samples; `dynamic` does it as early as it can."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_clock import VirtualClock, chain, node, step_of

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer
from chatlearn.data.stream import StreamDataset
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.runtime.protocol import Call
from chatlearn.testing import tiny_pair

KINDS = ("fixed", "dynamic")


LOG: list[str] = []


class Logged(BaseModule):
    """Writes every call into a log that all modules and their replicas share: its name and the samples."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        LOG.append(f"{self.name} {''.join(data['prompt'])}")
        return data

    def train_step(self, data_list: list[dict[str, Any]], iteration: int) -> None:
        parts = "|".join("".join(data["prompt"]) for data in data_list)
        LOG.append(f"{self.name}{iteration} {parts}")


class Odd(Logged):
    """Keeps every other letter of the alphabet: a, c, e, ..."""

    filters_samples = True

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        super().forward_step(data)
        chosen = [i for i, p in enumerate(data["prompt"]) if ord(p) % 2]
        return {"prompt": [data["prompt"][i] for i in chosen], "uid": data["uid"][chosen]}


def run(
    kind: str,
    prompts: str = "abcdefgh",
    *,
    models: dict[str, Any] | None = None,
    trainers: tuple[str, ...] = ("train",),
    keeps_odd: bool = False,
    **runtime: Any,
) -> list[str]:
    """Run one episode of generate -> score -> train and return the calls in order."""
    settings = {"generation_batch_size": 2, "train_global_batch_size": 4, **runtime}
    chatlearn.init(
        {"runtime": {"stream_data_loader_type": kind, **settings}, "models": models or {}}
    )
    LOG.clear()
    policy = Logged("policy")
    reward = (Odd if keeps_odd else Logged)("reward")
    learners = [Logged(name) for name in trainers]

    def trainer_flow(batch):
        for learner in learners:
            learner.train_step(batch)

    env = Environment(lambda batch: reward.forward_step(policy.forward_step(batch)))
    Engine(env, Trainer(trainer_flow)).set_dataset(list(prompts)).learn()
    return list(LOG)


def steps(log: list[str], trainer: str = "train") -> list[str]:
    return [line.split(" ")[1] for line in log if line.startswith(trainer)]


# ---- the order of calls in one process ----------------------------------------------------------------


def test_dynamic_trains_while_later_samples_wait_to_be_generated():
    assert run("dynamic") == [
        "policy ab",
        "reward ab",
        "policy cd",
        "reward cd",
        "train0 abcd",
        "policy ef",
        "reward ef",
        "policy gh",
        "reward gh",
        "train1 efgh",
    ]


def test_fixed_trains_when_the_episode_is_complete():
    log = run("fixed")
    assert log[:8] == [f"{m} {p}" for p in ("ab", "cd", "ef", "gh") for m in ("policy", "reward")]
    assert log[8:] == ["train0 abcd", "train1 efgh"]


def test_dynamic_streams_with_replicas_too():
    log = run("dynamic", models={"policy": {"num_replica": 3}})
    assert log == run("dynamic")


def test_batches_that_do_not_fit_the_steps():
    """Calls of 3 samples, steps of 4: a step waits for the call that holds its last sample, and no longer."""
    log = run("dynamic", generation_batch_size=3, train_micro_batch_size=2)
    assert log == [
        "policy abc",
        "reward abc",
        "policy def",
        "reward def",
        "train0 ab|cd",
        "policy gh",
        "reward gh",
        "train1 ef|gh",
    ]


def test_two_trainers_see_the_same_steps():
    log = run("dynamic", trainers=("actor", "critic"))
    assert steps(log, "actor") == steps(log, "critic") == ["abcd", "efgh"]
    assert log.index("critic0 abcd") < log.index("policy ef")


@pytest.mark.parametrize(
    ("incomplete", "last"), [("fill", ["efga"]), ("keep", ["efg"]), ("drop_last", [])]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rest(kind, incomplete, last):
    log = run(kind, "abcdefg", incomplete_step=incomplete)
    assert steps(log) == ["abcd", *last]


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_shrinks_the_episode(kind):
    """Of a to n, 7 remain: one step of four and a rest that is filled up."""
    log = run(kind, "abcdefghijklmn", keeps_odd=True)
    assert steps(log) == ["aceg", "ikma"]
    trained, generated = log.index("train0 aceg"), log.index("policy ij")
    assert (trained < generated) == (kind == "dynamic")


def test_later_passes_wait_for_the_whole_episode_and_are_shuffled_alike():
    logs = {kind: run(kind, num_training_epoch=3) for kind in KINDS}
    assert steps(logs["fixed"]) == steps(logs["dynamic"])
    per_pass = [steps(logs["dynamic"])[i : i + 2] for i in (0, 2, 4)]
    assert per_pass[0] == ["abcd", "efgh"]
    assert all(sorted("".join(both)) == list("abcdefgh") for both in per_pass)
    assert len({"".join(both) for both in per_pass}) == 3
    second_pass = next(i for i, line in enumerate(logs["dynamic"]) if line.startswith("train2"))
    assert logs["dynamic"].index("policy gh") < second_pass


# ---- on a virtual clock -------------------------------------------------------------------------------


def episode(kind: Any, seconds: Any, **more: Any) -> VirtualClock:
    source = StreamDataset(kind, global_batch_size=4, micro_batch_size=2, epochs=2)
    trainer = [node(0, module="actor"), node(1, module="critic", after=(0,))]
    return VirtualClock(
        chain(2, 2, 1), (1,), 16, trainer=trainer, source=source, seconds=seconds, **more
    ).run()


def earliest(clock: VirtualClock, module: str) -> list[float]:
    """When each of a trainer's steps of the first pass could have begun: samples there, step before done."""
    begins: list[float] = []
    done = 0.0
    for timed in clock.steps(module)[:4]:
        there = max(clock.delivered_at[i] for part in step_of(timed).micro_batches for i in part)
        before = [t.stop for t in clock.steps("actor") if step_of(t) == step_of(timed)]
        begins.append(max(there, done, *(before if module == "critic" else ())))
        done = timed.stop
    return begins


@given(st.integers(0, 2**32), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_dynamic_trains_at_the_earliest_possible_time(seed: int, replicas: int) -> None:
    def seconds(call: Call) -> float:
        return random.Random(f"{seed}/{call.node.name}/{call.uids}/{call.step}").uniform(0.1, 9)

    more: dict[str, Any] = {"replicas": {"m0": replicas, "m1": replicas}}
    dynamic, fixed = (episode(kind, seconds, **more) for kind in ("dynamic", "fixed"))
    for module in ("actor", "critic"):
        assert [t.start for t in dynamic.steps(module)[:4]] == earliest(dynamic, module)
        assert dynamic.trained(module) == fixed.trained(module)
    assert fixed.steps("actor")[0].start == max(fixed.delivered_at), "fixed waits for all"
    assert dynamic.delivered_at == fixed.delivered_at, "training holds no sampling up"
    assert dynamic.now <= fixed.now


def test_when_nothing_overlaps_dynamic_saves_the_whole_training_time_but_the_last_step() -> None:
    times = {"m0": 2.0, "m1": 0.5, "actor": 1.0, "critic": 1.0}

    def seconds(call: Call) -> float:
        return times[call.node.module]

    source = {k: StreamDataset(k, global_batch_size=4) for k in KINDS}  # type: ignore[arg-type]
    trainer = [node(0, module="actor")]
    ends = {
        kind: VirtualClock(
            chain(2, 2, 2), (1,), 16, trainer=trainer, source=source[kind], seconds=seconds
        )
        .run()
        .now
        for kind in KINDS
    }
    assert ends == {"fixed": 16 + 0.5 + 4, "dynamic": 16 + 0.5 + 1}


# ---- real policies --------------------------------------------------------------------------------------


def weights_after_an_episode(kind: str, **runtime: Any) -> tuple[dict[str, torch.Tensor], Any]:
    chatlearn.init(
        {
            "runtime": {
                "stream_data_loader_type": kind,
                "num_inference_per_prompt": 4,
                "generation_batch_size": 4,
                "train_global_batch_size": 8,
                "train_micro_batch_size": 4,
                **runtime,
            }
        }
    )
    policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=6)
    reward = FunctionReward("reward", lambda completions: [float(len(set(c))) for c in completions])
    advantage = GroupAdvantage("advantage")
    learner = PolicyTrainer("learner", model=tiny_pair, lr=1e-2)
    env = Environment(
        lambda batch: advantage.forward_step(reward.forward_step(policy.forward_step(batch)))
    )
    engine = Engine(env, Trainer(lambda batch: learner.train_step(batch)))
    engine.set_parameter_sync(learner, policy).set_dataset([f"{i}+{i}=" for i in range(6)])
    result = engine.learn()
    return {k: v.clone() for k, v in learner.model.state_dict().items()}, result


@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_after_an_episode_are_the_same_bit_for_bit(epochs):
    fixed, dynamic = (weights_after_an_episode(k, num_training_epoch=epochs) for k in KINDS)
    assert fixed[1].train_iteration == dynamic[1].train_iteration == 3 * epochs
    begun = tiny_pair()[0].state_dict()
    assert any(not torch.equal(begun[name], tensor) for name, tensor in fixed[0].items())
    for name, tensor in fixed[0].items():
        assert torch.equal(tensor, dynamic[0][name]), name
