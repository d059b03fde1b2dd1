# SPDX-License-Identifier: Apache-2.0
"""The headline numbers at the top of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from chatlearn.observability.headline import (
    ACCURACY,
    EVAL,
    GENERATED,
    REWARD,
    TRAINED,
    find,
    find_key,
    find_keys,
    labels_of,
    measure_label,
    total,
)
from chatlearn.observability.jsonl import Row
from chatlearn.observability.numbers import duration, number, quantity

MOST_REWARDS = 3
"""Modules whose rewards have tiles."""


def tiles_html(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    """Return the tiles: accuracy and reward before and after, episodes, time, tokens, warnings."""
    trained = [row for row in rows if row.get("episode")]
    tiles = [
        _accuracy(rows, summary),
        *_rewards(trained),
        _episodes(trained, summary),
        _time(rows, trained, summary),
        _tokens(rows, GENERATED, "tokens sampled"),
        _tokens(rows, TRAINED, "tokens trained on"),
        _recorded(rows),
        _nonfinite(rows),
    ]
    known = {"accuracy_before", "accuracy_after", "seconds", "episodes"}
    for name, value in summary.items():
        if name not in known and isinstance(value, int | float) and not isinstance(value, bool):
            tiles.append(_tile(name.replace("_", " "), escape(number(value))))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(label: str, value: str, note: str = "", css: str = "") -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="tile {css}"><span>{escape(label)}</span><b>{value}</b>{small}</div>'


def _change(before: float, after: float) -> str:
    return f"<em>{escape(number(before))} →</em> {escape(number(after))}"


def _accuracy(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
    label = "held-out accuracy"
    if not isinstance(before, int | float) or not isinstance(after, int | float):
        evaluated = [_numbers(row, EVAL) for row in rows]
        every = dict.fromkeys(name for e in evaluated for name in e)
        names = ACCURACY if find_key(every, ACCURACY) else REWARD
        key = find_key(every, names)
        values = [v for e in evaluated if (v := find(e, names)) is not None]
        if key is None:
            return ""
        label = f"held-out {measure_label(key, every).removeprefix('eval ')}"
        before, after = values[0], values[-1]
        if len(values) == 1:
            return _tile(label, escape(number(after)))
    return _tile(label, _change(before, after), "first → last", "good" if after > before else "")


def _rewards(trained: Sequence[Row]) -> list[str]:
    """Return a tile for each module's reward, named after the module where there are several."""
    rows = [_numbers(row) for row in trained]
    keys = find_keys(dict.fromkeys(name for row in rows for name in row), REWARD)
    if len(keys) <= 1:
        values = [v for row in rows if (v := find(row, REWARD)) is not None]
        return [_reward("training reward", values)] if values else []
    return [
        _reward(f"training {label}", [row[key] for row in rows if key in row])
        for key, label in list(labels_of(keys, "reward").items())[:MOST_REWARDS]
    ]


def _reward(label: str, values: Sequence[float]) -> str:
    tenth = max(1, len(values) // 10)
    before, after = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    if len(values) == 1:
        return _tile(label, escape(number(after)))
    note = f"mean of {tenth} episodes each" if tenth > 1 else "first → last"
    return _tile(label, _change(before, after), note)


def _episodes(trained: Sequence[Row], summary: Mapping[str, Any]) -> str:
    episodes = summary.get("episodes", max((int(r["episode"]) for r in trained), default=0))
    steps = max((int(row.get("train_iteration") or 0) for row in trained), default=0)
    return _tile("episodes", escape(str(episodes)), f"{steps} train steps" if steps else "")


def _time(rows: Sequence[Row], trained: Sequence[Row], summary: Mapping[str, Any]) -> str:
    seconds = max((float(row.get("time_s") or 0) for row in rows), default=0.0)
    total = summary.get("seconds")
    total = float(total) if isinstance(total, int | float) else seconds
    each = seconds / len(trained) if trained else 0.0
    return _tile("time", duration(total), f"{each:.2g} s per episode" if each else "")


def _tokens(rows: Sequence[Row], names: tuple[str, ...], label: str) -> str:
    values = [v for row in rows if (v := total(_numbers(row), names)) is not None]
    whole = sum(v for v in values if math.isfinite(v))
    if not whole:
        return ""
    seconds = max((float(row.get("time_s") or 0) for row in rows), default=0.0)
    return _tile(
        label, quantity(whole), f"{quantity(whole / seconds)}/s overall" if seconds else ""
    )


def _recorded(rows: Sequence[Row]) -> str:
    sizes = [size for row in rows if (size := _numbers(row).get("record/bytes"))]
    if not sizes:
        return ""
    each = f"{quantity(sum(sizes) / len(sizes))}B per episode"
    return _tile("recorded", f"{quantity(sum(sizes))}B", each)


def _nonfinite(rows: Sequence[Row]) -> str:
    bad = [row for row in rows if row.get("nonfinite")]
    if not bad:
        return ""
    names = sorted({str(name) for row in bad for name in row["nonfinite"]})
    return _tile(
        "NaN or infinite in", f"{len(bad)} episode{'s' * (len(bad) > 1)}", ", ".join(names), "warn"
    )


def _numbers(row: Row, prefix: str = "") -> dict[str, float]:
    """Return the row's metrics, of evaluations with `prefix` "eval/", of training without."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and name.startswith(EVAL) == bool(prefix)
    }
