# SPDX-License-Identifier: Apache-2.0
"""Sort a run's metrics into groups of small charts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final

from chatlearn.observability.charts import Series, line_chart, stacked_chart
from chatlearn.observability.headline import (
    ACCURACY,
    EVAL,
    OUTCOMES,
    PASS,
    REWARD,
    find_key,
    pass_k,
)
from chatlearn.observability.jsonl import Row
from chatlearn.observability.metrics import KEYS

TIME: Final = "time/"
WHOLES: Final = ("time/episode", "time/total")
"""Times that contain the phases, so that they do not belong on top of them."""
GROUPS: Final = (
    ("Reward", r"reward|score|accuracy|correct|solved|advantage"),
    ("Learning", r"loss|kl|mismatch|clip|grad|entropy|ratio|\blr\b|learning_rate|value|return"),
    ("Samples", r"length|truncat|finish|stop|cut_off|_len\b|samples|group|zero_std"),
    ("Speed and memory", r"per_s\b|token|second|memory|bytes|share|overhead|stale"),
    ("Other", r""),
)
"""The first group whose pattern is found in the last part of a metric's name takes it."""
LEAD: Final = (
    '<p class="lead">By episode. Thin lines are the values, bold ones their moving average; '
    "point at a curve to read it.</p>"
)
VARIANT: Final = re.compile(r"_(max|min)$")


def curves_html(rows: Sequence[Row]) -> str:
    """Return the section of all curves; empty without episodes."""
    names = _names(rows)
    evaluated = sorted((n for n in names if n.startswith(EVAL)), key=_rank_of_evaluation)
    phases = [name for name in names if name.startswith(TIME)]
    groups: dict[str, list[str]] = {"Reward": [], "Evaluation": _charts(rows, evaluated, True)}
    rewarding = find_key([n for n in names if n not in evaluated], REWARD) or ""
    for name in names:
        if name not in evaluated and name not in phases:
            group = _group(name)
            if group == "Other" and "/" in name and _owner(name) == _owner(rewarding):
                group = "Reward"  # the parts that the reward is made of, whatever their names
            groups.setdefault(group, []).append(name)
    html: dict[str, list[str]] = {}
    for title, members in groups.items():
        html[title] = members if title == "Evaluation" else _charts(rows, members, False)
    shares = [_series(rows, name, name.removeprefix(TIME)) for name in phases if name not in WHOLES]
    if time := stacked_chart("time by phase", _aligned(shares)):
        html.setdefault("Speed and memory", []).insert(0, time)
    order = ["Evaluation", "Reward", *(title for title, _ in GROUPS[1:])]
    parts = [
        f'<h3>{title}</h3><div class="grid-of-charts">{"".join(html[title])}</div>'
        for title in order
        if html.get(title)
    ]
    return f'<section id="curves"><h2>Curves</h2>{LEAD}{"".join(parts)}</section>' if parts else ""


DIGEST = "/digest"
"""End of the names of numbers that are compared between runs, and are no quantity."""


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the metrics in the order they first appear."""
    found: dict[str, None] = {}
    for row in rows:
        bad = set(row.get("nonfinite", ()))
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name.endswith(DIGEST) or (f"/{OUTCOMES}" in f"/{name}" and not value):
                continue  # nothing failed: no curve
            if name not in KEYS and (number or name in bad):
                found[name] = None
    return list(found)


def _rank_of_evaluation(name: str) -> int:
    """Put first what an evaluation is for; the rest stays in its order."""
    last = name.rsplit("/", 1)[-1]
    if last in ACCURACY or pass_k(name) is not None:
        return 0
    return 1 if last in REWARD else 2


def _owner(name: str) -> str:
    return name.split("/", 1)[0]


def _group(name: str) -> str:
    last = name.rsplit("/", 1)[-1]
    return next(title for title, pattern in GROUPS if re.search(pattern, last))


def _charts(rows: Sequence[Row], names: Sequence[str], points: bool) -> list[str]:
    """Draw one chart per last part of the names: modules, and variants such as `_max`, together.

    All k of one `pass@k` share a chart; another module's, or dataset's, has one of its own.
    """
    charts: dict[str, list[str]] = {}
    owners = {_pass_owner(name) for name in names if pass_k(name) is not None}
    for name in names:
        title = VARIANT.sub("", name.rsplit("/", 1)[-1]).replace("_", " ")
        if pass_k(name) is not None:
            title = f"{PASS}k" + (f" of {_pass_owner(name)}" if len(owners) > 1 else "")
        charts.setdefault(title, []).append(name)
    return [
        line_chart(title, [_series(rows, n, n) for n in members], points=points)
        for title, members in charts.items()
    ]


def _pass_owner(name: str) -> str:
    return name.rpartition("/")[0].removeprefix(EVAL)


def _series(rows: Sequence[Row], name: str, label: str) -> Series:
    """Return the metric over episodes; what was not finite is NaN, what is absent has no point."""
    found: dict[float, float] = {}
    for row in rows:
        value = row.get(name)
        if isinstance(value, int | float):
            found[float(row.get("episode", 0))] = float(value)
        elif name in row.get("nonfinite", ()):
            found[float(row.get("episode", 0))] = math.nan
    return Series(label, list(found), list(found.values()))


def _aligned(series: Sequence[Series]) -> list[Series]:
    """Give all series the same episodes, 0 where a phase did not happen."""
    every = sorted({x for s in series for x in s.x if x > 0})
    aligned: list[Series] = []
    for s in series:
        values = dict(zip(s.x, s.y, strict=True))
        aligned.append(Series(s.label, every, [values.get(x, 0.0) for x in every]))
    return aligned
