# SPDX-License-Identifier: Apache-2.0
"""Several trained policies in one flow: none sees or moves what is another's, each is synced, saved and resumed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import chatlearn
from chatlearn import (
    BaseModule,
    ConfigError,
    Engine,
    Environment,
    Evaluator,
    FlowError,
    Trainer,
)
from chatlearn.models import (
    FunctionReward,
    GroupAdvantage,
    PolicyInference,
    PolicyReference,
    PolicyTrainer,
)
from chatlearn.testing import tiny_pair

Batch = dict[str, Any]
SELF_PLAY = Path(__file__).parents[2] / "examples" / "self_play"
PROMPTS = ["1+1=", "2+3=", "9-4=", "7+7="]
RUNTIME = {"sample_per_episode": 16, "num_inference_per_prompt": 4, "train_global_batch_size": 8}


def letters(completions: list[str]) -> list[int]:
    return [sum(map(str.isalpha, text)) for text in completions]


def figures(completions: list[str]) -> list[int]:
    return [sum(map(str.isdigit, text)) for text in completions]


class Player:
    """A policy with all that trains it; `namespace` is None where it is alone."""

    def __init__(self, name: str, score: Any, namespace: str | None, **settings: Any) -> None:
        def source() -> Any:
            return tiny_pair(seed=len(name))

        own = {"namespace": namespace}
        self.policy = PolicyInference(name, model=source, max_new_tokens=3, **own)
        self.reference = PolicyReference(f"{name}_reference", model=source, **own)
        self.reward = FunctionReward(f"{name}_reward", score, **own)
        self.advantage = GroupAdvantage(f"{name}_advantage", **own)
        self.trainer = PolicyTrainer(
            f"{name}_trainer", model=source, kl_coef=0.1, **own, **settings
        )

    def play(self, batch: Any) -> Any:
        rollout = self.policy.forward_step(batch)
        scored = self.reward.forward_step(rollout, self.reference.forward_step(rollout))
        return self.advantage.forward_step(scored)


def engine_of(*players: Player) -> Engine:
    def env_flow(batch: Any) -> Any:
        for player in players:
            batch = player.play(batch)
        return batch

    def trainer_flow(batch: Any) -> None:
        for player in players:
            player.trainer.train_step(batch)

    def eval_flow(batch: Any) -> Any:
        return [player.reward.eval_step(player.policy.eval_step(batch)) for player in players]

    engine = Engine(
        Environment(env_flow), Trainer(trainer_flow), Evaluator(eval_flow).set_dataset(PROMPTS)
    )
    for player in players:
        engine.set_parameter_sync(player.trainer, player.policy)
    return engine.set_dataset(PROMPTS)


def short(namespace: str | None) -> Player:
    return Player("ann", letters, namespace, lr=1e-2)


def long(namespace: str | None) -> Player:
    return Player("berta", figures, namespace, lr=3e-3, lr_schedule="linear", total_steps=6)


def learned(player: Player) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in player.trainer.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[f"{name}_trainer/loss"] for row in rows if f"{name}_trainer/loss" in row]


def test_two_policies_in_one_flow_learn_exactly_as_each_does_alone(tmp_path: Path) -> None:
    alone: dict[str, Any] = {}
    for make in (short, long):
        player = make(None)
        chatlearn.init({"runtime": {**RUNTIME, "num_episode": 3, "output_dir": tmp_path / "alone"}})
        with engine_of(player) as engine:
            result = engine.learn()
            name = player.policy.name
            measured = [m[f"{name}_reward/rewards"] for _, m in result.evaluations]
            alone[name] = learned(player), losses(result.folder, name), measured
    both = short("a"), long("b")
    chatlearn.init({"runtime": {**RUNTIME, "num_episode": 3, "output_dir": tmp_path / "both"}})
    with engine_of(*both) as engine:
        result = engine.learn()
        for player in both:
            name = player.policy.name
            weights, lost, measured = alone[name]
            assert equal(learned(player), weights), (
                f"{name} learned something else beside the other"
            )
            assert losses(result.folder, name) == lost
            assert any(abs(loss) > 1e-6 for loss in lost), "nothing was learned from"
            assert [m[f"{name}_reward/rewards"] for _, m in result.evaluations] == measured


def test_without_namespaces_the_same_flow_would_mix_them_up(tmp_path: Path) -> None:
    """The reason for namespaces, and the proof that the test above can fail."""
    chatlearn.init({"runtime": {**RUNTIME, "num_episode": 1, "output_dir": tmp_path}})
    apart, mixed = short("a"), short(None)
    with engine_of(apart, long("b")) as engine:
        engine.learn()
        weights = learned(apart)
    with engine_of(mixed, long(None)) as engine:
        engine.learn()
        assert not equal(learned(mixed), weights)


def test_two_policies_without_namespaces_are_noted() -> None:
    def notes(*players: Player) -> list[str]:
        found = [note for note in engine_of(*players).check().notes if "same columns" in note]
        return [note.partition(" (")[0] for note in found]

    assert notes(short(None), long(None)) == ["ann and berta write the same columns"]
    assert notes(short("x"), long("x")) == ["ann and berta write the same columns"]
    assert notes(short("a"), long("b")) == notes(short(None), long("b")) == notes(short(None)) == []


def test_each_pair_is_synced_at_its_own_pace(tmp_path: Path) -> None:
    often, rarely = short("a"), long("b")
    chatlearn.init(
        {
            "runtime": {**RUNTIME, "num_episode": 3, "output_dir": tmp_path},
            "models": {"berta": {"sync_frequency": 2}},
        }
    )
    with engine_of(often, rarely) as engine:
        engine.learn()
        assert (often.policy.policy_version, rarely.policy.policy_version) == (4, 2)
        assert equal(dict(often.policy.state_dict()), learned(often))
        assert not equal(dict(rarely.policy.state_dict()), learned(rarely)), "episode 3 is not sent"
        assert often.trainer.optimiser is not None
        assert rarely.trainer.optimiser is not None
        rates = [p.trainer.training_state() for p in (often, rarely)]
    assert rates[0].keys() == rates[1].keys()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "ann_trainer/lr" in row]
    assert {row["ann_trainer/lr"] for row in rows} == {1e-2}
    falling = [row["berta_trainer/lr"] for row in rows]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < falling[0] < 3e-3 + 1e-9


def test_both_are_saved_and_resumed_as_if_never_stopped(tmp_path: Path) -> None:
    def run(folder: str, episodes: int, resume: str = "never") -> list[dict[str, torch.Tensor]]:
        players = short("a"), long("b")
        runtime = {**RUNTIME, "num_episode": episodes, "output_dir": tmp_path / folder}
        saved = {"save_episode_interval": 1, "resume": resume}
        models = {"berta": {"sync_frequency": 2}}
        chatlearn.init({"runtime": {**runtime, **saved}, "models": models})
        with engine_of(*players) as engine:
            engine.learn()
            return [learned(player) for player in players]

    whole = run("whole", 3)
    run("parts", 1)
    resumed = run("parts", 3, "auto")
    for one, other in zip(whole, resumed, strict=True):
        assert equal(one, other)
    newest = tmp_path / "parts" / "checkpoints" / "episode-000003" / "modules"
    for name in ("ann_trainer", "berta_trainer"):
        assert (newest / name / "weights.safetensors").stat().st_size > 0
        assert (newest / name / "training.pt").stat().st_size > 0
        assert (tmp_path / "parts" / "model" / name / "model.safetensors").exists()


# ---- a user's modules ------------------------------------------------------------------------------------------------


class Writes(BaseModule):
    """Writes `text`, of whatever it sees as `prompt`."""

    writes = frozenset({"text"})

    def forward_step(self, data: Batch) -> Batch:
        return {**data, "text": [f"{self.name}({prompt})" for prompt in data["prompt"]]}


class Keeps(BaseModule):
    """A filter that looks at its own `text`."""

    writes = frozenset({"score"})
    filters_samples = True

    def forward_step(self, data: Batch) -> Batch:
        data["score"] = [len(text) for text in data["text"]]
        kept = [i for i, text in enumerate(data["text"]) if "p1" not in text]
        return {name: [column[i] for i in kept] for name, column in data.items()}


class Sees(BaseModule):
    writes = frozenset({"twice"})

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.seen: dict[str, list[Any]] = {}

    def forward_step(self, data: Batch) -> Batch:
        for name, column in data.items():
            self.seen.setdefault(name, []).extend(column)
        return data

    def train_step(self, data_list: list[Batch]) -> list[Batch]:
        return [{**self.forward_step(data), "twice": list(data["text"])} for data in data_list]


@pytest.mark.parametrize("replicas", [1, 2])
def test_namespaces_hold_for_modules_of_a_user_s_own_through_filters(replicas: int) -> None:
    chatlearn.init(
        {
            "runtime": {"generation_batch_size": 2, "train_micro_batch_size": 2},
            "models": {name: {"num_replica": replicas} for name in ("w1", "w2", "keeps")},
        }
    )
    plain, one, two = Writes("w0"), Writes("w1", namespace="n1"), Writes("w2", namespace="n2")
    keeps, sees, learner = (
        Keeps("keeps", namespace="n1"),
        Sees("sees"),
        Sees("learner", namespace="n2"),
    )
    after = Sees("after")

    def env_flow(batch: Any) -> Any:
        return sees.forward_step(
            keeps.forward_step(two.forward_step(one.forward_step(plain.forward_step(batch))))
        )

    def trainer_flow(batch: Any) -> None:
        after.train_step(learner.train_step(batch))

    rows = [{"prompt": f"p{i}", "n2/prompt": f"q{i}"} for i in range(5)]
    Engine(Environment(env_flow), Trainer(trainer_flow)).set_dataset(rows).learn()
    left = [0, 2, 3, 4]
    texts = {
        "text": [f"w0(p{i})" for i in left],
        "n1/text": [f"w1(p{i})" for i in left],
        "n2/text": [f"w2(q{i})" for i in left],
    }
    assert {name: sees.seen[name] for name in texts} == texts
    assert sees.seen["n1/score"] == [6] * 4
    assert set(sees.seen) == {"uid", "prompt_uid", "prompt", "n2/prompt", *texts, "n1/score"}
    assert learner.seen["text"] == texts["n2/text"]
    assert learner.seen["../text"] == texts["text"]
    assert after.seen["n2/twice"] == texts["n2/text"]
    assert after.seen["text"] == texts["text"]


class Silent(BaseModule):
    was_set_up = False

    def setup(self) -> None:
        type(self).was_set_up = True

    def forward_step(self, data: Batch) -> Batch:
        return data


def test_a_namespace_that_cannot_hold_is_refused_before_setup() -> None:
    chatlearn.init({"models": {"silent": {"namespace": "n"}}})
    silent = Silent("silent")
    engine = Engine(Environment(lambda batch: silent.forward_step(batch))).set_dataset(["a"])
    with pytest.raises(ConfigError, match="Silent does not say which columns it writes"):
        engine.learn()
    assert not Silent.was_set_up


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_s_program_runs(tmp_path: Path) -> None:
    """Its first block, on tiny models; the classes that the page shows stand in for the rest."""
    page = (SELF_PLAY.parents[1] / "docs" / "several_policies.md").read_text(encoding="utf-8")
    program, *classes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert [name for code in classes for name in re.findall(r"class (\w+)", code)] == [
        "Judge",
        "Referee",
    ]
    names: dict[str, Any] = {name: getattr(chatlearn, name) for name in chatlearn.__all__}
    names |= {kind.__name__: kind for kind in (PolicyInference, PolicyTrainer, FunctionReward)}
    names |= {"GroupAdvantage": GroupAdvantage, "tiny_pair": tiny_pair, "prompts": ["?"]}
    names |= {"right": letters, "hard": lambda completions, solver_rewards: solver_rewards}
    for code in classes:
        exec(code, names)
    names["referee"] = names["Referee"]("referee")
    exec(program.replace("model=...", "model=tiny_pair"), names)
    models = {name: {"max_new_tokens": 3} for name in ("proposer", "solver")}
    chatlearn.init({"runtime": {**RUNTIME, "output_dir": tmp_path}, "models": models})
    with names["engine"] as engine:
        assert engine.learn().train_iteration == 2
    chatlearn.init({"runtime": {"output_dir": tmp_path}})
    judge = names["Judge"]("judge", namespace="solver")
    rows = [{"solver/completion": text} for text in ("a", "bbb")]
    sees = Sees("sees")
    Engine(Environment(lambda batch: sees.forward_step(judge.forward_step(batch)))).set_dataset(
        rows
    ).learn()
    assert sees.seen["solver/verdict"] == [1, 3]


# ---- the example -----------------------------------------------------------------------------------------------------


def self_play(folder: Path, *arguments: str) -> dict[str, float]:
    command = [sys.executable, str(SELF_PLAY / "self_play.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_self_play_runs_and_the_proposer_looks_further(tmp_path: Path) -> None:
    """A thirtieth of its episodes: the solver has hardly begun, the proposer has."""
    result = self_play(tmp_path, "runtime.num_episode=10", "runtime.save_episode_interval=5")
    assert set(result) == set(json.loads((SELF_PLAY / "expected.json").read_text())["seeds"]["0"])
    assert result["episodes"] == 10
    assert result["distinct_after"] > result["distinct_before"] + 0.05
    run = tmp_path / "runs" / "self_play"
    for episode in ("episode-000005", "episode-000010"):
        for name in ("proposer_trainer", "solver_trainer"):
            saved = run / "checkpoints" / episode / "modules" / name
            assert {file.name for file in saved.iterdir()} >= {"weights.safetensors", "training.pt"}
    picture = subprocess.run(
        [sys.executable, str(SELF_PLAY / "picture.py"), str(run), "picture.svg"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert picture.returncode == 0, picture.stderr
    drawn = (tmp_path / "picture.svg").read_text()
    assert drawn.count("<polyline") == 3  # one panel per measure, in which nothing hides another
    assert "<title>Self-play" in drawn
    ticks = re.findall(r'y="([0-9.]+)"[^>]*>(?:0|5|10|episode)</text>', drawn)
    assert len(set(ticks)) == 2  # the axis's name stands on a line of its own


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_players_improve_and_the_solver_learns_from_the_proposer(
    tmp_path: Path, seed: int
) -> None:
    bounds = json.loads((SELF_PLAY / "expected.json").read_text())["bounds"]
    result = self_play(tmp_path, f"runtime.seed={seed}")
    for name, bound in bounds["self_play"].items():
        assert bound["least"] <= result[name] <= bound["most"], (name, result)
    control = self_play(tmp_path, "--frozen-proposer", f"runtime.seed={seed}")
    for name, bound in bounds["frozen_proposer"].items():
        assert bound["least"] <= control[name] <= bound["most"], (name, control)


class Weighted(BaseModule):
    """Holds one number under `key` and remembers which it sampled with; a train step adds 1."""

    def __init__(self, name: str, key: str = "w", start: float = 0.0) -> None:
        super().__init__(name)
        self.weights, self.key, self.seen = {key: torch.tensor([start])}, key, []

    def state_dict(self) -> Any:
        return self.weights

    def load_state_dict(self, state: Any) -> None:
        for name, value in state.items():
            self.weights[name] = value.clone()

    def forward_step(self, data: Batch) -> Batch:
        self.seen.append({name: float(value) for name, value in self.weights.items()})
        return data

    def train_step(self, data_list: list[Batch]) -> None:
        self.weights[self.key] = self.weights[self.key] + 1


class Plain(Weighted):
    """The same, loaded as every module is."""

    load_state_dict = BaseModule.load_state_dict


def test_a_chain_of_syncs_reaches_its_end_at_once_however_it_is_declared() -> None:
    first, middle, last = Weighted("first"), Weighted("middle"), Weighted("last")

    def flow(batch: Any) -> Any:
        return last.forward_step(middle.forward_step(batch))

    chatlearn.init({"runtime": {"num_episode": 3}})
    engine = Engine(Environment(flow), Trainer(lambda batch: first.train_step(batch)))
    engine.set_parameter_sync(middle, last).set_parameter_sync(first, middle).set_dataset(["p"])
    engine.learn()
    assert last.seen == middle.seen == [{"w": 0.0}, {"w": 1.0}, {"w": 2.0}]


def test_several_sources_may_each_have_a_place_in_one_module() -> None:
    actor, critic, both = Weighted("actor", "a"), Weighted("critic", "c", 10.0), Weighted("both")

    def learn(batch: Any) -> None:
        actor.train_step(batch)
        critic.train_step(batch)

    chatlearn.init({"runtime": {"num_episode": 2}})
    engine = Engine(Environment(lambda batch: both.forward_step(batch)), Trainer(learn))
    engine.set_parameter_sync(actor, both).set_parameter_sync(critic, both).set_dataset(["p"])
    engine.learn()
    assert both.seen == [{"w": 0.0, "a": 0.0, "c": 10.0}, {"w": 0.0, "a": 1.0, "c": 11.0}]
    plain = Plain("plain")
    engine = Engine(Environment(lambda batch: plain.forward_step(batch)), Trainer(learn))
    engine.set_parameter_sync(actor, plain).set_parameter_sync(critic, plain).set_dataset(["p"])
    with pytest.raises(FlowError, match="2 modules sync into 'plain'"):
        engine.learn()
