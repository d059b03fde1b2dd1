# SPDX-License-Identifier: Apache-2.0
"""Name the call under way once it takes long, so that nobody wonders what a run is waiting for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from chatlearn.observability.numbers import duration

LONG_CALL_S: Final = 60.0
MOST_UIDS: Final = 8
"""Samples of a long call that are named."""


class CallUnderWay:
    """The call of a module that has been started and has not returned.

    Example:
        >>> call = CallUnderWay(clock)
        >>> call.begin("reward.forward_step", [3, 4])
        >>> call.told()  # two minutes later
        'reward.forward_step has taken 2:00 so far, uid 3, 4'
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._now: tuple[str, Sequence[int], float] | None = None

    def begin(self, name: str, uids: Sequence[int]) -> None:
        """Take note of a call that is being made."""
        self._now = name, uids, self._clock()

    def end(self) -> None:
        """Take note that it has returned."""
        self._now = None

    def told(self) -> str:
        """Name the call, how long it has taken and its samples; nothing while that is not long."""
        now = self._now
        if now is None or self._clock() - now[2] < LONG_CALL_S:
            return ""
        name, uids, began = now
        shown = ", ".join(str(uid) for uid in uids[:MOST_UIDS])
        more = f", ... ({len(uids)} in all)" if len(uids) > MOST_UIDS else ""
        samples = f", uid {shown}{more}" if shown else ""
        return f"{name} has taken {duration(self._clock() - began)} so far{samples}"
