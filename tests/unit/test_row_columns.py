# SPDX-License-Identifier: Apache-2.0
"""What the first rows of a dataset show of its columns."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch

from chatlearn.data.row_columns import kinds_shown, row_columns

MESSAGES = [{"role": "user", "content": "1+1="}]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "b"], "text"),
        ([1, 2.5, True], "number"),
        ([np.int64(1), np.float32(2)], "number"),
        ([torch.tensor(1), torch.tensor(2.5)], "number"),
        ([[1, 2], (3, 4, 5)], "tokens"),
        ([torch.tensor([1, 2]), np.array([1, 2, 3])], "tokens"),
        ([[1.0, 2], [0.5, 1.5]], "floats"),
        ([[True, False], torch.tensor([True, True])], "flags"),
        ([MESSAGES, [*MESSAGES, *MESSAGES]], "messages"),
        ([["a", "b"]], None),
        ([[1], [2]], None),  # one number may pass for a list of one
        ([torch.zeros(2, 2)], None),
        ([None, "a"], None),
        (["a", 1], None),
        ([{"a": 1}, {}], None),
        ([], None),
        ([[]], None),
    ],
)
def test_the_kind_of_a_column(values: list[Any], kind: str | None) -> None:
    assert kinds_shown(values) == (frozenset() if kind is None else {kind})


def test_rows_that_are_there() -> None:
    assert row_columns(["1+1="]) == {"prompt": {"text"}}
    assert row_columns(({"prompt": MESSAGES, "n": None},)) == {
        "prompt": {"messages"},
        "n": frozenset(),
    }
    late = [{"answer": "1"}] * 8 + [{"answer": 1}]
    assert row_columns(late) == {"answer": {"text"}}


def test_a_hugging_face_dataset_shows_what_its_format_gives() -> None:
    rows = datasets.Dataset.from_list(
        [{"prompt": "1", "ids": [1, 2]}, {"prompt": "2", "ids": [3, 4]}]
    )
    assert row_columns(rows) == {"prompt": {"text"}, "ids": {"tokens"}}
    assert row_columns(rows.with_format("torch", columns=["ids"])) == {"ids": {"tokens"}}
    assert row_columns(rows.with_transform(lambda batch: batch)) is None


class Lazy:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an item was made")


class Listed(list[Any]):
    """A list that may make other rows than it holds."""


@pytest.mark.parametrize("rows", [Lazy(), Listed(["a"])])
def test_rows_that_are_made_when_asked_are_left_alone(rows: Any) -> None:
    assert row_columns(rows) is None
