# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of datasets: equal where the rows are, in another process too, and cheap."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from chatlearn.data.fingerprint import fingerprint, name_of
from chatlearn.data.prompts import load_prompts

CHANGES: dict[str, tuple[Any, Any]] = {
    "text": ("a", "b"),
    "a key": ({"prompt": "a", "x": 1}, {"prompt": "a", "y": 1}),
    "a value": ({"prompt": "a", "x": 1}, {"prompt": "a", "x": 2}),
    "depth": ({"prompt": "a", "x": [1, [2]]}, {"prompt": "a", "x": [1, 2]}),
    "a tensor": (torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])),
    "a tensor in the middle": (
        torch.zeros(5000),
        torch.zeros(5000).index_fill(0, torch.tensor(9), 1),
    ),
    "a dtype": (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
    "a shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "an array": (np.zeros(3), np.ones(3)),
    "a numpy number": (np.float32(1), np.float32(2)),
    "bytes": (b"a", b"b"),
    "a set": ({"a", "b"}, {"a", "c"}),
    "a date": (dt.date(2024, 1, 1), dt.date(2024, 1, 2)),
    "a path": (Path("a"), Path("b")),
    "a tuple as key": ({(1, 2): "x"}, {(1, 3): "x"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(what: str) -> None:
    before, after = CHANGES[what]
    assert fingerprint([before]) != fingerprint([after])
    assert fingerprint([before]) == fingerprint([before])


def test_rows_count_in_their_order_and_number() -> None:
    assert fingerprint(["a", "b"]) != fingerprint(["b", "a"]) != fingerprint(["b"])
    assert fingerprint(["ab"]) != fingerprint(["a", "b"])
    assert fingerprint([]) != ""


def test_the_order_of_columns_does_not_count() -> None:
    assert fingerprint([{"a": 1, "b": 2}]) == fingerprint([{"b": 2, "a": 1}])


def test_what_holds_the_rows_does_not_count(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "n": i, "tags": ["x", None]} for i in range(2500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, separators=(",", ":")) for r in rows))
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(str(tmp_path / "c.parquet"))
    made.save_to_disk(str(tmp_path / "d"))
    held = [load_prompts(tmp_path / n) for n in ("a.jsonl", "b.jsonl", "c.parquet", "d")]
    prints = {fingerprint(rows) for rows in [*held, rows, tuple(rows), made]}
    assert len(prints) == 1
    assert prints != {fingerprint(made.select(range(2499)))}
    shuffled = made.shuffle(seed=1)
    assert fingerprint(shuffled) not in prints
    assert fingerprint(shuffled) == fingerprint(made.shuffle(seed=1))
    assert fingerprint(shuffled.with_transform(lambda batch: 1 / 0)) == fingerprint(shuffled)


def test_datasets_that_make_their_rows_are_not_asked() -> None:
    class Making:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> str:
            raise AssertionError("asked for a row")

    assert fingerprint(Making()) == ""


HARD = """
import dataclasses, enum, sys, torch, numpy as np
from chatlearn.data.fingerprint import fingerprint
class Bare: pass
class Saying:
    def __repr__(self): return f"Saying({self.__dict__})"
class Broken:
    def __repr__(self): raise ValueError
class Kind(enum.Enum): A = 1
@dataclasses.dataclass
class Row:
    names: object
    inner: object = None
saying = Saying(); saying.x = {"a", "b"}
circle = []; circle.append(circle)
print(fingerprint([{
    "bare": Bare(), "saying": saying, "broken": Broken(), "kind": Kind.A, "set": {"a", "b", "c"}, 1: 2,
    "row": Row({"x", "y"}, Row(frozenset("abc"))), "deep": {(1, "a"): {"x", "y"}}, "function": lambda: 0,
    "lone": "\\ud800", "objects": np.array([Bare()], dtype=object), "none": torch.ones(0), "circle": circle,
    "scalar": torch.tensor(1), "sparse": torch.ones(2).to_sparse(), "nan": float("nan"), "class": Bare,
}]))
"""


def test_every_process_finds_the_same() -> None:
    prints = {
        subprocess.run(
            [sys.executable, "-c", HARD],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(prints) == 1


def test_objects_that_say_nothing_stable_do_not_raise_a_false_alarm() -> None:
    class Bare:
        pass

    class Kind(enum.Enum):
        A = 1
        B = 2

    @dataclasses.dataclass
    class Row:
        x: Any

    assert fingerprint([Bare()]) == fingerprint([Bare()])
    assert fingerprint([Row(Bare())]) == fingerprint([Row(Bare())])
    assert fingerprint([Row(1)]) != fingerprint([Row(2)])
    assert fingerprint([Kind.A]) != fingerprint([Kind.B])


def test_names(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text("")
    assert name_of(tmp_path / "tasks.jsonl", 0) == "the dataset file tasks.jsonl"
    assert name_of("owner/name", 1) == "the dataset owner/name"
    assert name_of(["p"], 0) == "the dataset"
    assert name_of(["p"], 2) == "dataset 3"
