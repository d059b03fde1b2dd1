# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of episodes, case by case."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.arithmetic import episode_plan, run_plan
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
    assert (plan.prompts, plan.samples, plan.steps_per_pass) == (prompts, samples, steps)
    assert (plan.step_samples, plan.micro_batch_size, plan.micro_batches) == (step, micro, micros)
    assert plan.rest == rest


def test_generation_calls() -> None:
    assert episode_plan(RuntimeConfig(), 10).generation_calls == 1
    plan = episode_plan(RuntimeConfig(generation_batch_size=4), 10)
    assert (plan.generation_batch_size, plan.generation_calls) == (4, 3)


def test_step_sizes() -> None:
    def sizes(policy: str) -> list[int]:
        runtime = RuntimeConfig(train_global_batch_size=4, incomplete_step=policy)  # type: ignore[arg-type]
        return episode_plan(runtime, 10).step_sizes()

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
            "the last update of a pass has 2 samples left and is filled up with the episode's"
            " first 6 (incomplete_step: fill)\n"
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
    with pytest.raises(ConfigError, match="no update is ever full"):
        episode_plan(RuntimeConfig(train_global_batch_size=8, incomplete_step="drop_last"), 4)


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
    plan = episode_plan(runtime, samples)
    trained = sum(plan.step_sizes())
    assert trained == samples if policy == "keep" else trained - samples < plan.step_samples
    assert trained >= samples
    full = (plan.micro_batches - 1) * plan.micro_batch_size
    assert full < plan.step_samples <= full + plan.micro_batch_size
