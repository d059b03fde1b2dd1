# SPDX-License-Identifier: Apache-2.0
"""Every column comes back from a Parquet file as it went in; what cannot is refused by its type."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.record.cells import UnkeepableError, decode, encode
from chatlearn.record.sameness import same
from chatlearn.record.table import CallEntry, Place, Table, TableWriter

NAN = math.nan
COLUMNS: dict[str, Any] = {
    "float32": torch.rand(3),
    "scalars of no sample": torch.zeros(0),
    "matrix": torch.rand(3, 2),
    "rows without numbers": torch.zeros(2, 0),
    "no rows": torch.zeros(0, 3),
    "three dimensions": torch.rand(2, 3, 4),
    "bfloat16": torch.rand(3).bfloat16(),
    "ragged half": [torch.rand(2).half(), torch.rand(0).half()],
    "float8": torch.rand(3).to(torch.float8_e4m3fn),
    "uint64": torch.tensor([1, 2**63 - 1]).to(torch.uint64),
    "int8": [torch.tensor([1, -1], dtype=torch.int8)],
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j, 3]),
    "ragged complex": [torch.tensor([1 + 2j]), torch.zeros(0, dtype=torch.complex64)],
    "ragged": [torch.tensor([1, 2]), torch.tensor([3])],
    "ragged matrices": [torch.rand(2, 0), torch.rand(0, 3), torch.rand(1, 2)],
    "0-d tensors": [torch.tensor(1.0), torch.tensor(NAN), torch.tensor(-0.0)],
    "dtypes that differ": [torch.rand(2), torch.rand(2).double()],
    "tensor or None": [torch.rand(2), None],
    "tensor or list": [torch.tensor([1, 2]), [1, 2]],
    "texts": ["a", "", None, "ünï\n\0"],
    "half a character": ["\ud800"],
    "ints": [1, None, -(2**63)],
    "big ints": [2**70, 1],
    "floats": [1.0, None, NAN, math.inf, -0.0],
    "bools": [True, None],
    "int and float": [1, 1.0],
    "bool and int": [True, 1],
    "None": [None, None],
    "nothing": [],
    "token ids": [[1, 2], [], None],
    "lists of floats": [[1.5, NAN], [math.inf]],
    "lists of texts": [["a"], ["b", "c"]],
    "lists of None": [[None], [1]],
    "empty lists": [[], []],
    "messages": [[{"role": "user", "content": "1+1="}], [{"role": "system", "content": ""}]],
    "tuples": [(1, "a"), ((), [()])],
    "other keys": [{1: 2, "!x": (3,), None: 4}],
    "sets": [{1, 2}, frozenset({"a"})],
    "bytes": [b"x", bytearray(b"y"), b""],
    "complex numbers": [1 + 2j],
    "arrays": [np.arange(3), np.ones((2, 0)), np.array("x"), np.array(["2020"], "M8[D]")],
    "objects": [np.array(["a", None, (1,)], dtype=object)],
    "numpy scalars": [np.float32(1), np.int64(3), np.bool_(True)],
    "tensors deep inside": [{"a": [torch.rand(2, 2).bfloat16(), torch.zeros(0, 3)]}],
}  # fmt: skip


def round_trip(column: Any, folder: Path, name: str = "x") -> list[Any]:
    writer = TableWriter()
    stored = writer.store("out", name, column, range(len(column)), 0)
    entry = CallEntry(rows=len(column), outputs=[writer.layout([Place(name, "stored", stored)])])
    writer.add(entry, {"uid": range(len(column))})
    writer.write(folder / "x.parquet")
    return Table(folder / "x.parquet").cells(stored)


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_a_column_comes_back_as_it_was(column: Any, tmp_path: Path) -> None:
    back = round_trip(column, tmp_path)
    assert len(back) == len(column)
    assert all(map(same, column, back)), (list(column), back)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
        st.lists(st.floats(width=32), max_size=3).map(torch.tensor),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES, max_size=5))
def test_any_list_of_plain_values_comes_back_as_it_was(values: list[Any]) -> None:
    kind, array = encode(values)
    assert all(map(same, values, decode(kind, array)))


@pytest.mark.parametrize(
    "name", ["a/b", "../x", "", " ", "ünï", "a.b", "x\n", "uid", "out:x", "é" * 300]
)
def test_a_column_may_have_any_name(name: str, tmp_path: Path) -> None:
    assert round_trip([1, 2], tmp_path, name) == [1, 2]


def test_cells_of_a_file_share_no_storage(tmp_path: Path) -> None:
    first, second = round_trip(torch.zeros(2, 3), tmp_path)
    first += 1
    assert second.tolist() == [0, 0, 0]


class Image:
    pass


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ([Image()], "Image"),
        ([[1, Image()]], "Image"),
        ([{"a": (Image(),)}], "Image"),
        ([torch.eye(2).to_sparse()], "sparse"),
        ([torch.eye(2), torch.eye(2).to_sparse()], "sparse"),
        (torch.empty(2, device="meta"), "without data"),
        ([np.zeros(1, dtype=[("a", "i4")])], "array of"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_type(column: Any, named: str) -> None:
    with pytest.raises(UnkeepableError, match=named):
        encode(column)


def test_one_column_may_hold_other_things_in_other_calls(tmp_path: Path) -> None:
    writer = TableWriter()
    calls: list[Any] = [["a", "b"], torch.tensor([1.0]), ["c"], [[1], [2]]]
    for column in calls:
        stored = writer.store("out", "x", column, range(len(column)), writer.rows)
        layout = writer.layout([Place("x", "stored", stored)])
        writer.add(CallEntry(rows=len(column), outputs=[layout]), {"uid": range(len(column))})
    writer.write(tmp_path / "x.parquet")
    table = Table(tmp_path / "x.parquet")
    for call, start, column in zip(table.calls, table.starts, calls, strict=True):
        cells = table.cells(table.layouts[call.outputs[0]][0].stored)
        assert all(map(same, column, cells[start : start + call.rows]))


def test_other_readers_find_plain_types(tmp_path: Path) -> None:
    """`uid`, numbers, texts and token ids have the types that a table of them would have."""
    writer = TableWriter()
    batch: dict[str, Any] = {
        "rewards": torch.tensor([1.0, 0.5]),
        "text": ["a", "b"],
        "ids": [torch.tensor([1, 2]), torch.tensor([3])],
    }
    for name, column in batch.items():
        writer.store("out", name, column, range(2), 0)
    writer.add(CallEntry(rows=2), {"uid": [7, 8]})
    writer.write(tmp_path / "x.parquet")
    rows = pq.ParquetFile(tmp_path / "x.parquet", pre_buffer=False).read(use_threads=False)
    assert rows.to_pylist() == [
        {"uid": 7, "out:rewards": 1.0, "out:text": "a", "out:ids": [1, 2]},
        {"uid": 8, "out:rewards": 0.5, "out:text": "b", "out:ids": [3]},
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (0.0, -0.0),
        (1, True),
        (1, 1.0),
        ([1], (1,)),
        (torch.zeros(1), torch.zeros(1, dtype=torch.float64)),
        (torch.zeros(1), -torch.zeros(1)),
        (torch.zeros(2), torch.zeros(2, 1)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (np.zeros(1), np.zeros(1, dtype=np.float32)),
        ([1, True], [True, 1]),
    ],
)
def test_what_only_looks_alike_is_not_the_same(first: Any, second: Any) -> None:
    assert not same(first, second)
    assert same(first, first)
    assert same(second, second)
