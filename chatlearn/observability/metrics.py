# SPDX-License-Identifier: Apache-2.0
"""From the numbers of single calls to one flat row per episode, and the file of these rows.

How the values of several calls become one is read off the end of the name: `_tokens` are summed,
`_max` and `_min` take the extreme, all else is the mean weighted by the calls' samples.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatlearn.errors import OutputError
from chatlearn.observability.jsonl import JsonlFile, Row, json_safe, read_rows, to_line

KEYS = ("episode", "train_iteration", "time_s")
"""What every row of `metrics.jsonl` has besides its metrics."""
_TIMES = ("time_s", "time/")
"""Begin the names of what an episode took; the last of it is known only behind its checkpoint."""


class _Series:
    """The values that one metric had in an episode, reduced as they come."""

    __slots__ = ("kind", "total", "weight")

    def __init__(self, name: str) -> None:
        ends = {"_tokens": "sum", "_max": "max", "_min": "min"}
        self.kind = next((kind for end, kind in ends.items() if name.endswith(end)), "mean")
        self.total = 0.0
        self.weight = 0.0

    def add(self, value: float, samples: float) -> None:
        if self.kind == "mean":
            self.total += value * samples
        elif self.kind == "sum" or self.weight == 0:
            self.total += value
        elif math.isnan(value) or math.isnan(self.total):
            self.total = math.nan  # max() would lose it, depending on the order
        else:
            self.total = max(self.total, value) if self.kind == "max" else min(self.total, value)
        self.weight += samples

    @property
    def value(self) -> float:
        return self.total / self.weight if self.kind == "mean" else self.total


class EpisodeMetrics:
    """Collects the numbers of one episode (or one evaluation) and reduces them to a flat dict.

    Example:
        >>> episode = EpisodeMetrics()
        >>> episode.add("policy", "forward_step", {"response_length": 10.0}, samples=3)
        >>> episode.add("policy", "forward_step", {"response_length": 20.0}, samples=1)
        >>> episode.add_time("env_flow", 0.25)
        >>> episode.summary()
        {'policy/response_length': 12.5, 'time/env_flow': 0.25}
    """

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, str], _Series] = {}
        self._seconds: dict[str, float] = {}
        self._plain: dict[str, float] = {}

    def add(
        self, module: str, method: str, values: Mapping[str, float], samples: float = 1
    ) -> None:
        """Take the numbers of one call, which had `samples` samples."""
        for name, value in values.items():
            key = (module, method, name)
            if key not in self._series:
                self._series[key] = _Series(name)
            self._series[key].add(float(value), max(float(samples), 1e-12))

    def add_time(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase; its metric is `time/<phase>`."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def put(self, name: str, value: float) -> None:
        """Set a metric of the whole episode under its full name."""
        self._plain[name] = float(value)

    def summary(self) -> dict[str, float]:
        """Return `<module>/<name>` (`<module>.<method>/<name>` where two methods report one name),
        `time/<phase>` and the plain metrics; non-finite values stay what they are.
        """
        methods: dict[tuple[str, str], int] = {}
        for module, _, name in self._series:
            methods[(module, name)] = methods.get((module, name), 0) + 1
        flat: dict[str, float] = {}
        for (module, method, name), series in self._series.items():
            owner = module if methods[(module, name)] == 1 else f"{module}.{method}"
            flat[f"{owner}/{name}"] = series.value
        flat.update({f"time/{phase}": seconds for phase, seconds in self._seconds.items()})
        flat.update(self._plain)
        return flat


@dataclass(frozen=True)
class Records:
    """What a checkpoint keeps of a run's files."""

    lines: str
    """Those of `metrics.jsonl` once the last episode is in it."""
    metrics: Mapping[str, float]
    """Of the last episode."""
    transcripts: int
    """Samples in `transcripts.jsonl`."""


