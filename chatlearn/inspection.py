# SPDX-License-Identifier: Apache-2.0
"""Stop a user's script at its first `learn()` or `eval()` so that a command can look at the engine.

The command acts while the script's own `__main__` is still there, and an `except Exception` of the
script cannot swallow the stop.

Example:
    >>> with inspecting(lambda subject: subject.check()):
    ...     runpy.run_path("script.py", run_name="__main__")  # raises `Inspection` at `learn()`
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Action = Callable[[Any], Any]

_action: ContextVar[Action | None] = ContextVar("chatlearn_inspection", default=None)


class Inspection(BaseException):
    """Carry the engine or evaluator that was about to run, and what the command made of it."""

    def __init__(self, subject: Any, result: Any = None, error: Exception | None = None) -> None:
        super().__init__(f"stopped at {type(subject).__name__}")
        self.subject = subject
        self.result = result
        self.error = error
        """What the action raised; kept here so that it passes the script's own handlers."""


@contextmanager
def inspecting(action: Action = lambda subject: subject) -> Generator[None]:
    """Within the block, `intercept` calls `action` on its subject and raises `Inspection`."""
    token = _action.set(action)
    try:
        yield
    finally:
        _action.reset(token)


def intercept(subject: Any) -> None:
    """Raise `Inspection` if a command wants to look at `subject`; else do nothing.

    `Engine.learn` and `Evaluator.eval` call this before anything else.
    """
    action = _action.get()
    if action is None:
        return
    token = _action.set(None)  # the action itself may call `eval()`
    try:
        raise Inspection(subject, result=action(subject))
    except Exception as error:
        raise Inspection(subject, error=error) from error
    finally:
        _action.reset(token)
