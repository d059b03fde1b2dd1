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
        ('{"prompt": [{"role": "user"}], "answer": 1, "meta": 1}', "message 0 has no content"),
        ('{"prompt": [{"role": "user", "content": null}], "answer": 1, "meta": 1}', "no content"),
        ('{"prompt": [{"role": "user", "content": 5}], "answer": 1, "meta": 1}', "is a int"),
        ('{"prompt": [{"content": "x"}], "answer": 1, "meta": 1}', "message 0 has no role"),
        ('{"prompt": ["x"], "answer": 1, "meta": 1}', "message 0 is a str"),
        ('{"prompt": "x", "answer": NaN, "meta": 1}', "column 'answer' holds a number that is not"),
        ('{"prompt": "x", "answer": 1, "meta": {"a": [-Infinity]}}', "column 'meta' holds"),
        ('{"prompt": "x", "answer": 1e999, "meta": 1}', "column 'answer' holds"),
        ('{"prompt": "x", "answer": ' + "1" * 5000 + "}", "line cannot be read"),
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


def test_calls_of_tools_need_no_content(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    rows = [
        {"prompt": [*CHAT, call]},
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
    ]
    assert rows_of(jsonl(tmp_path / "data.jsonl", rows)) == rows


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert rows_of(path) == ROWS


def test_text_that_is_no_utf_8_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + '{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(
        DataError, match="no UTF-8 text: byte 0xe9 at byte 13 of the line"
    ) as raised:
        load_prompts(path)
    assert raised.value.place == f"{path}:3"
    assert raised.value.fix == "save the file as UTF-8"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": x}', "Expecting value at column 12"),
        ('{"prompt": "ab', "Unterminated string starting at column 12; the line ends at column 14"),
        ('{"prompt": "ab"', "Expecting ',' delimiter at column 16; the line ends at column 15"),
        ("{", "at column 2; the line ends at column 1"),
        ('{"prompt": "a"} {}', "Extra data at column 17"),
    ],
)
def test_the_column_of_what_is_no_json(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError) as raised:
        load_prompts(path)
    assert raised.value.cause.endswith(what)
    assert ("cut off" in raised.value.fix) == ("ends" in what)


def test_parquet_rows_are_held_to_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = tmp_path / "data.parquet"
    for row, what in (
        ({"prompt": None}, "the prompt is a NoneType"),
        ({"prompt": [{"role": "user", "content": None}]}, "message 0 has no content"),
        ({"prompt": "x", "answer": float("nan")}, "column 'answer' holds a number"),
    ):
        parquet.write_table(pa.Table.from_pylist([row]), path)
        with pytest.raises(DataError, match=what) as raised:
            load_prompts(path)
        assert raised.value.place == f"{path}, row 0"


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (
            [{"prompt": "a", "answer": 1}, {"prompt": "b"}],
            r"differ from the first row's: \['answer'\]",
        ),
        ([{"prompt": "a"}, {"promt": "b"}], r"differ .*: \['prompt', 'promt'\]"),
        ([{"prompt": "a", "answer": 1}, "b"], r"differ .*: \['answer'\]"),
        ([{"prompt": "a"}, {"prompt": None}], "the prompt is None"),
        (({"prompt": "a"}, {"prompt": ""}), "the prompt is empty text"),
        (["a", ""], "the prompt is empty text"),
    ],
)
def test_rows_in_memory_that_no_module_could_use(rows: Any, what: str) -> None:
    with pytest.raises(DataError, match=what) as raised:
        load_prompts(rows, what="the dataset of env_flow")
    assert raised.value.place == "the dataset of env_flow, row 1"
    assert raised.value.fix


def test_rows_in_memory_may_otherwise_be_anything() -> None:
    import torch

    for rows in (
        [torch.zeros(3), torch.ones(3)],
        [0, 1.5, float("nan")],
        [{"prompt": torch.tensor([])}, {"prompt": 0}],
        [{"x": None}, {"x": ""}],
        [CHAT, [{"anything": None}]],
    ):
        assert load_prompts(rows) is rows


def test_items_of_other_datasets_are_not_made_to_be_checked() -> None:
    data = Data(["", None])
    assert load_prompts(data) is data
    assert data.fetched == []


def test_prompts_of_hugging_face_datasets(tmp_path: Path) -> None:
    import datasets

    texts: list[str | None] = ["a"] * 1500
    for missing, what in ((None, "is None"), ("", "is empty text")):
        bad = datasets.Dataset.from_dict({"prompt": [*texts, missing], "x": [None] * 1501})
        with pytest.raises(DataError, match=what) as raised:
            load_prompts(bad, what="the dataset of env_flow")
        assert raised.value.place == "the dataset of env_flow, row 1500"
        assert rows_of(bad.select(range(3))) == [{"prompt": "a", "x": None}] * 3
        bad.save_to_disk(tmp_path / what)
        with pytest.raises(DataError, match=what) as raised:
            load_prompts(tmp_path / what)
        assert raised.value.place == f"{tmp_path / what}, row 1500"
    filled = bad.with_transform(lambda rows: {"prompt": [p or "z" for p in rows["prompt"]]})
    assert len(load_prompts(filled)) == 1501, "a transform makes the rows"
    for other in ({"x": [None, ""]}, {"prompt": [CHAT, CHAT]}, {"prompt": [1, 2]}):
        assert len(load_prompts(datasets.Dataset.from_dict(other).with_format("torch"))) == 2


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


@pytest.mark.parametrize(
    ("name", "meant"), [("train.jsnl", "train.jsonl"), ("a.paruqet", "a.parquet")]
)
def test_a_misspelt_ending_is_refused_before_the_hub_is_asked(name, meant, monkeypatch):
    monkeypatch.setattr("chatlearn.data.prompts._load_hugging_face", pytest.fail)
    with pytest.raises(DataError, match=f"did you mean {meant}"):
        load_prompts(name)
