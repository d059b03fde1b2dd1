# SPDX-License-Identifier: Apache-2.0
"""Replicas in one process: the same results in the same order as one replica, and the work shared by load."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from contract_modules import Batch

import chatlearn
from chatlearn import BaseModule, ControlDependencies, Engine, Environment, Evaluator, Trainer
from chatlearn.errors import ConfigError
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.testing import tiny_pair

PROMPTS = list("abcdefghijklm")  # a prime number of them
CALLS: list[tuple[str, int, int, str]] = []
"""Module, replica, iteration and samples of every call of a test: replicas share nothing but globals."""


class Marker(BaseModule):
    """Appends its name to every sample's `trail`; the number of samples in a call must not show in it."""

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        CALLS.append((self.name, self.replica_id, iteration, "".join(data["prompt"])))
        trail = data.get("trail", data["prompt"])
        return {**data, "trail": [f"{t}{self.name}" for t in trail]}

    eval_step = forward_step


class Grouped(Marker):
    """Writes the whole group into every sample."""

    batch_by = "group"

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        output = super().forward_step(data, iteration)
        uids, groups = output["uid"].tolist(), output["prompt_uid"].tolist()
        mates = [[u for u, other in zip(uids, groups, strict=True) if other == g] for g in groups]
        output["trail"] = [f"{t}{m}" for t, m in zip(output["trail"], mates, strict=True)]
        return output


class Whole(Marker):
    """Writes the size of the episode into every sample."""

    batch_by = "episode"

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        output = super().forward_step(data, iteration)
        output["trail"] = [f"{t}/{len(output['trail'])}" for t in output["trail"]]
        return output


class Filter(Marker):
    """Drops every third sample."""

    filters_samples = True

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        output = super().forward_step(data, iteration)
        kept = [i for i, uid in enumerate(output["uid"].tolist()) if uid % 3]
        return {
            key: [column[i] for i in kept] if isinstance(column, list) else column[kept]
            for key, column in output.items()
        }


class Learner(BaseModule):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.steps: list[list[list[str]]] = []

    def train_step(self, data_list: list[Batch]) -> None:
        self.steps.append([data["trail"] for data in data_list])


Make = Callable[[type[Marker], str], Marker]
Flow = Callable[[Any], Any]


def chain(make: Make) -> Flow:
    a, b = make(Marker, "a"), make(Marker, "b")
    return lambda batch: b.forward_step(a.forward_step(batch))


def diamond(make: Make) -> Flow:
    a, b, c, d = (make(Marker, name) for name in "abcd")

    def flow(batch: Any) -> Any:
        top = a.forward_step(batch)
        return d.forward_step(b.forward_step(top), c.forward_step(top))

    return flow


def between(kind: type[Marker]) -> Callable[[Make], Flow]:
    def factory(make: Make) -> Flow:
        a, x, b = make(Marker, "a"), make(kind, "x"), make(Marker, "b")
        return lambda batch: b.forward_step(x.forward_step(a.forward_step(batch)))

    factory.__name__ = kind.__name__
    return factory


def ordered(make: Make) -> Flow:
    a, b = make(Marker, "a"), make(Marker, "b")

    def flow(batch: Any) -> Any:
        first = a.forward_step(batch)
        with ControlDependencies(first):
            second = b.forward_step(batch)
        return first, second

    return flow


FLOWS = [chain, diamond, between(Grouped), between(Whole), between(Filter), ordered]
flows = pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.__name__)
counts = pytest.mark.parametrize("replicas", [2, 3, 5])


def maker(replicas: int, **settings: Any) -> Make:
    CALLS.clear()
    return lambda kind, name: kind(name, num_replica=replicas, **settings)


def split(module: str) -> dict[int, int]:
    """How many samples each replica of a module ran."""
    work: Counter[int] = Counter()
    for name, replica, _, samples in CALLS:
        work[replica] += len(samples) if name == module else 0
    return {replica: samples for replica, samples in sorted(work.items()) if samples}


# ---- the same results in the same order -------------------------------------------------------------


def trained(flow: Any, replicas: int, size: int | None, **runtime: Any) -> list[list[list[str]]]:
    chatlearn.init(
        {
            "runtime": {
                "generation_batch_size": size,
                "num_episode": 2,
                "sample_per_episode": 14,
                "num_inference_per_prompt": 2,
                "train_global_batch_size": 4,
                "train_micro_batch_size": 3,
                **runtime,
            }
        }
    )
    learner = Learner("learner")
    env, trainer = Environment(flow(maker(replicas))), Trainer(lambda b: learner.train_step(b))
    Engine(env, trainer).set_dataset(PROMPTS).learn()
    return learner.steps


