# SPDX-License-Identifier: Apache-2.0
"""Draw a flow graph: for the terminal (`to_text`), as Mermaid source (`to_mermaid`), as a picture
(`to_svg`).

All three are pure functions of the graph. The feed is drawn as `batch`, what the flow returns
leads to `▶ <sink>`, control dependencies are dashed.
"""

from __future__ import annotations

from collections.abc import Collection
from xml.sax.saxutils import escape

from chatlearn.flow.draw_text import shorten, step_label, to_text
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.flow.layout import Layout, Segment, arrange

__all__ = ["to_mermaid", "to_svg", "to_text"]

BOX_HEIGHT, PILL_HEIGHT, LAYER_GAP, MARGIN = 68, 30, 46, 20
ACCENTS = 8
"""Colours that tell the modules apart; a module that is called twice has its colour twice."""

STYLE = """
.flow{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
.flow .page{fill:#ffffff}
.flow .box{fill:#f6f8fa;stroke:#d0d7de}
.flow .pill{fill:none;stroke:#afb8c1}
.flow text{fill:#1f2328;text-anchor:middle}
.flow .name{font-size:14px;font-weight:600}
.flow .step{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:12px}
.flow .class{font-size:11px;fill:#59636e}
.flow .end{font-size:13px}
.flow .edge{fill:none;stroke:#6e7781;stroke-width:1.5}
.flow .control{stroke-dasharray:5 4}
.flow .head{fill:#6e7781}
.flow .head-control{fill:none;stroke:#6e7781;stroke-width:1.2}
.flow .m0{fill:#3b82f6}.flow .m1{fill:#f59e0b}.flow .m2{fill:#10b981}.flow .m3{fill:#ec4899}
.flow .m4{fill:#8b5cf6}.flow .m5{fill:#06b6d4}.flow .m6{fill:#84cc16}.flow .m7{fill:#ef4444}
@media (prefers-color-scheme:dark){
.flow .page{fill:#0d1117}
.flow .box{fill:#161b22;stroke:#3d444d}
.flow .pill{stroke:#656c76}
.flow text{fill:#e6edf3}
.flow .class{fill:#9198a1}
.flow .edge{stroke:#9198a1}
.flow .head{fill:#9198a1}
.flow .head-control{stroke:#9198a1}}
"""
ARROWHEADS = """<defs>
<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"
 orient="auto"><path class="head" d="M0 0L10 5L0 10z"/></marker>
<marker id="head-control" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8"
 orient="auto"><path class="head-control" d="M1 1L9 5L1 9"/></marker>
</defs>"""


def to_mermaid(graph: FlowGraph, *, sink: str = "output") -> str:
    """Return the graph as the source of a Mermaid flowchart; dotted arrows are control
    dependencies.
    """
    lines = ["flowchart TD"]
    if any(FEED in node.inputs for node in graph.nodes):
        lines.append('    batch(["batch"])')
    for node in graph.nodes:
        labels = (node.module.name, type(node.module).__name__, step_label(node))
        lines.append(f'    n{node.index}["{"<br/>".join(map(_mermaid_label, labels))}"]')
    if graph.outputs:
        lines.append(f'    out(["▶ {_mermaid_label(sink)}"])')
    for source, target, control in dict.fromkeys(graph.edges()):
        start = "batch" if source == FEED else f"n{source}"
        lines.append(f"    {start} {'-.->' if control else '-->'} n{target}")
    lines += [f"    n{node} --> out" for node in dict.fromkeys(graph.outputs)]
    return "\n".join(lines) + "\n"


def _mermaid_label(text: str) -> str:
    """Write all that Mermaid could read as syntax as entity codes."""
    return "".join(
        c if c.isalnum() or c in " _-.,:/▶" else f"#{ord(c)};" for c in shorten(text, limit=80)
    )


def to_svg(graph: FlowGraph, *, sink: str = "output", max_width: float = 1100) -> str:
    """Return the graph as a self-contained SVG picture that follows the reader's light or dark
    theme.
    """
    layout = arrange(
        graph,
        lambda vertex: _svg_width(graph, vertex, sink),
        gap=28,
        bend_width=10,
        max_width=max_width,
    )
    tops, heights, total = _rows(layout)
    width = layout.width + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="flow" role="img" width="{width:.0f}"',
        f'height="{total:.0f}" viewBox="0 0 {width:.0f} {total:.0f}">',
        f"<title>{escape(shorten(graph.name, 80))}</title><style>{STYLE}</style>",
        ARROWHEADS,
        '<rect class="page" width="100%" height="100%" rx="10"/>',
    ]
    parts += _svg_edges(layout, tops, heights)
    colour = {id(module): i % ACCENTS for i, module in enumerate(graph.modules)}
    for i, layer in enumerate(layout.layers):
        for v in (v for v in layer if not layout.is_bend(v)):
            x = layout.x[v] + MARGIN
            if 0 <= v < layout.sink:
                node = graph.nodes[v]
                parts.append(_svg_box(node, x, tops[i], layout.widths[v], colour[id(node.module)]))
            else:
                label = "batch" if v == FEED else f"▶ {sink}"
                y = tops[i] + (heights[i] - PILL_HEIGHT) / 2
                parts.append(_svg_pill(label, x, y, layout.widths[v]))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _svg_width(graph: FlowGraph, vertex: int, sink: str) -> float:
    """Estimate a box's width from its longest line, on the safe side of common fonts."""
    if vertex == FEED or vertex == len(graph.nodes):
        return 44 + 8.2 * len("batch" if vertex == FEED else shorten(f"▶ {sink}"))
    node = graph.nodes[vertex]
    lines = (
        8.8 * len(shorten(node.module.name)),
        7.4 * len(shorten(step_label(node))),
        6.8 * len(shorten(type(node.module).__name__)),
    )
    return max(*lines, 70.0) + 34


