# SPDX-License-Identifier: Apache-2.0
"""A step that leaves out what `@declares` says it writes is named in its first call, and no other step is."""

from __future__ import annotations

from typing import Any

import pytest

import chatlearn
from chatlearn import BaseModule, Engine, Environment, declares
from chatlearn.errors import FlowError


class Step(BaseModule):
    """Returns what it is made with, beside what it got."""

    writes = frozenset({"rewards", "reward", "length"})

    def __init__(self, name: str, made: Any, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.made = made
        self.calls = 0

    @declares(writes={"rewards", "length"}, passes_on=True)
    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        if callable(self.made):
            return self.made(data)
        return {**data, **{name: [1.0] * len(data["uid"]) for name in self.made}}


class Filter(Step):
    filters_samples = True


class Changed(Step):
    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return super().forward_step(data)


class Attributes(BaseModule):
    writes = frozenset({"rewards", "values"})

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "rewards": [1.0] * len(data["uid"])}


def fails_on_the_first(data: dict[str, Any]) -> dict[str, Any]:
    """Make nothing in the calls of one sample that it fails on."""
    if data["prompt"] == ["p"]:
        return {**data, "outcome": ["failed"]}
    return {**data, "rewards": [1.0], "length": [1.0]}


@pytest.fixture(autouse=True)
def one_by_one() -> None:
    chatlearn.init({"runtime": {"generation_batch_size": 1}})


def engine(step: Any) -> Engine:
    def env_flow(batch: Any) -> Any:
        return step.forward_step(batch)  # the call

    return Engine(Environment(env_flow)).set_dataset(["p", "q"])


@pytest.mark.parametrize("on_failure", ["stop", "retry"])
@pytest.mark.parametrize("namespace", [None, "solver"])
def test_a_column_that_is_declared_and_not_returned(on_failure: str, namespace: str | None) -> None:
    settings = {} if namespace is None else {"namespace": namespace}
    step = Step("step", ["reward", "length"], on_failure=on_failure, **settings)
    with pytest.raises(FlowError) as caught:
        engine(step).learn()
    assert "step.forward_step declares that it writes 'rewards', but" in caught.value.cause
    assert "'reward'" in caught.value.cause
    assert caught.value.place.startswith(f"{__file__}:{engine.__code__.co_firstlineno + 2} ")
    assert caught.value.fix.startswith("did you mean 'reward'? return 'rewards' from every call")
    assert step.calls == 1  # nothing is tried again


def test_a_column_that_nothing_resembles() -> None:
    with pytest.raises(FlowError, match="writes 'length'") as caught:
        engine(Step("step", ["rewards"])).learn()
    assert caught.value.fix.startswith("return 'length'")


FINE = {
    "all of them": Step("step", ["rewards", "length"]),
    "a part": Step("step", ["rewards/score", "length"]),
    "nothing": Filter("step", lambda data: {"uid": data["uid"][:0]}),
    "nothing but failures": Step("step", fails_on_the_first, on_failure="mask"),
    "a subclass that overrides the step": Changed("step", []),
    "attributes, which speak of all steps": Attributes("step"),
}


@pytest.mark.parametrize("name", FINE)
def test_what_breaks_no_promise(name: str) -> None:
    engine(FINE[name]).learn()
