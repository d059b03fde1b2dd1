# SPDX-License-Identifier: Apache-2.0
"""`Replay`: which episodes are in the window, and what kind of column a choice becomes."""

from __future__ import annotations

import functools
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.data.replay import EpisodeBuffer, Replay
from chatlearn.errors import ModuleError, describe_function
from chatlearn.flow.batch import size


def episode(number: int, count: int = 2) -> dict[str, Any]:
    return {"prompt": [f"{number}/{i}" for i in range(count)], "x": torch.arange(count) + number}


def chosen(columns: dict[str, Any], *rows: dict[str, Any]) -> Any:
    replay = Replay(-1, sampler=lambda buffers: rows)
    return replay.choose(replay.window(0, columns))


@given(st.integers(-1, 5).filter(bool), st.integers(0, 4), st.lists(st.integers(0, 3), max_size=8))
def test_the_window_slides(kept: int, offset: int, counts: list[int]) -> None:
    replay = Replay(kept, offset)
    expected: list[list[str]] = []
    for number, count in enumerate(counts):
        if not replay.keeps(number):
            assert number < offset
            continue
        window = replay.window(number, episode(number, count))
        expected.append([f"{number}/{i}" for i in range(count)])
        if kept > 0:
            expected = expected[-kept:]
        batch = replay.choose(window)
        assert batch.get("prompt", []) == [prompt for part in expected for prompt in part]
        assert size(batch) == sum(map(len, expected))
        replay.kept = window
    assert [number for number, _ in replay.kept] == list(range(len(counts)))[offset:][
        -kept if kept > 0 else None :
    ]


def test_an_episode_that_was_not_committed_is_not_kept() -> None:
    replay = Replay(2)
    replay.choose(replay.window(0, episode(0)))
    assert replay.kept == []
    assert [number for number, _ in replay.window(1, episode(1))] == [1]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, torch.int16),
        (True, torch.int16),
        (torch.tensor(3), torch.int16),
        (np.int64(3), torch.int16),
        (0.5, torch.float64),  # what an integer cannot hold is not cut off
    ],
)
def test_values_put_into_an_integer_column(value: Any, kind: torch.dtype) -> None:
    column = chosen({"x": torch.zeros(2, dtype=torch.int16)}, {"x": value}, {"x": value})["x"]
    assert column.dtype == kind
    assert column.tolist() == [value, value]


def test_changed_shapes() -> None:
    columns = {"x": torch.zeros(2, 3)}
    same = chosen(columns, {"x": torch.ones(4)}, {"x": torch.ones(4)})["x"]
    assert same.shape == (2, 4)
    ragged = chosen(columns, {"x": torch.ones(4)}, {"x": torch.ones(5)})["x"]
    assert [len(row) for row in ragged] == [4, 5]
    text = chosen(columns, {"x": "a"}, {"x": torch.ones(5)})["x"]
    assert text[0] == "a"


def test_huge_numbers_are_not_cut_off() -> None:
    assert chosen({"x": torch.zeros(1, dtype=torch.long)}, {"x": 2**70})["x"] == [2**70]


def test_a_column_that_is_a_list_in_any_kept_episode_is_a_list() -> None:
    replay = Replay(-1, sampler=lambda buffers: buffers[0].samples)
    replay.kept = [(0, {"x": torch.zeros(2, 3)})]
    window = replay.window(1, {"x": [torch.zeros(1), torch.zeros(2)]})
    assert isinstance(replay.choose(window)["x"], list)


def test_dtypes_that_differ_between_episodes_are_promoted() -> None:
    for sampler in (None, lambda buffers: [s for b in buffers for s in b.samples]):
        replay = Replay(-1, sampler=sampler)
        replay.kept = [(0, {"x": torch.zeros(1, dtype=torch.float32)})]
        window = replay.window(1, {"x": torch.zeros(1, dtype=torch.float64)})
        assert replay.choose(window)["x"].dtype == torch.float64  # type: ignore[union-attr]


def test_samples_are_made_when_they_are_asked_for() -> None:
    seen: list[EpisodeBuffer] = []

    def newest(buffers: Any) -> Any:
        seen.extend(buffers)
        return buffers[-1].samples

    replay = Replay(-1, sampler=newest)
    replay.kept = [(0, episode(0))]
    replay.choose(replay.window(1, episode(1)))
    assert "samples" not in vars(seen[0])
    assert seen[1].samples is seen[1].samples
    assert repr(seen[0]) == "EpisodeBuffer(episode_id=0)"
    assert EpisodeBuffer(3, [{"a": 1}]).samples == [{"a": 1}]


def test_state_is_columns_and_comes_back() -> None:
    replay = Replay(2)
    for number in range(3):
        replay.kept = replay.window(number, {**episode(number), "deep": [{"a": (1, None)}] * 2})
    file = io.BytesIO()
    torch.save(replay.state(), file)
    file.seek(0)
    other = Replay(2)
    other.load(torch.load(file, weights_only=True))
    assert [number for number, _ in other.kept] == [1, 2]
    assert str(other.kept) == str(replay.kept)
    shorter = Replay(1)
    shorter.load(replay.state())
    assert [number for number, _ in shorter.kept] == [2]
    later = Replay(-1, offset=2)
    later.load(replay.state())
    assert [number for number, _ in later.kept] == [2]


def test_functions_are_named() -> None:
    class Choosing:
        def __call__(self, buffers: Any, extra: int = 0) -> Any: ...

        def method(self, buffers: Any) -> Any: ...

    def plain(buffers: Any, extra: int) -> Any: ...

    assert "plain (" in describe_function(functools.partial(plain, extra=1))
    assert "Choosing.method (" in describe_function(Choosing().method)
    assert "Choosing.__call__ (" in describe_function(Choosing())
    assert describe_function(json.dumps).startswith("dumps (")


def test_an_error_of_ours_in_a_sampler_keeps_its_words() -> None:
    def failing(buffers: Any) -> Any:
        raise ModuleError("cause", place="here", fix="do this")

    with pytest.raises(ModuleError, match=r"cause\n  at: here\n  fix: do this\n  function: replay"):
        Replay(-1, sampler=failing).choose([(0, episode(0))])


def test_an_exception_that_cannot_be_printed_is_placed() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    def failing(buffers: Any) -> Any:
        raise Mute

    with pytest.raises(ModuleError, match=r"Mute .its message cannot be printed.\n  function: rep"):
        Replay(-1, sampler=failing).choose([(0, episode(0))])


def test_only_episodes_that_a_sampler_looks_at_are_copied() -> None:
    seen: list[EpisodeBuffer] = []

    def newest(buffers: Any) -> Any:
        seen.extend(buffers)
        return buffers[-1].samples[:4]

    replay = Replay(-1, sampler=newest)
    replay.kept = [(number, episode(number)) for number in range(3)]
    replay.choose(replay.window(3, episode(3)))
    assert [buffer.episode_id for buffer in seen if "samples" in vars(buffer)] == [3]
