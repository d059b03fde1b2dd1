# SPDX-License-Identifier: Apache-2.0
"""How the tests of violated rules look at an error: its class, cause, place and fix, and what had run by then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from contract_modules import Batch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer
from chatlearn.errors import ChatLearnError

SEEN: list[str] = []
"""What ran, in order: `setup` and the steps of every module of a test."""
PROMPTS = list("abcd")


class Recorded(BaseModule):
    """Records its setup and its steps; `function` is what a step does."""

    def __init__(
        self, name: str, function: Callable[..., Any] | None = None, **settings: Any
    ) -> None:
        super().__init__(name, **settings)
        self.function = function

    def setup(self) -> None:
        SEEN.append("setup")

    def forward_step(self, data: Batch) -> Any:
        SEEN.append(f"{self.name}.step")
        return data if self.function is None else self.function(data)

    eval_step = forward_step

    def train_step(self, data_list: list[Batch]) -> Any:
        SEEN.append(f"{self.name}.step")
        return None if self.function is None else self.function(data_list)

    def second_step(self, data_list: list[Batch]) -> None:
        SEEN.append(f"{self.name}.second")


class Filter(Recorded):
    filters_samples = True


def run(
    flow: Any, trainer: Any = None, evaluator: Any = None, *, data: Any = PROMPTS, **init: Any
) -> None:
    chatlearn.init(init)
    engine = Engine(Environment(flow), Trainer(trainer) if trainer else None, evaluator)
    engine.set_dataset(data).learn()


def steps() -> list[str]:
    return [entry for entry in SEEN if entry != "setup"]


def broken(
    error: type[ChatLearnError], violate: Callable[[], Any], *causes: str, place: str = ""
) -> ChatLearnError:
    """Break a rule; check the error's class, cause, place and fix."""
    with pytest.raises(error) as caught:
        violate()
    found = caught.value
    for cause in causes:
        assert cause in found.cause, found.cause
    assert place in found.place, found.place
    assert found.fix, str(found)
    return found


def before_anything(
    error: type[ChatLearnError], violate: Callable[[], Any], *causes: str, place: str = ""
) -> None:
    broken(error, violate, *causes, place=place)
    assert SEEN == [], "refused before anything was set up"


def before_steps(
    error: type[ChatLearnError], violate: Callable[[], Any], *causes: str, place: str = ""
) -> None:
    broken(error, violate, *causes, place=place)
    assert "setup" in SEEN
    assert steps() == [], "refused before the first step"


def after(
    step: str,
    error: type[ChatLearnError],
    violate: Callable[[], Any],
    *causes: str,
    place: str = "",
) -> None:
    broken(error, violate, *causes, place=place)
    assert steps()[-1] == step, "nothing ran after the step that broke the rule"
