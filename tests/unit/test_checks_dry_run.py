# SPDX-License-Identifier: Apache-2.0
"""Steps that declare nothing are learned from by calling copies of their modules on made-up samples."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer, declares
from chatlearn.checks.dry_run import DryRun, Watched, try_steps
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
CALLS: list[str] = []


@pytest.fixture(autouse=True)
def no_calls_yet() -> None:
    CALLS.clear()


class Does(BaseModule):
    """Does what its function does, and remembers that it did."""

    def __init__(self, name: str, function: Callable[[Any], Any], **settings: Any) -> None:
        super().__init__(name, **settings)
        self.function = function
        self.count = 0

    def forward_step(self, data: Any, iteration: int) -> Any:
        self.count += 1
        CALLS.append(f"{self.name} {iteration}")
        return self.function(data)

    eval_step = forward_step

    def train_step(self, data_list: Any) -> Any:
        CALLS.append(f"{self.name} {len(data_list)}")
        return [self.function(data) for data in data_list]


class Sets(Does):
    def setup(self) -> None:
        raise AssertionError("set up")


class Spaced(Does):
    writes = frozenset({"made"})


class Waits(BaseModule):
    async def forward_step(self, data: Any) -> Any:
        data["waited"] = [1.0] * len(data["uid"])
        return data


class Locked(Does):
    def __init__(self, name: str, function: Any) -> None:
        super().__init__(name, function)
        self.lock = threading.Lock()


class Keeps(Does):
    filters_samples = True


def evaluator(*modules: BaseModule, rows: Any = ROWS) -> Evaluator:
    def eval_flow(batch: Any) -> Any:
        for module in modules:
            batch = module.forward_step(batch)  # type: ignore[attr-defined]
        return batch

    return Evaluator(eval_flow).set_dataset(rows)


def learned(*modules: BaseModule, rows: Any = ROWS, **more: Any) -> DryRun:
    return try_steps(evaluator(*modules, rows=rows).check(), **more)


def add(**columns: Any) -> Callable[[Any], Any]:
    return lambda data: {**data, **columns}


def pop(data: Any) -> Any:
    data.pop("answer")
    data["prompt"] = [prompt.upper() for prompt in data["prompt"]]
    return data


def take(data: Any) -> Any:
    return {"length": [len(prompt) for prompt in data["prompt"]]}


def look(data: Any) -> Any:
    if "answer" in data and data.get("hint") is None:
        return data
    raise AssertionError


Known = tuple[Callable[[Any], Any], set[str], set[str], bool | None, set[str], bool]
LEARNED: dict[str, Known] = {
    "adds": (add(made=["a", "b"]), set(), {"made"}, True, set(), True),
    "pops and replaces": (pop, {"answer", "prompt"}, {"prompt"}, True, {"answer"}, False),
    "takes only": (take, {"prompt"}, {"length"}, False, set(), False),
    "looks": (look, {"answer", "hint"}, set(), True, set(), False),
    "copies": (lambda d: d.copy() | {"made": [1, 2]}, set(), {"made"}, True, set(), True),
    "gives nothing": (lambda data: None, set(), set(), False, set(), False),
    "chooses": (
        lambda data: {k: data[k] for k in data if k == "none"},
        set(),
        set(),
        None,
        set(),
        True,
    ),
    "keeps some": (
        lambda data: {k: v for k, v in data.items() if k != "answer"},
        set(),
        set(),
        True,
        {"answer"},
        True,
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_of_a_step(name: str) -> None:
    function, read, writes, passes_on, drops, walks = LEARNED[name]
    module = Does("does", function)
    found = learned(module)
    (said,) = found.learned.values()
    assert set(said.optional) >= read
    assert set(said.writes or ()) == writes
    assert (said.passes_on, set(said.drops), said.reads_all) == (passes_on, drops, walks)
    assert found.notes == ["tried in a dry run: does.forward_step"]
    assert (CALLS, module.count) == (["does 0"], 0), "a copy was called, once"


def test_kinds_are_those_of_what_was_made() -> None:
    def make(data: Any) -> Any:
        data["score"] = torch.tensor([0.5, 1.0])
        data["ids"] = [torch.tensor([1, 2]), torch.tensor([1, 2, 3])]
        return data

    (said,) = learned(Does("does", make)).learned.values()
    assert said.writes == {"score": {"number"}, "ids": {"tokens"}}


def test_it_sees_the_first_rows_and_what_declared_steps_would_make() -> None:
    seen: dict[str, Any] = {}

    def see(data: Any) -> Any:
        seen.update(dict.items(data))
        return data

    learned(PolicyInference("policy", model=dict), Does("sees", see))
    assert seen["answer"] == ["2", "4"]
    assert seen["completion"] == ["made up", "made up"]
    assert [ids.dtype for ids in seen["response_ids"]] == [torch.int64] * 2
    assert seen["temperature"].shape == (2,)


def test_a_missing_column_is_an_error_at_the_users_line() -> None:
    module = Does("does", lambda data: {**data, "n": [len(x) for x in data["promt"]]})
    program = evaluator(module).check(dry_run=True)
    (problem,) = program.problems
    assert problem.cause.startswith("does.forward_step reads 'promt' (needed because a dry run")
    assert problem.fix == "did you mean 'prompt'?"
    assert re.match(rf"{re.escape(__file__)}:\d+ in eval_flow", problem.place)
    assert evaluator(module).check().problems == [], "only on demand"


def test_what_follows_a_learned_step_is_certain() -> None:
    dropping = Does("drops", lambda data: {"uid": data["uid"]})
    policy = PolicyInference("policy", model=dict)
    (problem,) = evaluator(dropping, policy).check(dry_run=True).problems
    assert problem.cause.startswith("policy.forward_step reads 'prompt' or 'prompt_ids'")
    assert evaluator(dropping, policy).check().problems == []


def test_it_goes_through_all_flows() -> None:
    chatlearn.init({"runtime": {"num_inference_per_prompt": 2}})
    policy, advantage = PolicyInference("policy", model=dict), GroupAdvantage("advantage")
    length = Does("length", lambda data: {**data, "rewards": [0.0] * len(data["completion"])})
    watches = Does("watches", lambda data: data["advantages"] and None)
    learner = PolicyTrainer("learner", model=dict)

    def env_flow(batch: Any) -> Any:
        return advantage.forward_step(length.forward_step(policy.forward_step(batch)))

    def trainer_flow(batch: Any) -> None:
        learner.train_step(batch)
        watches.train_step(batch)

    evaluation = Evaluator(lambda batch: length.eval_step(batch)).set_dataset(["p"])
    engine = Engine(Environment(env_flow), Trainer(trainer_flow), evaluation).set_dataset(ROWS)
    program = engine.set_parameter_sync(learner, policy).check(dry_run=True)
    (problem,) = program.problems
    assert problem.cause.startswith("length.eval_step reads 'completion'")
    assert CALLS == ["length 0", "watches 1", "length 0"]


def hangs(data: Any) -> Any:
    time.sleep(60)


def raises(data: Any) -> Any:
    raise ValueError("no server")


NOT_LEARNED: dict[str, tuple[Callable[[], BaseModule], str]] = {
    "a setup of its own": (lambda: Sets("m", add()), r"Sets has a setup\(\) of its own"),
    "an exception": (lambda: Does("m", raises), "it raised ValueError: no server"),
    "another KeyError": (lambda: Does("m", lambda data: {}["x"]), "it raised KeyError: 'x'"),
    "a deadline": (
        lambda: Does("m", hangs),
        r"longer than 0.2 s, and was at .*test_checks_dry_run.py:\d+",
    ),
    "no copy": (lambda: Locked("m", add()), "it cannot be copied"),
    "no batch": (lambda: Does("m", lambda data: 3), "must return a dict of columns"),
}


@pytest.mark.parametrize("name", NOT_LEARNED)
def test_what_could_not_be_learned_is_said_and_leaves_everything_open(name: str) -> None:
    make, why = NOT_LEARNED[name]
    found = learned(make(), Does("after", lambda data: data["whatever"]), timeout_s=0.2)
    assert found.learned == {}
    first, second = found.notes
    assert re.search(rf"m.forward_step was not learned from.*{why}", first), first
    assert "after.forward_step" in second
    assert "it asked for 'whatever', which there may be" in second


def test_a_dataset_of_the_users_own_making_is_not_made() -> None:
    class Builds(Does):
        def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
            raise AssertionError("made")

    found = learned(Builds("builds", lambda data: data["prompt"]))
    assert "it asked for 'prompt'" in found.notes[0]


def test_async_steps_filters_and_namespaces() -> None:
    def keep(data: Any) -> Any:
        return {name: column[1:] for name, column in data.items()}

    def spaced(data: Any) -> Any:
        assert len(data["waited"]) == 1
        return {**data, "made": data["prompt"]}

    modules = Waits("waits"), Keeps("keeps", keep), Spaced("spaced", spaced, namespace="solver")
    found = learned(*modules, Does("after", lambda data: {**data, "n": data["solver/made"]}))
    assert len(found.learned) == 4, found.notes
    assert list(found.learned["eval_flow", 2].writes or ()) == ["made"]
    assert evaluator(*modules).check(dry_run=True).problems == []


def test_a_padded_column_and_constants_arrive_as_in_a_run() -> None:
    class Pads(BaseModule):
        def forward_step(self, data: Any, factor: int) -> Any:
            data["sum"] = data["ids"].sum(1) * factor
            return data

    pads = Pads("pads")
    pads.add_padding_config("ids", 0)
    rows = [{"ids": [1, 2]}, {"ids": [1, 2, 3]}]
    flow = Evaluator(lambda batch: pads.forward_step(batch, 3)).set_dataset(rows)
    found = try_steps(flow.check())
    assert list(found.learned["eval_flow", 0].writes or ()) == ["sum"], found.notes


def test_what_a_dry_run_shows_of_a_step_whose_output_nobody_takes() -> None:
    logs, last = Does("logs", lambda data: data), Does("last", add(more=["a", "b"]))

    def eval_flow(batch: Any) -> Any:
        logs.forward_step(batch)
        return last.forward_step(batch)

    def warnings(*, dry_run: bool) -> list[str]:
        program = Evaluator(eval_flow).set_dataset(ROWS).check(dry_run=dry_run)
        assert program.problems == []
        return [warning.cause for warning in program.warnings]

    assert warnings(dry_run=True) == [], "it makes no column, so it is called for what it does"
    assert warnings(dry_run=False) == [
        "nothing takes the output of logs.forward_step, if it has any"
    ]
    logs.function = add(made=["a", "b"])
    said = "nothing takes the output of logs.forward_step, which makes 'made'"
    assert warnings(dry_run=True) == [said]


def test_declared_and_ready_made_steps_are_not_called() -> None:
    class Says(Does):
        @declares(reads=(), writes=(), passes_on=True)
        def forward_step(self, data: Any, iteration: int) -> Any:
            raise AssertionError("called")

    def asked(completions: Any) -> Any:
        raise AssertionError("called")

    modules = PolicyInference("policy", model=dict), FunctionReward("reward", asked)
    found = learned(*modules, Says("says", add()))
    assert (found.learned, found.tried, found.notes) == ({}, [], [])


def test_a_watched_batch_remembers_what_was_asked_of_it() -> None:
    for ask in (list, dict, lambda d: {**d}, lambda d: d | {}, lambda d: d.copy(), len, bool):
        watched = Watched({"a": 1})
        ask(watched)
        assert watched.was_walked == (ask not in (len, bool))
        assert watched.read <= {"a"}
    watched = Watched({"a": 1})
    copied = watched.copy()
    assert copied["a"] == 1
    assert watched.read == {"a"}
    for ask in (lambda d: d["b"], lambda d: d.pop("b"), lambda d: d.copy()["b"]):
        with pytest.raises(KeyError, match="b"):
            ask(watched)
    assert watched.pop("b", 5) == 5
