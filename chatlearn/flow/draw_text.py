# SPDX-License-Identifier: Apache-2.0
"""Draw a flow graph for a terminal: boxes in layers, and between two layers a channel of wires.

Every source has one wire per channel (two, if it is also waited for): down from its box, along a
*track*, down into its targets. Wires that would share a column are kept on tracks in the right
order, as in channel routing of chips.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.flow.layout import Layout, arrange, spread

UP, DOWN, LEFT, RIGHT = 1, 2, 4, 8
SOLID = dict(
    zip(range(16), " ││││╯╮┤│╰╭├─┴┬┼", strict=True)
)  # by directions; a lone end looks like a line
SOLID[LEFT] = SOLID[RIGHT] = "─"
DASHED = {**SOLID, UP: "┆", DOWN: "┆", UP | DOWN: "┆", LEFT: "╌", RIGHT: "╌", LEFT | RIGHT: "╌"}
MAX_LABEL = 40


@dataclass
class Wire:
    """One source's connection through a channel: where it comes from and the columns it goes down
    to.
    """

    source: int
    control: bool
    top: int
    bottoms: list[int] = field(default_factory=list[int])
    track: int = 0

    @property
    def straight(self) -> bool:
        """Tell whether the wire needs no track."""
        return self.bottoms == [self.top]

    @property
    def span(self) -> tuple[int, int]:
        """Leftmost and rightmost column."""
        return min(self.top, *self.bottoms), max(self.top, *self.bottoms)


def step_label(node: Node) -> str:
    """Return the node's method, with `#2` when it is called again."""
    prefix = f"{node.module.name}."
    return node.name.removeprefix(prefix) if node.name.startswith(prefix) else node.method


