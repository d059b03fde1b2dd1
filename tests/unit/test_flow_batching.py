# SPDX-License-Identifier: Apache-2.0
"""Batches split, merged, joined, collated, padded and copied: order kept, nothing shared, errors named."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.errors import BatchError
from chatlearn.flow import batching as b
from chatlearn.flow.batch import join, samples, size, take
from chatlearn.runtime.store import SampleStore


def batch(n: int, start: int = 0) -> dict[str, Any]:
    values = range(start, start + n)
    return {
        "tensor": torch.tensor([[v, v] for v in values]).reshape(n, 2),
        "ragged": [torch.full((v % 3 + 1,), v) for v in values],
        "text": [str(v) for v in values],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@given(st.integers(1, 12), st.lists(st.integers(0, 12), max_size=5))
def test_split_and_merge_are_inverse(n: int, cuts: list[int]) -> None:
    whole = batch(n)
    borders = sorted({0, n, *(c for c in cuts if c <= n)})
    parts = [take(whole, i, j) for i, j in itertools.pairwise(borders)]
    assert same(b.merge(parts), whole)
    store = SampleStore()
    for part in parts:
        store.append(part)
    assert len(store) == n
    assert same(store.everything(), whole)


@given(st.integers(1, 8), st.data())
def test_gather_any_positions(n: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=10))
    store = SampleStore()
    store.append(batch(n))
    got = store.gather(positions)
    assert got["text"] == [str(p) for p in positions]
    assert got["tensor"].tolist() == [[p, p] for p in positions]
    assert [int(t[0]) for t in got["ragged"]] == positions
    assert same(b.select(batch(n), positions), got)


def test_an_empty_store() -> None:
    assert SampleStore().everything() == {}


def test_merge_turns_unequal_tensors_into_a_list_of_samples() -> None:
    merged = b.merge([{"x": torch.ones(2, 3)}, {"x": torch.ones(1, 4)}])
    assert [tuple(t.shape) for t in merged["x"]] == [(3,), (3,), (4,)]
    mixed = b.merge([{"x": torch.ones(2)}, {"x": ["a"]}])
    assert mixed["x"][2] == "a"
    assert b.merge([]) == {}
    with pytest.raises(BatchError, match=r"columns differ between calls of one node: \['y'\]"):
        b.merge([{"x": [1]}, {"x": [1], "y": [1]}])


def test_join() -> None:
    one, two = {"x": [1, 2], "a": [0, 0]}, {"x": [3, 4], "b": [0, 0]}
    assert join([("one", one), ("two", two)], "n") == {"x": [3, 4], "a": [0, 0], "b": [0, 0]}
    assert join([("one", one), ("none", {})], "n") == one
    with pytest.raises(BatchError, match=r"\{'one': 2, 'short': 1\}"):
        join([("one", one), ("short", {"y": [1]})], "n")


def test_normalise_accepts_what_is_a_column() -> None:
    given_ = UserDict(
        {
            "tuple": (1, 2),
            "array": np.array([1.0, 2.0]),
            "texts": np.array(["a", "b"]),
            "list": [None, None],
            "tensor": torch.ones(2, 2),
        }
    )
    made = b.normalise(given_, "here")
    assert made["tuple"] == [1, 2]
    assert isinstance(made["array"], torch.Tensor)
    assert made["texts"] == ["a", "b"]
    assert b.normalise({}, "here") == {}


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (3, "not int"),
        ([1], "not list"),
        ({1: [1]}, "column names are strings, not 1"),
        ({"x": "text"}, "'x' is a str"),
        ({"x": torch.tensor(1.0)}, "'x' is a Tensor"),
        ({"x": None}, "'x' is a NoneType"),
        ({"x": np.float32(1)}, "'x' is a float32"),
        ({"x": [1], "y": [1, 2]}, r"\{'x': 1, 'y': 2\}"),
    ],
)
def test_normalise_refuses_the_rest(output: Any, what: str) -> None:
    with pytest.raises(BatchError, match=what) as raised:
        b.normalise(output, "policy.forward_step, file.py:3")
    assert raised.value.place == "policy.forward_step, file.py:3"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], torch.tensor([1, 2])),
        ([1, 2.5], torch.tensor([1, 2.5], dtype=torch.float64)),
        ([True, False], torch.tensor([True, False])),
        ([True, 1], [True, 1]),
        ([2**70, 1], [2**70, 1]),
        (["a", "b"], ["a", "b"]),
        ([None, 1], [None, 1]),
        ([torch.ones(2), torch.zeros(2)], torch.tensor([[1.0, 1.0], [0.0, 0.0]])),
        ([torch.ones(1), torch.ones(2)], [torch.ones(1), torch.ones(2)]),
        ([torch.ones(1), "x"], [torch.ones(1), "x"]),
        ([np.int64(1), np.int64(2)], torch.tensor([1, 2])),
        ([np.float32(0.5), 1.0], torch.tensor([0.5, 1.0], dtype=torch.float64)),
        ([np.ones(2), np.zeros(2)], torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)),
        ([[1], [2]], [[1], [2]]),
    ],
)
def test_stack(values: Any, expected: Any) -> None:
    made = b.stack(values)
    assert same(made, expected)
    assert getattr(made, "dtype", None) == getattr(expected, "dtype", None)


def test_collate_refuses_what_is_no_row() -> None:
    assert b.collate([]) == {}
    with pytest.raises(BatchError, match="must be a dict, not str"):
        b.collate(["x"])
    with pytest.raises(BatchError, match="different columns"):
        b.collate([{"a": 1}, {"b": 1}])


def test_pad_both_sides_and_only_ragged_columns() -> None:
    ragged = [torch.tensor([1]), [2, 3]]
    assert b.pad({"x": list(ragged)}, {"x": (0, "left")})["x"].tolist() == [[0, 1], [2, 3]]
    assert b.pad({"x": list(ragged)}, {"x": (9, "right")})["x"].tolist() == [[1, 9], [2, 3]]
    whole = {"x": torch.ones(2, 2), "empty": []}
    assert same(
        b.pad(dict(whole), {"x": (0, "left"), "empty": (0, "left"), "no": (0, "left")}), whole
    )


@dataclasses.dataclass
class Thing:
    value: int


Pair = namedtuple("Pair", "a b")


def test_isolate_copies_every_container_and_keeps_objects() -> None:
    thing = Thing(1)
    row: dict[str, Any] = {
        "nested": {"list": [1, [2, {"deep": torch.ones(1)}]]},
        "tuple": ([1], {"x": {2}}),
        "array": np.ones(2),
        "ordered": OrderedDict(a=[1]),
        "pair": Pair([1], 2),
        "thing": thing,
        "set": {1},
    }
    original = {"rows": [row, row], "tensor": torch.ones(2), "bare": [torch.zeros(1)] * 2}
    copied = b.isolate(original)
    assert same(copied["rows"][0]["nested"], row["nested"])
    first = copied["rows"][0]
    first["nested"]["list"][1][1]["deep"] += 1
    first["nested"]["list"].append(3)
    first["tuple"][0].append(2)
    first["tuple"][1]["x"].add(9)
    first["array"] += 1
    first["ordered"]["a"].append(2)
    first["pair"].a.append(2)
    first["set"].add(5)
    copied["tensor"] += 1
    copied["bare"][0] += 1
    assert row["nested"] == {"list": [1, [2, {"deep": torch.ones(1)}]]}
    assert row["tuple"] == ([1], {"x": {2}})
    assert row["array"].tolist() == [1, 1]
    assert row["ordered"] == {"a": [1]}
    assert type(first["pair"]) is Pair
    assert row["pair"] == Pair([1], 2)
    assert row["set"] == {1}
    assert original["tensor"].tolist() == [1, 1]
    assert copied["bare"][1].tolist() == [0]
    assert copied["rows"][1]["set"] == {1}, "siblings share nothing either"
    assert first["thing"] is thing


def test_isolate_lets_no_gradient_through_and_makes_inference_tensors_usable() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert not b.isolate({"x": leaf * 2})["x"].requires_grad
    with torch.inference_mode():
        frozen = torch.ones(2)
    weight = torch.ones(2, requires_grad=True)
    (b.isolate({"x": frozen})["x"] * weight).sum().backward()
    assert weight.grad is not None


def test_numbers() -> None:
    given_ = {
        "i": 1,
        "f": 0.5,
        "b": True,
        "t": torch.tensor(2.0, requires_grad=True),
        3: np.float32(1),
    }
    more = {"text": "x", "list": [1], "wide": torch.ones(2), "none": None, "array": np.array("x")}
    assert b.numbers({**given_, **more}) == {"i": 1, "f": 0.5, "b": 1, "t": 2, "3": 1}


def test_samples() -> None:
    assert samples({"x": [1, 2], "y": ["a", "b"]}) == [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]
    assert size({}) == 0
