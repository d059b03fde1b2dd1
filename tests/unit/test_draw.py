# SPDX-License-Identifier: Apache-2.0
"""Drawings of flow graphs say exactly what the graph says, and no line runs through a box."""

from __future__ import annotations

import itertools
import random
import re
import xml.etree.ElementTree as ET

import pytest

from chatlearn.flow.draw import to_mermaid, to_svg, to_text
from chatlearn.flow.draw_text import SOLID
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.flow.layout import arrange, spread

UP, DOWN, LEFT, RIGHT = 1, 2, 4, 8
STEP = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1)}
BACK = {UP: DOWN, DOWN: UP, LEFT: RIGHT, RIGHT: LEFT}
MASKS = {char: mask for mask, char in SOLID.items() if mask} | {
    "│": UP | DOWN,
    "─": LEFT | RIGHT,
    "┆": UP | DOWN,
    "╌": LEFT | RIGHT,
}


class Named:
    """Stands for a module: all that a drawing needs is a name and a class."""

    def __init__(self, name: str) -> None:
        self.name = name


def graph(*calls: tuple, outputs: tuple[int, ...] = (), modules: dict | None = None) -> FlowGraph:
    """Build a graph from `(module name, inputs[, after])` calls of `step`."""
    modules, count, nodes = modules or {}, {}, []
    for index, (name, inputs, *after) in enumerate(calls):
        module = modules.setdefault(name, Named(name))
        count[name] = count.get(name, 0) + 1
        label = f"{name}.step" + (f"#{count[name]}" if count[name] > 1 else "")
        nodes.append(
            Node(index, label, module, "step", tuple(inputs), tuple(after[0]) if after else ())
        )
    return FlowGraph("flow", tuple(nodes), outputs)


