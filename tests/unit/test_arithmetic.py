# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of episodes, case by case."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.arithmetic import (
    check_updates,
    episode_plan,
    episodes_trained_on,
    is_due,
    run_plan,
    times_due,
    train_plan,
)
from chatlearn.config import RuntimeConfig
from chatlearn.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("runtime", "dataset", "prompts", "samples", "steps", "step", "micro", "micros", "rest"),
    [
        ({}, 10, 10, 10, 1, 10, 10, 1, 0),
        ({"num_inference_per_prompt": 4}, 10, 10, 40, 1, 40, 40, 1, 0),
        ({"sample_per_episode": 8}, 3, 8, 8, 1, 8, 8, 1, 0),
        ({"sample_per_episode": 8}, None, 8, 8, 1, 8, 8, 1, 0),
        ({"sample_per_episode": 8, "num_inference_per_prompt": 8}, 3, 1, 8, 1, 8, 8, 1, 0),
        ({"train_global_batch_size": 4}, 10, 10, 10, 3, 4, 4, 1, 2),
        ({"train_global_batch_size": 5}, 10, 10, 10, 2, 5, 5, 1, 0),
        ({"train_global_batch_size": 4, "incomplete_step": "drop_last"}, 10, 10, 10, 2, 4, 4, 1, 2),
        ({"train_global_batch_size": 4, "incomplete_step": "keep"}, 10, 10, 10, 3, 4, 4, 1, 2),
        ({"train_global_batch_size": 64}, 10, 10, 10, 1, 64, 64, 1, 10),
        ({"train_global_batch_size": 64, "incomplete_step": "keep"}, 10, 10, 10, 1, 10, 10, 1, 0),
        ({"train_global_batch_size": 8, "train_micro_batch_size": 3}, 8, 8, 8, 1, 8, 3, 3, 0),
        ({"train_micro_batch_size": 3}, 8, 8, 8, 1, 8, 3, 3, 0),
        ({"train_micro_batch_size": 99}, 8, 8, 8, 1, 8, 8, 1, 0),
    ],
)
def test_episode(
    runtime: dict[str, Any],
    dataset: int | None,
    prompts: int,
    samples: int,
    steps: int,
    step: int,
    micro: int,
    micros: int,
    rest: int,
) -> None:
    plan = episode_plan(RuntimeConfig(**runtime), dataset)
    training = plan.training
    assert (plan.prompts, plan.samples, training.steps_per_pass) == (prompts, samples, steps)
    assert (training.step_samples, training.micro_batch_size) == (step, micro)
    assert (training.micro_batches, training.rest) == (micros, rest)


def test_step_sizes() -> None:
    def sizes(policy: str) -> list[int]:
        runtime = RuntimeConfig(train_global_batch_size=4, incomplete_step=policy)  # type: ignore[arg-type]
        return episode_plan(runtime, 10).training.step_sizes()

    assert sizes("fill") == [4, 4, 4]
    assert sizes("drop_last") == [4, 4]
    assert sizes("keep") == [4, 4, 2]


def test_run() -> None:
    runtime = RuntimeConfig(
        num_episode=5,
        sample_per_episode=12,
        num_inference_per_prompt=2,
        train_global_batch_size=5,
        num_training_epoch=2,
    )
    plan = run_plan(runtime, 20)
    assert (plan.samples, plan.prompts, plan.updates, plan.dataset_passes) == (60, 30, 30, 1.5)
    assert run_plan(runtime, None).dataset_passes is None


@pytest.mark.parametrize(
    ("runtime", "dataset", "text"),
    [
        (
            {
                "sample_per_episode": 512,
                "num_inference_per_prompt": 8,
                "train_global_batch_size": 128,
                "train_micro_batch_size": 8,
            },
            64,
            "1 episode = 64 prompts x 8 = 512 samples = 4 updates x 16 micro-batches of 8\n"
            "1 run = 1 episode = 512 samples = 4 updates\n"
            "64 prompts = 1 pass over a dataset of 64",
        ),
        (
            {"num_episode": 2, "sample_per_episode": 6},
            8,
            "1 episode = 6 samples = 1 update x 1 micro-batch of 6\n"
            "1 run = 2 episodes = 12 samples = 2 updates\n"
            "12 prompts = 1.5 passes over a dataset of 8",
        ),
        (
            {
                "sample_per_episode": 10,
                "train_global_batch_size": 8,
                "train_micro_batch_size": 3,
                "num_training_epoch": 2,
            },
            None,
            "1 episode = 10 samples = 2 passes x 2 updates x 3 micro-batches of 3 (the last of 2)\n"
            "the last update of a pass has 2 samples left and is filled up with the first 6 samples, which"
            " count twice in the gradient of each pass (incomplete_step: fill)\n"
            "1 run = 1 episode = 10 samples = 4 updates",
        ),
    ],
    ids=["grpo", "passes", "rest"],
)
def test_describe(runtime: dict[str, Any], dataset: int | None, text: str) -> None:
    assert run_plan(RuntimeConfig(**runtime), dataset).describe() == text


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("drop_last", "the last 2 samples of a pass are not trained on"),
        ("keep", "has only 2 samples"),
        ("fill", "filled up with the first 2 samples, which count twice in the gradient"),
    ],
)
def test_describe_says_what_becomes_of_a_rest(policy: Any, text: str) -> None:
    runtime = RuntimeConfig(train_global_batch_size=4, incomplete_step=policy)
    assert text in episode_plan(runtime, 10).describe()


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        episode_plan(RuntimeConfig(), 0)
    with pytest.raises(DataError, match="empty"):
        episode_plan(RuntimeConfig(sample_per_episode=4), 0)
    with pytest.raises(ConfigError, match=r"set runtime\.sample_per_episode"):
        episode_plan(RuntimeConfig(), None)
    dropping = RuntimeConfig(train_global_batch_size=8, incomplete_step="drop_last")
    with pytest.raises(ConfigError, match="no update is ever full") as raised:
        check_updates(dropping, 4, "grpo.yaml:3 runtime.train_global_batch_size")
    assert raised.value.place == "grpo.yaml:3 runtime.train_global_batch_size"


