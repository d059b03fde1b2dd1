# SPDX-License-Identifier: Apache-2.0
"""Every rule of flows and batches that a user can break, broken once: error, cause, place, fix, and when.

`before_anything`: nothing was set up. `before_steps`: set up, but no step had run. What only data can show is refused
`after` the step that broke the rule, before any other. Modules, data, sync and runs: `test_rules_violated_runs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_modules import Batch
from violations import PROMPTS, SEEN, Filter, Recorded, after, before_anything, run, steps

from chatlearn import BaseModule, ControlDependencies, Evaluator
from chatlearn.errors import BatchError, ConfigError, FlowError

HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    SEEN.clear()


# ---- Flows: a symbol stands for a batch that does not exist yet --------------------------------------------


def _keep_going(batch: Any) -> Any:
    try:
        return batch["prompt"]
    except FlowError:
        return Recorded("m").forward_step(batch)


@pytest.mark.parametrize(
    ("use", "verb"),
    [
        (lambda b: 1 if b else 2, "branch on"),
        (lambda b: b == 3, "branch on"),
        (lambda b: "x" in b, "branch on"),
        (lambda b: [sample for sample in b], "iterate over"),  # noqa: C416
        (lambda b: len(b), "iterate over"),
        (lambda b: b["prompt"], "index"),
        (lambda b: b.__setitem__("prompt", 1), "index"),
        (lambda b: {**b}, "unpack"),
        (lambda b: b + 1, "calculate with"),
        (lambda b: float(b), "convert"),
        (lambda b: f"{b:>8}", "format"),
        (lambda b: b(), "call"),
        (lambda b: b.keys_of, "has no attribute 'keys_of'"),
        (_keep_going, "index"),
    ],
)
def test_a_symbol_used_as_if_it_held_data(use, verb):
    before_anything(FlowError, lambda: run(use), verb, "symbolic batch of env_flow", place=HERE)
    module = Recorded("policy")
    if verb != "index":
        flow = lambda batch: use(module.forward_step(batch))  # noqa: E731
        before_anything(
            FlowError, lambda: run(flow), verb, "output of policy.forward_step", place=HERE
        )


LEAKED: list[Any] = []


def leak() -> Any:
    """Return a symbol of a flow of another engine."""
    module = Recorded("elsewhere")

    def flow(batch: Any) -> Any:
        LEAKED.append(module.forward_step(batch))
        return LEAKED[-1]

    run(flow)
    SEEN.clear()
    return LEAKED[-1]


def test_a_leaked_symbol():
    symbol, module = leak(), Recorded("m")
    before_anything(
        FlowError,
        lambda: module.forward_step(symbol),
        "outside of a flow",
        "forward_step",
        place=HERE,
    )
    before_anything(
        FlowError, lambda: module.forward_step(data=symbol), "outside of a flow", place=HERE
    )
    other = lambda batch: module.forward_step(batch, symbol)  # noqa: E731
    before_anything(
        FlowError, lambda: run(other), "elsewhere.forward_step", "another flow", place=HERE
    )
    returns = lambda batch: (module.forward_step(batch), symbol)  # noqa: E731
    before_anything(FlowError, lambda: run(returns), "another flow", place=HERE)


def test_a_symbol_of_the_environment_flow_in_the_trainer_flow():
    kept: list[Any] = []
    policy, learner = Recorded("policy"), Recorded("learner")

    def env_flow(batch):
        kept.append(policy.forward_step(batch))
        return kept[-1]

    before_anything(
        FlowError,
        lambda: run(env_flow, lambda batch: learner.train_step(kept[-1])),
        "another flow",
        place=HERE,
    )


# ---- Flows: what a node is ----------------------------------------------------------------------------------


class Odd(Recorded):
    def no_data(self) -> None: ...

    def two_batches(self, data: Batch, other: Batch) -> None: ...


@pytest.mark.parametrize(
    ("call", "causes"),
    [
        (lambda m, b: m.generatee(b), ["no method 'generatee'"]),
        (lambda m, b: m.no_data(b), ["m.no_data takes no `data`"]),
        (lambda m, b: m.two_batches(b, b), ["nothing fills: other"]),
        (lambda m, b: m.forward_step(b, 3), ["no argument for the plain value 3"]),
        (lambda m, b: m.forward_step(b, temperature=3), ["plain value 3"]),
        (lambda m, b: m.forward_step([b]), ["symbolic values inside a list"]),
        (lambda m, b: m.setup(b), ["`setup`", "hook or service"]),
        (lambda m, b: m.put("key", b), ["`put`", "hook or service"]),
    ],
)
def test_a_call_that_can_be_no_node(call, causes):
    module = Odd("m")
    before_anything(FlowError, lambda: run(lambda batch: call(module, batch)), *causes, place=HERE)


class Untitled(BaseModule):
    def __init__(self) -> None:
        pass

    def forward_step(self, data: Batch) -> Batch:
        return data


class Counted(Recorded):
    def forward_step(self, data: Batch, iteration: int) -> Batch:  # type: ignore[override]
        return data


class Grouped(Recorded):
    batch_by = "groups"  # type: ignore[assignment]


def test_modules_that_cannot_take_part():
    first, second = Recorded("twin"), Recorded("twin")
    twins = lambda batch: second.forward_step(first.forward_step(batch))  # noqa: E731
    before_anything(FlowError, lambda: run(twins), "two modules have the name 'twin'", place=HERE)
    before_anything(
        FlowError,
        lambda: run(lambda b: Untitled().forward_step(b)),
        "Untitled has no name",
        place=HERE,
    )
    counted = Counted("m")
    before_anything(
        FlowError,
        lambda: run(lambda b: counted.forward_step(b, iteration=3)),
        "engine counts iterations",
        place=HERE,
    )
    grouped = Grouped("m")
    before_anything(
        FlowError,
        lambda: run(lambda b: grouped.forward_step(b)),
        "Grouped.batch_by is 'groups'",
        place=HERE,
    )
    for name in ("", 3, None):
        before_anything(ConfigError, lambda n=name: Recorded(n), "non-empty string")


async def _coroutine(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize(
    ("flow", "causes"),
    [
        (3, ["must be a function of one batch, not 3"]),
        (None, ["must be a function of one batch, not None"]),
        (lambda: None, ["does not take exactly one batch"]),
        (lambda a, b: None, ["does not take exactly one batch"]),
        (_coroutine, ["coroutine or generator"]),
        (lambda b: b, ["calls no module"]),
        (lambda b: None, ["calls no module"]),
    ],
)
def test_a_function_that_is_no_flow(flow, causes):
    place = HERE if callable(flow) else "violations.py"  # where the engine was told to learn
    before_anything(FlowError, lambda: run(flow), *causes, place=place)


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (lambda m, b: {"rollout": m.forward_step(b)}, "{'rollout':"),
        (lambda m, b: (m.forward_step(b), 3)[1], "returns 3"),
        (lambda m, b: (m.forward_step(b), None), "returns None"),
        (lambda m, b: (m.forward_step(b), b), "returns its own batch"),
        (lambda m, b: [m.forward_step(b), "x"], "returns 'x'"),
    ],
)
def test_a_flow_that_returns_no_node(returned, what):
    module = Recorded("m")
    flow = lambda batch: returned(module, batch)  # noqa: E731
    before_anything(FlowError, lambda: run(flow), what, "no output of a node", place=HERE)


# ---- Flows: ControlDependencies -------------------------------------------------------------------------------


def controlled(values: Any) -> Callable[[Any], Any]:
    module = Recorded("m")

    def flow(batch: Any) -> Any:
        with ControlDependencies(values):
            return module.forward_step(batch)

    return flow


def test_control_dependencies_on_what_is_no_node_of_this_flow():
    for value in (3, None, Recorded("m"), leak(), [leak(), 3]):
        before_anything(
            FlowError, lambda v=value: run(controlled(v)), "ControlDependencies got", place=HERE
        )


def test_control_dependencies_on_nothing_wait_for_nothing():
    """An empty list is no mistake: a loop that collects what to wait for begins with one."""
    run(controlled([]))
    assert steps() == ["m.step"]


def test_control_dependencies_outside_a_flow():
    def violate() -> None:
        with ControlDependencies([]):
            pass

    before_anything(FlowError, violate, "outside a flow", place=HERE)


def test_nodes_that_wait_for_each_other():
    first, second = Recorded("first"), Recorded("second")

    def flow(batch: Any) -> Any:
        later: list[Any] = []
        with ControlDependencies(later):
            made = first.forward_step(batch)
        later.append(second.forward_step(made))

    before_anything(
        FlowError, lambda: run(flow), "wait for each other", "first.forward_step", place=HERE
    )


# ---- Flows: the number of samples -----------------------------------------------------------------------------


def returns(count: int) -> Callable[[Batch], Batch]:
    return lambda data: {"x": [0] * count}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_step_that_changes_the_number_of_samples(count):
    module, sink = Recorded("m", returns(count)), Recorded("sink")
    cause = f"m.forward_step returned {count} samples for 4"
    for flow in (
        lambda b: module.forward_step(b),
        lambda b: sink.forward_step(module.forward_step(b)),
        lambda b: sink.forward_step(b, module.forward_step(b)),
    ):
        after("m.step", BatchError, lambda f=flow: run(f), cause, place=HERE)
    evaluator = Evaluator(lambda b: module.eval_step(b)).set_dataset(PROMPTS)
    after(
        "m.step",
        BatchError,
        evaluator.eval,
        f"m.eval_step returned {count} samples for 4",
        place=HERE,
    )


@pytest.mark.parametrize(
    ("returned", "cause"),
    [
        (lambda parts: None, "returned a NoneType for 2 micro-batches"),
        (lambda parts: {"x": [0] * 4}, "returned a dict for 2 micro-batches"),
        (lambda parts: [], "returned 0 micro-batches for 2"),
        (lambda parts: parts[:1], "returned 1 micro-batches for 2"),
        (lambda parts: [{"x": [0] * 2}, {"x": [0]}], "1 samples for the 2 of micro-batch 1"),
        (lambda parts: [{"x": [0] * 3}] * 2, "3 samples for the 2 of micro-batch 0"),
        (lambda parts: [{}, {}], "0 samples for the 2 of micro-batch 0"),
        (lambda parts: [3, 4], "must return a dict of columns"),
    ],
)
def test_a_trainer_node_whose_output_does_not_fit_its_taker(returned, cause):
    policy, first, second = Recorded("policy"), Recorded("first", returned), Recorded("second")

    def trainer_flow(batch):
        second.second_step(first.train_step(batch))

    def violate() -> None:
        micro = {"train_micro_batch_size": 2}
        run(lambda b: policy.forward_step(b), trainer_flow, runtime=micro)

    after("first.step", BatchError, violate, cause, place=HERE)


@pytest.mark.parametrize(
    ("returned", "causes"),
    [
        (3, ["must return a dict of columns or nothing, not int"]),
        ([1, 2, 3, 4], ["not list"]),
        ({"x": 3}, ["column 'x' is a int"]),
        ({"x": "abcd"}, ["column 'x' is a str"]),
        ({"x": torch.tensor(1.0)}, ["column 'x' is a Tensor"]),
        ({3: [0] * 4}, ["column names are strings, not 3"]),
        ({"x": [0] * 4, "y": [0] * 3}, ["columns disagree", "'x': 4", "'y': 3"]),
        ({"x": torch.zeros(2, 4), "y": [0] * 4}, ["columns disagree", "'x': 2"]),
    ],
)
def test_an_output_that_is_no_batch(returned, causes):
    module = Recorded("m", lambda data: returned)
    after("m.step", BatchError, lambda: run(lambda b: module.forward_step(b)), *causes, place=HERE)


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_output_where_somebody_takes_it(nothing):
    module, sink, learner = (
        Recorded("m", lambda data: nothing),
        Recorded("sink"),
        Recorded("learner"),
    )
    taken = lambda batch: sink.forward_step(module.forward_step(batch))  # noqa: E731
    after(
        "m.step",
        BatchError,
        lambda: run(taken),
        "m.forward_step returned nothing",
        "sink.forward_step",
        place=HERE,
    )
    violate = lambda: run(lambda b: module.forward_step(b), lambda b: learner.train_step(b))  # noqa: E731
    after("m.step", BatchError, violate, "returned nothing", "what env_flow returns", place=HERE)
    evaluator = Evaluator(lambda b: module.eval_step(b)).set_dataset(PROMPTS)
    after(
        "m.step",
        BatchError,
        evaluator.eval,
        "returned nothing",
        "what eval_flow returns",
        place=HERE,
    )


def test_calls_that_return_different_columns():
    calls: list[int] = []
    module = Recorded("m", lambda d: {"x" if calls.append(1) or len(calls) == 1 else "y": [0] * 2})
    sink = Recorded("sink", generation_batch_size=4)
    flow = lambda batch: sink.forward_step(module.forward_step(batch))  # noqa: E731
    violate = lambda: run(flow, runtime={"generation_batch_size": 2})  # noqa: E731
    after(
        "m.step",
        BatchError,
        violate,
        "columns differ between calls",
        "'x', 'y'",
        place="m.forward_step",
    )


@pytest.mark.parametrize(
    "select",
    [
        lambda uid: None,
        lambda uid: uid.flip(0),
        lambda uid: uid[[0, 0]],
        lambda uid: uid + 100,
        lambda uid: ["x"],
        lambda uid: [None],
    ],
    ids=["without uid", "reordered", "twice", "invented", "text", "nothing"],
)
def test_a_filter_that_does_not_tell_what_it_kept(select):
    def choose(data: Batch) -> Batch:
        kept = select(data["uid"])
        return {"prompt": data["prompt"][:1]} if kept is None else {"uid": kept}

    module = Filter("f", choose)
    violate = lambda: run(lambda b: module.forward_step(b))  # noqa: E731
    after("f.step", BatchError, violate, "f.forward_step must return the `uid` column", place=HERE)


def test_samples_from_both_sides_of_a_filter():
    module, sink = Filter("f"), Recorded("sink")
    joined = lambda batch: sink.forward_step(batch, module.forward_step(batch))  # noqa: E731
    before_anything(
        FlowError, lambda: run(joined), "both sides of a filter", "sink.forward_step", place=HERE
    )
    returned = lambda batch: (module.forward_step(batch), sink.forward_step(batch))  # noqa: E731
    before_anything(
        FlowError, lambda: run(returned), "both sides", "what the flow returns", place=HERE
    )
