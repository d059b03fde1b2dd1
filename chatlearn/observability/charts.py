# SPDX-License-Identifier: Apache-2.0
"""Draw curves as inline SVG: lines with axes and ticks, and stacked areas; pure functions.

The figures read well without JavaScript; the values they were drawn from travel in a `data-chart`
attribute, from which `report.js` shows the ones under the pointer.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from chatlearn.observability.numbers import number, tick_labels, ticks

WIDTH, HEIGHT = 460.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 26.0
COLOURS = 8
MAX_POINTS = 400
SMOOTH_FROM = 40
"""Curves of that many points get a bold moving average over the faint raw line."""


@dataclass(frozen=True)
class Series:
    """One curve: its label and its points; NaN is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class _Scale:
    """Maps values to the drawing's coordinates."""

    x0: float
    x1: float
    y0: float
    y1: float

    def px(self, x: float) -> float:
        return LEFT + (x - self.x0) / ((self.x1 - self.x0) or 1) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        share = (min(max(y, self.y0), self.y1) - self.y0) / ((self.y1 - self.y0) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def line_chart(title: str, series: Sequence[Series], *, points: bool = False) -> str:
    """Return a figure with one line per series; `points` marks every value."""
    series = [thin(s) for s in series]
    values = [v for s in series for v in s.y if math.isfinite(v)]
    low, high, cut = y_range(values, title)
    scale = _Scale(*_x_range(series), low, high)
    parts = [_axes(scale)]
    for i, s in enumerate(series):
        smooth = len(s.y) >= SMOOTH_FROM and not points and is_noisy(s.y)
        parts.append(_path(s, scale, f"line c{i % COLOURS}{' raw' if smooth else ''}"))
        if smooth:
            window = max(3, len(s.y) // 15)
            average = replace(s, y=moving_average(s.y, window, robust=cut))
            parts.append(_path(average, scale, f"line c{i % COLOURS}"))
        marked = [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
        if points or len(marked) == 1:
            parts += [
                f'<circle class="dot c{i % COLOURS}" cx="{scale.px(x):.1f}" cy="{scale.py(y):.1f}" '
                'r="3"/>'
                for x, y in marked
            ]
        parts += [
            f'<text class="gap" x="{scale.px(x):.1f}" y="{HEIGHT - BOTTOM - 3:.1f}">✕</text>'
            for x, y in zip(s.x, s.y, strict=True)
            if not math.isfinite(y)
        ]
    last = [_last(s.y) for s in series]
    note = f"values beyond {number(high)} are cut off" if cut else ""
    return _figure(title, series, parts, scale, [number(v) for v in last], note)


def stacked_chart(title: str, series: Sequence[Series], unit: str = "s") -> str:
    """Return a figure of areas on top of each other; all series have the same x."""
    series = [thin(s) for s in series if any(v > 0 for v in s.y)]
    if not series:
        return ""
    count = len(series[0].x)
    window = max(1, count // 50)  # single slow episodes would hide the share of the phases
    layers = [moving_average([v if math.isfinite(v) else 0.0 for v in s.y], window) for s in series]
    totals = [sum(layer[i] for layer in layers) for i in range(count)]
    _, high, cut = y_range([0.0, *totals], title)
    scale = _Scale(*_x_range(series), 0.0, high)
    parts = [_axes(scale)]
    base = [0.0] * count
    for i, (s, layer) in enumerate(zip(series, layers, strict=True)):
        top = [b + v for b, v in zip(base, layer, strict=True)]
        upper = [f"{scale.px(x):.1f} {scale.py(y):.1f}" for x, y in zip(s.x, top, strict=True)]
        lower = [f"{scale.px(x):.1f} {scale.py(y):.1f}" for x, y in zip(s.x, base, strict=True)]
        area = "L".join([*upper, *reversed(lower)])
        parts.append(f'<path class="area c{i % COLOURS}" d="M{area}Z"/>')
        base = top
    share = [sum(v for v in s.y if math.isfinite(v)) for s in series]
    whole = sum(share) or 1.0
    labels = [f"{100 * part / whole:.0f}%" for part in share]
    note = f"{unit} per episode" + (f"; beyond {number(high)} cut off" if cut else "")
    return _figure(title, series, parts, scale, labels, note)


def y_range(values: Sequence[float], title: str = "") -> tuple[float, float, bool]:
    """Return the range to draw and whether spikes stay outside of it."""
    if not values:
        return 0.0, 1.0, False
    ordered = sorted(values)
    low, high, cut = ordered[0], ordered[-1], False
    if len(ordered) >= 20:
        p2, p98 = ordered[len(ordered) // 50], ordered[-1 - len(ordered) // 50]
        if high - p98 > 4 * (p98 - p2) > 0:
            high, cut = p98 + 0.5 * (p98 - p2), True
    if ("accuracy" in title or "pass@" in title) and low >= 0 and high <= 1:
        return 0.0, 1.0, False
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 else low - pad), high + pad, cut


def is_noisy(values: Sequence[float]) -> bool:
    """Tell whether a curve goes up and down so much that only its average shows the trend."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return False
    way = sum(abs(b - a) for a, b in itertools.pairwise(finite))
    return way > 3 * (max(finite) - min(finite))


def moving_average(values: Sequence[float], window: int, *, robust: bool = False) -> list[float]:
    """Return the mean (`robust`: the median) of the `window` values around each; gaps stay gaps."""
    half, result = window // 2, list[float]()
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        if not math.isfinite(value):
            result.append(math.nan)
        else:
            result.append(statistics.median(near) if robust else sum(near) / len(near))
    return result


def thin(series: Series) -> Series:
    """Return the series with at most `MAX_POINTS` points, each the mean of its stretch."""
    count = len(series.x)
    if count <= MAX_POINTS:
        return series
    edges = [round(i * count / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    spans = list(itertools.pairwise(edges))
    return replace(
        series,
        x=[series.x[b - 1] for _, b in spans],
        y=[_stretch(series.y[a:b]) for a, b in spans],
    )


def _stretch(values: Sequence[float]) -> float:
    """Return the mean, or NaN if any value is not finite: thinning must not hide a gap."""
    return sum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _x_range(series: Sequence[Series]) -> tuple[float, float]:
    every = [x for s in series for x in s.x]
    low, high = min(every, default=0.0), max(every, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _axes(scale: _Scale) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[str] = []
    levels = ticks(scale.y0, scale.y1)
    for y, label in zip(levels, tick_labels(levels), strict=True):
        at = scale.py(y)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 6}" y="{at + 3.5:.1f}">{label}</text>')
    whole = [x for x in ticks(scale.x0, scale.x1, 5) if x == int(x)]
    for x, label in zip(whole, tick_labels(whole), strict=True):
        at = scale.px(x)
        parts.append(f'<path class="grid" d="M{at:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick x" x="{at:.1f}" y="{bottom + 16}">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    return "".join(parts)


def _path(series: Series, scale: _Scale, css: str) -> str:
    pieces: list[str] = []
    pen = "M"
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(y):
            pieces.append(f"{pen}{scale.px(x):.1f} {scale.py(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    return f'<path class="{css}" d="{"".join(pieces)}"/>'


def _last(values: Sequence[float]) -> float:
    return next((v for v in reversed(values) if math.isfinite(v)), math.nan)


def _figure(
    title: str,
    series: Sequence[Series],
    parts: list[str],
    scale: _Scale,
    values: Sequence[str],
    note: str,
) -> str:
    """Wrap a drawing with its title, legend and the data for the pointer."""
    data = {
        "x": sorted({x for s in series for x in s.x}),
        "range": [scale.x0, scale.x1],
        "series": [
            {
                "label": s.label,
                "colour": i % COLOURS,
                "points": {
                    str(int(x) if x == int(x) else x): number(y, 4)
                    for x, y in zip(s.x, s.y, strict=True)
                },
            }
            for i, s in enumerate(series)
        ],
    }
    legend = "".join(
        f'<span class="key"><i class="c{i % COLOURS}"></i>{escape(s.label)} <b>{value}</b></span>'
        for i, (s, value) in enumerate(zip(series, values, strict=True))
    )
    attribute = escape(json.dumps(data, separators=(",", ":")), quote=True)
    small = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="chart" data-chart="{attribute}">'
        f"<figcaption><strong>{escape(title)}</strong>{small}</figcaption>"
        f'<div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(title)}">'
        f'{"".join(parts)}<path class="cross" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg></figure>'
    )
