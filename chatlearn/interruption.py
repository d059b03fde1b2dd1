# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM as requests: the first asks a run to stop where nothing is lost, the second ends it there."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interruption:
    """Catch the signals that end a run, between `catch()` and `release()`.

    Example:
        >>> interruption = Interruption()
        >>> interruption.catch()
        >>> while not interruption.requested:
        ...     work()
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._handlers: dict[int, Any] = {}
        self.is_forced = False
        """Whether a second signal has ended the work wherever it was."""
        self.may_raise = False
        """Whether nothing is lost if the first signal ends the work wherever it is, as in setup."""

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._number is not None

    @property
    def exit_code(self) -> int:
        """The exit status by which a shell tells a signal: 130 for Ctrl-C."""
        return 128 + (self._number or signal.SIGINT)

    def catch(self) -> None:
        """Take the signals over; outside the main thread Python allows no handlers, and nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)

    def release(self) -> None:
        """Give the signals back to whoever had them; safe to call twice."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.is_forced = True
            raise KeyboardInterrupt
        self._number = number
        if self.may_raise:
            raise KeyboardInterrupt
        sys.stderr.write(
            "\nstopping at the next safe point, then saving; once more stops right here without saving\n"
        )
