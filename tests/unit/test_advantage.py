# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from chatlearn.errors import BatchError, RewardError
from chatlearn.models import GroupAdvantage
from chatlearn.module import state_of


def batch(rewards, groups):
    return {
        "uid": torch.arange(10, 10 + len(rewards)),
        "prompt_uid": torch.tensor(groups),
        "rewards": torch.tensor(rewards),
    }


def test_advantages_are_float32_and_relative_to_the_group():
    module = GroupAdvantage("advantage")
    got = module.forward_step(batch([1.0, 0.0, 5.0, 5.0], [0, 0, 1, 1]))["advantages"]
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([0.7071058, -0.7071058, 0.0, 0.0])


def test_it_is_called_with_whole_groups():
    assert GroupAdvantage.batch_by == "group"


def test_settings_choose_the_variant():
    module = GroupAdvantage("advantage", normalise_std=False, leave_one_out=True)
    got = module.forward_step(batch([1.0, 0.0, 2.0], [0, 0, 0]))["advantages"]
    assert got.tolist() == pytest.approx([0.0, -1.5, 1.5])


def test_it_reports_rewards_and_groups_without_signal():
    module = GroupAdvantage("advantage")
    module.forward_step(batch([1.0, 0.0, 5.0, 5.0], [0, 0, 1, 1]))
    assert state_of(module).metrics == [
        {
            "reward_mean": 2.75,
            "reward_std": pytest.approx(2.277608),
            "zero_std_fraction": 0.5,
        }
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_names_the_sample(bad):
    with pytest.raises(RewardError, match=r"uids \[11\]"):
        GroupAdvantage("advantage").forward_step(batch([1.0, bad], [0, 0]))
    named = {**batch([1.0, bad], [0, 0]), "uid": ["a", "b"]}
    with pytest.raises(RewardError, match=r"uids \['b'\]"):
        GroupAdvantage("advantage").forward_step(named)


@pytest.mark.parametrize("column", ["rewards", "prompt_uid"])
def test_a_missing_column_is_named(column):
    data = batch([1.0], [0])
    del data[column]
    with pytest.raises(BatchError, match=column):
        GroupAdvantage("advantage").forward_step(data)


def test_groups_may_be_named_by_strings():
    data = {"prompt_uid": ["a", "b", "a"], "rewards": [1.0, 3.0, 0.0]}
    got = GroupAdvantage("advantage").forward_step(data)["advantages"]
    assert got.tolist() == pytest.approx([0.7071058, 3.0, -0.7071058])


def test_an_empty_batch_stays_empty():
    data = {"prompt_uid": torch.empty(0, dtype=torch.int64), "rewards": torch.empty(0)}
    assert GroupAdvantage("advantage").forward_step(data)["advantages"].shape == (0,)


@pytest.mark.parametrize("wrong", [None, math.nan, math.inf])
def test_what_to_do_about_samples_without_a_reward_is_told(wrong):
    batch = {"uid": [7, 8], "prompt_uid": torch.tensor([0, 0]), "rewards": [1.0, wrong]}
    with pytest.raises(RewardError, match="1 rewards are not finite") as caught:
        GroupAdvantage("advantage").forward_step(batch)
    assert caught.value.place.endswith("sample uids [8]")
    assert (
        "on_failure of the module that makes `rewards` to mask, drop_group or retry"
        in caught.value.fix
    )
