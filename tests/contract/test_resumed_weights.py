# SPDX-License-Identifier: Apache-2.0
"""Weights that no train step touches: what moves otherwise goes on exactly, what does not move is not saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_modules import Batch
from torch import nn

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer

TIMES = ("time", "seconds", "per_s")


class Sampler(BaseModule):
    def setup(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Linear(1, 1)

    def forward_step(self, data: Batch) -> Batch:
        x = torch.tensor([[float(len(prompt))] for prompt in data["prompt"]])
        with torch.no_grad():
            return {**data, "x": x, "y": (self.model(x) + torch.randn(len(x), 1))[:, 0]}


class NamedAverage(Sampler):
    """Moves halfway to what its source gives; its own names tell its own state."""

    def state_dict(self) -> Any:
        return {f"{name}_average": t for name, t in self.model.state_dict().items()}

    def load_state_dict(self, state: Any) -> None:
        for name, own in self.model.state_dict().items():
            if name in state:
                own.mul_(0.5).add_(state[name], alpha=0.5)
            else:
                own.copy_(state[f"{name}_average"])


class Average(NamedAverage):
    """Moves halfway to what it is given, whoever gives it."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict({name.removesuffix("_average"): t for name, t in state.items()})


class Renamed(NamedAverage):
    """Knows only the names that its source uses."""

    def load_state_dict(self, state: Any) -> None:
        self.model.load_state_dict({name: state[name] for name in ("weight", "bias")})


class Reward(BaseModule):
    """Takes no gradient."""

    def setup(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Linear(1, 1).requires_grad_(False)

    def forward_step(self, data: Batch) -> Batch:
        return {**data, "rewards": -(data["y"] - self.model(data["x"])[:, 0]).abs()}


class RunningMean(Reward):
    def setup(self) -> None:
        self.model = nn.Module()
        self.model.register_buffer("mean", torch.zeros(()))

    def forward_step(self, data: Batch) -> Batch:
        self.model.mean.data = 0.9 * self.model.mean + 0.1 * data["y"].mean()
        return {**data, "rewards": data["y"] - self.model.mean}


class Target(Reward):
    """Moves behind every episode from the second on."""

    def setup(self) -> None:
        super().setup()
        self.episodes = 0

    def after_episode(self) -> None:
        self.episodes += 1
        if self.episodes > 1:
            self.model.weight.data.mul_(0.5).add_(0.3)

    def training_state(self) -> dict[str, Any]:
        return {"episodes": self.episodes}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.episodes = state["episodes"]


class Learner(BaseModule):
    def setup(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1)

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        with torch.no_grad():
            self.model.weight.add_(data_list[0]["rewards"].mean() / 10)
            self.model.bias.add_(float(iteration))
        self.log(loss=float(self.model.weight.detach()))


def learn(folder: Path, episodes: int, sampler: type[Sampler], reward: type[Reward]) -> list[Any]:
    """Learn; return the final weights, and the rows but for times."""
    values = {"output_dir": str(folder), "num_episode": episodes, "sample_per_episode": 4}
    values |= {"save_episode_interval": 1, "resume": "auto"}
    chatlearn.init({"runtime": values})
    policy, judge, learner = sampler("policy"), reward("judge"), Learner("learner")
    engine = Engine(
        Environment(lambda b: judge.forward_step(policy.forward_step(b))),
        Trainer(lambda b: learner.train_step(b)),
    )
    engine.set_parameter_sync(learner, policy).set_dataset(["a", "bb", "ccc"]).learn()
    weights = [
        {name: t.tolist() for name, t in m.model.state_dict().items()} for m in (policy, judge)
    ]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [
        {k: v for k, v in json.loads(line).items() if not any(time in k for time in TIMES)}
        for line in lines
    ]
    return [weights, rows]


def holds(folder: Path, name: str) -> list[bool]:
    weights = f"modules/{name}/weights.safetensors"
    return [(p / weights).is_file() for p in sorted((folder / "checkpoints").glob("episode-*"))]


@pytest.mark.parametrize("reward", [RunningMean, Target])
def test_frozen_weights_that_move_go_on(tmp_path: Path, reward: type[Reward]) -> None:
    whole = learn(tmp_path / "whole", 5, Sampler, reward)
    for episodes in (1, 2, 3, 4, 5):
        parts = learn(tmp_path / "parts", episodes, Sampler, reward)
    assert parts == whole


def test_frozen_weights_are_saved_once_they_have_moved(tmp_path: Path) -> None:
    learn(tmp_path, 2, Sampler, Target)
    learn(tmp_path, 5, Sampler, Target)
    assert holds(tmp_path, "judge") == [False, False, True, True, True]


def test_frozen_weights_that_stay_are_not_saved(tmp_path: Path) -> None:
    learn(tmp_path, 3, Sampler, Reward)
    assert holds(tmp_path, "judge") == [False] * 3
    assert holds(tmp_path, "policy") == [False] * 3  # its sync brings them


@pytest.mark.parametrize("sampler", [Average, NamedAverage])
def test_a_destination_that_averages_is_what_it_was(tmp_path: Path, sampler: type[Sampler]) -> None:
    """The sync of the last episode is not repeated, and the next ones prove what they did."""
    whole = learn(tmp_path / "whole", 5, sampler, Reward)
    for episodes in (1, 2, 5):
        parts = learn(tmp_path / "parts", episodes, sampler, Reward)
    assert parts == whole
    assert holds(tmp_path / "parts", "policy") == [True] * 5


def test_a_destination_that_cannot_take_its_own_state_is_synced_anew(
    tmp_path: Path, capsys: Any
) -> None:
    whole = learn(tmp_path / "whole", 4, Renamed, Reward)
    learn(tmp_path / "parts", 2, Renamed, Reward)
    assert "does not take back" not in capsys.readouterr().out
    assert learn(tmp_path / "parts", 4, Renamed, Reward) == whole
    assert (
        "policy: load_state_dict() does not take back what state_dict() gave"
        in capsys.readouterr().out
    )
