# SPDX-License-Identifier: Apache-2.0
"""End a call of a step that takes longer than it may.

::

    in the main thread      a timer's signal raises `DeadlinePassed` inside the step, again every second until it ends;
                            a coroutine is cancelled by its event loop, and the signal comes only if it blocks that loop
    stuck in C code         signals wait there: `GRACE_S` later the stacks are printed, what hangs among them, and the
                            process ends
    elsewhere, on Windows   the call runs in a thread of its own, which is given up (it goes on, unheard)

`DeadlinePassed` is no `Exception`, so that an `except Exception: pass` in the step does not swallow it. A step whose
`except:` does swallow it has still taken too long: whatever it returns or raises then (but for a Ctrl-C) is not used.
The signal raises only below the frame that called the step: never in the engine's own code, however late it comes.
"""

from __future__ import annotations

import contextlib
import contextvars
import faulthandler
import os
import signal
import site
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Generator, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, Final, TypeVar

T = TypeVar("T")

GRACE_S: Final = 60.0
"""How long a call may stay in C code beyond its deadline (or as long as the deadline, if that is longer)."""
_AGAIN_S: Final = 1.0
_STDERR: Final = 2


class DeadlinePassed(BaseException):
    """Ends the step that `deadline` bounds, which was at `place`; the worker makes a `DeadlineError` of it."""

    def __init__(self, deadline: Deadline, place: str, *, was_caught: bool = False) -> None:
        super().__init__(deadline, place)
        self.deadline = deadline
        self.place = place
        self.was_caught = was_caught
        """Whether the step caught what was to end it, and went on to its end."""


def _run(function: Callable[[], Any]) -> Any:
    return function()


class Deadline:
    """Bound one call.

    Args:
        seconds: how long it may take.
        what: names it where the stacks of a hanging process are printed.

    Example:
        >>> Deadline(5.0, "reward.forward_step, replica 0, uid 7").run(lambda: 1 + 1)
        2
    """

    def __init__(self, seconds: float, what: str) -> None:
        self.seconds = seconds
        self._passes = time.monotonic() + seconds
        self._ends = self._passes + max(GRACE_S, seconds)
        code = _run.__code__.replace(co_name=what, co_qualname=what)
        self._guarded = FunctionType(code, globals())
        """`_run` under a name of its own, by which its frame is known, to people too."""
        self._outer: Deadline | None = None
        """Of the step inside which the call is made, if there is one."""
        self._hit = ""
        """Where the call was when it was interrupted last; empty if it was not."""

    @property
    def left(self) -> float:
        """Seconds until it passes."""
        return max(self._passes - time.monotonic(), 0.0)

    def leave_to_loop(self) -> float:
        """Let an event loop end the call in the seconds that are returned, and step in only if it has not."""
        left = self.left
        self._passes += _AGAIN_S
        return left

    def run(self, function: Callable[[], T]) -> T:
        """Return what `function` returns.

        Raises:
            DeadlinePassed: it took too long; the traceback ends where it was.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or sys.platform == "win32":
            return self._run_beside(function)
        with self._timed():
            try:
                value = self._guarded(function)
            except (KeyboardInterrupt, DeadlinePassed):
                raise
            except BaseException as error:
                if self._hit:
                    raise DeadlinePassed(self, self._hit, was_caught=True) from error
                raise
        if self._hit:
            raise DeadlinePassed(self, self._hit, was_caught=True)
        return value

    # ---- in the main thread -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _timed(self) -> Generator[None]:
        """Have `_ring` called from the deadline on; afterwards all timers and handlers are as they were before."""
        began = time.monotonic()
        handlers = {n: signal.signal(n, self._ring) for n in (signal.SIGALRM, signal.SIGVTALRM)}
        rest, interval = signal.setitimer(signal.ITIMER_REAL, self.seconds, _AGAIN_S)
        over, lock = threading.Event(), threading.Lock()
        waker = threading.Thread(target=self._wake, args=(over, lock), daemon=True)
        waker.start()
        outer = getattr(handlers[signal.SIGALRM], "__self__", None)
        self._outer = outer if isinstance(outer, Deadline) else None
        self._print_when_it_hangs()
        try:
            yield
        finally:
            with lock:
                over.set()
            if self._outer is not None:
                self._outer._print_when_it_hangs()
            else:
                faulthandler.cancel_dump_traceback_later()
            rest = max(rest - (time.monotonic() - began), 1e-3) if rest else 0.0
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.setitimer(signal.ITIMER_REAL, rest, interval)

    def _print_when_it_hangs(self) -> None:
        left = max(self._ends - time.monotonic(), _AGAIN_S)
        faulthandler.dump_traceback_later(left, exit=True, file=_STDERR)

    def _wake(self, over: threading.Event, lock: threading.Lock) -> None:
        """Send a second signal, for steps that use the first one's timer themselves (`signal.alarm`)."""
        main = threading.main_thread().ident
        assert main is not None
        delay = self.seconds + _AGAIN_S / 4
        while not over.wait(delay):
            delay = _AGAIN_S
            with lock:
                if not over.is_set():
                    signal.pthread_kill(main, signal.SIGVTALRM)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._outer is not None:
            self._outer._ring(number, frame)
        if frame is None or self.left:
            return
        caller = frame.f_back
        while caller is not None:
            if caller.f_code is self._guarded.__code__:
                self._hit = _innermost(list(_below(frame, caller)))
                raise DeadlinePassed(self, self._hit)
            caller = caller.f_back

    # ---- elsewhere -------------------------------------------------------------------------------------------------

    def _run_beside(self, function: Callable[[], T]) -> T:
        outcome: list[tuple[T | None, BaseException | None]] = []

        def call() -> None:
            try:
                outcome.append((self._guarded(function), None))
            except BaseException as error:  # noqa: BLE001 - raised again where the call was made
                outcome.append((None, error))

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(call,), daemon=True)
        thread.start()
        while not outcome and self.left and thread.is_alive():
            thread.join(self.left)
        if not outcome:
            # The one way to see where another thread is.
            frame = sys._current_frames().get(thread.ident or 0)  # pyright: ignore[reportPrivateUsage]
            place = "" if frame is None else _innermost(list(_below(frame, None)))
            raise DeadlinePassed(self, place)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]


