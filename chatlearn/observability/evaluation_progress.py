# SPDX-License-Identifier: Apache-2.0
"""Show how an evaluation outside of a run goes: a bar if it takes long, and one line at its end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from chatlearn.observability.numbers import duration
from chatlearn.observability.progress import (
    HEARTBEAT_S,
    Call,
    Progress,
    never_disturb,
    shown_numbers,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOW_AFTER_S = 1.0
"""An evaluation that is done by then shows nothing."""


class EvaluationProgress(Progress):
    """Shows, on standard error, how far an evaluation is.

    Example:
        >>> with EvaluationProgress(samples=500, nodes=2) as display:
        ...     display.advance(call)
        ...     display.evaluated({"reward/rewards": 0.4})
    """

    def __init__(
        self,
        samples: int,
        nodes: int,
        *,
        stream: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to show `samples` samples that pass through `nodes` nodes."""
        super().__init__(1, stream=stream or sys.stderr, live=live, clock=clock)
        self._samples = samples
        self._work = samples * nodes
        self._worked = 0
        self._began = clock()

    def __enter__(self) -> EvaluationProgress:
        super().__enter__()
        self._began = self._clock()
        self._start()
        return self

    @never_disturb
    def advance(self, call: Call) -> None:
        """Take note of a finished call."""
        self._worked += call.samples
        super().advance(call)

    @never_disturb
    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Say what was measured."""
        seconds = self._clock() - self._began
        if seconds >= SHOW_AFTER_S:
            self._write(
                f"evaluation  {self._samples} samples in {duration(seconds)}  {shown_numbers(metrics)}"
            )

    def _beat(self, amount: str) -> None:
        if self._live is None and self._clock() - self._last_line > HEARTBEAT_S:
            self._write(f"evaluation  {self._share():.0%}  {self._phase}  {amount}")

    def _share(self) -> float:
        return min(self._worked / max(self._work, 1), 1.0)

    @never_disturb
    def _start(self) -> None:
        if self._wants_live():
            self._thread = threading.Thread(target=self._show_late, name="progress", daemon=True)
            self._thread.start()

    def _show_late(self) -> None:
        if not self._stop.wait(SHOW_AFTER_S):
            self._show_live()
            self._refresh()

    @never_disturb
    def _show_live(self) -> None:
        self._open_live(transient=True)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        share = self._share()
        seconds = self._clock() - self._began
        left = f"ETA {duration(seconds / share * (1 - share))}" if 0 < share < 1 else ""
        bar: Any = ProgressBar(total=1.0, completed=share, width=None)
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(f"evaluation {share:.0%}", bar, f"{duration(seconds)}  {left}")
        return Group(head, self._doing())
