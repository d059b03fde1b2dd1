# SPDX-License-Identifier: Apache-2.0
"""Small modules of a user's own, as the contract tests write them: public names only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatlearn import BaseModule, Engine, Environment, Trainer

Batch = dict[str, Any]


class Step(BaseModule):
    """Runs a function as `forward_step`, and remembers the prompts and the iteration of each call."""

    def __init__(self, name: str, function: Callable[[Batch], Batch | None] = lambda d: d) -> None:
        super().__init__(name)
        self.function = function
        self.calls: list[list[Any]] = []
        self.iterations: list[int] = []

    def forward_step(self, data: Batch, iteration: int) -> Batch | None:
        self.calls.append(plain(data.get("prompt", data.get("uid"))))
        self.iterations.append(iteration)
        return self.function(data)

    eval_step = forward_step

    @property
    def prompts(self) -> list[Any]:
        return [prompt for call in self.calls for prompt in call]

    @property
    def sizes(self) -> list[int]:
        return [len(call) for call in self.calls]


class Learner(BaseModule):
    """Remembers what it was trained on: per step the column `prompt` of each micro-batch."""

    def __init__(self, name: str = "learner", column: str = "prompt") -> None:
        super().__init__(name)
        self.column = column
        self.steps: list[list[list[Any]]] = []
        self.iterations: list[int] = []
        self.columns: set[str] = set()

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        self.steps.append([plain(data[self.column]) for data in data_list])
        self.columns = set(data_list[0])
        self.iterations.append(iteration)

    @property
    def trained(self) -> list[list[Any]]:
        """Per step, its samples in order."""
        return [[sample for part in step for sample in part] for step in self.steps]


def plain(column: Any) -> list[Any]:
    return column.tolist() if hasattr(column, "tolist") else list(column)


def generate(flow: Callable[[Any], Any], prompts: Any) -> None:
    """Run an environment flow alone for one episode (or as configured)."""
    Engine(Environment(flow)).set_dataset(prompts).learn()


def train(prompts: Any, learner: Learner | None = None, **modules: Any) -> Learner:
    """Train on what an echoing environment returns."""
    learner = learner or Learner()
    echo = modules.get("echo") or Step("echo")
    env = Environment(lambda batch: echo.forward_step(batch))
    Engine(env, Trainer(lambda batch: learner.train_step(batch))).set_dataset(prompts).learn()
    return learner


LATER_THAN_FORMAT_1 = ("sequence", "digests", "config", "versions", "architectures", "metrics")


def as_format_1(checkpoint: Path, *without: str) -> None:
    """Make a checkpoint one of the first format, which had no digests, and `without` what came later still."""
    path = checkpoint / "checkpoint.json"
    content = json.loads(path.read_text())
    for key in (*LATER_THAN_FORMAT_1, "transcripts", "digest", *without):
        del content[key]
    del content["files"]["metrics.jsonl"]
    (checkpoint / "metrics.jsonl").unlink()
    path.write_text(json.dumps({**content, "format": 1}))
