# SPDX-License-Identifier: Apache-2.0
"""Prompts from lists, JSONL, Parquet and saved datasets; malformed rows are refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatlearn.data.feed import Feed
from chatlearn.data.prompts import PromptDataset, load_prompts
from chatlearn.data.sampler import Draw
from chatlearn.errors import ChatLearnError, DataError

CHAT = [{"role": "user", "content": "1+1="}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "answer": 2, "meta": {"level": [1]}},
    {"prompt": "2+2=", "answer": 4, "meta": {"level": [2]}},
]


def rows_of(source: Any) -> list[dict[str, Any]]:
    dataset = PromptDataset(load_prompts(source))
    return [dataset[i] for i in range(len(dataset))]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_lists_of_text_dicts_and_anything() -> None:
    assert rows_of(["a", "b"]) == [{"prompt": "a"}, {"prompt": "b"}]
    assert rows_of(ROWS) == ROWS
    assert rows_of([CHAT]) == [{"prompt": CHAT}]


def test_jsonl(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", [*ROWS])
    assert rows_of(str(path)) == rows_of(path) == ROWS
    path.write_text(path.read_text().replace("\n", "\n\n") + "  \n")
    assert rows_of(path) == ROWS, "blank lines are nothing"


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = tmp_path / "data.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    assert rows_of(path) == ROWS
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="no readable Parquet file") as raised:
        load_prompts(path)
    assert raised.value.place == str(path)


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one") == ROWS
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    assert rows_of(str(tmp_path / "two")) == ROWS
    with pytest.raises(DataError, match=r"no split 'other', only \['test', 'train'\]"):
        load_prompts(tmp_path / "two", split="other")
    with pytest.raises(DataError, match=r"DatasetDict with the keys \['test', 'train'\]"):
        load_prompts(datasets.DatasetDict(both))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{not json", "line is no JSON"),
        ("3", "must be an object with named columns, not int"),
        ('{"prompt": "x"}', r"columns differ from the first row's: \['answer', 'meta'\]"),
        ('{"prompt": "", "answer": 1, "meta": 1}', "the prompt is empty text"),
        ('{"prompt": null, "answer": 1, "meta": 1}', "the prompt is a NoneType"),
        ('{"prompt": 5, "answer": 1, "meta": 1}', "the prompt is a int"),
        ('{"prompt": [], "answer": 1, "meta": 1}', "not of chat messages"),
        ('{"prompt": [{"role": "user"}], "answer": 1, "meta": 1}', "not of chat messages"),
    ],
)
def test_malformed_rows_are_refused_with_file_and_line(
    tmp_path: Path, line: str, what: str
) -> None:
    path = jsonl(tmp_path / "data.jsonl", ROWS)
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError, match=what) as raised:
        load_prompts(path)
    assert raised.value.place == f"{path}:4"


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    for source, what in (
        ([], "is empty"),
        (tmp_path / "empty.jsonl", "is empty"),
        (tmp_path / "no.jsonl", "does not exist"),
        (tmp_path / "no.parquet", "does not exist"),
        (tmp_path / "x.csv", "cannot be read from a .csv file"),
        (3, "must be a list, a dataset or a path, not int"),
        ((p for p in "ab"), "not generator"),
        ({"prompt": ["a"]}, r"a dict with the keys \['prompt'\]"),
    ):
        with pytest.raises(DataError, match=what):
            load_prompts(source)  # type: ignore[arg-type]


def test_columns_of_the_engine_are_not_the_datasets() -> None:
    with pytest.raises(DataError, match=r"columns \['uid'\]"):
        rows_of([{"prompt": "x", "uid": 3}])


# ---- feed -----------------------------------------------------------------------------------------


class Data:
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.fetched.append(index)
        return self.rows[index]


def feed(data: Any, group: int = 1, first: int = 0) -> Feed:
    return Feed([data], [Draw(0, i) for i in range(len(data))], group, first)


def test_any_range_with_uids_and_groups() -> None:
    data = Data([{"x": i} for i in range(3)])
    made = feed(data, group=2, first=10)
    assert len(made) == 6
    batch = made.batch(1, 4)
    assert batch["x"].tolist() == [0, 1, 1]
    assert batch["uid"].tolist() == [21, 22, 23]
    assert batch["prompt_uid"].tolist() == [10, 11, 11]
    made.batch(0, 6)
    assert data.fetched == [0, 1, 2], "each row is fetched once"


def test_rows_are_never_changed_through_a_batch() -> None:
    rows: list[Any] = [{"x": {"y": [1]}}]
    made = feed(Data(rows), group=2)
    made.batch(0, 2)["x"][0]["y"].append(2)
    assert rows == [{"x": {"y": [1]}}]
    assert made.batch(0, 2)["x"] == [{"y": [1]}] * 2


def test_collate_fn_makes_the_batch() -> None:
    class Collating(Data):
        def collate_fn(self, rows: list[Any]) -> Any:
            return {"sum": [sum(rows)] * len(rows)}

    assert feed(Collating([1, 2])).batch(0, 2)["sum"] == [3, 3]


@pytest.mark.parametrize(
    ("made", "what"),
    [
        ({"x": [1]}, "made 1 samples of 2 rows"),
        ({"x": [1, 2], "uid": [1, 2]}, r"columns \['uid'\]"),
        ([1, 2], "must return a dict"),
        ({"x": [1, 2], "y": [1]}, "disagree"),
    ],
)
def test_collate_fn_is_checked(made: Any, what: str) -> None:
    class Collating(Data):
        def collate_fn(self, rows: list[Any]) -> Any:
            return made

    with pytest.raises(ChatLearnError, match=what):
        feed(Collating([1, 2])).batch(0, 2)


def test_a_dataset_that_fails_is_named_with_its_row() -> None:
    class Failing(Data):
        def __getitem__(self, index: int) -> Any:
            raise KeyError("image")

    with pytest.raises(DataError, match="the dataset failed: KeyError: 'image'") as raised:
        feed(Failing([1])).batch(0, 1)
    assert raised.value.place == "Failing, row 0"
    assert isinstance(raised.value.__cause__, KeyError)