def random_graph(seed: int) -> FlowGraph:
    dice = random.Random(seed)
    calls = []
    for i in range(2 + seed % 9):
        inputs = sorted(dice.sample(range(-1, i), min(i + 1, dice.randint(1, 3))))
        after = [dice.randrange(i)] if i and dice.random() < 0.3 else []
        calls.append((f"m{i}", inputs, after))
    last = len(calls) - 1
    return graph(*calls, outputs=tuple({last, last // 2}))


CASES = {
    "chain": graph(("a", [FEED]), ("b", [0]), ("c", [1]), outputs=(2,)),
    "rlhf": graph(("p", [FEED]), ("r", [0]), ("v", [0]), ("w", [0, 1, 2]), outputs=(3,)),
    "trainers": graph(("t", [FEED]), ("u", [FEED])),
    "fan": graph(
        ("p", [FEED]),
        *((f"j{i}", [0]) for i in range(6)),
        ("w", list(range(1, 7))),
        outputs=(7,),
    ),
    "control": graph(("a", [FEED]), ("b", [FEED], [0]), ("c", [0, 1], [0]), outputs=(2, 0)),
    **{f"random{seed}": random_graph(seed) for seed in range(60)},
}


def read_back(text: str, flow: FlowGraph) -> set[tuple[int, int]]:
    """Follow the lines of a drawing from every box to the arrowheads and return the edges found."""
    rows = text.split("\n")
    width = max(map(len, rows))
    cells = [row.ljust(width) for row in rows]
    inside: dict[tuple[int, int], int] = {}  # the cell an arrowhead points at -> vertex
    starts: list[tuple[int, int, int]] = []
    labels = {node.index: node.module.name for node in flow.nodes}
    for y, row in enumerate(cells):
        for vertex, label in labels.items():
            for match in re.finditer(rf"│ +{label} +│", row):
                left, right = match.start(), match.end()
                inside.update({(y - 1, x): vertex for x in range(left, right)})
                starts += [
                    (y + 2, x, vertex) for x in range(left, right) if cells[y + 2][x] in "┬┆"
                ]
        if match := re.search("batch", row):
            starts.append((y, match.start() + 2, FEED))
        if "▶ output" in row:
            inside.update({(y, x): len(flow.nodes) for x in range(width)})
    found = set()
    for y, x, vertex in starts:
        todo, seen = [(y, x, DOWN)], set()
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            y1, x1 = at[0] + STEP[at[2]][0], at[1] + STEP[at[2]][1]
            char = cells[y1][x1] if y1 < len(cells) and x1 < width else " "
            if char in "▼▽":
                found.add((vertex, inside[(y1 + 1, x1)]))
            elif char in "│┆" and at[2] in (LEFT, RIGHT):
                todo.append((y1, x1, at[2]))  # a crossing: the horizontal line goes on behind
            elif char != " " and char in MASKS:
                assert MASKS[char] & BACK[at[2]], f"a line ends at {char!r} ({y1}, {x1})\n{text}"
                todo += [(y1, x1, d) for d in STEP if MASKS[char] & d and d != BACK[at[2]]]
            else:
                pytest.fail(f"a line leads nowhere ({y1}, {x1})\n{text}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_text_drawing_reads_back_as_the_graph(name):
    flow = CASES[name]
    wanted = {(s, t) for s, t, _ in flow.edges()} | {(o, len(flow.nodes)) for o in flow.outputs}
    assert read_back(to_text(flow, width=200), flow) == wanted


@pytest.mark.parametrize("width", [60, 80, 100])
def test_text_drawing_keeps_to_the_width_and_to_the_truth(width):
    flow = CASES["fan"]
    text = to_text(flow, width=width)
    assert max(map(len, text.split("\n"))) <= width
    assert len(read_back(text, flow)) == 14


def test_text_lists_the_nodes_where_no_box_fits():
    text = to_text(CASES["control"], width=8)
    assert text.split("\n") == [
        "a.step ← batch",
        "b.step ← batch  (after a.step)",
        "c.step ← a.step, b.step  (after a.step)",
        "▶ output ← c.step, a.step",
    ]


def test_text_of_a_chain_is_this():
    text = to_text(graph(("policy", [FEED]), outputs=(0,)), sink="trainer")
    assert text.split("\n") == [
        "   batch",
        "     ▼",
        "╭─────────╮",
        "│  policy │",
        "│   step  │",
        "╰────┬────╯",
        "     ▼",
        " ▶ trainer",
    ]


def test_text_marks_second_calls_control_and_empty_flows():
    twice = to_text(graph(("p", [FEED]), ("w", [0]), ("p", [1]), outputs=(2,)))
    assert "step#2" in twice
    assert "▽" in to_text(CASES["control"])
    assert to_text(FlowGraph("nothing", (), ())) == "(an empty flow)"


def test_long_names_and_control_characters_stay_in_their_box():
    text = to_text(graph(("a\nb" + "x" * 100, [FEED])), width=80)
    assert "…" in text
    assert max(map(len, text.split("\n"))) <= 80


@pytest.mark.parametrize("name", CASES)
def test_nothing_overlaps_in_a_layer(name):
    flow = CASES[name]
    layout = arrange(flow, lambda v: 50.0, gap=10, bend_width=4, max_width=300)
    for layer in layout.layers:
        for a, b in itertools.pairwise(layer):
            room = (layout.widths[a] + layout.widths[b]) / 2 + 10
            assert layout.x[b] - layout.x[a] >= room - 1e-6
    assert min(layout.x[v] - layout.widths[v] / 2 for v in layout.x) == pytest.approx(0)


def test_segments_join_neighbouring_layers_only():
    for flow in CASES.values():
        layout = arrange(flow, lambda v: 50.0, gap=10, bend_width=4, max_width=300)
        row = {v: i for i, layer in enumerate(layout.layers) for v in layer}
        assert all(row[s.target] == row[s.source] + 1 for s in layout.segments)


def test_spread_keeps_separations_and_stays_near():
    assert spread([0, 0, 0], [2, 2], [1, 1, 1]) == pytest.approx([-2, 0, 2])
    assert spread([0, 10], [2], [1, 1]) == [0, 10]
    assert spread([5, 5], [2], [1, 1e9]) == pytest.approx([3, 5])


def test_mermaid_names_nodes_edges_and_escapes():
    flow = graph(('ev"il]<b>', [FEED]), ("b", [0], [0]), outputs=(1,))
    assert to_mermaid(flow, sink="trainer").split("\n") == [
        "flowchart TD",
        '    batch(["batch"])',
        '    n0["ev#34;il#93;#60;b#62;<br/>Named<br/>step"]',
        '    n1["b<br/>Named<br/>step"]',
        '    out(["▶ trainer"])',
        "    batch --> n0",
        "    n0 --> n1",
        "    n0 -.-> n1",
        "    n1 --> out",
        "",
    ]
    twice = graph(("p", [FEED]), ("p", [0]), outputs=(1, 1))
    assert "step#35;2" in to_mermaid(twice)
    assert to_mermaid(twice).count("--> out") == 1


@pytest.mark.parametrize("name", CASES)
def test_svg_is_well_formed_and_complete(name):
    flow = CASES[name]
    root = ET.fromstring(to_svg(flow))
    ns = "{http://www.w3.org/2000/svg}"
    texts = [t.text for t in root.iter(f"{ns}text")]
    assert all(texts.count(node.module.name) >= 1 for node in flow.nodes)
    heads = [p for p in root.iter(f"{ns}path") if p.get("marker-end")]
    assert len(heads) == len({*flow.edges()}) + len(set(flow.outputs))


def test_svg_escapes_and_shows_only_the_file_name_of_a_place():
    module = Named("<script>&")
    node = Node(0, "<script>&.step", module, "step", (FEED,), (), place="/home/me/flow.py:12")
    svg = to_svg(FlowGraph("f<>", (node,), (0,)))
    assert "<script>" not in svg
    assert "/home/me" not in svg
    assert "flow.py:12" in svg
    ET.fromstring(svg)


def test_svg_gives_a_module_one_colour_and_follows_the_theme():
    svg = to_svg(graph(("p", [FEED]), ("w", [0]), ("p", [1]), outputs=(2,)))
    assert re.findall(r'class="m(\d)"', svg) == ["0", "1", "0"]
    assert "prefers-color-scheme:dark" in svg
