# SPDX-License-Identifier: Apache-2.0
"""The progress display: its lines, its pace, its cost, and that it never disturbs the run."""

from __future__ import annotations

import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from chatlearn.observability.evaluation_progress import EvaluationProgress
from chatlearn.observability.headline import evaluation_highlights, find_key, headline
from chatlearn.observability.numbers import duration, number, quantity, sparkline, ticks
from chatlearn.observability.progress import Progress


@dataclass
class Call:
    module: str = "policy"
    method: str = "forward_step"
    samples: int = 8


METRICS = {
    "reward/rewards": 0.43,
    "policy_trainer/loss": 0.0123,
    "policy/generated_tokens": 12_300.0,
    "policy_trainer/trained_tokens": 8_100.0,
    "time/env_flow": 1.0,
    "time/trainer_flow": 1.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(total: int = 150, start: int = 0, **kwargs) -> tuple[Progress, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return Progress(total, start, stream=stream, clock=clock, **kwargs), stream, clock


def test_a_line_per_episode_says_what_matters():
    progress, stream, clock = plain(start=11)
    with progress:
        progress.phase("generating")
        progress.advance(Call())
        clock.now += 0.31
        progress.episode_done(METRICS)
    assert stream.getvalue() == (
        "episode 12/150  reward 0.43  loss 0.0123  gen 12.3k tok/s  train 8.1k tok/s  "
        "0.31 s/episode  ETA 0:43\n"
    )


def test_fast_runs_give_a_line_a_second_and_always_the_last():
    progress, stream, clock = plain(total=35)
    with progress:
        for _ in range(35):
            clock.now += 0.125
            progress.episode_done({})
    shown = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert shown == ["1/35", "9/35", "17/35", "25/35", "33/35", "35/35"]


def test_an_interrupted_run_shows_its_last_episode():
    progress, stream, clock = plain()

    def run() -> None:
        with progress:
            for _ in range(4):
                clock.now += 0.125
                progress.episode_done({})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert stream.getvalue().splitlines()[-1].startswith("episode 4/150")


def test_evaluations_and_notes_always_show_and_in_order():
    progress, stream, clock = plain()
    with progress:
        progress.evaluation_done({"reward": 0.2, "accuracy": 0.31})
        for _ in range(3):
            clock.now += 0.125
            progress.episode_done({})
        progress.evaluation_done({"eval/reward/accuracy": 0.52})
        progress.note("checkpoint [bold]x[/bold]")
        progress.evaluation_done({})
    assert [line.split("  0.125 s")[0] for line in stream.getvalue().splitlines()] == [
        "evaluation before training  accuracy 0.31  reward 0.2",
        "episode 1/150",
        "episode 3/150",
        "evaluation after episode 3  accuracy 0.52",
        "checkpoint [bold]x[/bold]",
        "evaluation after episode 3  (no numbers)",
    ]


def test_long_episodes_give_signs_of_life():
    progress, stream, clock = plain()
    with progress:
        progress.phase("generating")
        for _ in range(7):
            clock.now += 10
            progress.advance(Call())
    assert stream.getvalue() == "episode 1/150  generating  32 samples\n"


def test_nan_is_shown_not_hidden():
    progress, stream, _ = plain()
    with progress:
        progress.episode_done({"t/loss": math.nan, "r/rewards": math.inf})
    assert "loss nan" in stream.getvalue()
    assert "reward inf" in stream.getvalue()


class Broken(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("live", [False, True])
def test_a_broken_pipe_ends_the_display_only(live):
    with Progress(3, stream=Broken(), live=live) as progress:
        progress.begin()
        for _ in range(3):
            progress.episode_done(METRICS)
            progress.note("x")
            progress.evaluation_done({"accuracy": 1.0})
        time.sleep(0.3)
    assert progress.is_off or live


def test_a_closed_stream_and_a_narrow_encoding():
    stream = io.StringIO()
    stream.close()
    with Progress(1, stream=stream) as progress:
        progress.begin()
        progress.episode_done({})
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress(1, stream=ascii_stream) as progress:
        progress.begin()
        progress.note("épisode →")
    assert not progress.is_off


@pytest.mark.parametrize("live", [False, True])
def test_calls_are_cheap(live: bool):
    """Counted in lines of Python, which no other process disturbs, at about 0.1 us each."""
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    with Progress(10**6, stream=io.StringIO(), live=live) as progress:
        progress.begin()
        call, n = Call(), 200
        progress.episode_done(METRICS)
        before = sys.gettrace()
        sys.settrace(count)
        try:
            for _ in range(n):
                progress.phase("generating")
                progress.advance(call)
                progress.episode_done(METRICS)
        finally:
            sys.settrace(before)
    assert 0 < lines / (3 * n) < 260, lines / (3 * n)


def test_without_a_terminal_rich_is_not_imported():
    code = (
        "import sys; from chatlearn.observability.progress import Progress\n"
        "with Progress(1) as p: p.begin(), p.episode_done({})\n"
        "assert 'rich' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


SCRIPT = """
import sys, time
from chatlearn.observability.progress import Progress
with Progress(50) as progress:
    progress.begin()
    progress.note("a note")
    progress.evaluation_done({"accuracy": 0.25})
    for i in range(50):
        progress.phase("generating")
        time.sleep(0.02)
        if i == 5:
            print("the user's own line", flush=True)
        progress.episode_done({"r/rewards": i / 50, "t/loss": 0.5})
    progress.evaluation_done({"accuracy": 0.75})
"""


def on_terminal(script: str, interrupt_at: str | None = None) -> tuple[str, int]:
    """Run a script on a pseudo-terminal and return what it showed and its exit status.

    `interrupt_at` is what it must have shown before it is interrupted: at a fixed time it might still be starting.
    """
    import pty

    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "90", "LINES": "30"}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=child,
        stderr=child,
        stdin=child,
        env=environment,
        # A shell that started the tests in the background has them, and whom they start, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                piece = os.read(parent, 65536)
            except OSError:
                break
            if not piece:
                break
            shown += piece
            if interrupt_at is not None and interrupt_at.encode() in shown:
                process.send_signal(signal.SIGINT)
                interrupt_at = None
        os.close(parent)
        status = process.wait()
    return shown.decode(), status


def test_on_a_terminal_it_draws_and_gives_the_terminal_back():
    shown, status = on_terminal(SCRIPT)
    assert status == 0, shown
    for text in ("50/50", "a note", "the user's own line", "accuracy 0.75", "(from 0.25)", "▁"):
        assert text in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_ctrl_c_gives_the_terminal_back():
    shown, status = on_terminal(SCRIPT.replace("0.02", "0.2"), interrupt_at="3/50")
    assert status != 0
    assert "KeyboardInterrupt" in shown
    assert "stopped" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_headline_finds_numbers_by_the_end_of_their_names():
    found = headline({**METRICS, "eval/reward/rewards": 9.0, "eval/accuracy": 0.9})
    assert found.reward == 0.43
    assert found.accuracy == 0.9
    assert found.generated_per_s == 12_300
    assert headline({"m/generated_tokens_per_s": 5.0}).generated_per_s == 5
    assert headline({"m/generated_tokens": 5.0}).generated_per_s is None
    assert headline({}).loss is None


TWO_POLICIES = {
    "a/generated_tokens": 1000.0,
    "b/generated_tokens": 500.0,
    "a/generated_tokens_per_s": 1000.0,  # 1 s
    "b/generated_tokens_per_s": 250.0,  # 2 s
    "a_reward/rewards": 0.9,
    "a_reward/rewards/right": 0.9,
    "judge/rewards": 0.4,
    "a_trainer/loss": 0.1,
    "b_trainer/loss": -0.2,
    "a_trainer/trained_tokens": 300.0,
    "b_trainer/trained_tokens": 100.0,
    "time/env_flow": 100.0,
    "time/trainer_flow": 4.0,
    "eval/a/generated_tokens": 1e9,
}


def test_several_policies_are_told_apart_and_their_tokens_counted_together():
    found = headline(TWO_POLICIES)
    assert found.rewards == (("a_reward", 0.9), ("judge reward", 0.4))
    assert found.losses == (("a_trainer loss", 0.1), ("b_trainer loss", -0.2))
    assert found.generated_per_s == pytest.approx(1500 / 3)
    assert found.trained_per_s == pytest.approx(400 / 4)
    progress, stream, _ = plain()
    with progress:
        progress.episode_done({**TWO_POLICIES, "third/rewards": 1.0})
    assert stream.getvalue().startswith(
        "episode 1/150  a_reward 0.9  judge reward 0.4  …  a_trainer loss 0.1  b_trainer loss -0.2  "
        "gen 500 tok/s  train 100 tok/s  "
    )


def test_a_speed_of_two_methods_or_without_tokens():
    methods = {"m.x/generated_tokens": 30.0, "m.y/generated_tokens": 10.0}
    both = {**methods, "m/generated_tokens_per_s": 20.0, "b/generated_tokens": 10.0}
    assert headline({**both, "b/generated_tokens_per_s": 5.0}).generated_per_s == 50 / 4
    assert headline({**methods, "time/env_flow": 4.0}).generated_per_s == 10
    idle = {"a/generated_tokens": 0.0, "a/generated_tokens_per_s": 0.0, "b/generated_tokens": 6.0}
    assert headline({**idle, "b/generated_tokens_per_s": 3.0}).generated_per_s == 3


def test_what_several_modules_report_carries_their_names_in_an_evaluation():
    statistics = {"prompt_length": 4.0, "stop_fraction": 1.0}
    metrics = {f"{who}/{name}": value for who in "ab" for name, value in statistics.items()}
    found = evaluation_highlights({**metrics, "c/own": 2.0, "accuracy": 0.5}, most=9)
    assert [name for name, _ in found.numbers] == ["accuracy", *metrics, "own"]
    rewards = {"a/pass@1": 0.5, "a/length": 1.0, "b/pass@1": 0.7, "length": 9.0}
    assert evaluation_highlights(rewards).numbers == [
        ("a/pass@1", 0.5),
        ("length", 9.0),  # of a post-process function, before those of modules
        ("a/length", 1.0),
    ]
    judged = {"policy/length": 3.0, "a/rewards": 0.1, "b/rewards": 0.2}
    assert [name for name, _ in evaluation_highlights(judged).numbers] == [
        "a/rewards",
        "b/rewards",
        "length",
    ]
    of_datasets = {f"{d}policy/length": 1.0 for d in ("", "math/", "code/")}
    assert evaluation_highlights(of_datasets).numbers[0] == ("length", 1.0)


def test_an_evaluation_of_several_samples_and_datasets_stays_short():
    passes = {f"reward/pass@{k}": k / 10 for k in (1, 2, 4, 8)}
    own = {"policy/response_length": 9.0, "reward/rewards": 0.1, "reward/avg@8": 0.1, **passes}
    metrics = {**own, **{f"{d}/{name}": 1.0 for d in ("math", "code") for name in own}}
    found = evaluation_highlights(metrics)
    assert found.of_datasets == [("math", 1.0), ("code", 1.0)]
    assert found.numbers == [
        ("pass@1", 0.1),
        ("pass@8", 0.8),
        ("rewards", 0.1),
        ("response_length", 9.0),
    ]
    progress, stream, _ = plain()
    with progress:
        progress.evaluation_done(metrics)
        progress.episode_done({})
    assert stream.getvalue().startswith(
        "evaluation before training  pass@1 0.1 (math 1, code 1)  pass@8 0.8  rewards 0.1  "
        "response_length 9\n"
    )
    first = evaluation_highlights({**metrics, "accuracy": 0.4}).numbers[:2]
    assert first == [("accuracy", 0.4), ("pass@8", 0.8)]
    many = {f"d{i}/r/rewards": 1.0 for i in range(40)} | {"r/rewards": 1.0}
    assert len(evaluation_highlights(many).of_datasets) < 10


def test_what_a_post_process_function_measured_comes_before_what_modules_logged():
    metrics = {"solver/length": 3.0, "solver/x": 1.0, "accuracy": 0.5, "distinct": 0.2}
    shown = [name for name, _ in evaluation_highlights(metrics).numbers]
    assert shown == ["accuracy", "distinct", "length", "x"]


def test_numbers_over_all_datasets_come_first_wherever_they_stand():
    assert find_key(["a/reward/rewards", "reward/rewards"], ("rewards",)) == "reward/rewards"


# ---- an evaluation of its own ----------------------------------------------------------------------


def evaluation(seconds: float, **kwargs) -> str:
    stream, clock = io.StringIO(), Clock()
    with EvaluationProgress(300, 2, stream=stream, clock=clock, **kwargs) as display:
        display.phase("policy.eval_step")
        for _ in range(10):
            clock.now += seconds / 10
            display.tick(40)
            display.advance(Call())
        display.note("a note")
        display.evaluated({"reward/pass@1": 0.25})
    return stream.getvalue()


def test_a_quick_evaluation_shows_nothing_but_notes():
    assert evaluation(0.9) == "a note\n"


def test_a_longer_evaluation_ends_with_one_line():
    assert evaluation(12) == "a note\nevaluation  300 samples in 0:12  pass@1 0.25\n"


def test_a_long_evaluation_gives_signs_of_life():
    lines = evaluation(100).splitlines()
    assert lines[0] == "evaluation  4%  policy.eval_step  160 tokens"
    assert len(lines) == 2 + 2


def test_an_evaluation_that_fails_shows_no_numbers():
    stream, clock = io.StringIO(), Clock()

    def run() -> None:
        with EvaluationProgress(3, 1, stream=stream, clock=clock):
            clock.now += 12
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert stream.getvalue() == ""


EVALUATION = """
import time
from types import SimpleNamespace
from chatlearn.observability.evaluation_progress import EvaluationProgress
with EvaluationProgress(10, 1) as display:
    display.phase("policy.eval_step")
    for i in range(10):
        time.sleep(SECONDS)
        display.advance(SimpleNamespace(samples=1, module="policy", method="eval_step"))
    display.evaluated({"r/pass@1": 0.25})
"""


def test_on_a_terminal_a_bar_appears_after_a_second_and_goes_away():
    shown, status = on_terminal(EVALUATION.replace("SECONDS", "0.2"))
    assert status == 0, shown
    assert "policy.eval_step" in shown
    assert re.search(r"evaluation  10 samples in 0:0[2-9]  pass@1 0.25", shown)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    quick, _ = on_terminal(EVALUATION.replace("SECONDS", "0"))
    assert quick == ""


def test_numbers():
    values = {0: "0", 0.43: "0.43", 0.0123: "0.0123", 1.0: "1", 12.345: "12.3", 123.4: "123"}
    values |= {99999: "100k", 1234: "1234", -0.5: "-0.5", 1.2e-5: "1.2e-05", 1e6: "1M"}
    assert {value: number(value) for value in values} == values
    assert [number(math.nan), number(-math.inf)] == ["nan", "-inf"]
    assert [quantity(v) for v in (0, 999, 999.9, 12_345, 4.5e6)] == [
        "0",
        "999",
        "1k",
        "12.3k",
        "4.5M",
    ]
    assert [duration(v) for v in (-1, 41.4, 725, 11045, math.inf)] == [
        "0:00",
        "0:41",
        "12:05",
        "3:04:05",
        "?",
    ]


def test_sparkline_and_ticks():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5], 8) == "▁▁"
    assert sparkline([math.nan], 8) == ""
    assert len(sparkline(list(range(1000)), 30)) == 30
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(0, 150) == [0, 50, 100, 150]
    assert ticks(-0.013, 0.021) == [-0.01, 0, 0.01, 0.02]
    assert ticks(3, 3) == [3]
