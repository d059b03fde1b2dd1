# SPDX-License-Identifier: Apache-2.0
"""What checkpoints must hold: every policy, every replica, every count, and which data it was."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from contract_modules import Batch, Learner, Step, as_format_1

import chatlearn
from chatlearn import BaseModule, ChatLearnError, Engine, Environment, Evaluator, Trainer
from chatlearn.errors import CheckpointError, ConfigError, DataError
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.testing import tiny_pair

PROMPTS = [f"p{i}" for i in range(8)]


def runtime(**values: Any) -> None:
    chatlearn.init({"runtime": values})


# ---- the data a run goes on with ------------------------------------------------------------------


class Expensive(Step):
    """Counts how often its weights were loaded."""

    setups = 0

    def setup(self) -> None:
        type(self).setups += 1


def learn(source: Any, folder: Path, episodes: int, **more: Any) -> list[list[Any]]:
    runtime(output_dir=str(folder), num_episode=episodes, sample_per_episode=2, **more)
    step, learner = Expensive("step"), Learner()
    engine = Engine(
        Environment(lambda b: step.forward_step(b)), Trainer(lambda b: learner.train_step(b))
    )
    sources = source if isinstance(source, tuple) else (source,)
    engine.set_multiple_datasets(sources).learn()
    return learner.trained


def refused(source: Any, folder: Path, error: type[ChatLearnError], **more: Any) -> str:
    """Resume, and hold that it was refused before any weights were loaded and anything was written."""
    setups = Expensive.setups
    before = contents(folder)
    with pytest.raises(error) as raised:
        learn(source, folder, 4, **{"resume": "auto", **more})
    assert Expensive.setups == setups
    assert contents(folder) == before
    return str(raised.value)


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def write(path: Path, *prompts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def test_a_file_that_changed_is_refused_before_setup(tmp_path: Path) -> None:
    tasks, run = write(tmp_path / "tasks.jsonl", *PROMPTS), tmp_path / "run"
    learn(tasks, run, 2)
    write(tasks, *PROMPTS, "p8")
    message = refused(tasks, run, DataError)
    assert "the dataset file tasks.jsonl changed since the run was saved" in message
    assert "it has 9 rows, and had 8" in message
    assert f"at: {tasks}, " in message
    assert "episode-000002" in message
    assert "fix: resume with the rows that the run was started with" in message
    write(tasks, *PROMPTS[:-1], "other")
    assert "still has 8 rows, but not the same ones" in refused(tasks, run, DataError)
    tasks.write_text("".join(f'{{"prompt":  "{prompt}"}}\n\n' for prompt in PROMPTS))
    assert learn(tasks, run, 3, resume="auto") == [["p4", "p5"]]  # other blanks, the same rows


def test_a_checkpoint_that_is_named_is_refused_before_the_folder_is_touched(tmp_path: Path) -> None:
    learn(PROMPTS, tmp_path / "a", 2)
    learn(PROMPTS, tmp_path / "b", 1)
    named = str(tmp_path / "a/checkpoints/episode-000002")
    assert "changed" in refused(PROMPTS[::-1], tmp_path / "b", DataError, resume=named)
    assert learn(PROMPTS, tmp_path / "b", 3, resume=named) == [["p4", "p5"]]
    assert (tmp_path / "b/earlier/0001").is_dir()


@pytest.mark.parametrize("kind", ["list", "rows", "hugging face", "second", "number"])
def test_rows_in_memory_that_changed(tmp_path: Path, kind: str) -> None:
    first, then = {
        "list": (PROMPTS, [*PROMPTS[:-1], "x"]),
        "rows": ([{"prompt": "p", "n": n} for n in range(4)], [{"prompt": "p", "n": 0}] * 4),
        "hugging face": tuple(
            datasets.Dataset.from_list([{"prompt": p} for p in (*PROMPTS[:-1], last)])
            for last in ("p7", "x")
        ),
        "second": ((PROMPTS, ["a", "b"]), (PROMPTS, ["a", "c"])),
        "number": ((PROMPTS, ["a", "b"]), (PROMPTS, ["a"], ["b"])),
    }[kind]
    learn(first, tmp_path, 2)
    message = refused(then, tmp_path, DataError)
    if kind == "second":
        assert "dataset 2 changed" in message
    if kind == "number":
        assert "has 3 datasets, but had 2" in message
    learn(first, tmp_path, 3, resume="auto")


def test_a_dataset_that_makes_its_rows_is_compared_by_size(tmp_path: Path) -> None:
    class Making:
        def __init__(self, size: int) -> None:
            self.size, self.asked = size, 0

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, index: int) -> str:
            self.asked += 1
            return f"p{index}"

    made = Making(50)
    learn(made, tmp_path, 2)
    assert made.asked < 10
    assert "it has 49 rows, and had 50" in refused(Making(49), tmp_path, DataError)
    assert learn(Making(50), tmp_path, 3, resume="auto") == [["p4", "p5"]]


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"num_inference_per_prompt": 2}, {"data_shuffle": True}]
)
def test_other_samples_are_refused_before_setup(tmp_path: Path, changed: Any) -> None:
    learn(PROMPTS, tmp_path, 2)
    message = refused(PROMPTS, tmp_path, ConfigError, **changed)
    ((key, value),) = changed.items()
    assert f"{key}={value}, but it was {key}=" in message


def test_a_damaged_checkpoint_is_refused_before_setup(tmp_path: Path) -> None:
    learn(PROMPTS, tmp_path, 2, max_replay_episode=1)
    (tmp_path / "checkpoints/episode-000002/replay.pt").write_bytes(b"")
    message = refused(PROMPTS, tmp_path, CheckpointError, max_replay_episode=1)
    assert "replay.pt has 0 bytes instead of" in message


def test_checkpoints_of_earlier_versions_still_resume(tmp_path: Path) -> None:
    learn(PROMPTS, tmp_path, 2)
    as_format_1(tmp_path / "checkpoints/episode-000002", "datasets", "replay")
    with pytest.raises(ConfigError, match=r"\[7\] rows, but \[8\]"):
        learn(PROMPTS[:-1], tmp_path, 3, resume="auto")
    assert learn(PROMPTS, tmp_path, 3, resume="auto") == [["p4", "p5"]]


# ---- replicas -------------------------------------------------------------------------------------


class Weights(BaseModule):
    """A model of one number; as a trainer it adds one per step."""

    def setup(self) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.model.weight.fill_(float(self.name == "source"))

    def forward_step(self, data: Batch) -> Batch:
        count = len(data["prompt"])
        versions, weight = [self.policy_version] * count, float(self.model.weight.detach())
        return {
            **data,
            "value": [weight] * count,
            "version": versions,
            "replica": [self.replica_id] * count,
        }

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        for data in data_list:
            self.get("seen").append(
                list(zip(data["replica"], data["value"], data["version"], strict=True))
            )
        with torch.no_grad():
            self.model.weight.add_(1.0)


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_every_replica_gets_the_checkpoints_weights_and_version(
    tmp_path: Path, frequency: int
) -> None:
    def seen(folder: str, *until: int) -> list[Any]:
        noted: list[Any] = []
        for episodes in until:
            models = {"destination": {"num_replica": 3, "sync_frequency": frequency}}
            values = {"num_episode": episodes, "output_dir": str(tmp_path / folder)}
            values |= {"generation_batch_size": 2, "resume": "auto"}
            chatlearn.init({"runtime": values, "models": models})
            source, destination = Weights("source"), Weights("destination")
            source.put("seen", noted)
            env = Environment(lambda b, d=destination: d.forward_step(b))
            engine = Engine(env, Trainer(lambda b, s=source: s.train_step(b)))
            engine.set_parameter_sync(source, destination).set_dataset(PROMPTS).learn()
            engine.stop()
        return noted

    whole = seen("whole", 5)
    assert {replica for replica, _, _ in whole[0]} == {0, 1, 2}
    assert seen("parts", 1, 2, 3, 5) == whole


class Tallying(BaseModule):
    """Each replica keeps a count of its own."""

    count = 0

    def forward_step(self, data: Batch) -> Batch:
        self.count += len(data["prompt"])
        return {**data, "tally": [f"{self.replica_id}:{self.count}"] * len(data["prompt"])}

    def training_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_replicas_go_on_with_their_own_training_state(tmp_path: Path) -> None:
    def tallies(folder: str, *until: int, replicas: int = 2) -> list[Any]:
        learner = Learner(column="tally")
        for episodes in until:
            values = {"num_episode": episodes, "output_dir": str(tmp_path / folder)}
            values |= {"sample_per_episode": 3, "generation_batch_size": 1, "resume": "auto"}
            chatlearn.init({"runtime": values, "models": {"tallying": {"num_replica": replicas}}})
            tallying = Tallying("tallying")
            env = Environment(lambda b, t=tallying: t.forward_step(b))
            engine = Engine(env, Trainer(lambda b: learner.train_step(b)))
            engine.set_dataset(PROMPTS).learn()
        return learner.trained

    whole = tallies("whole", 3)
    assert len({tally for step in whole for tally in step}) == 9  # no two counts are the same
    assert tallies("parts", 1, 2, 3) == whole
    assert len(tallies("parts", 4, replicas=3)) == 1  # one more than was saved
    assert len(tallies("parts", 5, replicas=1)) == 1


# ---- several trained policies ---------------------------------------------------------------------


class Drawing(BaseModule):
    """A policy that answers with its weights and random numbers."""

    def setup(self) -> None:
        self.model = torch.nn.Linear(2, 1)

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        noise = torch.rand(len(data["prompt"]), 2) + iteration
        return {**data, self.name: self.model(noise).detach().squeeze(1)}


class Descending(BaseModule):
    """A trainer with a model, an optimiser and a schedule of its own."""

    def __init__(self, name: str, column: str, lr: float) -> None:
        super().__init__(name)
        self.column, self.lr = column, lr

    def setup(self) -> None:
        self.model = torch.nn.Linear(2, 1)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=self.lr)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimiser, 2, 0.5)

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        self.optimiser.zero_grad()
        for data in data_list:
            given = torch.stack([data[self.column], data[self.column] * iteration], 1)
            ((self.model(given) - random.random()) ** 2).mean().backward()
        self.optimiser.step()
        self.schedule.step()

    def training_state(self) -> dict[str, Any]:
        return {"optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state_dict()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])


def final_weights(modules: list[BaseModule]) -> dict[str, list[float]]:
    weights = {m.name: [t.flatten() for t in m.state_dict().values()] for m in modules}
    return {name: torch.cat(tensors).tolist() for name, tensors in weights.items()}


def versions_of(folder: Path, episode: int) -> dict[str, int]:
    path = folder / f"checkpoints/episode-{episode:06d}/checkpoint.json"
    return json.loads(path.read_text())["policy_versions"]


@pytest.mark.parametrize("pairs", [2, 3])
@pytest.mark.parametrize("replay", [0, 2])
def test_several_policies_go_on_bit_for_bit(tmp_path: Path, pairs: int, replay: int) -> None:
    def trained(folder: str, *until: int) -> dict[str, list[float]]:
        modules: list[BaseModule] = []
        for episodes in until:
            policies = [Drawing(f"policy{i}") for i in range(pairs)]
            learners = [
                Descending(f"learner{i}", f"policy{i}", 0.1 / (i + 1)) for i in range(pairs)
            ]
            values = {"num_episode": episodes, "output_dir": str(tmp_path / folder)}
            values |= {"sample_per_episode": 5, "train_global_batch_size": 2, "resume": "auto"}
            values |= {"max_replay_episode": replay, "generation_batch_size": 2}
            models = {p.name: {"sync_frequency": i + 1} for i, p in enumerate(policies)}
            models["policy1"] |= {"num_replica": 2}
            chatlearn.init({"runtime": values, "models": models})
            engine = several(policies, learners)
            engine.set_dataset(PROMPTS).learn()
            modules = [*policies, *learners]
        return final_weights(modules)

    whole = trained("whole", 7)
    assert trained("parts", 1, 3, 4, 7) == whole
    for folder in ("whole", "parts"):
        versions = versions_of(tmp_path / folder, 7)
        assert [versions[f"policy{i}"] for i in range(pairs)] == [8, 4, 3][:pairs]
        assert [versions[f"learner{i}"] for i in range(pairs)] == [0] * pairs
    lagging = f"policy{pairs - 1}"  # 7 is no multiple of its frequency
    if pairs == 2:
        assert whole[lagging] != whole["learner1"]
    assert whole["policy0"] == whole["learner0"]


def several(policies: list[Any], learners: list[Any]) -> Engine:
    def env_flow(batch: Any) -> Any:
        for policy in policies:
            batch = policy.forward_step(batch)
        return batch

    def trainer_flow(batch: Any) -> None:
        for learner in learners:
            learner.train_step(batch)

    engine = Engine(Environment(env_flow), Trainer(trainer_flow))
    for learner, policy in zip(learners, policies, strict=True):
        engine.set_parameter_sync(learner, policy)
    return engine


def test_several_language_models_go_on_bit_for_bit(tmp_path: Path) -> None:
    def length(completions: list[str]) -> list[float]:
        return [len(set(text)) / 4 for text in completions]

    def trained(folder: str, *until: int) -> dict[str, list[float]]:
        modules: list[BaseModule] = []
        for episodes in until:
            values = {"num_episode": episodes, "output_dir": str(tmp_path / folder)}
            values |= {"sample_per_episode": 8, "num_inference_per_prompt": 4, "resume": "auto"}
            values |= {"train_global_batch_size": 4}
            models = {"b": {"sync_frequency": 2}}
            chatlearn.init({"runtime": values, "models": models})
            chains: list[tuple[Any, ...]] = []
            for name, lr in (("a", 1e-2), ("b", 3e-3)):
                policy = PolicyInference(name, namespace=name, model=tiny_pair, max_new_tokens=4)
                reward = FunctionReward(f"{name}_reward", length, namespace=name)
                advantage = GroupAdvantage(f"{name}_advantage", namespace=name)
                schedule = {"lr_schedule": "linear", "warmup_steps": 2, "total_steps": 12}
                learner = PolicyTrainer(
                    f"{name}_learner", namespace=name, model=tiny_pair, lr=lr, **schedule
                )
                chains.append((policy, reward, advantage, learner))

            def env_flow(batch: Any, chains: Any = chains) -> Any:
                for policy, reward, advantage, _ in chains:
                    batch = advantage.forward_step(reward.forward_step(policy.forward_step(batch)))
                return batch

            def trainer_flow(batch: Any, chains: Any = chains) -> None:
                for *_, learner in chains:
                    learner.train_step(batch)

            engine = Engine(Environment(env_flow), Trainer(trainer_flow))
            for policy, _, _, learner in chains:
                engine.set_parameter_sync(learner, policy)
            engine.set_dataset(["1+1=", "2+3="]).learn()
            modules = [m for policy, _, _, learner in chains for m in (policy, learner)]
        return final_weights(modules)

    whole = trained("whole", 3)
    assert trained("parts", 1, 3) == whole
    assert whole["a"] == whole["a_learner"]
    assert whole["b"] != whole["b_learner"]  # not due after episode 3
    versions = versions_of(tmp_path / "parts", 3)
    assert {name: versions[name] for name in "ab"} == {"a": 4, "b": 2}


# ---- counts and orders ----------------------------------------------------------------------------


class Counted(BaseModule):
    """Takes down the iteration of every call of each of its methods, and the prompts."""

    def note(self, method: str, data: Batch, iteration: int) -> Batch:
        self.get("log")[self.name, method].append((iteration, list(data["prompt"])))
        return data

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        return self.note("forward_step", data, iteration)

    def score(self, data: Batch, iteration: int) -> Batch:
        return self.note("score", data, iteration)

    def eval_step(self, data: Batch, iteration: int) -> Batch:
        return self.note("eval_step", data, iteration)

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        for data in data_list:
            self.note("train_step", data, iteration)


@pytest.mark.parametrize("loader", ["fixed", "dynamic"])
def test_counts_shuffles_and_turns_go_on(tmp_path: Path, loader: str) -> None:
    def noted(folder: str, *until: int) -> dict[Any, list[Any]]:
        log: dict[Any, list[Any]] = defaultdict(list)
        for episodes in until:
            runtime(
                num_episode=episodes,
                output_dir=str(tmp_path / folder),
                resume="auto",
                sample_per_episode=7,
                generation_batch_size=3,
                train_global_batch_size=3,
                train_micro_batch_size=2,
                num_training_epoch=2,
                data_shuffle=True,
                data_ratio=[2, 1, 1],
                stream_data_loader_type=loader,
                eval_episode_interval=2,
                seed=11,
            )
            a, b, c = Counted("a"), Counted("b.c"), Counted("c")
            a.put("log", log)

            def env_flow(batch: Any, a: Any = a, b: Any = b) -> Any:
                return b.score(b.forward_step(a.forward_step(batch)))

            evaluator = Evaluator(lambda x, a=a, b=b: b.score(a.eval_step(x)))
            engine = Engine(
                Environment(env_flow),
                Trainer(lambda x, c=c: c.train_step(x)),
                evaluator.set_dataset(["e0", "e1", "e2", "e3"]),
            )
            sizes = {"x": 5, "y": 3, "z": 4}
            several = [[f"{name}{i}" for i in range(size)] for name, size in sizes.items()]
            engine.set_multiple_datasets(several).learn()
        return log

    whole = noted("whole", 6)
    assert noted("parts", 1, 2, 3, 6) == whole
    assert {name for name, _ in whole} == {"a", "b.c", "c"}
    for (_, method), calls in whole.items():
        counted = sorted({iteration for iteration, _ in calls})
        assert counted == list(range(len(counted))), method
    assert len(whole["b.c", "score"]) == 6 * 3 + 3 * 2  # of the environment and of evaluation
    orders = [prompts for _, part in whole["a", "forward_step"] for prompts in part]
    firsts = [prompt for prompt in orders if prompt[0] == "x"]
    passes = [tuple(firsts[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(p) == [f"x{i}" for i in range(5)] for p in passes)
    assert len(set(passes)) > 1