@flows
@counts
@pytest.mark.parametrize("size", [1, 5, None])
@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_training_sees_what_one_replica_gives(flow, replicas, size, kind):
    more = {"stream_data_loader_type": kind, "num_training_epoch": 2}
    expected = trained(flow, 1, 3, **more)
    runs = Counter((name, sample) for name, _, _, samples in CALLS for sample in samples)
    assert trained(flow, replicas, size, **more) == expected
    again = Counter((name, sample) for name, _, _, samples in CALLS for sample in samples)
    assert again == runs, "each sample runs as often as with one replica"
    two_each = {p: 4 if p == "a" else 2 for p in PROMPTS}  # 14 prompts wrap around: "a" comes twice
    assert {p: runs["a", p] for p in PROMPTS} == two_each


@flows
@counts
@pytest.mark.parametrize("size", [1, 4, None])
def test_evaluation_gives_what_one_replica_gives(flow, replicas, size):
    def results(count: int) -> dict[str, list[str]]:
        made = flow(maker(count))
        evaluator = Evaluator(made).set_dataset(PROMPTS)
        batches = evaluator.eval()
        evaluator.stop()
        return {name: [t for b in bs for t in b["trail"]] for name, bs in batches.items()}

    chatlearn.init({"runtime": {"generation_batch_size": size}})
    one = results(1)
    per_module = {name: sorted(s) for name, s in samples_by_module().items()}
    assert results(replicas) == one
    assert {name: sorted(s) for name, s in samples_by_module().items()} == per_module
    assert all(len(set(s)) == len(s) for s in per_module.values()), "each sample once"


def samples_by_module() -> dict[str, str]:
    joined: dict[str, str] = {}
    for name, _, _, samples in CALLS:
        joined[name] = joined.get(name, "") + samples
    return joined


# ---- by load ------------------------------------------------------------------------------------------


def generate(flow: Flow, prompts: Any, **runtime: Any) -> None:
    chatlearn.init({"runtime": runtime})
    Engine(Environment(flow)).set_dataset(prompts).learn()


@pytest.mark.parametrize(
    ("samples", "size", "replicas", "expected"),
    [
        (13, 1, 2, {0: 7, 1: 6}),
        (13, 3, 2, {0: 7, 1: 6}),  # 3 3 3 3 1
        (13, 4, 3, {0: 5, 1: 4, 2: 4}),  # 4 4 4 1
        (13, 1, 5, {0: 3, 1: 3, 2: 3, 3: 2, 4: 2}),
        (13, None, 3, {0: 13}),
        (2, 1, 3, {0: 1, 1: 1}),
    ],
)
def test_every_replica_gets_its_share(samples, size, replicas, expected):
    generate(chain(maker(replicas)), PROMPTS[:samples], generation_batch_size=size)
    assert split("a") == split("b") == expected


def test_the_split_is_by_samples_and_not_by_calls():
    """A filter leaves groups of 4 and of 1 in turn; dealt in turn, the replicas would get 16 and 4 samples."""

    class Rare(Filter):
        def forward_step(self, data: Batch, iteration: int) -> Batch:
            first_of_odd = [
                i
                for i, (uid, group) in enumerate(zip(data["uid"], data["prompt_uid"], strict=True))
                if group % 2 == 0 or uid % 4 == 0
            ]
            return {"uid": data["uid"][first_of_odd], "prompt": ["x"] * len(first_of_odd)}

    class Late(Grouped):
        def forward_step(self, data: Batch, iteration: int) -> Batch:
            CALLS.append((self.name, self.replica_id, iteration, "x" * len(data["uid"])))
            return data

    rare, late = Rare("rare"), Late("late", num_replica=2, generation_batch_size=1)
    CALLS.clear()
    chatlearn.init({"runtime": {"num_inference_per_prompt": 4, "sample_per_episode": 32}})
    env = Environment(lambda batch: late.forward_step(rare.forward_step(batch)))
    Engine(env).set_dataset(PROMPTS).learn()
    sizes = [len(samples) for name, _, _, samples in CALLS if name == "late"]
    assert sizes == [4, 1] * 4
    assert split("late") == {0: 10, 1: 10}


# ---- what a replica is ----------------------------------------------------------------------------------


class Stateful(BaseModule):
    """Counts in an attribute of its own and in one value that all modules share."""

    seen: ClassVar[list[Stateful]] = []

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.own = {"calls": 0}
        self.set_ups = 0
        self.episodes: list[str] = []

    def setup(self) -> None:
        self.set_ups += 1
        Stateful.seen.append(self)
        self.weights = torch.rand(3)

    def before_episode(self) -> None:
        self.episodes.append("before")

    def after_episode(self) -> None:
        self.episodes.append("after")

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        self.own["calls"] += 1
        self.put("calls", self.get("calls", 0) + 1)
        CALLS.append((self.name, self.replica_id, iteration, "".join(data["prompt"])))
        return data


