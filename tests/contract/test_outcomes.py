# SPDX-License-Identifier: Apache-2.0
"""Rewards that raise, hang or give no number, under every policy: what is trained on, counted, shown and saved."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_modules import Batch, Learner, Step, plain

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, ModuleError, Trainer
from chatlearn.errors import BatchError, DeadlineError
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.run import RunResult
from chatlearn.testing import tiny_pair

BAD = 5
"""The uid that rewards fail on: prompt 1, the second of its group of four."""
GROUP = 4
PROMPTS = ["p0", "p1", "p2"]


def configure(reward: dict[str, Any], **runtime: Any) -> None:
    base = {"num_inference_per_prompt": GROUP, "trackers": [], "output_dir": "run"}
    chatlearn.init({"runtime": {**base, **runtime}, "models": {"reward": reward}})


class Taught(Learner):
    """Remembers which samples it was trained on, and the micro-batches themselves."""

    def __init__(self, name: str = "learner") -> None:
        super().__init__(name, "uid")
        self.batches: list[Batch] = []

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        super().train_step(data_list, iteration)
        self.batches += data_list

    @property
    def uids(self) -> list[int]:
        return [uid for step in self.trained for uid in step]

    def row(self, uid: int) -> dict[str, Any]:
        for batch in self.batches:
            for at, found in enumerate(plain(batch["uid"])):
                if found == uid:
                    return {name: column[at] for name, column in batch.items()}
        raise AssertionError(f"{uid} was not trained on")


def run(reward: BaseModule, learner: Taught | None = None, **more: Any) -> tuple[RunResult, Taught]:
    """Train on what `reward` returns, after a module that makes texts and tokens."""
    learner = learner or Taught()

    def write(data: Batch) -> Batch:
        uids = plain(data["uid"])
        data["completion"] = [f"answer {uid}" for uid in uids]
        data["response_ids"] = [torch.arange(1 + uid % 3) for uid in uids]
        return data

    writer = Step("writer", write)
    engine = Engine(
        Environment(lambda batch: reward.forward_step(writer.forward_step(batch))),  # type: ignore[attr-defined]
        Trainer(lambda batch: learner.train_step(batch)),
        more.get("evaluator"),
    )
    return engine.set_dataset(more.get("prompts", PROMPTS)).learn(), learner


# ---- ways to fail -------------------------------------------------------------------------------------


def raising(completions: list[str], uid: list[int]) -> list[float]:
    if BAD in uid:
        raise ValueError("no such answer")
    return [1.0] * len(uid)


def sleeping(completions: list[str], uid: list[int]) -> list[float]:
    if BAD in uid:
        time.sleep(30)
    return [1.0] * len(uid)


def looping(completions: list[str], uid: list[int]) -> list[float]:
    while BAD in uid:
        pass
    return [1.0] * len(uid)


def backtracking(completions: list[str], uid: list[int]) -> list[float]:
    if BAD in uid:
        re.match(r"(a+)+$", "a" * 40 + "b")
    return [1.0] * len(uid)


def swallowing(completions: list[str], uid: list[int]) -> list[float]:
    while BAD in uid:
        try:
            time.sleep(30)
        except Exception as error:
            print(error)
    return [1.0] * len(uid)


def catching(completions: list[str], uid: list[int]) -> list[float]:
    """Runs untrusted code per sample, as people do."""
    scores: list[float] = []
    for u in uid:
        try:
            if u == BAD:
                time.sleep(30)
            scores.append(1.0)
        except:  # noqa: E722 - that is the point
            scores.append(0.0)
    return scores


def exiting(completions: list[str], uid: list[int]) -> list[float]:
    if BAD in uid:
        sys.exit(0)
    return [1.0] * len(uid)


def returning(value: Any) -> Callable[..., list[Any]]:
    def score(completions: list[str], uid: list[int]) -> list[Any]:
        return [value if u == BAD else 1.0 for u in uid]

    return score


class Judge(BaseModule):
    """A user's own reward, which waits for a server that never answers."""

    async def forward_step(self, data: Batch) -> Batch:
        if BAD in plain(data["uid"]):
            await asyncio.sleep(30)
        return {**data, "rewards": torch.ones(len(data["uid"]))}


class Exits(BaseModule):
    """A user's own reward that leaves the script."""

    def forward_step(self, data: Batch) -> Batch:
        if BAD in plain(data["uid"]):
            sys.exit(0)
        return {**data, "rewards": torch.ones(len(data["uid"]))}


