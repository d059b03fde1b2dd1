# SPDX-License-Identifier: Apache-2.0
"""What the flow checker calls an error fails when it is run, and what fails for a missing column it had called one.

The flows are random, of modules that do exactly what they declare. Their twins declare nothing, so that the engine
runs them without a word from the checker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.errors import ModuleError
from chatlearn.flow.declaration import Declaration
from chatlearn.program import Program

DATASET = [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
NAMES = "abcdef"


@dataclass(frozen=True)
class Plan:
    """One module and its only call: which nodes it takes (-1 is the batch), and what it does with columns."""

    inputs: tuple[int, ...]
    reads: frozenset[str]
    writes: frozenset[str]
    passes_on: bool
    namespace: str | None = None


class Twin(BaseModule):
    """Does what its plan says and declares nothing, but for what a namespace asks."""

    writes = frozenset(NAMES)

    def __init__(self, name: str, plan: Plan) -> None:
        super().__init__(name, namespace=plan.namespace)
        self.plan = plan

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return self.step(data)

    def train_step(self, data_list: list[dict[str, Any]]) -> None:
        for data in data_list:
            self.step(data)

    def step(self, data: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(self.plan.reads):
            data[name]
        kept = data if self.plan.passes_on else {"uid": data["uid"]}
        return {**kept, **dict.fromkeys(self.plan.writes, ["x"] * len(data["uid"]))}


class Declared(Twin):
    """The same, declared; `says` is what it says about passing columns on."""

    says: bool | None = True

    def describe_columns(self, method: str) -> Declaration:
        plan = self.plan
        passes_on = plan.passes_on if type(self).says else None
        writes = plan.writes if plan.passes_on or not type(self).says else plan.writes | {"uid"}
        return Declaration.of(reads=plan.reads, writes=writes, passes_on=passes_on)


class Reserved(Declared):
    """Declared, but for whether it passes columns on."""

    says = None


def names(least: int = 0) -> Any:
    return st.frozensets(st.sampled_from(NAMES), min_size=least, max_size=3)


@st.composite
def flows(draw: Any, namespaces: bool = True) -> list[Plan]:
    """Draw a flow of up to six nodes; each takes the batch, or one or two of those before it."""
    plans: list[Plan] = []
    for index in range(draw(st.integers(1, 6))):
        sources = st.integers(-1, index - 1)
        inputs = tuple(draw(st.lists(sources, min_size=1, max_size=2, unique=True)))
        space = draw(st.sampled_from([None, None, "x", "y"])) if namespaces else None
        plans.append(Plan(inputs, draw(names()), draw(names(1)), draw(st.booleans()), space))
    return plans


def flow_of(kind: type[Twin], plans: list[Plan], prefix: str = "m") -> Any:
    modules = [kind(f"{prefix}{index}", plan) for index, plan in enumerate(plans)]

    def flow(batch: Any) -> Any:
        given = [batch]
        for module in modules:
            given.append(module.forward_step(*(given[index + 1] for index in module.plan.inputs)))
        return given[-1]

    return flow


def evaluator(kind: type[Twin], plans: list[Plan]) -> Evaluator:
    return Evaluator(flow_of(kind, plans)).set_dataset(DATASET)


def reported(program: Program) -> dict[str, set[str]]:
    """Return the columns that each module is said to miss."""
    found: dict[str, set[str]] = {}
    for problem in program.problems:
        match = re.match(r"(\w+)\.\w+ reads (.*), which (its input|env_flow)", problem.cause)
        assert match, problem
        found.setdefault(match[1], set()).update(re.findall(r"'(\w+)'", match[2]))
    return found


def first_failure(run: Any) -> tuple[str, str] | None:
    """Run; return the module that failed for want of a column, and the column."""
    try:
        run()
    except ModuleError as error:
        failure, cause = str(error), error.__cause__
    else:
        return None
    assert isinstance(cause, KeyError), failure
    module = re.search(r"module: (\w+)", failure)
    assert module is not None
    return module[1], cause.args[0]


@settings(max_examples=150, deadline=None)
@given(plans=flows())
def test_it_says_error_exactly_where_a_run_fails(plans: list[Plan]) -> None:
    chatlearn.init()
    found = reported(evaluator(Declared, plans).check())
    failure = first_failure(evaluator(Twin, plans).eval)
    assert (failure is None) == (not found)
    if failure is not None:
        assert failure[1] in found[failure[0]]


@settings(max_examples=100, deadline=None)
@given(plans=flows())
def test_where_less_is_declared_an_error_is_still_certain(plans: list[Plan]) -> None:
    chatlearn.init()
    if reported(evaluator(Reserved, plans).check()):
        assert first_failure(evaluator(Twin, plans).eval) is not None


@settings(max_examples=100, deadline=None)
@given(plans=flows(), cut=st.data())
def test_an_undeclared_step_ends_what_is_certain(plans: list[Plan], cut: Any) -> None:
    """Whatever one of the modules does not declare, what is still called an error is one."""
    chatlearn.init()
    unknown = cut.draw(st.integers(0, len(plans) - 1))
    plans[unknown] = replace(plans[unknown], namespace=None)
    modules = [
        (Twin if index == unknown else Declared)(f"m{index}", plan)
        for index, plan in enumerate(plans)
    ]
    modules[unknown].__class__ = type("Silent", (Twin,), {"writes": None})

    def flow(batch: Any) -> Any:
        given = [batch]
        for module in modules:
            given.append(module.forward_step(*(given[index + 1] for index in module.plan.inputs)))
        return given[-1]

    if reported(Evaluator(flow).set_dataset(DATASET).check()):
        assert first_failure(evaluator(Twin, plans).eval) is not None


@settings(max_examples=150, deadline=None)
@given(plans=flows(namespaces=False), cut=st.data())
def test_removing_a_needed_edge_gives_exactly_the_expected_errors(
    plans: list[Plan], cut: Any
) -> None:
    """A correct flow has none; with one node's inputs replaced by the batch, its own wants are named."""
    chatlearn.init()
    there: list[set[str]] = []
    correct: list[Plan] = []
    for plan in plans:
        around = set().union(*({"a", "b"} if i < 0 else there[i] for i in plan.inputs))
        correct.append(Plan(plan.inputs, plan.reads & around, plan.writes, passes_on=True))
        there.append(around | plan.writes)
    assert reported(evaluator(Declared, correct).check()) == {}

    index = cut.draw(st.integers(0, len(plans) - 1))
    broken = list(correct)
    broken[index] = Plan((-1,), correct[index].reads, correct[index].writes, passes_on=True)
    wanting: dict[str, set[str]] = {}
    there = []
    for number, plan in enumerate(broken):
        around = set().union(*({"a", "b"} if i < 0 else there[i] for i in plan.inputs))
        if missing := plan.reads - around:
            wanting[f"m{number}"] = missing
        there.append(around | plan.writes)
    assert reported(evaluator(Declared, broken).check()) == wanting


def engine(kind: type[Twin], plans: list[Plan], learner: Plan) -> Engine:
    trainer = kind("learner", learner)
    flow = Trainer(lambda batch: trainer.train_step(batch))
    return Engine(Environment(flow_of(kind, plans)), flow).set_dataset(DATASET)


@settings(max_examples=40, deadline=None)
@given(plans=flows(), reads=names(1), space=st.sampled_from([None, "x"]))
def test_a_trainer_gets_what_the_environment_returns(
    plans: list[Plan], reads: frozenset[str], space: str | None, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("run")
    chatlearn.init({"runtime": {"output_dir": folder / "run", "trackers": []}})
    learner = Plan((-1,), reads, frozenset(), passes_on=True, namespace=space)
    found = reported(engine(Declared, plans, learner).check())
    failure = first_failure(engine(Twin, plans, learner).learn)
    assert (failure is None) == (not found)
    if failure is not None:
        assert failure[1] in found[failure[0]]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
