# SPDX-License-Identifier: Apache-2.0
"""Draw both players' measures over a run's episodes, from the run's own metrics.

python picture.py RUN_FOLDER OUTPUT.svg [FOLDER_OF_THE_CONTROL]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, GAP = 760, 290, 46, 16, 62, 46, 36
MEASURES = (
    ("eval/accuracy", "#2563eb", "solver: right answers"),
    ("eval/well_formed", "#d97706", "proposer: well-formed"),
    ("eval/distinct", "#d97706", "proposer: well-formed and distinct"),
)
PANEL = (WIDTH - LEFT - RIGHT - GAP * (len(MEASURES) - 1)) / len(MEASURES)
TITLE = "Self-play: both policies learn from each other"
GREY = "#555"

Curve = list[tuple[int, float]]


def read(folder: Path, name: str) -> Curve:
    """Return a metric of a run over its episodes."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["episode"], row[name]) for row in rows if name in row]


def draw(run: Path, control: Path | None) -> str:
    """Return the picture as SVG: one panel per measure, a solid line for the run, a dashed one for the control."""
    last = max(episode for episode, _ in read(run, MEASURES[0][0]))
    parts = [_text(LEFT, 18, TITLE, "start", "#111", 'font-weight="bold" font-size="14"')]
    parts += _legend(control is not None)
    for number, (name, colour, label) in enumerate(MEASURES):
        parts += _axes(number, last)
        parts.append(_text(_left(number), TOP - 8, label, "start", colour))
        if control is not None:
            dash = 'stroke-dasharray="5 4" stroke-opacity="0.8"'
            parts.append(_line(number, read(control, name), last, colour, dash))
        parts.append(_line(number, read(run, name), last, colour))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    head += f'font-family="sans-serif" font-size="12"><title>{TITLE}</title>'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head + paper, *parts, "</svg>", ""])


def _left(panel: int) -> float:
    return LEFT + panel * (PANEL + GAP)


def _place(panel: int, episode: float, share: float, last: int) -> tuple[float, float]:
    x = _left(panel) + episode / last * PANEL
    return x, TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)


def _line(panel: int, curve: Curve, last: int, colour: str, dash: str = "") -> str:
    points = (_place(panel, episode, share, last) for episode, share in curve)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" {dash}/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = GREY, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {more}>{text}</text>'
    )


def _legend(with_control: bool) -> list[str]:
    """Say which line is whose, at the title's right."""
    entries = [("self-play", "")]
    if with_control:
        entries.append(("control: only the solver learns", 'stroke-dasharray="5 4"'))
    parts, x = list[str](), 420.0
    for text, dash in entries:
        parts.append(f'<path d="M{x:.1f} 14h24" stroke="{GREY}" stroke-width="2" {dash}/>')
        parts.append(_text(x + 30, 18, text, "start"))
        x += 110
    return parts


def _axes(panel: int, last: int) -> list[str]:
    lines = list[str]()
    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, y), (right, _) = _place(panel, 0, share, last), _place(panel, last, share, last)
        lines.append(f'<path d="M{x:.1f} {y:.1f}H{right:.1f}" stroke="#e5e7eb"/>')
        if panel == 0:
            lines.append(_text(x - 6, y + 4, f"{share:.0%}", "end"))
    for episode in (0, last // 2, last):
        x, y = _place(panel, episode, 0, last)
        lines.append(_text(x, y + 17, str(episode), "middle"))
    x, y = _place(panel, last / 2, 0, last)
    lines.append(_text(x, y + 35, "episode", "middle"))
    return lines


if __name__ == "__main__":
    _, run, output, *control = sys.argv
    Path(output).write_text(draw(Path(run), Path(control[0]) if control else None), "utf-8")
