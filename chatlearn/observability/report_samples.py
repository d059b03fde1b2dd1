# SPDX-License-Identifier: Apache-2.0
"""The samples in the report: the same evaluation prompts before and after, and training groups."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, cast

from chatlearn.columns import FAILED, TIMED_OUT
from chatlearn.observability.jsonl import Row
from chatlearn.observability.numbers import number

PART = "rewards/"
SHOWN_EPISODES = 4


def samples_html(rows: Sequence[Row]) -> str:
    """Return the sections for evaluation and training samples; empty without transcripts."""
    evaluated = [row for row in rows if row.get("phase") == "eval"]
    trained = [row for row in rows if row.get("phase") == "train"]
    scale = _reward_range(rows)
    return _before_after(evaluated, scale) + _training(trained, scale)


def _before_after(rows: Sequence[Row], scale: tuple[float, float]) -> str:
    """Pair the first and the last evaluation's samples by prompt."""
    if not rows:
        return ""
    episodes = sorted({int(row["episode"]) for row in rows})
    first, last = episodes[0], episodes[-1]
    after = _by_prompt(row for row in rows if row["episode"] == last)
    cards: list[str] = []
    for key, row in _by_prompt(row for row in rows if row["episode"] == first).items():
        later = after.get(key) if last != first else None
        columns = _completion(row, f"after episode {first}" if first else "before", scale)
        if later is not None:
            columns += _completion(later, f"after episode {last}", scale)
        cards.append(
            f'<article class="sample">{_prompt(row)}<div class="versions">{columns}</div></article>'
        )
    title = "Samples before and after" if last != first else "Evaluation samples"
    lead = "The same prompts in the first and in the last evaluation." if last != first else ""
    return f'<section id="samples"><h2>{title}</h2><p class="lead">{lead}</p>{"".join(cards)}</section>'


def _training(rows: Sequence[Row], scale: tuple[float, float]) -> str:
    """Show what was sampled for training in a few episodes spread over the run."""
    episodes = sorted({int(row["episode"]) for row in rows})
    if not episodes:
        return ""
    steps = min(SHOWN_EPISODES, len(episodes))
    picks = {episodes[round(i * (len(episodes) - 1) / max(1, steps - 1))] for i in range(steps)}
    parts: list[str] = []
    for episode in sorted(picks):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row["episode"] == episode:
                groups.setdefault(_group(row), []).append(row)
        cards = "".join(
            f'<article class="sample">{_prompt(group[0])}<div class="versions">'
            f"{''.join(_completion(row, '', scale) for row in group)}</div></article>"
            for group in groups.values()
        )
        parts.append(f"<details><summary>Episode {episode}</summary>{cards}</details>")
    return f'<section id="training"><h2>Training samples</h2>{"".join(parts)}</section>'


def _by_prompt(rows: Iterable[Row]) -> dict[tuple[str, int], Row]:
    """Key rows by prompt and how often it stood before; numbers differ between evaluations."""
    keyed: dict[tuple[str, int], Row] = {}
    for row in rows:
        prompt = f"{row.get('namespace', '')} {row.get('prompt', '')}"
        count = 0
        while (prompt, count) in keyed:
            count += 1
        keyed[(prompt, count)] = row
    return keyed


def _group(row: Row) -> str:
    return f"{row.get('prompt_uid', '')} {row.get('prompt', '')}"


def _prompt(row: Row) -> str:
    prompt = row.get("prompt")
    messages = _messages(prompt)
    if messages:
        inner = "".join(
            f'<div class="message"><span class="role">{escape(str(m.get("role", "")))}</span>'
            f"<pre>{escape(str(m.get('content', '')))}</pre></div>"
            for m in messages
        )
        return f'<div class="prompt">{inner}</div>'
    if prompt is None:
        return ""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return f'<div class="prompt"><pre>{escape(text)}</pre></div>'


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """Return the messages of a chat prompt; none for a prompt of another kind."""
    if not isinstance(prompt, list):
        return []
    items = cast("list[Any]", prompt)
    if all(isinstance(item, dict) and "role" in item for item in items):
        return items
    return []


def _completion(row: Row, when: str, scale: tuple[float, float]) -> str:
    reward = row.get("rewards")
    chips = ""
    outcome = row.get("outcome")
    is_lost = outcome in (FAILED, TIMED_OUT)
    if is_lost:
        chips += f'<span class="chip warn">{outcome.replace("_", " ")}: no reward</span>'
    elif "rewards" in row:
        chips += f'<span class="reward" {_tint(reward, scale)}>reward {_value(reward)}</span>'
    chips += "".join(
        f'<span class="chip">{escape(name.removeprefix(PART))} {_value(value)}</span>'
        for name, value in row.items()
        if name.startswith(PART) and not is_lost
    )
    advantage = row.get("advantages")
    if isinstance(advantage, int | float):
        chips += f'<span class="chip">advantage {_value(advantage)}</span>'
    if row.get("finish_reason") == "length":
        chips += '<span class="chip warn">cut off at the limit</span>'
    when = " · ".join(part for part in (row.get("namespace"), when) if part)
    head = f'<span class="when">{escape(when)}</span>' if when else ""
    text = row.get("completion")
    body = '<pre class="none">no completion</pre>'
    if text is not None:
        body = f"<pre>{escape(str(text))}</pre>" if text else '<pre class="none">(empty)</pre>'
    return f'<div class="version"><div class="chips">{head}{chips}</div>{body}</div>'


def _reward_range(rows: Sequence[Row]) -> tuple[float, float]:
    values = [
        float(row["rewards"])
        for row in rows
        if isinstance(row.get("rewards"), int | float) and math.isfinite(row["rewards"])
    ]
    return (min(values), max(values)) if values else (0.0, 1.0)


def _tint(reward: Any, scale: tuple[float, float]) -> str:
    """Colour from red (lowest reward of the run) over yellow to green (highest)."""
    if not isinstance(reward, int | float):
        return 'style="--hue:0"'
    low, high = scale
    share = (reward - low) / (high - low) if high > low else 0.5
    return f'style="--hue:{round(130 * share)}"'


def _value(value: Any) -> str:
    if value is None:  # how JSON lines write what is not finite
        return "NaN"
    return number(value) if isinstance(value, int | float) else escape(str(value))
