# SPDX-License-Identifier: Apache-2.0
"""Draw both players' measures over a run's episodes, from the run's own metrics.

python picture.py RUN_FOLDER OUTPUT.svg [FOLDER_OF_THE_CONTROL]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 44, 226, 16, 34
CURVES = (
    ("eval/accuracy", "#2563eb", "solved by the solver"),
    ("eval/distinct", "#d97706", "distinct, of the proposer"),
)

Curve = list[tuple[int, float]]


def read(folder: Path, name: str) -> Curve:
    """Return a metric of a run over its episodes."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["episode"], row[name]) for row in rows if name in row]


def draw(run: Path, control: Path | None) -> str:
    """Return the picture as SVG: solid lines for the run, dashed ones for the control."""
    last = max(episode for episode, _ in read(run, CURVES[0][0]))
    parts, labels = [_axes(last)], []
    for name, colour, label in CURVES:
        curves = [(read(run, name), label, "")]
        if control is not None:
            curves.append((read(control, name), f"{label}, control", 'stroke-dasharray="5 4" '))
        for curve, text, dash in curves:
            points = [_place(episode, share, last) for episode, share in curve]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            line = f'fill="none" stroke="{colour}" stroke-width="2" {dash}/>'
            parts.append(f'<polyline points="{path}" {line}')
            labels.append((points[-1][1] + 4, text, colour))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
    style = 'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    return head + style + "\n".join(["", *parts, *_apart(labels), "</svg>", ""])


def _apart(labels: list[tuple[float, str, str]]) -> Iterator[str]:
    """Write the labels beside the ends of their lines, none over another."""
    free = 0.0
    for wanted, text, colour in sorted(labels):
        y = max(wanted, free)
        free = y + 15
        yield f'<text x="{WIDTH - RIGHT + 6}" y="{y:.1f}" fill="{colour}">{text}</text>'


def _place(episode: float, share: float, last: int) -> tuple[float, float]:
    x = LEFT + episode / last * (WIDTH - LEFT - RIGHT)
    return x, TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)


def _axes(last: int) -> str:
    lines = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, y), (right, _) = _place(0, share, last), _place(last, share, last)
        lines.append(f'<path d="M{x:.1f} {y:.1f}H{right:.1f}" stroke="#e5e7eb"/>')
        lines.append(
            f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{share:.0%}</text>'
        )
    for episode in (0, last // 2, last):
        x, y = _place(episode, 0, last)
        lines.append(
            f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" fill="#555">{episode}</text>'
        )
    x, y = _place(last / 4, 0, last)
    lines.append(
        f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" fill="#555">episode</text>'
    )
    return "\n".join(lines)


if __name__ == "__main__":
    _, run, output, *control = sys.argv
    Path(output).write_text(draw(Path(run), Path(control[0]) if control else None), "utf-8")
