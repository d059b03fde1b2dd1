# SPDX-License-Identifier: Apache-2.0
"""Bad input through the public API: each gets an error that names the cause, the place, the fix.

What can be known before a run is refused before any module is set up.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import chatlearn
from chatlearn import Engine, Environment, Evaluator, ModuleError, Trainer
from chatlearn.errors import ConfigError, DataError, FlowError, OutputError, RewardError
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.testing import tiny_model, tiny_pair, tiny_tokenizer

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]


def score(completions: list[str], answer: list[str]) -> list[float]:
    return [float(text.startswith(right)) for text, right in zip(completions, answer, strict=True)]


class Loud(PolicyInference):
    """A policy that must not be set up."""

    def setup(self) -> None:
        raise AssertionError("set up before everything was checked")


def grpo(reward: Any = score, policy: PolicyInference | None = None, **settings: Any) -> Engine:
    """The usual GRPO engine over a tiny model."""
    sampler = policy or PolicyInference("policy", model=tiny_pair, max_new_tokens=4)
    judge, advantage = FunctionReward("reward", reward), GroupAdvantage("advantage")
    learner = PolicyTrainer("policy_trainer", model=settings.pop("trained", tiny_pair))

    def env_flow(batch):
        return advantage.forward_step(judge.forward_step(sampler.forward_step(batch)))

    def trainer_flow(batch):
        learner.train_step(batch)

    engine = Engine(Environment(env_flow), Trainer(trainer_flow))
    return engine.set_parameter_sync(learner, sampler).set_dataset(settings.pop("data", ROWS))


def init(tmp_path: Path, **runtime: Any) -> None:
    chatlearn.init(
        {"runtime": {"num_inference_per_prompt": 2, "output_dir": tmp_path / "run", **runtime}}
    )


def message_of(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """The error's text; it has to name a place or a fix."""
    text = str(caught.value)
    assert "fix:" in text, text
    return text


@pytest.mark.parametrize("kind", ["list", "jsonl"])
def test_an_empty_dataset(tmp_path, kind):
    init(tmp_path)
    empty: Any = []
    if kind == "jsonl":
        empty = tmp_path / "empty.jsonl"
        empty.write_text("\n")
    with pytest.raises(DataError, match="is empty") as caught:
        grpo(policy=Loud("policy", model=tiny_pair), data=empty).learn()
    message_of(caught)


def test_a_malformed_row_is_named_with_file_and_line(tmp_path):
    init(tmp_path)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + '{"prompt": "1+1=", "answer"\n')
    with pytest.raises(DataError) as caught:
        grpo(policy=Loud("policy", model=tiny_pair), data=path).learn()
    assert f"{path}:2" in message_of(caught)


@pytest.mark.parametrize("prompt", ["", 3, [{"rolle": "user"}], None])
def test_a_prompt_that_is_none(tmp_path, prompt):
    init(tmp_path)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompt}) + "\n")
    with pytest.raises(DataError) as caught:
        grpo(policy=Loud("policy", model=tiny_pair), data=path).learn()
    assert f"{path}:1" in message_of(caught)


def test_a_prompt_longer_than_the_limit(tmp_path):
    init(tmp_path)
    rows = [*ROWS[:2], {"prompt": "1" * 50, "answer": "1"}]
    policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=4, max_prompt_tokens=20)
    with pytest.raises(ModuleError, match=r"50 tokens") as caught:
        grpo(policy=policy, data=rows).learn()
    assert isinstance(caught.value.__cause__, DataError)
    assert "20" in message_of(caught)


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        (lambda completions: [1.0], r"1 reward.*8|8.*1"),
        (lambda completions: [1.0, math.nan] * 4, "nan"),
        (lambda completions: [1.0, None] * 4, "None"),
        (lambda completions: None, "None"),
        (lambda completions: ["good"] * 8, "good"),
    ],
    ids=["count", "nan", "none", "nothing", "text"],
)
def test_a_reward_that_gives_no_usable_reward(tmp_path, reward, match):
    init(tmp_path)
    with pytest.raises(ModuleError, match=match) as caught:
        grpo(reward).learn()
    assert isinstance(caught.value.__cause__, RewardError)
    text = message_of(caught)
    assert "module: reward" in text
    assert "lambda" in text


def test_a_reward_that_asks_for_an_unknown_column_is_refused_before_setup(tmp_path):
    init(tmp_path)
    with pytest.raises(FlowError, match=r"asks for 'solution'.*'answer'") as caught:
        grpo(
            lambda completions, solution: [1.0] * 8, policy=Loud("policy", model=tiny_pair)
        ).learn()
    assert "lambda" in message_of(caught)


def test_a_reward_that_raises_keeps_its_own_traceback(tmp_path):
    def broken(completions):
        raise KeyError("no such rule")

    init(tmp_path)
    with pytest.raises(ModuleError, match="no such rule") as caught:
        grpo(broken).learn()
    causes, error = [], caught.value.__cause__
    while error is not None:
        causes.append(error)
        error = error.__cause__
    original = next(cause for cause in causes if isinstance(cause, KeyError))
    names = []
    tb = original.__traceback__
    while tb is not None:
        names.append(tb.tb_frame.f_code.co_name)
        tb = tb.tb_next
    assert names[-1] == "broken"


