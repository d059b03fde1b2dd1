# SPDX-License-Identifier: Apache-2.0
"""Write numbers as people read them: short, as quantities, durations, sparklines, ticks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def number(value: float, digits: int = 3) -> str:
    """Return a value with about `digits` significant digits: `0.431`, `12.3`, `1.2e-05`, `nan`."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return quantity(value, digits)
    if size < 1e-4:
        return f"{value:.{digits - 1}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:.{min(decimals, digits + 1)}f}"
    return text if "." not in text else text.rstrip("0").rstrip(".") or "0"


def quantity(value: float, digits: int = 3) -> str:
    """Return a count with a unit prefix: `12.3k`, `4.5M`."""
    if not math.isfinite(value):
        return str(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Return seconds as `0:41`, `12:05` or `3:04:05`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(0.0, seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a curve of at most `width` characters, each the mean of its stretch of values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges) if b > a]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round values that cover `low` to `high`."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return the values with as many digits as it takes to tell them apart."""
    labels: list[str] = []
    for digits in range(3, 9):
        labels = [number(value, digits) for value in values]
        if len(set(labels)) == len(values):
            break
    return labels
