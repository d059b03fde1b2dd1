# SPDX-License-Identifier: Apache-2.0
"""What steps declare of their columns, and how far a declaration reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import chatlearn
from chatlearn import BaseModule, ModuleError, declares
from chatlearn.columns import COLUMNS, KINDS, MAKERS, kinds_of
from chatlearn.errors import FlowError
from chatlearn.flow.declaration import ANYTHING, Declaration, Need, declaration_of
from chatlearn.models import FunctionReward, PolicyReference, PolicyTrainer

NUMBER = frozenset({"number"})
UNKNOWN = Declaration()


class Judge(BaseModule):
    """Declares one method, and leaves the other to the class attributes."""

    reads = frozenset({"prompt"})
    writes = {"verdict": "text"}  # noqa: RUF012

    @declares(reads={"completion": "text"}, writes={"rewards": "number"}, passes_on=True, cost="x")
    def forward_step(self, data: Any) -> Any:
        return self._scored(data)

    def eval_step(self, data: Any) -> Any:
        return self._scored(data)

    @staticmethod
    @declares(reads={"uid": "any"})
    def static_step(data: Any) -> Any:
        return data

    def _scored(self, data: Any) -> Any:
        return data


def needed(said: Declaration) -> list[str]:
    return [name for need in said.needs or () for name in need.columns]


def test_a_method_goes_before_its_class() -> None:
    said = declaration_of(Judge("judge"), "forward_step")
    assert said.needs == (Need({"completion": frozenset({"text"})}),)
    assert said.writes == {"rewards": NUMBER}
    assert (said.passes_on, said.cost, said.is_of_method) == (True, "x", True)
    of_class = declaration_of(Judge("judge"), "eval_step")
    assert (needed(of_class), of_class.is_of_method) == (["prompt"], False)
    assert of_class.writes == {"verdict": frozenset({"text"})}
    static = declaration_of(Judge("judge"), "static_step")
    assert static.needs == (Need({"uid": ANYTHING}),)
    assert static.writes is None


class Setup(Judge):
    """Overrides hooks and adds helpers: that says nothing about columns."""

    batch_by = "group"

    def __init__(self, name: str) -> None:
        super().__init__(name)

    def setup(self) -> None: ...

    def log(self, *_: Any, **__: Any) -> None: ...

    def further(self) -> None: ...


class Overrides(Judge):
    def forward_step(self, data: Any) -> Any:
        return {**super().forward_step(data), "more": data["uid"]}


class Helper(Judge):
    def _scored(self, data: Any) -> Any:
        return {**data, "more": data["uid"]}


class Adds(Judge):
    def further_step(self, data: Any) -> Any:
        return {**data, "more": data["uid"]}


class Again(Overrides):
    writes = frozenset({"rewards", "more"})


class Mixin:
    def _scored(self, data: Any) -> Any:
        return data


class Mixed(Mixin, Judge):
    pass


@pytest.mark.parametrize(
    ("kind", "method", "reads", "writes"),
    [
        (Setup, "forward_step", ["completion"], ["rewards"]),
        (Overrides, "forward_step", None, None),
        (Overrides, "eval_step", None, None),
        (Helper, "forward_step", None, None),
        (Helper, "eval_step", None, None),
        (Adds, "further_step", None, None),
        (Adds, "forward_step", ["completion"], ["rewards"]),
        (Again, "forward_step", None, ["more", "rewards"]),
        (Mixed, "forward_step", None, None),
        (BaseModule, "forward_step", None, None),
    ],
)
def test_a_declaration_is_not_stretched_over_code_that_overrides_it(
    kind: type[BaseModule], method: str, reads: list[str] | None, writes: list[str] | None
) -> None:
    said = declaration_of(kind("judge"), method)
    assert (None if said.needs is None else needed(said)) == reads
    assert (None if said.writes is None else list(said.writes)) == writes


def test_a_function_put_on_the_module_ends_what_was_declared() -> None:
    replaced, helped, unrelated = Judge("a"), Judge("b"), Judge("c")
    replaced.forward_step = lambda data: data  # type: ignore[method-assign]
    helped._scored = lambda data: data  # type: ignore[method-assign]
    unrelated.function = lambda data: data  # type: ignore[attr-defined]
    assert declaration_of(replaced, "forward_step") == UNKNOWN
    assert declaration_of(helped, "forward_step") == UNKNOWN
    assert declaration_of(unrelated, "forward_step").writes == {"rewards": NUMBER}


def test_what_is_no_collection_declares_nothing() -> None:
    class Counts(BaseModule):
        reads: Any = 0
        writes: Any = None

        def forward_step(self, data: Any) -> Any:
            return data

    assert declaration_of(Counts("counts"), "forward_step").needs is None
    counts = Counts("counts")
    counts.reads = ["a row"]  # kept by an instance: no declaration of its class
    assert declaration_of(counts, "forward_step").needs is None


@pytest.mark.parametrize(
    ("attribute", "value", "cause", "fix"),
    [
        ("reads", "prompt", "'prompt' is no set of column names", "frozenset()"),
        ("writes", {1, 2}, "is no set of column names", '{"rewards": "number"}'),
        ("writes", {"rewards": "nubmer"}, "'nubmer' is no kind of column", "did you mean 'number'"),
        ("reads", {"rewards": None}, "'None' is no kind", "text, messages, number"),
    ],
)
def test_a_malformed_declaration_is_named_with_its_class(
    attribute: str, value: Any, cause: str, fix: str
) -> None:
    def forward_step(self: Any, data: Any) -> Any:
        return data

    kind = type("Wrong", (BaseModule,), {attribute: value, "forward_step": forward_step})
    with pytest.raises(FlowError) as caught:
        declaration_of(kind("wrong"), "forward_step")
    assert cause in caught.value.cause
    assert fix in caught.value.fix
    assert caught.value.place == f"{__file__}, class Wrong"


def test_a_malformed_decorator_is_refused_at_its_line() -> None:
    with pytest.raises(FlowError, match="'words' is no kind") as caught:
        declares(reads={"completion": "words"})
    assert caught.value.place.startswith(f"{__file__}:")


def test_a_hook_depends_on_the_configuration() -> None:
    chatlearn.init({"models": {"b": {"kl_coef": 0.1}}})
    wants: dict[str, Any] = {}
    for name in "ab":
        said = declaration_of(PolicyTrainer(name, model=dict), "train_step")
        wants[name] = needed(said), said.would_read
    assert wants["a"][1] == {"ref_logprobs": "kl_coef above 0"}
    assert wants["b"] == ([*wants["a"][0], "ref_logprobs"], {})


def test_a_hook_that_says_nothing_of_a_method_leaves_it_to_the_class() -> None:
    class Own(PolicyReference):
        """Adds a step that neither the hook nor the class of ours knows."""

        def third_step(self, data: Any) -> Any:
            return data

    assert declaration_of(Own("own", model=dict), "third_step") == Declaration(is_of_method=False)


def test_a_hook_that_gives_no_declaration_is_refused() -> None:
    class Gives(BaseModule):
        def describe_columns(self, method: str) -> Any:
            return {"reads": {"prompt"}}

        def forward_step(self, data: Any) -> Any:
            return data

    with pytest.raises(FlowError, match="no declaration") as caught:
        declaration_of(Gives("gives"), "forward_step")
    assert "Declaration.of(" in caught.value.fix


def test_a_hook_that_raises_names_the_module() -> None:
    class Raises(BaseModule):
        def describe_columns(self, method: str) -> Declaration:
            raise KeyError(method)

        def forward_step(self, data: Any) -> Any:
            return data

    with pytest.raises(ModuleError, match="describe_columns"):
        declaration_of(Raises("raises"), "forward_step")


def typed(completions: Any, /, answer: Any, *rest: Any, hint: Any = 1, **columns: Any) -> Any: ...


def plain(prompts: Any, solver_rewards: Any = ()) -> Any: ...


class Scores:
    def __call__(self, answer: Any) -> Any: ...


@pytest.mark.parametrize(
    ("function", "required", "optional", "reads_all"),
    [
        (typed, [["completions", "completion"], ["answer"]], ["hint"], True),
        (plain, [["prompts", "prompt"]], ["solver_rewards"], False),
        (Scores(), [["answer"]], [], False),
    ],
)
def test_a_reward_reads_what_its_functions_ask_for(
    function: Callable[..., Any], required: list[list[str]], optional: list[str], reads_all: bool
) -> None:
    said = declaration_of(FunctionReward("reward", {"f": function}), "eval_step")
    assert [list(need.columns) for need in said.needs or ()] == [["completion"], *required]
    assert (list(said.optional), said.reads_all) == (optional, reads_all)
    assert {"rewards", "rewards/f"} <= set(said.writes or ())


@pytest.mark.parametrize(
    ("parameter", "column", "will_do"),
    [
        ("solver_rewards", "solver/rewards", True),
        ("solver_completions", "solver/completion", True),
        ("completions", "completion", True),
        ("answer", "solver/answer", False),
    ],
)
def test_a_parameter_stands_for_columns_that_no_parameter_can_be_called(
    parameter: str, column: str, will_do: bool
) -> None:
    scope: dict[str, Any] = {}
    exec(f"def score({parameter}): ...", scope)
    said = declaration_of(FunctionReward("reward", scope["score"]), "forward_step")
    assert (said.needs or ())[-1].is_met_by(column) == will_do


def test_every_column_of_ours_has_kinds_and_makers_that_exist() -> None:
    for column in COLUMNS.values():
        assert set(column.kind.split(" | ")) <= KINDS.keys(), column
    assert kinds_of("prompt", "advantages") == {
        "prompt": "text | messages",
        "advantages": "number | floats",
    }
    assert MAKERS.keys() <= COLUMNS.keys()
    for maker in MAKERS.values():
        kind, method = maker.split(".")
        assert callable(getattr(getattr(chatlearn.models, kind), method))