def test_a_tokenizer_without_pad_trains(tmp_path):
    init(tmp_path)
    source = lambda: (tiny_model(), tiny_tokenizer(pad=False))  # noqa: E731
    policy = PolicyInference("policy", model=source, max_new_tokens=4)
    result = grpo(policy=policy, trained=source).learn()
    assert result is not None
    assert result.train_iteration == 1


def test_a_tokenizer_without_eos(tmp_path):
    init(tmp_path)
    source = lambda: (tiny_model(), tiny_tokenizer(eos=False))  # noqa: E731
    with pytest.raises(ModuleError, match="end-of-sequence") as caught:
        grpo(policy=PolicyInference("policy", model=source)).learn()
    assert "eos_token" in message_of(caught)
    named = PolicyInference("policy", model=source, eos_token="<eos>", max_new_tokens=4)
    assert grpo(policy=named).learn() is not None


def test_a_model_path_that_does_not_exist(tmp_path):
    init(tmp_path)
    missing = str(tmp_path / "no-such-model")
    with pytest.raises(ConfigError, match="no-such-model") as caught:
        grpo(policy=Loud("policy", model=missing), trained=missing).learn()
    text = message_of(caught)
    assert "2 problems" in text, "the policy's and the trainer's are reported at once"


def test_a_model_that_was_forgotten(tmp_path):
    init(tmp_path)
    with pytest.raises(ConfigError, match="model"):
        grpo(policy=PolicyInference("policy")).learn()


def test_a_group_size_that_does_not_divide_the_episode(tmp_path):
    with pytest.raises(ConfigError, match="no multiple of num_inference_per_prompt") as caught:
        init(tmp_path, num_inference_per_prompt=3, sample_per_episode=8)
    assert "6 or 9" in message_of(caught)


def test_a_flow_that_returns_nothing_to_a_trainer(tmp_path):
    init(tmp_path)
    policy, learner = Loud("policy", model=tiny_pair), PolicyTrainer("trainer", model=tiny_pair)

    def env_flow(batch):
        policy.forward_step(batch)

    def trainer_flow(batch):
        learner.train_step(batch)

    with pytest.raises(FlowError, match="returns nothing") as caught:
        Engine(Environment(env_flow), Trainer(trainer_flow)).set_dataset(ROWS).learn()
    assert "test_bad_input.py" in message_of(caught)


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    init(tmp_path)
    with pytest.raises(OutputError) as caught:
        grpo(policy=Loud("policy", model=tiny_pair)).learn()
    assert "output_dir" in message_of(caught)


def test_a_second_learn_in_one_process_is_a_new_run(tmp_path):
    init(tmp_path)
    engine = grpo()
    first, second = engine.learn(), engine.learn()
    assert first is not None
    assert second is not None
    assert (first.train_iteration, second.train_iteration) == (1, 1)
    assert (tmp_path / "run" / "earlier" / "0001" / "metrics.jsonl").exists()
    same = ("policy_trainer/loss", "reward/rewards", "policy_trainer/grad_norm")
    assert [first.metrics[k] for k in same] == [second.metrics[k] for k in same]


def test_an_evaluator_without_dataset(tmp_path):
    init(tmp_path)
    policy = Loud("policy", model=tiny_pair)
    with pytest.raises(DataError, match="evaluator has no dataset") as caught:
        Evaluator(lambda batch: policy.eval_step(batch)).eval()
    message_of(caught)


def test_everything_wrong_is_reported_at_once(tmp_path):
    init(tmp_path, backend="ray")
    with pytest.raises(ConfigError, match="problems") as caught:
        grpo(policy=Loud("policy", model="./nowhere"), data=[]).learn()
    text = message_of(caught)
    for part in ("ray", "nowhere", "is empty"):
        assert part in text


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"prompt": "1" * 600, "answer": "1"}, "row 3 has 600 tokens"),
        ({"prompt": 7, "answer": "1"}, "row 3 is a int"),
    ],
)
def test_a_row_that_the_policy_cannot_use_is_found_before_anything_is_sampled(tmp_path, bad, match):
    class Deaf(PolicyInference):
        def forward_step(self, data):
            raise AssertionError("sampled before all rows were looked at")

    init(tmp_path, num_inference_per_prompt=1, sample_per_episode=1)
    with pytest.raises(ModuleError, match=match) as caught:
        grpo(policy=Deaf("policy", model=tiny_pair), data=[*ROWS[:3], bad]).learn()
    message_of(caught)


def test_a_missing_prompt_column_is_named_with_what_there_is(tmp_path):
    init(tmp_path)
    with pytest.raises(FlowError, match=r"reads 'prompt' or 'prompt_ids', .* 'promt'"):
        grpo(data=[{"promt": "1+1=", "answer": "2"}]).learn()


@pytest.mark.parametrize(("answer", "kind"), [(4, int), (True, bool), (0.5, float), ("4", str)])
def test_a_reward_gets_python_values_whatever_the_columns_type(tmp_path, answer, kind):
    seen: list[type] = []

    def typed(completions, answer):
        seen.extend(type(value) for value in answer)
        return [0.0] * len(completions)

    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}=", "answer": answer}) + "\n" for i in (1, 2))
    )
    init(tmp_path)
    grpo(typed, data=path).learn()
    assert set(seen) == {kind}