class MetricStore:
    """Writes `metrics.jsonl`: one row per episode, valid JSON, flushed line by line.

    A non-finite value is written as null and its name stands in the row's `nonfinite` list.

    Example:
        >>> store = MetricStore(folder / "metrics.jsonl")
        >>> store.write(1, 4, {"policy_trainer/loss": 0.1})
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = JsonlFile(path)
        self._clock = clock
        self._start = clock()
        self._lines: list[str] = []
        """Of the whole run, for checkpoints: whatever happens to the file, the curves go on."""

    def write(
        self, episode: int, train_iteration: int, metrics: Mapping[str, float], **extra: Any
    ) -> Row:
        """Append the row of `episode` (episodes done; 0 is before the first one) and return it."""
        row = self._row(episode, train_iteration, metrics, extra)
        if self._file.was_removed:
            self._file.replace("".join(self._lines))
        self._lines += self._file.append(row)
        return row

    def amend(self, episode: int, train_iteration: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the row of `episode`, the last one; write one if there is none."""
        row: Row = json.loads(self._lines[-1]) if self._lines else {}
        if row.get("episode") != episode:
            self.write(episode, train_iteration, metrics)
            return
        bad = [*(n for n in row.pop("nonfinite", []) if n not in metrics), *nonfinite(metrics)]
        row |= {name: None if name in bad else float(v) for name, v in metrics.items()}
        if bad:
            row["nonfinite"] = bad
        self._lines[-1] = to_line(row)
        self._file.replace("".join(self._lines))

    def lines(self, episode: int, train_iteration: int, metrics: Mapping[str, float]) -> str:
        """Return what the file will hold once the row of `episode` is written; nothing is written."""
        return "".join([*self._lines, to_line(self._row(episode, train_iteration, metrics, {}))])

    def written(self) -> str:
        """Return what the file holds."""
        return "".join(self._lines)

    def restore(self, episode: int, saved: str | None) -> list[Row]:
        """Go on after `episode`: have the file hold the rows up to it, go on from the time of the last one.

        Args:
            episode: episodes done; before the first one nothing counts.
            saved: the lines that the checkpoint kept. They replace the file's own, unless those say the same and
                only took other times. None takes the file's own.

        Returns:
            The rows that it holds now.

        Raises:
            OutputError: it cannot be written, or nothing was saved and a line of its own is no JSON object.
        """
        kept = [] if saved is None else saved.splitlines(keepends=True)
        try:
            rows = [row for row in read_rows(self._file.path) if _episode(row) <= episode]
        except OutputError:
            if saved is None:
                raise
        else:
            own = [to_line(row) for row in rows]
            kept = own if saved is None or _same(own, kept) else kept
        self._lines = kept if episode > 0 else []
        if self._lines or self._file.path.exists():
            self._file.replace("".join(self._lines))
        rows = [json.loads(line) for line in self._lines]
        seconds = max((float(row.get("time_s") or 0.0) for row in rows), default=0.0)
        self._start = self._clock() - seconds
        return rows

    def sync(self) -> None:
        """Have on disk what was written."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _row(
        self,
        episode: int,
        train_iteration: int,
        metrics: Mapping[str, float],
        extra: Mapping[str, Any],
    ) -> Row:
        row: Row = {
            "episode": episode,
            "train_iteration": train_iteration,
            "time_s": round(self._clock() - self._start, 4),
            **{name: json_safe(value) for name, value in extra.items()},
        }
        bad = nonfinite(metrics)
        row.update({name: None if name in bad else float(v) for name, v in metrics.items()})
        if bad:
            row["nonfinite"] = bad
        return row


def _episode(row: Row) -> int:
    number = row.get("episode")
    return number if isinstance(number, int) else 0


def _same(own: list[str], saved: list[str]) -> bool:
    """Tell whether rows are those of a checkpoint, whose last one was saved before it was done: its times differ."""
    if len(own) != len(saved) or own[:-1] != saved[:-1]:
        return False
    last: list[Row] = [json.loads(lines[-1]) for lines in (own, saved) if lines]
    values = [{k: v for k, v in row.items() if not k.startswith(_TIMES)} for row in last]
    return not values or values[0] == values[1]


def nonfinite(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of metrics that are NaN or infinite."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]
