# SPDX-License-Identifier: Apache-2.0
"""Steps that take longer than they may: each is ended, says where it was, and leaves signals and timers alone."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from chatlearn import BaseModule, ModuleError
from chatlearn.errors import DeadlineError
from chatlearn.runtime.deadline import Deadline
from chatlearn.runtime.worker import EventLoop, Where, Worker

TIMEOUT_S = 0.1
LONG_S = 30.0


class Hanging(BaseModule):
    """One step for every way to hang; `reached` says what ran behind."""

    reached = 0

    def sleeps(self, data: Any) -> None:
        time.sleep(LONG_S)

    def is_busy(self, data: Any) -> None:
        while True:
            pass

    def backtracks(self, data: Any) -> None:
        re.match(r"(a+)+$", "a" * 40 + "b")

    def swallows_exceptions(self, data: Any) -> None:
        for _ in range(1000):
            try:
                time.sleep(LONG_S / 1000)
            except Exception:
                self.reached += 1

    def swallows_the_first(self, data: Any) -> None:
        try:
            time.sleep(LONG_S)
        except BaseException:
            self.reached += 1
        time.sleep(LONG_S)

    def uses_the_alarm_itself(self, data: Any) -> None:
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(int(LONG_S))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        time.sleep(LONG_S)

    async def awaits(self, data: Any) -> None:
        await asyncio.sleep(LONG_S)

    async def blocks_its_loop(self, data: Any) -> None:
        time.sleep(LONG_S)  # noqa: ASYNC251 - a mistake that steps make

    async def awaits_deep_in_a_library(self, data: Any) -> None:
        await asyncio.gather(self._asks(1), self._asks(2))

    def waits_deep_in_a_library(self, data: Any) -> None:
        threading.Event().wait(LONG_S)

    async def _asks(self, number: int) -> None:
        await asyncio.Event().wait()

    def answers_nevertheless(self, data: Any) -> float:
        try:
            time.sleep(LONG_S)
        except:  # noqa: E722 - as people write it
            return 0.0
        return 1.0

    def raises_something_else(self, data: Any) -> None:
        try:
            time.sleep(LONG_S)
        except BaseException as error:
            raise ValueError("no such answer") from error

    def exits(self, data: Any) -> None:
        try:
            time.sleep(LONG_S)
        except BaseException:
            sys.exit(0)

    async def answers_when_cancelled(self, data: Any) -> float:
        try:
            await asyncio.sleep(LONG_S)
        except:  # noqa: E722 - as people write it
            return 0.0
        return 1.0

    async def raises_when_cancelled(self, data: Any) -> None:
        try:
            await asyncio.sleep(LONG_S)
        except asyncio.CancelledError as error:
            raise ValueError("no such answer") from error

    async def cannot_be_cancelled(self, data: Any) -> None:
        while True:
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                self.reached += 1

    def cleans_up(self, data: Any) -> None:
        try:
            time.sleep(LONG_S)
        finally:
            self.reached += 1

    def returns(self, data: Any) -> str:
        return "done"

    async def returns_late(self, data: Any) -> str:
        await asyncio.sleep(0)
        return "done"

    async def raises_a_timeout_of_its_own(self, data: Any) -> None:
        raise TimeoutError("the server's")


def worker(**settings: Any) -> Worker:
    return Worker(Hanging("judge", timeout_s=TIMEOUT_S, **settings), EventLoop())


def step(using: Worker, method: str) -> Any:
    return using.step(method, {}, 0, {}, Where(3, [4, 5])).value


WAYS = [name for name in vars(Hanging) if not name.startswith(("_", "return", "raises", "reached"))]
CAUGHT = [
    "answers_nevertheless",
    "raises_something_else",
    "exits",
    "answers_when_cancelled",
    "raises_when_cancelled",
]


@pytest.mark.parametrize("method", WAYS)
def test_every_way_to_hang_ends(method: str) -> None:
    using = worker()
    with pytest.raises(
        DeadlineError, match=f"judge.{method} took longer than models.judge.time"
    ) as raised:
        step(using, method)
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("timeout_s=0.1 seconds")
    assert re.fullmatch(r"  it was at: .+:\d+ in \w+", lines[1])
    if method in CAUGHT or method.endswith("_library"):
        assert __file__ in lines[1], "a line of the user's"
    if method == "awaits_deep_in_a_library":
        assert lines[1].endswith("in _asks")
    if method in CAUGHT:
        assert lines.pop(2).startswith("  it caught what was to end it, so what it did then is not")
    assert lines[2:] == [
        "  module: judge (Hanging)",
        f"  method: {method}",
        "  replica: 0",
        "  episode: 3",
        "  samples: uid 4, 5 (2 in all)",
    ]
    assert step(using, "returns") == "done", "the worker goes on"
    assert step(using, "returns_late") == "done"
    using._loop.close()


def test_what_a_step_clears_up_is_cleared_up() -> None:
    using = worker()
    for method in ("cleans_up", "swallows_the_first"):
        with pytest.raises(DeadlineError):
            step(using, method)
    assert using.module.reached == 2  # type: ignore[attr-defined]
    with pytest.raises(DeadlineError):
        step(using, "swallows_exceptions")
    assert using.module.reached == 2, "it is no Exception"  # type: ignore[attr-defined]


def test_signals_and_timers_are_as_before() -> None:
    rings: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rings.append(number))
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        using = worker()
        step(using, "returns")
        with pytest.raises(DeadlineError):
            step(using, "sleeps")
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1.0
        while not rings:
            time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert signal.signal(signal.SIGALRM, before) is not None
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


def test_a_timeout_of_the_steps_own_is_an_error_like_any_other() -> None:
    with pytest.raises(ModuleError, match="TimeoutError: the server's") as raised:
        step(worker(), "raises_a_timeout_of_its_own")
    assert not isinstance(raised.value, DeadlineError)


def test_without_a_bound_nothing_is_timed() -> None:
    using = Worker(Hanging("judge"), EventLoop())
    assert step(using, "returns") == "done"
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_ctrl_c_still_works() -> None:
    class Interrupted(BaseModule):
        def forward_step(self, data: Any) -> None:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            step(Worker(Interrupted("m", timeout_s=5.0), EventLoop()), "forward_step")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("method", ["at_last", "a_coroutine_at_last"])
def test_ctrl_c_after_a_deadline_that_was_caught_is_still_one(method: str) -> None:
    class Interrupted(BaseModule):
        def at_last(self, data: Any) -> None:
            with contextlib.suppress(BaseException):
                time.sleep(LONG_S)
            raise KeyboardInterrupt

        async def a_coroutine_at_last(self, data: Any) -> None:
            with contextlib.suppress(BaseException):
                await asyncio.sleep(LONG_S)
            raise KeyboardInterrupt

    using = Worker(Interrupted("m", timeout_s=TIMEOUT_S), EventLoop())
    with pytest.raises(KeyboardInterrupt):
        step(using, method)
    using._loop.close()


def test_the_outer_deadline_holds_inside_the_inner_one() -> None:
    from chatlearn.runtime.deadline import DeadlinePassed

    outer, inner = Deadline(0.1, "outer"), Deadline(LONG_S, "inner")
    with pytest.raises(DeadlinePassed) as raised:
        outer.run(lambda: inner.run(lambda: time.sleep(LONG_S)))
    assert raised.value.deadline is outer
    outer, inner = Deadline(LONG_S, "outer"), Deadline(0.1, "inner")
    with pytest.raises(DeadlinePassed) as raised:
        outer.run(lambda: inner.run(lambda: time.sleep(LONG_S)))
    assert raised.value.deadline is inner

    def swallow() -> None:
        with contextlib.suppress(BaseException):
            time.sleep(LONG_S)

    outer, inner = Deadline(0.1, "outer"), Deadline(LONG_S, "inner")
    with pytest.raises(DeadlinePassed) as raised:
        outer.run(lambda: inner.run(swallow))
    assert raised.value.deadline is outer


def in_a_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(LONG_S / 2)
    assert results, "it hangs"
    return results[0]


@pytest.mark.parametrize(
    "method", ["sleeps", "swallows_exceptions", "awaits", "cannot_be_cancelled"]
)
def test_outside_the_main_thread_the_call_is_given_up(method: str) -> None:
    def run() -> str:
        using = worker()
        with pytest.raises(DeadlineError) as raised:
            step(using, method)
        assert step(using, "returns") == "done"
        assert step(using, "returns_late") == "done"
        return str(raised.value)

    assert f"judge.{method} took longer than models.judge.timeout_s=0.1" in in_a_thread(run)


def test_errors_pass_from_the_thread_beside() -> None:
    def run() -> str:
        with pytest.raises(ModuleError) as raised:
            step(worker(), "raises_a_timeout_of_its_own")
        return str(raised.value)

    assert in_a_thread(run).startswith("TimeoutError: the server's")


STUCK = """
import sys
import itertools
from chatlearn import BaseModule
from chatlearn.runtime import deadline
from chatlearn.runtime.worker import EventLoop, Where, Worker

deadline.GRACE_S = float(sys.argv[2])

class Judge(BaseModule):
    def forward_step(self, data):
        if sys.argv[1] == "C":
            sum(itertools.repeat(1))  # C code that never comes back and never looks for signals
        hits = 0
        while hits < 1000:
            try:
                while True:
                    len("")
            except:
                hits += 1
                print("hit", flush=True)

worker = Worker(Judge("judge", timeout_s=0.1), EventLoop())
worker.step("forward_step", {}, 0, {}, Where(1, [4, 5]))
"""


def end_of(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STUCK, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_call_stuck_in_c_code_ends_the_process_and_is_named() -> None:
    done = end_of("C", "0.2")
    assert done.returncode == 1
    assert "in judge.forward_step, replica 0, uid 4, 5 (2 in all)" in done.stderr
    assert ", line 13 in forward_step" in done.stderr


def test_a_loop_that_catches_all_is_hit_again_and_ends_with_the_process() -> None:
    done = end_of("loop", "2.5")
    assert done.returncode == 1
    assert done.stdout.count("hit") > 1
    assert "in judge.forward_step, replica 0, uid 4, 5 (2 in all)" in done.stderr
