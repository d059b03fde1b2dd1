# SPDX-License-Identifier: Apache-2.0
"""Show how a run goes: a live display on a terminal, plain lines everywhere else.

    the run's thread                          the display's thread (terminal only)
      phase / advance / episode_done  --->      every 0.25 s: render the state, refresh
      (set a few attributes, < 50 us)

Showing never disturbs the run: whatever fails here (a closed pipe, a strange terminal) ends the
display, not the run; and leaving the context, by Ctrl-C too, gives the terminal back as it was.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TextIO, TypeVar

from chatlearn.observability.headline import (
    ACCURACY,
    REWARD,
    Headline,
    Labelled,
    evaluation_highlights,
    find_key,
    headline,
    measure_label,
)
from chatlearn.observability.long_call import CallUnderWay
from chatlearn.observability.numbers import duration, number, quantity, sparkline
from chatlearn.observability.outcomes import words

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

REFRESH_S = 0.25
HEARTBEAT_S = 30.0
"""In plain mode a long episode gives a line at least this often."""
MOST_MODULES = 2
"""Modules whose rewards, and whose losses, stand on a line."""


class Call(Protocol):
    """What is known of a finished call of a module."""

    @property
    def module(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def samples(self) -> int: ...


P = ParamSpec("P")
AnyProgress = TypeVar("AnyProgress", bound="Progress")


def never_disturb(
    method: Callable[Concatenate[AnyProgress, P], None],
) -> Callable[Concatenate[AnyProgress, P], None]:
    """Have whatever fails in `method` end the display, and nothing else."""

    @functools.wraps(method)
    def guarded(self: AnyProgress, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.is_off:
            return
        try:
            method(self, *args, **kwargs)
        except Exception:  # noqa: BLE001 - the policy of this file: the display ends, the run goes on
            self.is_off = True

    return guarded


class Progress:
    """Shows episodes, the phase, speeds, reward, loss and accuracy while a run goes on.

    Example:
        >>> with Progress(total_episodes=150) as progress:
        ...     for _ in range(150):
        ...         progress.phase("generating")
        ...         progress.episode_done(metrics)
    """

    def __init__(
        self,
        total_episodes: int,
        start_episode: int = 0,
        *,
        stream: TextIO | None = None,
        live: bool | None = None,
        interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; `live` None asks the stream, plain lines keep `interval_s` apart."""
        self._total = total_episodes
        self._episode = start_episode
        self._stream = sys.stdout if stream is None else stream
        self._want_live = live
        self._interval = interval_s
        self._clock = clock
        self.is_off = False
        self._live: Live | None = None
        self._console: Console | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._phase = ""
        self._phase_samples = self._phase_tokens = 0
        self._phase_began = 0.0
        self._call = CallUnderWay(clock)
        self._lost = ""
        """What the episode has lost so far, or the last one that ended, in words."""
        self._now = Headline()
        self._first_accuracy: float | None = None
        self._accuracy: float | None = None
        self._measured = "accuracy"
        self._rewards: dict[str, deque[float]] = {}
        self._durations: deque[float] = deque(maxlen=20)
        self._last_done = self._last_line = clock()
        self._next_episode_line = 0.0
        self._pending = ""

    # ---- what the engine calls -----------------------------------------------------------------

    def __enter__(self) -> Self:
        self._last_line = self._clock()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._phase = "done" if kind is None else "stopped"
        self._finish()

    @never_disturb
    def begin(self) -> None:
        """Start the clock of the first episode and, on a terminal, the live display.

        Apart from `__enter__`, because setting modules up may show progress bars of its own.
        """
        self._last_done = self._clock()
        self._start()

    @never_disturb
    def phase(self, name: str, call: str = "", uids: Sequence[int] = ()) -> None:
        """Say what the run does now: generating, training, saving; and of a call its name and samples."""
        self._phase = name
        self._phase_samples = self._phase_tokens = 0
        self._phase_began = self._clock()
        if call:
            self._call.begin(call, uids)

    @never_disturb
    def calling(self, name: str, uids: Sequence[int]) -> None:
        """Take note of the call that is made next within a phase, to name it if it takes long."""
        self._call.begin(name, uids)

    @never_disturb
    def losing(self, lost: str) -> None:
        """Say in words what the episode has lost so far."""
        self._lost = lost

    @never_disturb
    def tick(self, tokens: int) -> None:
        """Take note of tokens that a call under way has produced."""
        self._phase_tokens += tokens
        self._beat(f"{quantity(self._phase_tokens)} tokens")

    def _beat(self, amount: str) -> None:
        """In plain mode, give a sign of life during long work."""
        if self._live is None and self._clock() - self._last_line > HEARTBEAT_S:
            done = f"episode {self._episode + 1}/{self._total}"
            self._write(f"{done}  {self._phase}  {amount}")

    @never_disturb
    def advance(self, call: Call) -> None:
        """Take note of a finished call."""
        self._call.end()
        self._phase_samples += call.samples
        self._beat(f"{self._phase_samples} samples")

    @never_disturb
    def episode_done(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of the episode that ended."""
        now = self._clock()
        self._durations.append(now - self._last_done)
        self._last_done = now
        self._episode += 1
        self._now = headline(metrics)
        self._lost = words(metrics)
        for label, reward in self._now.rewards:
            self._rewards.setdefault(label, deque(maxlen=400)).append(reward)
        if self._live is not None:
            return
        self._pending = ""
        if now >= self._next_episode_line or self._episode >= self._total:
            self._next_episode_line = now + self._interval
            self._write(self._line())
        else:
            self._pending = self._line()

    @never_disturb
    def evaluation_done(self, metrics: Mapping[str, float], episode: int | None = None) -> None:
        """Take the metrics of an evaluation after `episode` episodes (None: those done so far)."""
        key = find_key(metrics, ACCURACY) or find_key(metrics, REWARD)
        if key is not None:
            self._accuracy = metrics[key]
            self._measured = measure_label(key, metrics)
            if self._first_accuracy is None:
                self._first_accuracy = self._accuracy
        shown = shown_numbers(metrics)
        done = self._episode if episode is None else episode
        when = f"after episode {done}" if done else "before training"
        self._show_pending()
        self._write(f"evaluation {when}  {shown}")

    @never_disturb
    def note(self, text: str) -> None:
        """Show a line of its own, such as where a checkpoint was written."""
        self._show_pending()
        self._write(text)

    # ---- lines -----------------------------------------------------------------------------------

    def _line(self) -> str:
        parts = [f"episode {self._episode}/{self._total}", *self._numbers()]
        return "  ".join([*parts, *self._timing()])

    def _numbers(self) -> list[str]:
        now = self._now
        parts = [*_first(now.rewards), *_first(now.losses)]
        if now.generated_per_s is not None:
            parts.append(f"gen {quantity(now.generated_per_s)} tok/s")
        if now.trained_per_s is not None:
            parts.append(f"train {quantity(now.trained_per_s)} tok/s")
        if self._lost:
            parts.append(self._lost)
        return parts

    def _timing(self) -> list[str]:
        if not self._durations:
            return []
        each = sum(self._durations) / len(self._durations)
        left = max(0, self._total - self._episode)
        eta = [f"ETA {duration(each * left)}"] if left else []
        return [f"{each:.3g} s/episode", *eta]

    def _show_pending(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, ""
            self._write(pending)

    def _write(self, line: str) -> None:
        if self._console is not None and self._live is not None:
            self._console.print(line, markup=False, highlight=False)
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()
        self._last_line = self._clock()

    # ---- the live display ------------------------------------------------------------------------

    @never_disturb
    def _start(self) -> None:
        if self._wants_live():
            self._open_live()
        work = self._watch if self._live is None else self._refresh
        self._thread = threading.Thread(target=work, name="progress", daemon=True)
        self._thread.start()

    def _wants_live(self) -> bool:
        return self._stream.isatty() if self._want_live is None else self._want_live

    def _open_live(self, *, transient: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        class OurConsole(Console):
            def on_broken_pipe(self) -> None:  # rich would end the process
                self.quiet = True

        console = OurConsole(file=self._stream)
        if console.is_dumb_terminal:
            return
        live = Live(
            get_renderable=self._render, console=console, auto_refresh=False, transient=transient
        )
        try:
            live.start()
        except Exception:  # noqa: BLE001 - another live display has the terminal: plain lines then
            return
        self._console, self._live = console, live

    def _watch(self) -> None:
        """In plain mode, name a call that takes long again and again."""
        while not self._stop.wait(HEARTBEAT_S):
            self._name_long_call()

    @never_disturb
    def _name_long_call(self) -> None:
        if text := self._call.told():
            self._write(text)

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_S):
            self._refresh_once()

    @never_disturb
    def _refresh_once(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _finish(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
        live, self._live = self._live, None
        try:
            if live is not None:
                live.stop()  # draws the last state, shows the cursor, gives stdout back
            elif not self.is_off:
                self._show_pending()
        except Exception:  # noqa: BLE001 - the policy of this file
            self.is_off = True

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar: Any = ProgressBar(total=max(self._total, 1), completed=self._episode, width=None)
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        title = Text.assemble("episode ", (f"{self._episode}/{self._total}", "bold"))
        head.add_row(title, bar, Text("  ".join(self._timing()), style="dim"))
        doing = self._doing()
        facts = Text("  ".join(self._numbers()))
        if self._accuracy is not None:
            facts.append(f"  {self._measured} {number(self._accuracy)}", style="green")
            if self._first_accuracy != self._accuracy and self._first_accuracy is not None:
                facts.append(f" (from {number(self._first_accuracy)})", style="dim")
        lines: list[RenderableType] = [head, doing]
        if facts.plain.strip():
            lines.append(facts)
        width = (self._console.width if self._console else 80) - 3
        for label, rewards in list(self._rewards.items())[:MOST_MODULES]:
            if len(rewards) > 1:
                curve = sparkline(list(rewards), min(60, max(10, width - len(label))))
                lines.append(Text.assemble((f"{label} ", "dim"), (curve, "green")))
        return Group(*lines)

    def _doing(self) -> Text:
        """Say what the run does now, and how fast."""
        from rich.text import Text

        doing = Text(self._phase or "starting", style="cyan")
        if self._phase_tokens:
            speed = self._phase_tokens / max(self._clock() - self._phase_began, 1e-3)
            doing.append(
                f"  {quantity(self._phase_tokens)} tokens, {quantity(speed)} tok/s", style="dim"
            )
        if self._phase_samples:
            doing.append(f"  {self._phase_samples} samples", style="dim")
        if long_call := self._call.told():
            doing.append(f"  {long_call}", style="yellow")
        return doing


def _first(labelled: Labelled) -> list[str]:
    shown = [f"{label} {number(value)}" for label, value in labelled[:MOST_MODULES]]
    return [*shown, "…"] if len(labelled) > MOST_MODULES else shown


def shown_numbers(metrics: Mapping[str, float]) -> str:
    """Return the few numbers of an evaluation that belong on a line."""
    found = evaluation_highlights(metrics)
    parts = [f"{label} {number(value)}" for label, value in found.numbers]
    if found.of_datasets:
        each = ", ".join(f"{name} {number(value)}" for name, value in found.of_datasets)
        parts[0] += f" ({each})"
    lost = [text] if (text := words(metrics)) else []
    return "  ".join([*parts, *lost]) or "(no numbers)"