def cancelled(
    deadline: Deadline, awaitable: Awaitable[Any], error: BaseException | None
) -> DeadlinePassed:
    """Return what ends a step whose coroutine was cancelled.

    Args:
        deadline: of the step.
        awaitable: what was cancelled.
        error: what came of it: a `TimeoutError`; anything else, or None if it returned, where it caught the cancelling.
    """
    if not isinstance(error, TimeoutError):
        code: CodeType | None = getattr(awaitable, "cr_code", None)
        place = f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}" if code else ""
        return DeadlinePassed(deadline, place, was_caught=True)
    while error.__cause__ is not None:
        error = error.__cause__
    return DeadlinePassed(deadline, _innermost(list(traceback.walk_tb(error.__traceback__))[::-1]))


_LIBRARIES: Final = tuple(
    {
        *(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib")),
        f"{site.getusersitepackages()}{os.sep}",
        f"{Path(__file__).parents[1]}{os.sep}",
        "<frozen",
    }
)
"""Where code lies that is Python's, installed, or ours."""


def _below(frame: FrameType, caller: FrameType | None) -> Generator[tuple[FrameType, int]]:
    """Yield frames and their lines from `frame` outwards, up to, and without, `caller`."""
    inner: FrameType | None = frame
    while inner is not None and inner is not caller:
        yield inner, inner.f_lineno
        inner = inner.f_back


def _innermost(frames: Sequence[tuple[FrameType, int]]) -> str:
    """Name the innermost line, given the innermost first; of those that are the user's, if any is."""
    own = (f for f in frames if not f[0].f_code.co_filename.startswith(_LIBRARIES))
    frame, line = next(own, frames[0])
    return f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