def shorten(text: str, limit: int = MAX_LABEL) -> str:
    """Return the text on one line, cut with an ellipsis where it is longer than `limit`."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def to_text(graph: FlowGraph, *, width: int = 100, sink: str = "output") -> str:
    """Draw the graph with box-drawing characters, at most `width` columns wide where that is
    possible.

    Layers that are too wide are broken into several; if even single boxes do not fit, the nodes
    are listed instead. Dashed lines ending in `▽` are control dependencies. `sink` names who
    receives the flow's outputs.

    Example:
        >>> print(to_text(trace(env_flow), sink="trainer"))
    """
    if not graph.nodes:
        return "(an empty flow)"
    for share in (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.0):
        drawing = _draw(graph, width * share, sink)
        if max(map(len, drawing)) <= width:
            return "\n".join(drawing)
    return "\n".join(_listing(graph, sink))


def _labels(graph: FlowGraph, vertex: int, sink: str) -> list[str]:
    if vertex == FEED:
        return ["batch"]
    if vertex == len(graph.nodes):
        return [shorten(f"▶ {sink}")]
    node = graph.nodes[vertex]
    return [shorten(node.module.name), shorten(step_label(node))]


def _draw(graph: FlowGraph, max_width: float, sink: str) -> list[str]:
    def size(vertex: int) -> int:
        boxed = max(map(len, _labels(graph, vertex, sink)))
        if 0 <= vertex < len(graph.nodes):
            node = graph.nodes[vertex]
            inputs = len(set(node.inputs)) + len(set(node.after))
            boxed = max(boxed + 4, 4 * inputs + 1)
        elif vertex != FEED:
            boxed = max(boxed, 4 * len(set(graph.outputs)) - 3)
        return boxed | 1  # odd, so that the centre is a column

    layout = arrange(graph, size, gap=3, bend_width=1, max_width=max_width, grid=True)
    column = {v: int(x - 0.5) for v, x in layout.x.items()}
    rows: list[str] = []
    for i, layer in enumerate(layout.layers):
        if i:
            rows += _channel(layout, i, column)
        rows += _boxes(graph, layout, layer, column, sink)
    return [row.rstrip() for row in rows]


def _boxes(
    graph: FlowGraph, layout: Layout, layer: list[int], column: dict[int, int], sink: str
) -> list[str]:
    """Draw one layer: boxes of four lines, names of feed and sink, bends as vertical lines."""
    real = any(0 <= v < layout.sink for v in layer)
    rows = [_Row() for _ in range(4 if real else 1)]
    controls = {s.target for s in layout.segments if s.control}
    for v in layer:
        labels, width = [], int(layout.widths[v])
        left = column[v] - width // 2
        if layout.is_bend(v):
            for row in rows:
                row.put(left, "┆" if v in controls else "│")
            continue
        labels = _labels(graph, v, sink)
        if not 0 <= v < layout.sink:
            rows[-1 if v == FEED else 0].put(left, labels[0].center(width))
            continue
        rows[0].put(left, f"╭{'─' * (width - 2)}╮")
        rows[1].put(left, f"│{labels[0].center(width - 2)}│")
        rows[2].put(left, f"│{labels[1].center(width - 2)}│")
        rows[3].put(left, f"╰{'─' * (width - 2)}╯")
        for control, port in _out_ports(layout, v, column).items():
            rows[3].put(port, "┆" if control else "┬")
    return ["".join(row.cells) for row in rows]


class _Row:
    """One line of characters that grows as text is put into it."""

    def __init__(self) -> None:
        self.cells: list[str] = []

    def put(self, at: int, text: str) -> None:
        self.cells += " " * (at + len(text) - len(self.cells))
        self.cells[at : at + len(text)] = list(text)


def _out_ports(layout: Layout, vertex: int, column: dict[int, int]) -> dict[bool, int]:
    """Return the columns where data and control wires leave a vertex."""
    kinds = sorted({s.control for s in layout.segments if s.source == vertex})
    if len(kinds) == 2:  # data from the centre, control beside it
        return {False: column[vertex], True: column[vertex] + 2}
    return dict.fromkeys(kinds, column[vertex])


def _channel(layout: Layout, lower: int, column: dict[int, int]) -> list[str]:
    """Draw the wires between layer `lower - 1` and layer `lower`, arrowheads in the last row."""
    wires = _route(layout, lower, column)
    for _ in range(200):
        shift = _assign_tracks(wires)
        if shift is None:
            break
        targets = layout.layers[lower]  # two wires that swap columns: make room from that column on
        for v in targets:
            if column[v] + layout.widths[v] // 2 >= shift:
                column[v] += 1
        wires = _route(layout, lower, column)
    tracks = 1 + max((w.track for w in wires if not w.straight), default=-1)
    cells: dict[tuple[int, int], tuple[int, bool]] = {}
    for wire in wires:
        _lay(wire, tracks, cells)
    right = 1 + max((w.span[1] for w in wires), default=0)
    rows = ["".join(_glyph(cells.get((row, col))) for col in range(right)) for row in range(tracks)]
    heads = _Row()
    for segment, port in _in_ports(layout, lower, column).items():
        line = "┆" if segment[2] else "│"
        head = "▽" if segment[2] else "▼"
        heads.put(port, line if layout.is_bend(segment[1]) else head)
    return [*rows, "".join(heads.cells)]


def _in_ports(
    layout: Layout, lower: int, column: dict[int, int]
) -> dict[tuple[int, int, bool], int]:
    """Return, per segment into layer `lower`, the column where it arrives: spread over the box,
    straight if near.
    """
    ports: dict[tuple[int, int, bool], int] = {}
    for v in layout.layers[lower]:
        into = [s for s in layout.segments if s.target == v]
        starts = {s: _out_ports(layout, s.source, column)[s.control] for s in into}
        into.sort(key=lambda s: (starts[s], s.control))
        if layout.is_bend(v):
            ports[(into[0].source, v, into[0].control)] = column[v]
            continue
        reach = (int(layout.widths[v]) - 3) // 2 if v < layout.sink else 2 * len(into)
        pitch = max(1, min(4, 2 * reach // max(1, len(into) - 1)))
        desired: list[float] = []
        for i, segment in enumerate(into):
            even = column[v] + round((i - (len(into) - 1) / 2) * pitch)
            near = abs(starts[segment] - even) <= 2
            desired.append(starts[segment] if near else even)
        separation = [float(min(2, pitch))] * (len(into) - 1)
        placed = spread(desired, separation, [1.0] * len(into)) if into else []
        last: int | None = None
        for segment, x in zip(into, placed, strict=True):
            port = round(x) if last is None else max(round(x), last + 1)
            ports[(segment.source, v, segment.control)] = last = port
    return ports


def _route(layout: Layout, lower: int, column: dict[int, int]) -> list[Wire]:
    wires: dict[tuple[int, bool], Wire] = {}
    for (source, _, control), port in _in_ports(layout, lower, column).items():
        if (source, control) not in wires:
            top = _out_ports(layout, source, column)[control]
            wires[(source, control)] = Wire(source, control, top)
        wires[(source, control)].bottoms.append(port)
    for wire in wires.values():
        wire.bottoms.sort()
    return list(wires.values())


def _assign_tracks(wires: list[Wire]) -> int | None:
    """Give every bent wire a track; return a column to shift at if two wires block each other.

    Where wire `a` starts in a column in which wire `b` ends, `a` must turn off above `b`.
    """
    bent = [w for w in wires if not w.straight]
    blocked = {w.top for w in wires if w.straight}
    for wire in bent:
        if clash := blocked & (set(wire.bottoms) - {wire.top}):
            return min(clash)
    todo, tracks = bent, 0
    while todo:
        free = [
            w
            for w in todo
            if not any(o is not w and o.top in w.bottoms and o.top != w.top for o in todo)
        ]
        if not free:
            return min(w.top for w in todo)
        row: list[Wire] = []
        cost = {id(w): sum(_crossed(w, o) - _crossed(o, w) for o in todo) for w in free}
        for wire in sorted(free, key=lambda w: (cost[id(w)], w.top)):
            low, high = wire.span
            if all(high < o.span[0] - 1 or low > o.span[1] + 1 for o in row):
                wire.track = tracks
                row.append(wire)
        todo = [w for w in todo if w not in row]
        tracks += 1
    return None


def _crossed(upper: Wire, lower: Wire) -> int:
    """Count the crossings of two wires if one turns off above the other."""
    (u0, u1), (l0, l1) = upper.span, lower.span
    return (u0 < lower.top < u1) + sum(l0 < bottom < l1 for bottom in upper.bottoms)


def _lay(wire: Wire, tracks: int, cells: dict[tuple[int, int], tuple[int, bool]]) -> None:
    """Draw one wire; where it crosses another one, the vertical line stays whole."""

    def add(row: int, col: int, mask: int, vertical: bool) -> None:
        own = marks.get((row, col), 0)
        marks[(row, col)] = own | mask
        if vertical:
            verticals.add((row, col))

    marks: dict[tuple[int, int], int] = {}
    verticals: set[tuple[int, int]] = set()
    turn = tracks if wire.straight else wire.track
    for row in range(min(turn, tracks)):
        add(row, wire.top, UP | DOWN, True)
    if not wire.straight:
        add(turn, wire.top, UP, True)
        for bottom in wire.bottoms:
            add(turn, bottom, DOWN, True)
            for row in range(turn + 1, tracks):
                add(row, bottom, UP | DOWN, True)
        low, high = wire.span
        for col in range(low, high):
            add(turn, col, RIGHT, False)
            add(turn, col + 1, LEFT, False)
    for cell, mask in marks.items():
        if cell not in cells or cell in verticals:
            cells[cell] = (mask, wire.control)


def _glyph(cell: tuple[int, bool] | None) -> str:
    if cell is None:
        return " "
    return (DASHED if cell[1] else SOLID)[cell[0]]


def _listing(graph: FlowGraph, sink: str) -> list[str]:
    """Say in words what does not fit as a drawing."""

    def name(v: int) -> str:
        return "batch" if v == FEED else shorten(graph.nodes[v].name)

    lines: list[str] = []
    for node in graph.nodes:
        line = f"{name(node.index)} ← {', '.join(name(v) for v in node.inputs)}"
        if node.after:
            line += f"  (after {', '.join(name(v) for v in node.after)})"
        lines.append(line)
    if graph.outputs:
        lines.append(f"▶ {sink} ← {', '.join(name(v) for v in graph.outputs)}")
    return lines
