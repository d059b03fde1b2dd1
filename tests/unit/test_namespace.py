# SPDX-License-Identifier: Apache-2.0
"""Namespaces: which columns a module sees, under which names they leave, and that the way out is the way in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chatlearn
from chatlearn import BaseModule, ConfigError, ModuleError
from chatlearn.errors import BatchError, RewardError
from chatlearn.flow.namespace import own_columns, own_row
from chatlearn.flow.passage import enter, leave, leave_all
from chatlearn.models import (
    FunctionReward,
    GroupAdvantage,
    PolicyInference,
    PolicyReference,
    PolicyTrainer,
)
from chatlearn.module import resolve_config
from chatlearn.rewards.function import Scorer, parameter_names
from chatlearn.runtime.worker import EventLoop, Where, Worker
from chatlearn.testing import tiny_pair

Batch = dict[str, Any]


@pytest.mark.parametrize(
    ("outside", "inside"),
    [
        pytest.param({"answer": 1}, {"answer": 1}, id="plain columns are seen as they are"),
        pytest.param({"n/a": 1, "b": 2}, {"a": 1, "b": 2}, id="the own ones lose the namespace"),
        pytest.param({"n/a": 1, "a": 2}, {"a": 1, "../a": 2}, id="an own one hides a plain one"),
        pytest.param({"a": 2, "n/a": 1}, {"a": 1, "../a": 2}, id="in any order"),
        pytest.param({"m/a": 1}, {"m/a": 1}, id="other namespaces are plain columns"),
        pytest.param({"n/a/x": 1}, {"a/x": 1}, id="parts of the own ones"),
        pytest.param({"w": 1}, {"w": 1, "../w": 1}, id="a plain one that is written is kept"),
        pytest.param({"w/x": 1}, {"../w/x": 1}, id="parts of others stand outside"),
        pytest.param({"n/w": 1, "w": 2}, {"w": 1, "../w": 2}, id="own ones are written, too"),
        pytest.param({"uid": 1, "n/uid": 2}, {"uid": 1, "n/uid": 2}, id="uids belong to nobody"),
        pytest.param({"../a": 1}, {"../../a": 1}, id="a name that looks escaped is escaped"),
        pytest.param({"n/../a": 1, "a": 2}, {"n/../a": 1, "a": 2}, id="no way out by a name"),
        pytest.param({"n/": 1, "na": 2}, {"n/": 1, "na": 2}, id="no name without a name"),
    ],
)
def test_what_a_module_sees(outside: Batch, inside: Batch) -> None:
    outside = {name: [value] for name, value in outside.items()}
    seen = enter(outside, "n", {"w"})
    assert seen == {name: [value] for name, value in inside.items()}
    copies = {f"n/{name}": seen[name] for name in seen if name == "w" and "n/w" not in outside}
    assert leave(seen, tuple(outside), "n", {"w"}) == {**outside, **copies}


def test_what_is_written_leaves_under_the_namespace() -> None:
    entered = {"uid": [1], "n/a": [2], "w": [3], "b": [4]}
    data = enter(entered, "n", {"w", "v"})
    data |= {"w": [30], "v": [40], "v/part": [50], "a": [20]}
    assert leave(data, entered, "n", {"w", "v"}) == {
        "uid": [1],
        "n/a": [20],
        "n/w": [30],
        "w": [3],
        "b": [4],
        "n/v": [40],
        "n/v/part": [50],
    }


def test_what_is_popped_is_gone_and_what_it_hid_is_not() -> None:
    entered = {"n/a": [1], "a": [2], "b": [3]}
    data = enter(entered, "n", ())
    del data["a"], data["b"]
    assert leave(data, entered, "n", ()) == {"a": [2]}


def test_writing_into_a_column_that_is_replaced_leaves_the_plain_one_alone() -> None:
    plain = torch.zeros(2)
    ragged = [torch.zeros(1), torch.zeros(2)]
    entered: Batch = {"w": plain, "v": ragged}
    data = enter(entered, "n", {"w", "v"})
    data["w"] += 1  # type: ignore[operator]
    data["v"][0] += 1
    out = leave(data, entered, "n", {"w", "v"})
    assert out["n/w"].tolist() == [1, 1]
    assert out["w"].tolist() == [0, 0]
    assert [t.tolist() for t in out["v"]] == [[0], [0, 0]]
    assert [t.tolist() for t in out["n/v"]] == [[1], [0, 0]]


@pytest.mark.parametrize("name", ["new", "n/new", "../new", "rewards_of_all"])
def test_a_new_column_must_be_declared(name: str) -> None:
    with pytest.raises(BatchError, match="does not declare it") as raised:
        leave({"a": [1], name: [2]}, ["a"], "n", {"rewards"})
    assert name in str(raised.value)
    assert "declared: 'rewards'" in str(raised.value)


names = st.text("ntw./", min_size=1, max_size=7) | st.sampled_from(
    [
        "uid",
        "prompt_uid",
        "n/a",
        "a",
        "../a",
        "n/../a",
        "n/n/a",
        "n/uid",
        "w",
        "n/w",
        "w/x",
        "n/w/x",
    ]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(names, unique=True, max_size=9), st.sets(names, max_size=4), st.data())
def test_what_goes_in_comes_out_the_same(outside: list[str], writes: set[str], data: Any) -> None:
    """Through any filter, with every other column replaced, what was plain comes back as it was."""
    batch = {name: torch.tensor([3 * i, 3 * i + 1, 3 * i + 2]) for i, name in enumerate(outside)}
    seen = enter(dict(batch), "n", writes)
    kept = data.draw(st.lists(st.integers(0, 2), unique=True).map(sorted))
    selected = {name: column[torch.tensor(kept, dtype=torch.long)] for name, column in seen.items()}
    for name in seen:
        if name in writes and name not in ("uid", "prompt_uid") and not name.startswith("../"):
            selected[name] = torch.full((len(kept),), -1)
    out = leave(selected, tuple(batch), "n", writes)
    assert len(out) == len(selected), "two columns left under one name"
    for name, column in batch.items():
        own = name.startswith("n/") and name.removeprefix("n/") in own_columns(batch, "n")
        if own and name.removeprefix("n/") in writes:
            assert (out[name] == -1).all()
        else:
            assert out[name].tolist() == column[kept].tolist(), name
    assert all(name in batch or name.startswith("n/") for name in out)


def test_a_declaration_cannot_reach_outside() -> None:
    """Found by the test above: two columns left as `n/../a`."""
    entered = {"../a": [1], "n/../a": [2]}
    assert leave(enter(entered, "n", {"../a"}), entered, "n", {"../a"}) == entered


def test_what_is_no_batch_leaves_as_it_is() -> None:
    entered = [("n/a",), ("n/a",)]
    assert leave_all([{"a": 1}, {"a": 2}], entered, "n", ()) == [{"n/a": 1}, {"n/a": 2}]
    assert leave_all([{"a": 1}, None], entered, "n", ()) == [{"n/a": 1}, None]
    for value in (None, {"loss": 0.5}, "text", [{"a": 1}]):
        assert leave_all(value, entered, "n", ()) == value
    assert leave_all(7, ("n/a",), "n", ()) == 7
    assert leave_all({3: 1}, ("n/a",), "n", ()) == {3: 1}


def test_rows_of_a_dataset() -> None:
    row = {"n/prompt": "own", "prompt": "plain", "n/uid": 1}
    assert own_row(row, None) == (row, frozenset())
    assert own_row(row, "n") == ({**row, "prompt": "own"}, frozenset({"prompt"}))


# ---- modules ---------------------------------------------------------------------------------------------------------


class Doubler(BaseModule):
    writes = frozenset({"twice"})

    def forward_step(self, data: Batch) -> Batch:
        data["twice"] = [2 * x for x in data["x"]]
        return data

    async def later(self, data: Batch) -> Batch:
        return self.forward_step(data)

    def quiet(self, data: Batch) -> None:
        self.seen = data

    def undeclared(self, data: Batch) -> Batch:
        return {**data, "more": data["x"]}

    def train_step(self, data_list: list[Batch]) -> Any:
        self.seen = data_list
        return [self.forward_step(data) for data in data_list]

    def measure(self, data_list: list[Batch]) -> Any:
        return {"loss": 0.5}


def step(module: BaseModule, method: str, data: Any) -> Any:
    return Worker(module, EventLoop()).step(method, data, 0, {}, Where(1, [0])).value


@pytest.mark.parametrize("method", ["forward_step", "later"])
def test_a_step_within_a_namespace(method: str) -> None:
    data = {"uid": [0], "n/x": [1], "x": [10], "twice": [0]}
    assert step(Doubler("d", namespace="n"), method, data) == {**data, "n/twice": [2]}
    assert step(Doubler("d"), method, dict(data)) == {**data, "twice": [20]}


def test_train_steps_take_and_may_return_one_batch_per_micro_batch() -> None:
    module = Doubler("d", namespace="n")
    module.add_padding_config("ids", -1)
    ragged = [torch.tensor([1]), torch.tensor([1, 2])]
    data = [{"n/x": [1, 1], "n/ids": ragged}, {"n/x": [3], "n/ids": ragged[:1]}]
    first, second = step(module, "train_step", data)
    assert first["n/twice"] == [2, 2]
    assert second["n/twice"] == [6]
    assert first["n/ids"].tolist() == [[1, -1], [1, 2]], "padding speaks of what the module sees"
    assert step(module, "measure", data) == {"loss": 0.5}
    assert step(module, "quiet", {"n/x": [1]}) is None
    assert module.seen == {"x": [1]}


def test_an_undeclared_column_names_module_and_way_out() -> None:
    with pytest.raises(ModuleError, match=r"'more' is new(.*\n)*.*writes(.*\n)*.*module: d"):
        step(Doubler("d", namespace="n"), "undeclared", {"x": [1]})


class Silent(BaseModule):
    """A class that says nothing of what it writes."""


class Letters(BaseModule):
    writes = "rewards"  # type: ignore[assignment]


def test_a_namespace_needs_a_class_that_declares_its_columns() -> None:
    config = chatlearn.init({"models": {"s": {"namespace": "n"}}})
    with pytest.raises(ConfigError, match="Silent does not say which columns it writes") as raised:
        resolve_config(Silent("s"), config)
    assert "code models.s.namespace" in str(raised.value)
    assert "writes = frozenset" in str(raised.value)
    with pytest.raises(ConfigError, match="'rewards', no set of column names"):
        resolve_config(Letters("l", namespace="n"), config)
    with pytest.raises(ConfigError, match=r"'\.\.' is no name"):
        resolve_config(Doubler("d", namespace=".."), config)
    with pytest.raises(ConfigError, match="namespace"):
        resolve_config(Doubler("d", namespace="a/b"), config)
    assert resolve_config(Silent("other"), config).namespace is None


# ---- ready-made modules ----------------------------------------------------------------------------------------------


def test_a_policy_s_own_prompt_goes_before_tokens_of_others() -> None:
    policy = PolicyInference("p", model=tiny_pair, max_new_tokens=2, temperature=0, namespace="n")
    worker = Worker(policy, EventLoop())
    worker.set_up()
    others = tiny_pair()[1]("9").input_ids
    row = {"uid": [0], "prompt_ids": [torch.tensor(others)]}

    def prompt_of(data: Batch) -> str:
        out = worker.step("forward_step", data, 0, {}, Where()).value
        return policy.tokenizer.decode(out["n/prompt_ids"][0])

    assert prompt_of({**row, "n/prompt": ["1+1="]}) == "1+1="
    assert prompt_of({**row, "prompt": ["1+1="]}) == "9"
    own = {"n/prompt": ["1+1="], "n/prompt_ids": [torch.tensor(others)]}
    assert prompt_of({"uid": [0], **own}) == "9"
    policy.check_rows([{"n/prompt": "1+1="}, {"prompt": "2"}, {"n/prompt_ids": others}])
    with pytest.raises(chatlearn.ChatLearnError, match="no column 'prompt'"):
        policy.check_rows([{"m/prompt": "1+1="}])


def test_rewards_and_advantages_of_two_players() -> None:
    data: Batch = {
        "uid": torch.tensor([0, 1]),
        "prompt_uid": torch.tensor([0, 0]),
        "a/completion": ["x", "yy"],
        "b/completion": ["", "z"],
    }
    for player in ("a", "b"):
        reward = FunctionReward(f"{player}_reward", {"length": lengths}, namespace=player)
        data = step(reward, "forward_step", data)
        data = step(GroupAdvantage(f"{player}_advantage", namespace=player), "forward_step", data)
    assert data["a/rewards"].tolist() == data["a/rewards/length"].tolist() == [1, 2]
    assert data["b/rewards"].tolist() == [0, 1]
    assert data["a/advantages"].tolist() == pytest.approx([-0.7071, 0.7071], abs=1e-3)
    assert not {"rewards", "advantages", "rewards/length"} & set(data)


def test_log_probs_of_two_players() -> None:
    ids = [torch.tensor([5, 6])]
    data: Batch = {"uid": [0]} | {f"{p}/{c}_ids": ids for p in "ab" for c in ("prompt", "response")}
    for player in ("a", "b"):
        for kind in (PolicyTrainer, PolicyReference):
            module = kind(player, namespace=player, model=tiny_pair)
            worker = Worker(module, EventLoop())
            worker.set_up()
            data = worker.step("forward_step", data, 0, {}, Where()).value
    assert {name for name in data if name.endswith("logprobs")} == {
        "a/old_logprobs", "b/old_logprobs", "a/ref_logprobs", "b/ref_logprobs",
    }  # fmt: skip


def lengths(completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


@pytest.mark.parametrize(
    ("column", "parameters"),
    [
        ("answer", ["answer"]),
        ("prompt", ["prompt", "prompts"]),
        ("solver/rewards", ["solver_rewards"]),
        ("solver/completion", ["solver_completion", "solver_completions"]),
        ("judge-1/rewards/exact", ["judge_1_rewards_exact"]),
        ("../rewards", ["outer_rewards"]),
    ],
)
def test_the_parameters_that_ask_for_a_column(column: str, parameters: list[str]) -> None:
    assert parameter_names(column) == parameters


def test_a_judge_of_both_players() -> None:
    data: Batch = {"uid": [0, 1], "a/completion": ["x", "yy"], "b/completion": ["xx", "z"]}

    def longer(a_completions: list[str], b_completion: list[str], **columns: Any) -> list[bool]:
        assert set(columns) == {"uid", "a/completion", "b/completion"}
        return [len(a) > len(b) for a, b in zip(a_completions, b_completion, strict=True)]

    judge = FunctionReward("judge", longer)
    assert step(judge, "forward_step", dict(data))["rewards"].tolist() == [0, 1]
    with pytest.raises(ModuleError, match="'completion' is missing"):
        step(judge, "forward_step", {"uid": [0], "a/completions": ["x"]})


def test_a_parameter_that_may_mean_two_columns() -> None:
    data = {"a-b/x": [1], "a/b_x": [2], "a_b/x": [3]}
    with pytest.raises(
        RewardError, match=r"'a_b_x', which may be any of \['a-b/x', 'a/b_x', 'a_b/x'\]"
    ):
        Scorer("s", lambda a_b_x: a_b_x)(data)
    assert Scorer("s", lambda a_b_x: a_b_x)({**data, "a_b_x": [4]}) == [4]
    with pytest.raises(RewardError, match="solver_completions"):
        Scorer("s", lambda wrong: wrong)({"solver/completion": ["x"]})
