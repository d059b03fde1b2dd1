# SPDX-License-Identifier: Apache-2.0
import functools
import gc
import math

import numpy as np
import pytest
import torch

from chatlearn.errors import BatchError, ConfigError, RewardError
from chatlearn.models import FunctionReward
from chatlearn.module import state_of


def batch():
    return {
        "uid": torch.tensor([7, 8, 9]),
        "prompt": ["1+1=", "2+2=", "3+3="],
        "completion": ["2", "5", "6"],
        "answer": ["2", "4", "6"],
    }


def exact(completions, answer):
    return [c == a for c, a in zip(completions, answer, strict=True)]


def brief(completions):
    return [-len(c) for c in completions]


def rewards(function, data=None):
    return FunctionReward("reward", function).forward_step(data or batch())["rewards"].tolist()


def test_a_function_gets_columns_by_parameter_name():
    seen = {}

    def score(completions, prompts, answer, uid, missing=5, *, completion):
        seen.update(locals())
        return [0, 0, 0]

    rewards(score)
    assert seen["prompts"] == ["1+1=", "2+2=", "3+3="]
    assert seen["completions"] == seen["completion"] == ["2", "5", "6"]
    assert seen["answer"] == ["2", "4", "6"]
    assert seen["uid"] == [7, 8, 9]
    assert seen["missing"] == 5


def test_keyword_catch_all_gets_everything():
    def score(completions, **columns):
        assert sorted(columns) == ["answer", "completion", "prompt", "uid"]
        return [1.0] * len(completions)

    assert rewards(score) == [1.0, 1.0, 1.0]


class Judge:
    def __call__(self, completions):
        return np.array([1, 2, 3])


@pytest.mark.parametrize(
    "function",
    [
        lambda completions: [1, 2, 3],
        lambda completions: (1.0, 2.0, 3.0),
        lambda completions: torch.tensor([1, 2, 3]),
        lambda completions: np.array([1.0, 2.0, 3.0]),
        lambda completions: [torch.tensor(1.0), np.float32(2), 3],
        lambda completions, /: [1, 2, 3],
        functools.partial(lambda completions, scale: [scale * i for i in (1, 2, 3)], scale=1),
        Judge(),
    ],
)
def test_numbers_of_any_kind(function):
    assert rewards(function) == [1.0, 2.0, 3.0]


def test_several_functions_are_weighted_and_each_has_its_column():
    module = FunctionReward("reward", [exact, brief], weights=[1.0, 0.2])
    data = module.forward_step(batch())
    assert data["rewards"].dtype == torch.float32
    assert data["rewards"].tolist() == pytest.approx([0.8, -0.2, 0.8])
    assert data["rewards/exact"].tolist() == [1.0, 0.0, 1.0]
    assert data["rewards/brief"].tolist() == [-1.0, -1.0, -1.0]
    assert state_of(module).metrics == [
        {
            "rewards": pytest.approx(0.8 - 1 / 3),
            "rewards/exact": pytest.approx(2 / 3),
            "rewards/brief": -1.0,
        }
    ]


def test_functions_and_weights_by_name():
    module = FunctionReward("reward", {"a": exact, "b": brief}, weights={"b": 0.0, "a": 2.0})
    data = module.eval_step(batch())
    assert data["rewards"].tolist() == [2.0, 0.0, 2.0]
    assert set(state_of(module).metrics[0]) == {"rewards", "rewards/a", "rewards/b"}


def test_sorting_in_place_does_not_reorder_the_batch():
    def score(completions):
        completions.sort(reverse=True)
        return [0.0] * 3

    data = batch()
    rewards(score, data)
    assert data["completion"] == ["2", "5", "6"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, solution: [0] * 3, "asks for 'solution'"),
        (lambda completions: [1.0, 2.0], "returned 2 rewards for 3 samples"),
        (lambda completions: None, "returned None"),
        (lambda completions: 1.0, "returned 1.0"),
        (lambda completions: "abc", "returned 'abc'"),
        (lambda completions: torch.tensor(1.0), "returned 1.0"),
        (lambda completions: [1.0, None, 2.0], "returned None for one sample"),
        (lambda completions: [1.0, math.nan, 2.0], "returned nan for one sample"),
        (lambda completions: [1.0, -math.inf, 2.0], "returned -inf for one sample"),
        (lambda completions: [1.0, "good", 2.0], "returned 'good' for one sample"),
        (lambda completions: torch.ones(3, 2), r"returned \[1.0, 1.0\] for one sample"),
        (lambda completions: [1.0, torch.ones(2), 2.0], "for one sample"),
    ],
)
def test_what_is_no_reward_is_an_error_and_never_a_zero(function, message):
    with pytest.raises(RewardError, match=message) as caught:
        rewards(function)
    assert "lambda" in str(caught.value)
    assert __file__ in str(caught.value)


def test_a_bad_number_names_sample_and_completion():
    data = batch()
    data["completion"][1] = "x" * 500
    with pytest.raises(RewardError) as caught:
        rewards(lambda completions: [0.0, math.nan, 0.0], data)
    assert "sample uid 8" in str(caught.value)
    assert "xxx..." in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_unknown_parameter_lists_what_there_is():
    with pytest.raises(RewardError) as caught:
        rewards(lambda solution: [0] * 3)
    for name in ("answer", "completions", "prompts", "uid"):
        assert name in str(caught.value)


