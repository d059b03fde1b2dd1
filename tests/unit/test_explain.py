# SPDX-License-Identifier: Apache-2.0
"""What `explain` says is what a run then does."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer, cli
from chatlearn.explain import describe_program, explain
from chatlearn.program import Program


class Recording(BaseModule):
    """Notes the size of every call, by node."""

    calls: defaultdict[str, list[int]]

    def setup(self) -> None:
        self.model = torch.nn.Linear(1, 1)

    def forward_step(self, data: Any) -> Any:
        self._note("forward_step", len(data["prompt"]))
        return data

    def eval_step(self, data: Any) -> Any:
        self._note("eval_step", len(data["prompt"]))
        return data

    def train_step(self, data_list: list[Any]) -> None:
        self._note("train_step", [len(data["prompt"]) for data in data_list])

    def save_checkpoint(self, iteration: int) -> None:
        self._note("save_checkpoint", iteration)

    def _note(self, method: str, what: Any) -> None:
        LOG[f"{self.name}.{method}"].append(what)


class Grouped(Recording):
    batch_by = "group"


class Whole(Recording):
    batch_by = "episode"


class Half(Recording):
    filters_samples = True

    def forward_step(self, data: Any) -> Any:
        super().forward_step(data)
        keep = range(0, len(data["prompt"]), 2)
        return {name: [column[i] for i in keep] for name, column in data.items()}


class Policy(Recording):
    def forward_step(self, data: Any) -> Any:
        PROMPTS.append(list(data["prompt"]))
        return super().forward_step(data)

    def before_episode(self) -> None:
        PROMPTS.clear()

    def after_episode(self) -> None:
        if self.replica_id == 0:
            EPISODES.append(Counter(p[0] for prompts in PROMPTS for p in prompts))


LOG: defaultdict[str, list[Any]] = defaultdict(list)
PROMPTS: list[list[str]] = []
EPISODES: list[Counter[str]] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    LOG.clear()
    PROMPTS.clear()
    EPISODES.clear()


def made(*, filters: bool = False) -> tuple[Engine, list[BaseModule]]:
    policy, reward = Policy("policy"), Recording("reward")
    advantage, whiten, learner = Grouped("advantage"), Whole("whiten"), Recording("learner")
    half = Half("half")

    def env_flow(batch: Any) -> Any:
        scored = reward.forward_step(policy.forward_step(batch))
        if filters:
            scored = half.forward_step(scored)
        return whiten.forward_step(advantage.forward_step(scored))

    evaluator = Evaluator(lambda batch: reward.eval_step(policy.eval_step(batch)))
    evaluator.set_multiple_datasets([["e"] * 7, ["f"] * 3])
    trainer = Trainer(lambda batch: learner.train_step(batch))
    engine = Engine(Environment(env_flow), trainer, evaluator)
    engine.set_multiple_datasets([["a"] * 5, ["b"] * 3]).set_parameter_sync(learner, policy)
    return engine, [policy, learner]


def rows_of(program: Program) -> dict[str, str]:
    assert program.problems == []
    return {label: text for section in explain(program) for label, text in section.rows}


def number(pattern: str, text: str) -> int:
    found = re.search(pattern.replace("N", r"(\d+)"), text)
    assert found, f"{pattern!r} is not in {text!r}"
    return int(found[1])


def times(text: str) -> int:
    word = text.rsplit(": ", 1)[1]
    return {"never": 0, "once": 1}[word] if word in ("never", "once") else number("^N times", word)


RUNTIMES: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven": {
        "num_episode": 3,
        "sample_per_episode": 18,
        "num_inference_per_prompt": 3,
        "generation_batch_size": 4,
        "train_global_batch_size": 5,
        "train_micro_batch_size": 2,
        "num_training_epoch": 2,
        "data_ratio": [1, 3],
        "save_episode_interval": 2,
        "eval_episode_interval": 2,
        "enable_eval_before_training": True,
        "eval_num_inference_per_prompt": 2,
    },
    "dynamic, dropping": {
        "num_episode": 4,
        "sample_per_episode": 22,
        "num_inference_per_prompt": 2,
        "generation_batch_size": 6,
        "train_global_batch_size": 8,
        "train_micro_batch_size": 8,
        "stream_data_loader_type": "dynamic",
        "incomplete_step": "drop_last",
        "save_episode_interval": 2,
        "data_shuffle": True,
    },
    "keeping, an update larger than the episode": {
        "num_episode": 2,
        "train_global_batch_size": 64,
        "incomplete_step": "keep",
        "eval_episode_interval": 5,
    },
    "filling, an update larger than the episode": {
        "num_episode": 2,
        "train_global_batch_size": 30,
        "train_micro_batch_size": 4,
        "generation_batch_size": 1,
    },
    "replay": {
        "num_episode": 5,
        "sample_per_episode": 6,
        "train_global_batch_size": 4,
        "max_replay_episode": 2,
        "replay_episode_offset": 1,
    },
}


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("case", RUNTIMES)
def test_a_run_does_what_was_explained(case: str, replicas: int) -> None:
    runtime = RUNTIMES[case]
    models = {
        "policy": {"num_replica": replicas, "sync_frequency": 2},
        "reward": {"generation_batch_size": 5},
    }
    config = chatlearn.init({"runtime": runtime, "models": models}).runtime
    engine, (policy, _) = made()
    program = engine.check()
    rows, plan = rows_of(program), program.run_plan()
    result = engine.learn()

    assert result.train_iteration == plan.updates
    for node in ("policy", "reward", "advantage", "whiten"):
        sizes = LOG[f"{node}.forward_step"]
        said = rows[f"{node}.forward_step"]
        assert number("N call", said) * config.num_episode == len(sizes)
        assert number("of N sample", said) == max(sizes)
        assert sum(sizes) == plan.samples
        if "the last of" in said:
            assert number("the last of N", said) in sizes
        assert ("shared by 3 replicas" in said) == (node == "policy" and replicas == 3)
    group, said = plan.episode.group_size, rows["advantage.forward_step"]
    assert ("whole group" in said) == (group > 1)
    assert group == 1 or f" of {group})" in said
    updates = LOG["learner.train_step"]
    assert len(updates) == plan.updates
    if not config.max_replay_episode:
        per_pass = plan.episode.training.step_sizes()
        expected = per_pass * config.num_training_epoch * config.num_episode
        assert [sum(update) for update in updates] == expected
        assert number("^N call", rows["learner.train_step"]) * config.num_episode == len(updates)
        assert number("of N sample", rows["learner.train_step"]) == max(map(sum, updates))
        assert number(r"\(N micro-batch", rows["learner.train_step"]) == max(map(len, updates))

    evaluations = times(rows["when"])
    assert len(result.evaluations) == evaluations
    assert sum(LOG["policy.eval_step"]) == evaluations * 10 * config.eval_num_inference_per_prompt
    for node in ("policy", "reward"):
        calls = LOG[f"{node}.eval_step"]
        assert len(calls) == evaluations * number("N call", rows[f"{node}.eval_step"])
        if calls:
            assert max(calls) == number("N sample", rows[f"{node}.eval_step"])
    assert policy.policy_version == times(rows["sync learner -> policy"])
    saved = rows["checkpoint"]
    expected = times(saved) if config.save_episode_interval else 1
    assert len(LOG["learner.save_checkpoint"]) == expected

    for dataset, letter, size in (("dataset_0", "a", 5), ("dataset_1", "b", 3)):
        taken = [counts[letter] // group for counts in EPISODES]
        said = re.match(
            r"(\d+)(?: to (\d+))? of \d+ prompts? of an episode, (\d+) of", rows[dataset]
        )
        assert said, rows[dataset]
        assert (min(taken), max(taken)) == (int(said[1]), int(said[2] or said[1]))
        assert sum(taken) == int(said[3])
        assert ("repeats within an episode" in rows[dataset]) == (max(taken) > size)


def test_filters_make_it_at_most() -> None:
    chatlearn.init({"runtime": {"generation_batch_size": 3, "train_global_batch_size": 2}})
    engine, _ = made(filters=True)
    program = engine.check()
    rows = rows_of(program)
    result = engine.learn()
    assert len(LOG["half.forward_step"]) == number("^N calls", rows["half.forward_step"])
    assert number("^at most N call", rows["advantage.forward_step"]) > len(
        LOG["advantage.forward_step"]
    )
    assert number("^at most N call", rows["learner.train_step"]) > result.train_iteration > 0
    assert "half.forward_step may keep fewer samples; then there are fewer updates" in (
        describe_program(program, 120)
    )


def newest(buffers: Any) -> Any:
    return buffers[-1].samples[:2]


def test_replay_is_explained() -> None:
    chatlearn.init(
        {
            "runtime": {
                "num_episode": 5,
                "sample_per_episode": 6,
                "train_global_batch_size": 4,
                "max_replay_episode": 2,
                "replay_episode_offset": 1,
            }
        }
    )
    engine, _ = made()
    program = engine.check()
    assert rows_of(program)["replay"] == (
        "all samples of the last 2 episodes, from episode 2 on: 2 to 3 updates"
    )
    engine.set_replay_sampler(newest)
    program = engine.check()
    said = rows_of(program)["replay"]
    assert said.startswith("newest (")
    assert said.endswith(
        ") chooses from the last 2 episodes, from episode 2 on; it decides how many updates that makes"
    )
    assert describe_program(program, 120)[:2] == [
        "1 episode = 6 samples",
        "1 run = 5 episodes = 30 samples",
    ]


def test_without_a_trainer_nothing_is_said_of_updates() -> None:
    policy = Policy("policy")
    engine = Engine(Environment(lambda batch: policy.forward_step(batch))).set_dataset(["a"] * 4)
    lines = describe_program(engine.check(), 100)
    assert lines[0] == "1 episode = 4 samples"
    assert (
        "  dataset              4 prompts of an episode, 4 of the run = 1 pass over its 4 rows"
        in lines
    )
    assert not any("update" in line or "trainer" in line for line in lines)


def test_an_evaluator_alone_is_explained() -> None:
    chatlearn.init({"runtime": {"eval_num_inference_per_prompt": 4, "generation_batch_size": 16}})
    policy = Policy("policy")
    evaluator = Evaluator(lambda batch: policy.eval_step(batch)).set_dataset(["e"] * 10)
    assert describe_program(evaluator.check(), 100) == [
        "eval_flow, per evaluation",
        "  samples           10 prompts x 4 = 40 samples",
        "  measured          avg@4, pass@1, pass@2, pass@4; a reward from 1 on passes",
        "  policy.eval_step  3 calls of 16 samples, the last of 8",
    ]


def test_a_module_that_builds_its_datasets_may_change_their_sizes() -> None:
    class Own(Policy):
        def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
            return [{"prompt": p} for p in prompts] * 2

    policy = Own("policy")
    engine = Engine(Environment(lambda batch: policy.forward_step(batch))).set_dataset(["a"])
    assert "if their sizes differ" in rows_of(engine.check())["policy.build_dataset"]


def test_the_page_on_episodes_shows_what_explain_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/episodes.md").read_text()
    for language, name in (("yaml", "recipe.yaml"), ("python", "train.py")):
        [block] = re.findall(rf"```{language}\n(# {name}\n.*?)```", page, re.DOTALL)
        Path(name).write_text(block)
    [shown] = re.findall(r"\$ chatlearn explain recipe.yaml\n(.*?)\n```", page, re.DOTALL)
    monkeypatch.setattr(cli, "_console", lambda: Console(width=100))
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", "recipe.yaml"])
    assert ended.value.code == 0
    printed, values = capsys.readouterr().out.split("\n\nkey ")
    assert printed == shown
    assert "recipe.yaml:5" in values


@pytest.mark.parametrize("width", [40, 80, 160])
def test_lines_keep_to_the_width(width: int) -> None:
    chatlearn.init({"runtime": RUNTIMES["uneven"]})
    lines = describe_program(made()[0].check(), width)
    assert all(len(line) <= width for line in lines)
    assert not any(line.endswith(" ") for line in lines)
