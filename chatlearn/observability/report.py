# SPDX-License-Identifier: Apache-2.0
"""Write `report.html`: one page that opens offline and shows a run from its folder's files alone.

Everything that comes from the run is escaped, and the page's policy lets no script run but ours.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, cast

from chatlearn.errors import OutputError
from chatlearn.observability.atomic import write_atomically
from chatlearn.observability.headline import EVAL
from chatlearn.observability.jsonl import Row, read_rows
from chatlearn.observability.report_curves import curves_html
from chatlearn.observability.report_samples import samples_html
from chatlearn.observability.report_tiles import tiles_html

FILES = ("metrics.jsonl", "transcripts.jsonl", "config.yaml", "summary.json", "flows")


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path; what is missing is left out.

    Raises:
        OutputError: No run lies in the folder, or the page cannot be written.

    Example:
        >>> write_report(Path("runs/grpo"))
        PosixPath('runs/grpo/report.html')
    """
    if not any((run_folder / name).exists() for name in FILES):
        raise OutputError(
            "there is no run to report on",
            place=str(run_folder),
            fix="give the output folder of a run, which holds metrics.jsonl",
        )
    target = run_folder / "report.html"
    write_atomically(target, render(run_folder))
    return target


def render(run_folder: Path) -> str:
    """Return the page of a run folder."""
    rows = read_rows(run_folder / "metrics.jsonl")
    summary = _read_mapping(run_folder / "summary.json")
    sections = [
        ("", tiles_html(rows, summary)),
        ("Curves", curves_html(rows)),
        ("Flows", _flows(run_folder / "flows")),
        ("Samples", samples_html(read_rows(run_folder / "transcripts.jsonl"))),
        ("Configuration", _configuration(run_folder)),
    ]
    links = "".join(
        f'<a href="#{name.lower()}">{name}</a>' for name, html in sections if name and html
    )
    body = "".join(html for _, html in sections)
    return _page(run_folder.resolve().name, _subtitle(rows), links, body)


def _page(title: str, subtitle: str, links: str, body: str) -> str:
    folder = resources.files("chatlearn.observability")
    style = folder.joinpath("report.css").read_text(encoding="utf-8")
    script = folder.joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(title)} – run report</title>
<style>{style}</style></head>
<body><main><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
<nav>{links}</nav>
{body}
<footer>Written by chatlearn from the files of this run folder; it needs no network.</footer>
</main><script>{script}</script></body></html>
"""


def _subtitle(rows: Sequence[Row]) -> str:
    trained = [row for row in rows if row.get("episode")]
    evaluated = sum(any(name.startswith(EVAL) for name in row) for row in rows)
    counts = {
        "episode": len({row["episode"] for row in trained}),
        "train step": max((int(row.get("train_iteration") or 0) for row in rows), default=0),
        "evaluation": evaluated,
    }
    parts = [f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count]
    return " · ".join(parts) or "no episode has finished"


def _read_mapping(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if there is no such file.

    Raises:
        OutputError: The file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"not JSON: {error}", place=str(path), fix="delete it") from error
    if not isinstance(value, dict):
        raise OutputError("not a JSON object", place=str(path), fix="delete it")
    return cast("dict[str, Any]", value)


def _flows(folder: Path) -> str:
    """Show the drawings as images, in which nothing can run."""
    figures: list[str] = []
    order = ("env_flow", "trainer_flow", "eval_flow")  # as an episode runs them; others behind
    known = [folder / f"{name}.svg" for name in order]
    others = [path for path in sorted(folder.glob("*.svg")) if path not in known]
    for path in [path for path in [*known, *others] if path.exists()]:
        data = base64.b64encode(path.read_bytes()).decode()
        name = escape(path.stem)
        figures.append(
            f"<figure><figcaption><strong>{name}</strong></figcaption>"
            f'<img alt="drawing of {name}" src="data:image/svg+xml;base64,{data}"></figure>'
        )
    if not figures:
        return ""
    return (
        f'<section id="flows"><h2>Flows</h2><div class="flows">{"".join(figures)}</div></section>'
    )


def _configuration(run_folder: Path) -> str:
    """Show every resolved value and, where it is known, who set it."""
    path = run_folder / "config.yaml"
    if not path.exists():
        return ""
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OutputError(f"not YAML: {error}", place=str(path), fix="delete it") from error
    origins = _read_mapping(run_folder / "config_origins.json")
    lines: list[str] = []
    leaves = dict(_leaves("", values))
    objects = {  # which no YAML holds
        key: "(a Python object)"
        for key in origins
        if not any(leaf == key or leaf.startswith((f"{key}.", f"{key}[")) for leaf in leaves)
    }
    for key, value in {**leaves, **objects}.items():
        origin = str(origins.get(key, ""))
        css = ' class="default"' if origin == "default" else ""
        by = f'<td class="by">{escape(origin)}</td>' if origins else ""
        shown = value if isinstance(value, str) else json.dumps(value, default=str)
        lines.append(f"<tr{css}><td>{escape(key)}</td><td>{escape(shown)}</td>{by}</tr>")
    head = "<tr><th>key</th><th>value</th>" + ("<th>set by</th>" if origins else "") + "</tr>"
    only = (
        '<input type="checkbox" id="set-only" checked> '
        '<label class="only" for="set-only">hide what stands at its default</label>'
        if origins
        else ""
    )
    return (
        f'<section id="configuration"><h2>Configuration</h2>{only}'
        f'<div class="table"><table>{head}{"".join(lines)}</table></div></section>'
    )


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    """Return dotted keys and values; lists are values."""
    if not isinstance(value, dict) or not value:
        return [(prefix, value)] if prefix else []
    items = cast("dict[Any, Any]", value).items()
    return [
        leaf
        for key, inner in items
        for leaf in _leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    ]