def test_replayed_episodes_may_make_the_update_that_one_is_too_small_for() -> None:
    def runtime(**more: int) -> RuntimeConfig:
        return RuntimeConfig(train_global_batch_size=8, incomplete_step="drop_last", **more)  # type: ignore[arg-type]

    check_updates(runtime(num_episode=2, max_replay_episode=2), 4, "")
    for too_few in ({"num_episode": 1}, {"num_episode": 2, "replay_episode_offset": 1}):
        with pytest.raises(ConfigError, match="no update is ever full"):
            check_updates(runtime(max_replay_episode=2, **too_few), 4, "")


@given(
    samples=st.integers(1, 200),
    step=st.integers(1, 200) | st.none(),
    micro=st.integers(1, 200) | st.none(),
    policy=st.sampled_from(["fill", "keep"]),
)
def test_the_parts_add_up(samples: int, step: int | None, micro: int | None, policy: Any) -> None:
    if micro and step and micro > step:
        micro = step
    runtime = RuntimeConfig(
        train_global_batch_size=step, train_micro_batch_size=micro, incomplete_step=policy
    )
    plan = episode_plan(runtime, samples).training
    trained = sum(plan.step_sizes())
    assert trained == samples if policy == "keep" else trained - samples < plan.step_samples
    assert trained >= samples
    full = (plan.micro_batches - 1) * plan.micro_batch_size
    assert full < plan.step_samples <= full + plan.micro_batch_size


@pytest.mark.parametrize(
    ("samples", "step", "text"),
    [
        (10, 11, "filled up with the first 1 sample, which counts twice"),
        (10, 20, "which count twice"),
        (10, 64, "each counts 6 or 7 times"),
        (10, 60, "each counts 6 times"),
        (10, 7, "has 3 samples left and is filled up with the first 4 samples, which count twice"),
    ],
)
def test_describe_says_how_often_samples_count(samples: int, step: int, text: str) -> None:
    plan = train_plan(RuntimeConfig(train_global_batch_size=step), samples)
    assert text in (plan.describe_rest() if plan.rest else "")


def test_what_nobody_trains_has_no_updates() -> None:
    runtime = RuntimeConfig(num_episode=2, train_global_batch_size=4)
    assert run_plan(runtime, 10, trains=False).describe_episodes() == (
        "1 episode = 10 samples\n1 run = 2 episodes = 20 samples"
    )


@pytest.mark.parametrize(
    ("kept", "offset", "lengths"),
    [
        (0, 0, [1, 1, 1, 1]),
        (1, 0, [1, 1, 1, 1]),
        (2, 0, [1, 2, 2, 2]),
        (2, 2, [1, 1, 1, 2]),
        (-1, 0, [1, 2, 3, 4]),
        (-1, 1, [1, 1, 2, 3]),
        (3, 9, [1, 1, 1, 1]),
    ],
)
def test_replay(kept: int, offset: int, lengths: list[int]) -> None:
    runtime = RuntimeConfig(
        num_episode=4,
        max_replay_episode=kept,
        replay_episode_offset=offset,
        train_global_batch_size=3,
    )
    assert [episodes_trained_on(runtime, episode) for episode in range(4)] == lengths
    plan = run_plan(runtime, 5)
    assert plan.updates == sum(-(-5 * length // 3) for length in lengths)
    assert run_plan(runtime, 5, chooses=True).updates is None
    if kept:  # the updates of one episode alone would mislead
        assert plan.describe_episodes() == (
            f"1 episode = 5 samples\n1 run = 4 episodes = 20 samples = {plan.updates} updates"
        )


@given(st.integers(0, 50), st.none() | st.integers(1, 60))
def test_what_is_due(episodes: int, interval: int | None) -> None:
    due = [done for done in range(1, episodes + 1) if is_due(done, interval)]
    assert times_due(episodes, interval) == len(due)
    assert all(interval and done % interval == 0 for done in due)