def test_a_replica_is_a_copy_with_a_setup_of_its_own_and_shares_what_was_put():
    Stateful.seen.clear()
    CALLS.clear()
    module, other = Stateful("module", num_replica=3), Stateful("other")
    module.put("unit", "metres")
    generate(
        lambda batch: other.forward_step(module.forward_step(batch)),
        list("abcdefg"),
        generation_batch_size=1,
        num_episode=2,
    )
    replicas = [m for m in Stateful.seen if m.name == "module"]
    assert [m.replica_id for m in replicas] == [0, 1, 2]
    assert replicas[0] is module, "replica 0 is the user's own object"
    assert [m.set_ups for m in replicas] == [1, 1, 1]
    assert [m.episodes for m in replicas] == [["before", "after"] * 2] * 3
    assert [m.own["calls"] for m in replicas] == [6, 4, 4], (
        "state of its own: 3 + 2 + 2 per episode"
    )
    assert {m.get("calls") for m in (*replicas, other)} == {28}, "put() reaches everybody"
    assert {m.get("unit") for m in (*replicas, other)} == {"metres"}
    assert all(torch.equal(m.weights, module.weights) for m in replicas), "the same random numbers"


def test_iterations_count_a_modules_calls_over_all_its_replicas():
    """With one replica or three: `iteration` goes 0, 1, 2, ... once, and on over episodes."""
    for replicas in (1, 3):
        CALLS.clear()
        module = Stateful("module", num_replica=replicas)
        generate(
            lambda batch, m=module: m.forward_step(batch),
            list("abcdefg"),
            generation_batch_size=2,
            num_episode=2,
        )
        seen = [(iteration, samples) for _, _, iteration, samples in CALLS]
        assert seen == list(enumerate(["ab", "cd", "ef", "g"] * 2))


def test_a_module_that_cannot_be_copied_is_refused_before_anything_is_set_up():
    Stateful.seen.clear()
    module = Stateful("module", num_replica=2)
    module.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="cannot be copied for num_replica > 1") as caught:
        generate(lambda batch: module.forward_step(batch), ["a"])
    assert "'module'" in caught.value.cause
    assert caught.value.place == "models.module.num_replica"
    assert "setup()" in caught.value.fix
    assert Stateful.seen == []


# ---- real policies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_policies_sample_token_for_token_the_same(size):
    def completions(replicas: int, batch_size: int | None) -> tuple[list[list[int]], torch.Tensor]:
        chatlearn.init(
            {
                "runtime": {
                    "generation_batch_size": batch_size,
                    "num_inference_per_prompt": 2,
                    "num_episode": 2,
                    "sample_per_episode": 8,
                }
            }
        )
        rows: list[list[int]] = []

        class Judge(FunctionReward):
            def forward_step(self, data: Batch) -> Batch:
                rows.extend(t.tolist() for t in data["response_ids"])
                return super().forward_step(data)

        policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=6, num_replica=replicas)
        judge = Judge("reward", lambda completions: [float(len(set(c))) for c in completions])
        advantage = GroupAdvantage("advantage")
        learner = PolicyTrainer("learner", model=tiny_pair, lr=1e-2)
        env = Environment(
            lambda b: advantage.forward_step(judge.forward_step(policy.forward_step(b)))
        )
        engine = Engine(env, Trainer(lambda b: learner.train_step(b)))
        engine.set_parameter_sync(learner, policy).set_dataset(["1+1=", "2+2=", "3+3=", "4+4="])
        engine.learn()
        return rows, torch.cat([p.detach().flatten() for p in learner.model.parameters()])

    rows, weights = completions(1, None)
    more_rows, more_weights = completions(2, size)
    assert more_rows == rows, "both episodes: replicas receive the synced weights, too"
    assert torch.allclose(more_weights, weights, atol=1e-5)


class Slow(Marker):
    """Its first replica is slow."""

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        if self.replica_id == 0:
            time.sleep(0.06)
        return super().forward_step(data, iteration)


def test_a_slow_replica_gets_less_to_do() -> None:
    chatlearn.init(
        {"runtime": {"generation_batch_size": 1}, "models": {"slow": {"num_replica": 2}}}
    )
    CALLS.clear()
    slow = Slow("slow")
    Engine(Environment(lambda batch: slow.forward_step(batch))).set_dataset(PROMPTS).learn()
    done = Counter(replica for _, replica, _, _ in CALLS)
    assert done[0] < done[1]
    assert sorted(prompt for *_, prompt in CALLS) == PROMPTS