class Unscored(BaseModule):
    """A user's own reward that has no number for one sample."""

    def __init__(self, name: str, value: Any, *, listed: bool = False) -> None:
        super().__init__(name)
        self.value, self.listed = value, listed

    def forward_step(self, data: Batch) -> Batch:
        rewards = [self.value if uid == BAD else 1.0 for uid in plain(data["uid"])]
        return {**data, "rewards": rewards if self.listed else torch.tensor(rewards)}


class Miscounts(BaseModule):
    """A user's own reward that loses a sample on the way."""

    def forward_step(self, data: Batch) -> Batch:
        uids = [uid for uid in plain(data["uid"]) if uid != BAD]
        return {"uid": data["uid"], "rewards": torch.ones(len(uids))}


WAYS: dict[str, tuple[Callable[[], BaseModule], str, str]] = {
    "raises": (lambda: FunctionReward("reward", raising), "failed", "ValueError: no such answer"),
    "NaN": (lambda: FunctionReward("reward", returning(float("nan"))), "failed", "returned nan"),
    "infinite": (
        lambda: FunctionReward("reward", returning(float("inf"))),
        "failed",
        "returned inf",
    ),
    "None": (lambda: FunctionReward("reward", returning(None)), "failed", "returned None"),
    "text": (lambda: FunctionReward("reward", returning("high")), "failed", "returned 'high'"),
    "exits": (lambda: FunctionReward("reward", exiting), "failed", "raised SystemExit: 0"),
    "a module exits": (lambda: Exits("reward"), "failed", "SystemExit: 0"),
    "catches all": (lambda: FunctionReward("reward", catching), "timed_out", "timeout_s=0.1"),
    "miscounts": (lambda: Miscounts("reward"), "failed", "disagree in their number of samples"),
    "sleeps": (lambda: FunctionReward("reward", sleeping), "timed_out", "timeout_s=0.1 seconds"),
    "loops": (lambda: FunctionReward("reward", looping), "timed_out", "timeout_s=0.1 seconds"),
    "backtracks": (lambda: FunctionReward("reward", backtracking), "timed_out", "timeout_s=0.1"),
    "swallows": (lambda: FunctionReward("reward", swallowing), "timed_out", "timeout_s=0.1"),
    "awaits": (lambda: Judge("reward"), "timed_out", "timeout_s=0.1 seconds"),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> tuple[Callable[[], BaseModule], str, str]:
    return WAYS[request.param]


def settings(policy: str, outcome: str) -> dict[str, Any]:
    return {"on_failure": policy, **({"timeout_s": 0.1} if outcome == "timed_out" else {})}


def test_stop(way: Any) -> None:
    make, outcome, cause = way
    configure(settings("stop", outcome))
    with pytest.raises((ModuleError, BatchError)) as raised:
        run(make())
    assert cause in str(raised.value)
    assert isinstance(raised.value, DeadlineError) == (outcome == "timed_out")
    lines = [line.split(":")[0].strip() for line in str(raised.value).splitlines()]
    found = [
        line for line in lines if line in ("module", "method", "replica", "episode", "samples")
    ]
    assert found == ["module", "method", "replica", "episode", "samples"]


def test_mask(way: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make, outcome, cause = way
    configure(settings("mask", outcome))
    result, learner = run(make())
    assert learner.uids == list(range(12)), "steps keep their size"
    row = learner.row(BAD)
    assert row["outcome"] == outcome
    assert torch.as_tensor(row["rewards"]).isnan()
    assert {learner.row(uid)["outcome"] for uid in range(12) if uid != BAD} == {"ok"}
    assert float(learner.row(4)["rewards"]) == 1.0
    if "response_ids" in row:
        assert len(row["response_ids"]) == len(row["loss_mask"]) == 0
        assert learner.row(4)["loss_mask"].tolist() == [True] * 2
        assert row["completion"] == f"answer {BAD}"
    assert result.metrics[f"outcomes/reward/{outcome}"] == 1
    assert result.metrics["outcomes/masked_samples"] == 1
    assert result.metrics["outcomes/dropped_groups"] == 0
    shown = capsys.readouterr().out
    assert "reward gave a sample up, for the first time" in shown
    assert cause in shown
    assert f"1 {outcome.replace('_', ' ')}" in shown.split("episode 1/1")[1].splitlines()[0]
    assert "reward gave up 1 sample in this run" in shown


def test_drop_group(way: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make, outcome, _ = way
    configure(settings("drop_group", outcome))
    result, learner = run(make())
    assert learner.uids == [0, 1, 2, 3, 8, 9, 10, 11]
    assert "loss_mask" not in learner.columns
    assert {learner.row(uid).get("outcome", "ok") for uid in learner.uids} == {"ok"}
    assert result.metrics[f"outcomes/reward/{outcome}"] == 1
    assert result.metrics["outcomes/dropped_groups"] == 1
    assert result.metrics["outcomes/dropped_samples"] == 4
    assert f"1 {outcome.replace('_', ' ')}, 1 group dropped" in capsys.readouterr().out


@pytest.mark.parametrize("after", ["stop", "mask", "drop_group"])
def test_retry_until_the_tries_are_used_up(way: Any, after: str) -> None:
    make, outcome, cause = way
    configure({**settings("retry", outcome), "max_retries": 1, "after_retries": after})
    if after == "stop":
        with pytest.raises(ModuleError, match=r"reward\.forward_step failed 2 times") as raised:
            run(make())
        assert cause in str(raised.value)
        return
    result, learner = run(make())
    assert learner.uids == [u for u in range(12) if after == "mask" or u // GROUP != 1]
    assert result.metrics[f"outcomes/reward/{outcome}"] == 1
    assert result.metrics["outcomes/reward/retried"] in (1, 12), "the culprit, if it is known"


def test_with_the_default_no_column_is_added_and_nothing_is_counted() -> None:
    configure({})
    result, learner = run(FunctionReward("reward", returning(1.0)))
    assert not {"outcome", "loss_mask"} & learner.columns
    assert not [name for name in result.metrics if name.startswith("outcomes/")]


def test_where_nothing_fails_nothing_changes_but_two_columns() -> None:
    configure({"on_failure": "mask"})
    result, learner = run(FunctionReward("reward", returning(1.0)))
    assert {learner.row(uid)["outcome"] for uid in range(12)} == {"ok"}
    counts = {n: v for n, v in result.metrics.items() if n.startswith("outcomes/")}
    assert set(counts.values()) == {0.0}
    assert "outcomes/reward/failed" in counts


def test_a_mark_of_a_users_own_step() -> None:
    def judge(data: Batch) -> Batch:
        data["outcome"] = ["failed" if uid == BAD else "ok" for uid in plain(data["uid"])]
        return data

    configure({"on_failure": "mask"})
    _, learner = run(Step("reward", judge))
    assert learner.row(BAD)["outcome"] == "failed"
    reward = Step("reward", judge)
    configure({})
    with pytest.raises(
        BatchError, match=f"a step failed on uid {BAD}: reward.forward_step says so"
    ):
        run(reward)
    assert len(reward.calls) == 1


@pytest.mark.parametrize("policy", ["mask", "drop_group", "retry"])
@pytest.mark.parametrize(
    ("value", "listed"),
    [
        (float("nan"), False),
        (float("inf"), False),
        (float("nan"), True),
        (None, True),
        ("no", True),
    ],
)
def test_a_reward_of_a_users_own_that_is_no_number_fails_its_sample(
    policy: str, value: Any, listed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(
        {"on_failure": policy, "after_retries": "mask"}
        if policy == "retry"
        else {"on_failure": policy}
    )
    result, learner = run(Unscored("reward", value, listed=listed))
    assert result.metrics["outcomes/reward/failed"] == 1
    assert result.metrics["outcomes/reward/retried"] == (2 if policy == "retry" else 0)
    said = f"reward.forward_step returned {value!r} in its column 'rewards' for uid {BAD}"
    assert said in capsys.readouterr().out
    if policy == "drop_group":
        assert not {4, 5, 6, 7} & set(learner.uids)
    else:
        assert learner.row(BAD)["outcome"] == "failed"


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None, "no", [1.0, float("nan")]])
def test_with_the_default_such_a_reward_ends_the_run(value: Any) -> None:
    configure({})
    said = f"a step failed on uid {BAD}: reward.forward_step returned"
    with pytest.raises(BatchError, match=said) as caught:
        run(Unscored("reward", value, listed=True))
    assert f"{value!r} in its column 'rewards' for uid {BAD}" in caught.value.cause
    assert "models.reward.on_failure" in caught.value.fix


def test_rewards_of_several_numbers_are_no_failure() -> None:
    configure({})
    for value in ([1.0, 2.0], (1, 0.5), torch.ones(2), np.float32(0.5), np.ones(2), True):
        _, learner = run(Unscored("reward", value, listed=True))
        assert learner.uids == list(range(12))


@pytest.mark.parametrize("policy", ["stop", "mask"])
def test_rewards_that_came_in_are_not_the_failure_of_who_passes_them_on(policy: str) -> None:
    configure({"on_failure": policy})
    prompts = [{"prompt": "a", "rewards": float("nan")}, {"prompt": "b", "rewards": 1.0}]
    result, learner = run(Step("reward"), prompts=prompts)
    assert learner.uids == list(range(8))
    assert result.metrics.get("outcomes/reward/failed", 0) == 0


def test_an_evaluation_ends_with_a_reward_that_is_no_number() -> None:
    configure({})
    reward = Unscored("reward", float("nan"))
    evaluator = Evaluator(lambda batch: reward.forward_step(batch)).set_dataset(["x"] * 8)
    step = Step("step")
    engine = Engine(Environment(lambda batch: step.forward_step(batch))).set_evaluator(evaluator)
    with pytest.raises(BatchError, match=f"returned nan in its column 'rewards' for uid {BAD}"):
        engine.set_dataset(PROMPTS).learn()


@pytest.mark.parametrize(
    ("mark", "fix"),
    [
        ("timeout", "did you mean 'timed_out'?"),
        ("broken", "it is one of 'ok', 'cut', 'failed', 'timed_out'"),
        (None, "it is one of"),
        (3, "it is one of"),
    ],
)
def test_a_mark_that_is_no_outcome_is_refused(mark: Any, fix: str) -> None:
    def judge(data: Batch) -> Batch:
        data["outcome"] = [mark if uid == BAD else "ok" for uid in plain(data["uid"])]
        return data

    configure({})
    with pytest.raises(BatchError) as raised:
        run(Step("reward", judge))
    text = f"reward.forward_step returned {mark!r} in its column 'outcome' for uid {BAD}"
    assert raised.value.cause.startswith(text)
    assert "module: reward" in raised.value.cause
    assert raised.value.fix.startswith(fix)


def test_other_columns_of_outcomes_may_hold_anything() -> None:
    def judge(data: Batch) -> Batch:
        data["game/outcome"] = ["won"] * len(data["uid"])
        return data

    configure({"on_failure": "mask"})
    _, learner = run(Step("reward", judge))
    assert learner.row(BAD)["game/outcome"] == "won"

    def outcome(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    result, _ = run(FunctionReward("reward", outcome))
    assert result.metrics["reward/rewards/outcome"] == 1.0


def test_a_dataset_with_such_a_column_is_no_failure() -> None:
    configure({"on_failure": "mask"})
    prompts = [{"prompt": "a", "outcome": "failed"}, {"prompt": "b", "outcome": "ok"}]
    result, learner = run(Step("reward"), prompts=prompts)
    assert learner.uids == list(range(8))
    assert result.metrics["outcomes/reward/failed"] == 0


# ---- what it costs, and when it ends -------------------------------------------------------------------


def test_the_culprit_is_found_by_halving_and_known_ones_at_once() -> None:
    configure({"on_failure": "mask"})
    calls: list[int] = []

    def counted(completions: list[str], uid: list[int]) -> list[float]:
        calls.append(len(uid))
        return raising(completions, uid)

    run(FunctionReward("reward", counted))
    assert calls == [12, 6, 3, 3, 1, 2, 1, 1, 6]
    calls.clear()

    def named(completions: list[str], uid: list[int]) -> list[float]:
        calls.append(len(uid))
        return returning(float("nan"))(completions, uid)

    run(FunctionReward("reward", named))
    assert calls == [12]


@pytest.mark.parametrize("policy", ["mask", "drop_group"])
def test_a_reward_that_always_fails_ends_the_run_with_its_first_failure(policy: str) -> None:
    calls = 0

    def broken(completions: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        raise ValueError(f"call {calls}")

    configure({"on_failure": policy})
    with pytest.raises(
        ModuleError, match=r"(?s)no sample is left: all have failed.*ValueError: call 1\n"
    ):
        run(FunctionReward("reward", broken))
    calls = 0
    with pytest.raises(
        ModuleError, match=r"(?s)failed on every sample so far.*ValueError: call 1\n"
    ) as raised:
        run(FunctionReward("reward", broken), prompts=["p"] * 100)
    assert calls < 80, "400 samples, of which the first 32 tell"
    assert isinstance(raised.value.__cause__, Exception)


def test_groups_that_all_lose_a_sample_leave_nothing() -> None:
    configure({"on_failure": "drop_group"})

    def first_of_each(completions: list[str], uid: list[int]) -> list[float]:
        return [float("nan") if u % GROUP == 0 else 1.0 for u in uid]

    with pytest.raises(ModuleError, match="no sample is left"):
        run(FunctionReward("reward", first_of_each))


def test_a_train_step_that_takes_too_long_ends_the_run() -> None:
    class Slow(Taught):
        def train_step(self, data_list: list[Batch], iteration: int) -> None:
            time.sleep(30)

    chatlearn.init({"models": {"learner": {"timeout_s": 0.1}}, "runtime": {"output_dir": "run"}})
    with pytest.raises(
        DeadlineError, match=r"learner.train_step took longer than models.learner.timeout_s"
    ):
        run(FunctionReward("reward", returning(1.0)), Slow())
    assert not list(Path("run").glob("checkpoints/episode-*"))


@pytest.mark.parametrize("policy", ["mask", "drop_group", "retry"])
def test_train_steps_cannot_be_given_up(policy: str) -> None:
    chatlearn.init({"models": {"learner": {"on_failure": policy}}})
    with pytest.raises(
        chatlearn.ConfigError, match=f"models.learner.on_failure={policy}, but learner stands in"
    ):
        run(FunctionReward("reward", returning(1.0)))


def test_settings_without_effect_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    configure({"max_retries": 3, "after_retries": "mask"})
    run(FunctionReward("reward", returning(1.0)))
    shown = capsys.readouterr().out
    assert (
        "models.reward.max_retries, models.reward.after_retries: no effect without models.reward.on_failure=retry"
        in shown
    )


# ---- random numbers, streaming, passes, replay, resume -------------------------------------------------


class Noisy(BaseModule):
    """Draws from torch's, Python's and numpy's generators; fails as often as it is told to before it succeeds."""

    def __init__(self, times: int) -> None:
        super().__init__("reward")
        self.left = times
        self.iterations: list[int] = []

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        import random

        import numpy as np

        self.iterations.append(iteration)
        drawn = torch.rand(len(data["uid"])) + random.random() + np.random.random()
        if self.left:
            self.left -= 1
            raise ValueError("not now")
        return {**data, "rewards": drawn}


def test_who_fails_and_then_succeeds_gives_the_same_bits() -> None:
    results = []
    for times in (0, 2):
        configure({"on_failure": "retry"}, generation_batch_size=5, num_episode=2)
        reward = Noisy(times)
        result, learner = run(reward)
        rewards = torch.cat([torch.as_tensor(batch["rewards"]) for batch in learner.batches])
        results.append((learner.uids, rewards.tolist()))
        assert reward.iterations == [0] * times + [0, 1, 2, 3, 4, 5]
        assert result.metrics["outcomes/reward/retried"] == 0, "in the second episode"
    assert results[0] == results[1]


@pytest.mark.parametrize("policy", ["mask", "drop_group"])
@pytest.mark.parametrize("size", [1, 3, None])
def test_streaming_and_call_sizes_change_nothing(policy: str, size: int | None) -> None:
    trained = []
    for kind in ("fixed", "dynamic"):
        configure(
            {"on_failure": policy},
            stream_data_loader_type=kind,
            train_global_batch_size=5,
            num_training_epoch=2,
            generation_batch_size=size,
        )
        result, learner = run(FunctionReward("reward", raising))
        trained.append(learner.trained)
        assert result.metrics["outcomes/reward/failed"] == 1
        left = [u for u in range(12) if policy == "mask" or u // GROUP != 1]
        assert set(learner.uids) == set(left)
        assert learner.trained[0] == left[:5]
        assert {len(step) for step in learner.trained} == {5}
    assert trained[0] == trained[1]


@pytest.mark.parametrize("policy", ["mask", "drop_group"])
def test_several_trainers_and_replay(policy: str) -> None:
    configure({"on_failure": policy}, max_replay_episode=2, num_episode=2, sample_per_episode=8)
    first, second = Taught("first"), Taught("second")
    reward, writer = (
        FunctionReward("reward", raising),
        Step("writer", lambda d: {**d, "completion": d["prompt"]}),
    )

    def trainer_flow(batch: Any) -> None:
        first.train_step(batch)
        second.train_step(batch)

    engine = Engine(
        Environment(lambda batch: reward.forward_step(writer.forward_step(batch))),
        Trainer(trainer_flow),
    )
    result = engine.set_dataset(PROMPTS).learn()
    kept = [u for u in range(8) if policy == "mask" or u // GROUP != 1]
    assert first.trained == second.trained == [kept, [*kept, *range(8, 16)]]
    assert result.metrics["outcomes/reward/failed"] == 0, "of the second episode"
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    by_episode = {row["episode"]: row for row in rows}
    assert by_episode[1]["outcomes/reward/failed"] == 1


@pytest.mark.parametrize("policy", ["mask", "drop_group"])
def test_a_resumed_run_goes_on_as_if_never_stopped(policy: str) -> None:
    def bad_once_per_episode(completions: list[str], uid: list[int]) -> list[float]:
        return [float("nan") if u % 12 == BAD else float(u) for u in uid]

    def learn(episodes: int, folder: str, resume: str) -> Taught:
        configure(
            {"on_failure": policy},
            num_episode=episodes,
            output_dir=folder,
            resume=resume,
            save_episode_interval=1,
        )
        return run(FunctionReward("reward", bad_once_per_episode))[1]

    whole = learn(3, "whole", "never")
    parts = [*learn(1, "parts", "never").trained, *learn(3, "parts", "auto").trained]
    assert whole.trained == parts
    last = [
        json.loads(Path(f, "metrics.jsonl").read_text().splitlines()[-1])
        for f in ("whole", "parts")
    ]
    counts = [{n: v for n, v in row.items() if n.startswith("outcomes/")} for row in last]
    assert counts[0] == counts[1]
    assert counts[0]["outcomes/reward/failed"] == 1


def test_columns_of_a_namespace() -> None:
    chatlearn.init(
        {
            "runtime": {"num_inference_per_prompt": GROUP, "trackers": [], "output_dir": "run"},
            "models": {
                "reward": {"on_failure": "mask", "namespace": "solver"},
                **{name: {"namespace": "solver"} for name in ("policy", "advantage", "learner")},
            },
        }
    )
    policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=4)
    reward, advantage = (
        FunctionReward("reward", returning(float("nan"))),
        GroupAdvantage("advantage"),
    )
    seen: list[Batch] = []

    class Spy(PolicyTrainer):
        def train_step(self, data: Any, iteration: int = 0) -> None:
            seen.extend(map(dict, data))
            super().train_step(data, iteration)

    trainer = Spy("learner", model=tiny_pair)
    engine = Engine(
        Environment(lambda b: advantage.forward_step(reward.forward_step(policy.forward_step(b)))),
        Trainer(lambda b: trainer.train_step(b)),
    )
    result = engine.set_parameter_sync(trainer, policy).set_dataset(PROMPTS).learn()
    (batch,) = seen
    assert batch["outcome"][BAD] == "failed"
    assert batch["rewards"][BAD].isnan()
    assert len(batch["loss_mask"][BAD]) == 0
    tokens = [len(ids) for uid, ids in enumerate(batch["response_ids"]) if uid != BAD]
    assert result.metrics["learner/trained_tokens"] == sum(tokens)


def test_cut_responses_are_counted_and_no_failure() -> None:
    configure({"on_failure": "stop"})
    chatlearn.init(
        {
            "runtime": {"num_inference_per_prompt": GROUP, "trackers": [], "output_dir": "run"},
            "models": {"policy": {"on_failure": "drop_group"}},
        }
    )
    policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=2)
    result, learner = run_policy(policy)
    cut = [learner.row(uid)["finish_reason"] == "length" for uid in range(12)]
    assert [learner.row(uid)["outcome"] == "cut" for uid in range(12)] == cut
    assert result.metrics["outcomes/policy/cut"] == sum(cut) > 0
    assert result.metrics["outcomes/policy/failed"] == 0


def run_policy(policy: PolicyInference) -> tuple[RunResult, Taught]:
    learner = Taught()
    engine = Engine(
        Environment(lambda b: policy.forward_step(b)), Trainer(lambda b: learner.train_step(b))
    )
    return engine.set_dataset(PROMPTS).learn(), learner


# ---- evaluation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mask", "drop_group"])
def test_an_evaluation_measures_those_that_have_values_and_counts_the_others(policy: str) -> None:
    chatlearn.init(
        {
            "runtime": {"eval_num_inference_per_prompt": 4, "generation_batch_size": 3},
            "models": {"reward": {"on_failure": policy}},
        }
    )

    def score(completions: list[str], uid: list[int]) -> list[float]:
        if BAD in uid:
            raise ValueError("no such answer")
        return [float(u % 4 == 0) for u in uid]

    def write(data: Batch) -> Batch:
        return {**data, "completion": data["prompt"]}

    writer, reward = Step("writer", write), FunctionReward("reward", score)
    evaluator = Evaluator(lambda b: reward.eval_step(writer.eval_step(b))).set_dataset(PROMPTS)
    results = evaluator.eval()["reward"]
    assert [uid for batch in results for uid in plain(batch["uid"])] == list(range(12))
    outcomes = [outcome for batch in results for outcome in batch["outcome"]]
    assert outcomes == ["failed" if uid == BAD else "ok" for uid in range(12)]
    assert [len(batch["uid"]) for batch in results] == [3, 3, 3, 3], "as the calls were planned"
    rewards = torch.cat([torch.as_tensor(batch["rewards"]) for batch in results])
    assert [uid for uid in range(12) if rewards[uid].isnan()] == [BAD]
    metrics = evaluator.metrics
    assert metrics["outcomes/reward/failed"] == 1
    assert metrics["reward/avg@4"] == pytest.approx(3 / 11)
    assert metrics["reward/pass@1"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 4) / 3)
    assert metrics["reward/pass@4"] == 1.0
    assert metrics["reward/pass@4_left_out"] == 1
    evaluator.stop()


def test_an_evaluation_that_loses_all_ends_with_the_first_cause() -> None:
    chatlearn.init({"models": {"reward": {"on_failure": "mask"}}})
    writer = Step("writer", lambda d: {**d, "completion": d["prompt"]})

    def broken(completions: list[str]) -> list[float]:
        raise ValueError("no server")

    reward = FunctionReward("reward", broken)
    evaluator = Evaluator(lambda b: reward.eval_step(writer.eval_step(b))).set_dataset(PROMPTS)
    with pytest.raises(ModuleError, match=r"(?s)no sample is left.*no server"):
        evaluator.eval()


# ---- the gradient -------------------------------------------------------------------------------------


class Double(PolicyTrainer):
    """Trains in double precision and keeps the gradient and the batch of its only step."""

    gradient: dict[str, torch.Tensor]
    batch: list[dict[str, Any]]

    def setup(self) -> None:
        super().setup()
        self.model.double()  # type: ignore[union-attr]
        self.before = {n: p.detach().clone() for n, p in self.model.named_parameters()}  # type: ignore[union-attr]

    def train_step(self, data: Any, iteration: int = 0) -> None:
        self.batch = [dict(batch) for batch in data]
        super().train_step(data, iteration)
        parameters = dict(self.model.named_parameters())  # type: ignore[union-attr]
        self.gradient = {name: p.grad.clone() for name, p in parameters.items()}


def length_reward(completions: list[str]) -> list[float]:
    return [float(len(set(text))) for text in completions]


def train(policy: str | None) -> tuple[Double, RunResult]:
    """Train one step; under `policy` the reward of `BAD` is NaN, with None all rewards are there."""

    def score(completions: list[str], uid: list[int]) -> list[float]:
        scores = length_reward(completions)
        return [
            float("nan") if u == BAD and policy else s for u, s in zip(uid, scores, strict=True)
        ]

    configure({"on_failure": policy or "stop"}, train_micro_batch_size=4)
    sampler = PolicyInference("policy", model=tiny_pair, max_new_tokens=6)
    reward, advantage = FunctionReward("reward", score), GroupAdvantage("advantage")
    learner = Double("learner", model=tiny_pair, max_grad_norm=None, lr=1e-3)
    engine = Engine(
        Environment(lambda b: advantage.forward_step(reward.forward_step(sampler.forward_step(b)))),
        Trainer(lambda b: learner.train_step(b)),
    )
    return learner, engine.set_parameter_sync(learner, sampler).set_dataset(PROMPTS).learn()


def oracle(learner: Double, uids: list[int]) -> dict[str, torch.Tensor]:
    """The gradient of these samples alone: GRPO written out, sample by sample, in double precision."""
    from chatlearn.testing import tiny_model

    model = tiny_model().double()
    rows = {
        int(b["uid"][i]): {k: v[i] for k, v in b.items()}
        for b in learner.batch
        for i in range(len(b["uid"]))
    }
    rewards = {u: length_reward([rows[u]["completion"]])[0] for u in uids}
    tokens = sum(len(rows[u]["response_ids"]) for u in uids)
    for uid in uids:
        group = torch.tensor(
            [rewards[u] for u in uids if u // GROUP == uid // GROUP], dtype=torch.float64
        )
        flat = bool((group == group[0]).all())
        advantage = 0.0 if flat else (rewards[uid] - group.mean()) / (group.std() + 1e-6)
        advantage = float(torch.as_tensor(advantage, dtype=torch.float32))
        prompt, response = rows[uid]["prompt_ids"], rows[uid]["response_ids"]
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        ratio = (own - rows[uid]["rollout_logprobs"].double()).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        (loss.sum() / tokens).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("mask", [u for u in range(12) if u != BAD]),
        ("drop_group", [u for u in range(12) if u // GROUP != BAD // GROUP]),
        (None, list(range(12))),
    ],
)
def test_the_gradient_is_that_of_the_batch_without_what_was_lost(
    policy: str | None, left: list[int]
) -> None:
    learner, result = train(policy)
    wanted = oracle(learner, left)
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 1e-4
    for name, gradient in learner.gradient.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-7 * largest)
    rows = {int(u): i for b in learner.batch for i, u in enumerate(b["uid"])}
    assert list(rows) == ([u for u in range(12) if u in left or policy == "mask"])
    lengths = {
        int(u): len(r)
        for b in learner.batch
        for u, r in zip(b["uid"], b["response_ids"], strict=True)
    }
    assert result.metrics["learner/trained_tokens"] == sum(lengths[u] for u in left)


def test_a_step_of_lost_samples_alone_changes_nothing() -> None:
    def first_prompt(completions: list[str], uid: list[int]) -> list[float]:
        return [float("nan") if u < GROUP else float(u % 3) for u in uid]

    configure({"on_failure": "mask"}, train_global_batch_size=4)
    sampler = PolicyInference("policy", model=tiny_pair, max_new_tokens=6)
    reward, advantage = FunctionReward("reward", first_prompt), GroupAdvantage("advantage")
    weights: list[torch.Tensor] = []
    tokens: list[float] = []

    class Watched(PolicyTrainer):
        def train_step(self, data: Any, iteration: int = 0) -> None:
            super().train_step(data, iteration)
            weights.append(self.model.model.norm.weight.detach().clone())  # type: ignore[union-attr]
            tokens.append(sum(map(len, data[0]["response_ids"])))

    learner = Watched("learner", model=tiny_pair, lr=1e-2)
    engine = Engine(
        Environment(lambda b: advantage.forward_step(reward.forward_step(sampler.forward_step(b)))),
        Trainer(lambda b: learner.train_step(b)),
    )
    result = engine.set_parameter_sync(learner, sampler).set_dataset(PROMPTS).learn()
    assert tokens[0] == 0
    assert torch.equal(weights[0], tiny_pair()[0].model.norm.weight)
    assert not torch.equal(weights[1], weights[0])
    assert result.metrics["learner/trained_tokens"] == sum(tokens)


# ---- replicas, and what others see ----------------------------------------------------------------------


def test_another_replica_gets_the_samples_that_one_failed_on() -> None:
    class Flaky(BaseModule):
        def forward_step(self, data: Batch) -> Batch:
            if self.replica_id == 0:
                raise ConnectionError("replica 0 is ill")
            return {**data, "replica": [self.replica_id] * len(data["uid"])}

    configure({"on_failure": "retry", "max_retries": 1, "num_replica": 2}, generation_batch_size=4)
    result, learner = run(Flaky("reward"))
    assert learner.uids == list(range(12))
    assert {learner.row(uid)["replica"] for uid in range(12)} == {1}
    assert result.metrics["outcomes/reward/retried"] > 0


def test_a_lost_sample_reaches_no_module_behind() -> None:
    configure({"on_failure": "mask"}, generation_batch_size=2)
    reward, behind = FunctionReward("reward", raising), Step("behind")
    writer, learner = Step("writer", lambda d: {**d, "completion": d["prompt"]}), Taught()
    engine = Engine(
        Environment(lambda b: behind.forward_step(reward.forward_step(writer.forward_step(b)))),
        Trainer(lambda b: learner.train_step(b)),
    )
    engine.set_dataset(PROMPTS).learn()
    assert behind.sizes == [2, 2, 1, 2, 2, 2]
    assert Counter(behind.prompts) == {"p0": 4, "p1": 3, "p2": 4}
    assert learner.uids == list(range(12))


def test_transcripts_and_the_report_say_what_became_of_a_sample() -> None:
    configure({"on_failure": "mask"}, sample_per_episode=8)
    run(FunctionReward("reward", raising))
    rows = [json.loads(line) for line in Path("run/transcripts.jsonl").read_text().splitlines()]
    (bad,) = [row for row in rows if row["uid"] == BAD]
    assert (bad["outcome"], bad["rewards"], bad["completion"]) == ("failed", None, "answer 5")
    assert "failed: no reward" in Path("run/report.html").read_text()
