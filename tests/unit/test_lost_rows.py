# SPDX-License-Identifier: Apache-2.0
"""What stands in a batch for samples that were lost: nothing that looks like a value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from chatlearn.flow.batch import size
from chatlearn.flow.batching import isolate, select
from chatlearn.runtime.lost_rows import LostSample, add_loss_masks, insert_lost
from chatlearn.training.samples import without_lost


def lost(uid: int, outcome: str = "failed", **known: Any) -> LostSample:
    return LostSample(uid, prompt_uid=uid // 4, outcome=outcome, known=known)


def full() -> dict[str, Any]:
    """A batch of two samples with every kind of column."""
    return {
        "uid": torch.tensor([4, 6]),
        "prompt_uid": torch.tensor([1, 1]),
        "prompt": ["a", "b"],
        "completion": ["x", "y"],
        "prompt_ids": [torch.tensor([1, 2]), torch.tensor([3])],
        "response_ids": [torch.tensor([5, 6, 7]), torch.tensor([8])],
        "rollout_logprobs": [torch.tensor([-0.1, -0.2, -0.3]), torch.tensor([-0.4])],
        "rewards": torch.tensor([1.0, 0.5]),
        "solver/rewards": torch.tensor([1, 0]),
        "passed": torch.tensor([True, False]),
        "hits": [3, 4],
        "share": [0.5, None],
        "padded_ids": torch.tensor([[1, 2], [3, 0]]),
        "embedding": torch.ones(2, 3),
        "solver/outcome": ["ok", "cut"],
        "tags": [["t"], []],
        "details": [{"k": 1}, None],
    }


def test_numbers_become_nan_texts_stay_and_ragged_columns_are_empty() -> None:
    known = {"prompt": "q", "completion": "z", "prompt_ids": torch.tensor([9, 9])}
    batch = insert_lost(full(), {1: lost(5, "timed_out", **known)}, full())
    row = {name: column[1] for name, column in batch.items()}
    assert batch["uid"].tolist() == [4, 5, 6]  # type: ignore[union-attr]
    assert batch["uid"].dtype == batch["prompt_uid"].dtype == torch.int64  # type: ignore[union-attr]
    assert int(row["prompt_uid"]) == 1
    assert (row["prompt"], row["completion"]) == ("q", "z")
    assert row["prompt_ids"].tolist() == [9, 9]
    for name in ("rewards", "solver/rewards", "passed", "hits", "share"):
        assert math.isnan(row[name]), name
    assert row["embedding"].isnan().all()
    assert row["padded_ids"].tolist() == [0, 0], "tokens that are padding"
    for name in ("response_ids", "rollout_logprobs"):
        assert len(row[name]) == 0
        assert row[name].dtype == full()[name][0].dtype
    assert row["tags"] == []
    assert row["details"] is None
    assert batch["outcome"] == ["ok", "timed_out", "ok"]
    assert batch["solver/outcome"] == ["ok", "timed_out", "cut"]


def test_the_others_are_as_they_were() -> None:
    original = full()
    batch = insert_lost(isolate(original), {0: lost(3), 3: lost(7)}, original)
    assert {size({name: column}) for name, column in batch.items()} == {4}
    living = select({name: batch[name] for name in original}, [1, 2])
    for name, column in original.items():
        assert list(map(str, living[name])) == list(map(str, column)) or torch.equal(
            torch.as_tensor(living[name], dtype=torch.float64),
            torch.as_tensor(column, dtype=torch.float64),
        )


def test_without_known_texts_they_are_empty() -> None:
    batch = insert_lost(full(), {0: lost(3)}, full())
    assert batch["completion"][0] == ""
    assert len(batch["prompt_ids"][0]) == 0


def test_a_batch_of_lost_samples_alone_has_the_columns_of_others() -> None:
    batch = insert_lost({}, {0: lost(3, prompt="q"), 1: lost(4)}, full())
    assert batch.keys() == {*full(), "outcome"}
    assert batch["prompt"] == ["q", ""]
    assert torch.as_tensor(batch["rewards"]).isnan().all()
    assert batch["outcome"] == ["failed", "failed"]


def test_with_none_lost_only_the_outcome_is_new() -> None:
    batch = insert_lost(full(), {}, full())
    assert batch.keys() - full().keys() == {"outcome"}
    assert batch["outcome"] == ["ok", "ok"]
    assert batch["passed"].dtype == torch.bool  # type: ignore[union-attr]


def test_a_mask_is_made_for_every_response_and_given_ones_stay() -> None:
    given = {**full(), "solver/response_ids": full()["response_ids"]}
    given["solver/loss_mask"] = [torch.tensor([True, False, True]), torch.tensor([False])]
    batch = add_loss_masks(insert_lost(given, {1: lost(5)}, given))
    assert [mask.tolist() for mask in batch["loss_mask"]] == [[True] * 3, [], [True]]
    assert [mask.tolist() for mask in batch["solver/loss_mask"]] == [
        [True, False, True],
        [],
        [False],
    ]
    padded = {"uid": [1, 2], "response_ids": torch.tensor([[1, 2], [3, 4]])}
    masks = add_loss_masks(insert_lost(padded, {1: lost(5)}, padded))["loss_mask"]
    assert masks.tolist() == [[True, True], [False, False], [True, True]]  # type: ignore[union-attr]


@pytest.mark.parametrize("outcomes", [["ok", "cut"], None])
def test_a_batch_without_lost_samples_is_trained_on_as_it_is(outcomes: list[str] | None) -> None:
    batch = full() if outcomes is None else {**full(), "outcome": outcomes}
    assert without_lost([batch]) == [batch]


def test_lost_samples_leave_every_column() -> None:
    batch = insert_lost(full(), {1: lost(5), 2: lost(7, "timed_out")}, full())
    (living,) = without_lost([batch])
    assert living["uid"].tolist() == [4, 6]
    assert living["completion"] == ["x", "y"]
    assert {len(column) for column in living.values()} == {2}