def test_an_exception_keeps_its_traceback_and_names_the_function():
    def score(completions):
        return [1 / 0 for _ in completions]

    with pytest.raises(RewardError, match="'score' raised ZeroDivisionError") as caught:
        rewards(score)
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    frame = cause.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    assert frame.tb_frame.f_code.co_filename == __file__


class AsyncJudge:
    async def __call__(self, completions):
        return [0.0] * len(completions)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["function", "partial", "object"])
def test_an_async_function_is_refused_and_leaves_no_warning(kind):
    async def score(completions, scale=1.0):
        return [scale] * len(completions)

    function = {
        "function": score,
        "partial": functools.partial(score, scale=2.0),
        "object": AsyncJudge(),
    }[kind]
    (problem,) = FunctionReward("r", function).check_config()
    assert isinstance(problem, ConfigError)
    with pytest.raises(RewardError, match="is an `async def`") as caught:
        rewards(function)
    assert "plain `def`" in caught.value.fix
    assert (problem.cause, problem.fix) == (caught.value.cause, caught.value.fix)
    gc.collect()


@pytest.mark.parametrize("function", [exact, Judge(), functools.partial(exact), Judge().__call__])
def test_a_plain_function_has_no_problem(function):
    assert FunctionReward("r", function).check_config() == []


def test_a_function_that_exits_is_an_error_and_what_to_do_is_no_made_up_number():
    def score(completions):
        raise SystemExit(0)

    with pytest.raises(RewardError, match="'score' raised SystemExit: 0") as caught:
        rewards(score)
    assert isinstance(caught.value.__cause__, SystemExit)
    assert "models.<name>.on_failure to retry, mask or drop_group" in caught.value.fix
    assert "after_retries" in caught.value.fix


def test_uids_of_any_kind_can_be_named():
    data = {**batch(), "uid": ["a", "b", "c"]}
    with pytest.raises(RewardError, match="sample uid b"):
        rewards(lambda completions: [0.0, math.nan, 0.0], data)


def test_a_batch_without_completions_is_named():
    with pytest.raises(BatchError, match="'completion' is missing"):
        rewards(exact, {"answer": ["1"]})


def test_an_empty_batch_is_fine():
    assert rewards(lambda completions: [], {"completion": []}) == []


@pytest.mark.parametrize(
    ("functions", "settings", "message"),
    [
        ([], {}, "no reward function"),
        ([exact, exact], {}, "share a name"),
        ({"a": 3}, {}, "is a int"),
    ],
)
def test_unusable_functions_are_refused_when_the_module_is_made(functions, settings, message):
    with pytest.raises(ConfigError, match=message):
        FunctionReward("reward", functions, **settings)


@pytest.mark.parametrize("weights", [[1.0], {"exact": 1.0}, {"exact": 1.0, "other": 2.0}])
def test_weights_that_do_not_fit_are_refused(weights):
    module = FunctionReward("reward", [exact, brief], weights=weights)
    assert "weight" in str(module.check_config()[0])
    with pytest.raises(ConfigError, match="weights"):
        module.forward_step(batch())


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", [1.0, 2.0], np.float32("nan")])
def test_with_a_policy_a_bad_number_fails_one_sample(value):
    module = FunctionReward("reward", lambda completions: [1.0, value, 3.0], on_failure="mask")
    data = module.forward_step(batch())
    assert data["outcome"] == ["ok", "failed", "ok"]
    assert data["rewards"].isnan().tolist() == [False, True, False]
    assert [data["rewards"][0], data["rewards"][2]] == [1.0, 3.0]
    assert state_of(module).metrics[-1]["rewards"] == 2.0, "the mean of those that have one"
    failure = state_of(module).failure
    assert "for one sample" in failure
    assert "sample uid 8, completion '5'" in failure


def test_one_of_several_functions_fails_a_sample_and_others_keep_their_values():
    def picky(completions):
        return [None, 2.0, 3.0]

    module = FunctionReward(
        "reward", [brief, picky], weights={"brief": 1.0, "picky": 0.0}, on_failure="retry"
    )
    data = {**batch(), "outcome": ["cut", "cut", "ok"]}
    data = module.forward_step(data)
    assert data["outcome"] == ["failed", "cut", "ok"]
    assert data["rewards"][0].isnan(), "a weight of 0 does not hide it"
    assert data["rewards/brief"].tolist() == [-1.0, -1.0, -1.0]


def test_every_call_with_a_policy_makes_the_same_columns():
    module = FunctionReward("reward", brief, on_failure="drop_group")
    assert module.forward_step(batch())["outcome"] == ["ok"] * 3
    assert "outcome" not in FunctionReward("reward", brief).forward_step(batch())


def test_when_all_fail_no_mean_is_logged():
    module = FunctionReward("reward", lambda completions: [math.nan] * 3, on_failure="mask")
    assert module.forward_step(batch())["outcome"] == ["failed"] * 3
    assert state_of(module).metrics == []


@pytest.mark.parametrize("policy", ["mask", "drop_group", "retry"])
def test_what_is_wrong_with_the_whole_batch_is_still_an_error(policy):
    for function in (lambda completions: [1.0], lambda completions: "3", lambda nothing: [1.0] * 3):
        with pytest.raises(RewardError):
            FunctionReward("reward", function, on_failure=policy).forward_step(batch())
