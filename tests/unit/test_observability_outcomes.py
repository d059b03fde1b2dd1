# SPDX-License-Identifier: Apache-2.0
"""Outcomes as metrics and in words; the first cause of every module; calls that take long are named."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field

import pytest

from chatlearn.observability.long_call import LONG_CALL_S, MOST_UIDS, CallUnderWay
from chatlearn.observability.outcomes import FirstCauses, OutcomeCounts, kept_rows, words
from chatlearn.observability.progress import Progress, shown_numbers


@dataclass
class Report:
    module: str
    outcomes: dict[str, int] = field(default_factory=dict)
    cause: str = ""
    method: str = "forward_step"
    samples: int = 4


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_counts_add_up_and_zeros_are_there() -> None:
    counts = OutcomeCounts()
    counts.add(Report("policy", {"cut": 2}))
    counts.add(Report("reward", {"failed": 0, "retried": 8}))
    counts.add(Report("reward", {"failed": 1}))
    counts.add(Report("reference"))
    counts.add_losses({"dropped_groups": 1, "masked_samples": 0})
    assert counts.metrics() == {
        "outcomes/policy/cut": 2.0,
        "outcomes/reward/failed": 1.0,
        "outcomes/reward/retried": 8.0,
        "outcomes/dropped_groups": 1.0,
        "outcomes/masked_samples": 0.0,
    }


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({}, ""),
        ({"outcomes/reward/failed": 0.0, "outcomes/policy/cut": 9.0}, ""),
        ({"outcomes/a/failed": 2.0, "outcomes/b/failed": 1.0}, "3 failed"),
        (
            {"outcomes/a/timed_out": 1.0, "outcomes/dropped_groups": 1.0},
            "1 timed out, 1 group dropped",
        ),
        ({"outcomes/a/failed": 4.0, "outcomes/dropped_groups": 2.0}, "4 failed, 2 groups dropped"),
        ({"judge/failed": 4.0, "outcomes/a/retried": 0.0}, ""),
        ({"outcomes/a/retried": 6.0, "outcomes/b/retried": 1.0}, "a: 6 retried, b: 1 retried"),
        (
            {"outcomes/a/retried": 2.0, "outcomes/a/failed": 1.0, "outcomes/dropped_groups": 1.0},
            "1 failed, 1 group dropped, a: 2 retried",
        ),
    ],
)
def test_what_was_lost_in_words(metrics: dict[str, float], said: str) -> None:
    assert words(metrics) == said


def test_the_first_cause_of_a_module_is_told_once_and_all_are_counted() -> None:
    causes = FirstCauses()
    assert causes.note_of(Report("reward", {"failed": 0})) is None
    note = causes.note_of(Report("reward", {"failed": 1}, "ValueError: x\n  module: reward"))
    assert note is not None
    assert note.splitlines() == [
        "reward gave a sample up, for the first time; further ones are counted in outcomes/reward/...",
        "  ValueError: x",
        "    module: reward",
    ]
    assert causes.note_of(Report("reward", {"timed_out": 2}, "another")) is None
    other = causes.note_of(Report("judge", {"failed": 2}, "third"))
    assert other is not None
    assert other.startswith("judge gave 2 samples up")
    assert causes.summary() == [
        "reward gave up 3 samples in this run; see outcomes/reward/...",
        "judge gave up 2 samples in this run; see outcomes/judge/...",
    ]


def test_samples_with_values() -> None:
    assert kept_rows({"uid": [1, 2]}) is None
    assert kept_rows({"outcome": ["ok", "cut"]}) is None
    assert kept_rows({"outcome": ["ok", "failed", "timed_out", "cut"]}) == [0, 3]


def test_an_evaluations_line_says_what_was_lost_and_shows_no_counts() -> None:
    line = shown_numbers(
        {"reward/rewards": 0.5, "outcomes/reward/failed": 2.0, "outcomes/policy/cut": 7.0}
    )
    assert line == "rewards 0.5  2 failed"


def test_a_call_is_named_once_it_takes_long() -> None:
    clock = Clock()
    call = CallUnderWay(clock)
    assert call.told() == ""
    call.begin("reward.forward_step", [3, 4])
    clock.now = LONG_CALL_S - 1
    assert call.told() == ""
    clock.now = 120.0
    assert call.told() == "reward.forward_step has taken 2:00 so far, uid 3, 4"
    call.begin("reward.forward_step", range(100))
    clock.now += LONG_CALL_S
    uids = ", ".join(map(str, range(MOST_UIDS)))
    assert call.told() == f"reward.forward_step has taken 1:00 so far, uid {uids}, ... (100 in all)"
    call.end()
    assert call.told() == ""


def test_without_a_terminal_a_long_call_gives_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatlearn.observability.progress.HEARTBEAT_S", 0.01)
    clock, stream = Clock(), io.StringIO()
    with Progress(3, stream=stream, live=False, clock=clock) as progress:
        progress.begin()
        progress.phase("reward.forward_step")
        progress.calling("reward.forward_step", [7])
        clock.now = 90.0
        for _ in range(1000):  # ten seconds at most
            if "so far" in stream.getvalue():
                break
            time.sleep(0.01)
    assert "reward.forward_step has taken 1:30 so far, uid 7" in stream.getvalue()


def test_what_an_episode_loses_stands_on_its_line() -> None:
    stream = io.StringIO()
    with Progress(1, stream=stream, live=False) as progress:
        progress.begin()
        progress.losing("1 failed")
        progress.episode_done({"reward/rewards": 0.5, "outcomes/reward/failed": 2.0})
    assert "episode 1/1  reward 0.5  2 failed" in stream.getvalue()


def test_the_live_display_names_a_long_call_and_what_is_lost() -> None:
    from rich.console import Console

    clock, stream = Clock(), io.StringIO()
    progress = Progress(3, stream=stream, live=False, clock=clock)
    progress.phase("reward.forward_step")
    progress.calling("reward.forward_step", [7])
    progress.losing("1 timed out, 1 group dropped")
    clock.now = 90.0
    Console(file=stream, width=120).print(progress._render())
    assert "reward.forward_step has taken 1:30 so far, uid 7" in stream.getvalue()
    assert "1 timed out, 1 group dropped" in stream.getvalue()