def _rows(layout: Layout) -> tuple[list[float], list[float], float]:
    """Return the top and height of every layer and the height of the whole picture."""
    tops: list[float] = []
    heights: list[float] = []
    y = float(MARGIN)
    for i, layer in enumerate(layout.layers):
        boxed = any(0 <= v < layout.sink for v in layer)
        if i:
            reach = max(
                (abs(layout.x[s.source] - layout.x[s.target]) for s in _into(layout, i)), default=0
            )
            y += LAYER_GAP + min(40.0, 0.06 * reach)  # steep curves cross at readable angles
        tops.append(y)
        heights.append(float(BOX_HEIGHT if boxed else PILL_HEIGHT))
        y += heights[-1]
    return tops, heights, y + MARGIN


def _into(layout: Layout, layer: int) -> list[Segment]:
    inside = set(layout.layers[layer])
    return [s for s in layout.segments if s.target in inside]


def _svg_edges(layout: Layout, tops: list[float], heights: list[float]) -> list[str]:
    """Draw the segments as curves between the layers, which boxes never reach into, and bends as
    verticals.
    """
    parts: list[str] = []
    for i in range(1, len(layout.layers)):
        segments = _into(layout, i)
        for v in layout.layers[i]:
            into = sorted(
                (s for s in segments if s.target == v),
                key=lambda s: (layout.x[s.source], s.control),
            )
            pitch = min(22.0, (layout.widths[v] - 30) / max(1, len(into)))
            for j, segment in enumerate(into):
                x1 = layout.x[v] + MARGIN + (j - (len(into) - 1) / 2) * pitch
                x0 = layout.x[segment.source] + MARGIN + _departure(layout, segment)
                upper = tops[i - 1] + heights[i - 1]
                if not 0 <= segment.source < layout.sink and not layout.is_bend(segment.source):
                    upper -= (heights[i - 1] - PILL_HEIGHT) / 2
                parts.append(_svg_segment(layout, segment, x0, upper, x1, tops[i], heights[i]))
    return parts


def _departure(layout: Layout, segment: Segment) -> float:
    """Return how far from the centre a segment leaves its source: control dependencies beside the
    data.
    """
    both = {s.control for s in layout.segments if s.source == segment.source}
    return 16.0 if segment.control and len(both) == 2 else 0.0


def _svg_segment(
    layout: Layout, segment: Segment, x0: float, y0: float, x1: float, top: float, height: float
) -> str:
    kind = "edge control" if segment.control else "edge"
    bend = layout.is_bend(segment.target)
    pill = not bend and segment.target == layout.sink
    y1 = top if not pill else top + (height - PILL_HEIGHT) / 2
    pull = (y1 - y0) * 0.5
    if abs(x0 - x1) < 0.5:
        path = f"M{x0:.1f} {y0:.1f}V{y1:.1f}"
    else:
        path = f"M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 + pull:.1f} "
        path += f"{x1:.1f} {y1 - pull:.1f} {x1:.1f} {y1:.1f}"
    if bend:
        return f'<path class="{kind}" d="{path}V{top + height:.1f}"/>'
    head = "head-control" if segment.control else "head"
    return f'<path class="{kind}" d="{path}" marker-end="url(#{head})"/>'


def _svg_box(node: Node, x: float, y: float, width: float, colour: int) -> str:
    left = x - width / 2
    where = f" ({node.place.rsplit('/', 1)[-1]})" if node.place else ""
    lines = (
        ("name", 23, node.module.name),
        ("step", 41, step_label(node)),
        ("class", 57, type(node.module).__name__),
    )
    texts = "".join(
        f'<text class="{kind}" x="{x + 3:.1f}" y="{y + dy:.1f}">{escape(shorten(text))}</text>'
        for kind, dy, text in lines
    )
    return (
        f"<g><title>{escape(shorten(node.name + where, 120))}</title>"
        f'<rect class="box" x="{left:.1f}" y="{y:.1f}" rx="9" '
        f'width="{width:.1f}" height="{BOX_HEIGHT}"/>'
        f'<rect class="m{colour}" x="{left + 6:.1f}" y="{y + 10:.1f}" rx="2" '
        f'width="4" height="{BOX_HEIGHT - 20}"/>{texts}</g>'
    )


def _svg_pill(label: str, x: float, y: float, width: float) -> str:
    return (
        f'<g><rect class="pill" x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{PILL_HEIGHT}" rx="{PILL_HEIGHT / 2}"/>'
        f'<text class="end" x="{x:.1f}" y="{y + 20:.1f}">{escape(shorten(label))}</text></g>'
    )


def sink_of(name: str, graphs: Collection[str]) -> str:
    """Return where a flow's outputs go, given the names of the engine's flows."""
    return "trainer" if name == "env_flow" and "trainer_flow" in graphs else "output"
