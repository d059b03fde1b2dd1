# SPDX-License-Identifier: Apache-2.0
"""Place a flow graph in layers: which row, in which order, at which x; shared by the drawings of
`draw.py`.

The classic four steps of layered drawing, each a small pure function: layers by longest path (a
layer that would grow wider than `max_width` spills into the next), invisible *bends* wherever an
edge passes a layer, an order within the layers with few crossings (barycentres, then swaps of
neighbours), and x positions as close as possible to the neighbours' without overlap. Edges of one
source share their bends, so that fan-out is one trunk that branches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.flow.graph import FEED, FlowGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, order=True)
class Segment:
    """A piece of an edge between two neighbouring layers."""

    source: int
    target: int
    control: bool


@dataclass
class Layout:
    """Layers of vertices with their x positions and the segments between neighbouring layers.

    Vertices are `FEED`, the node indices, `sink` (the flow's outputs) and, above `sink`, bends of
    long edges.
    """

    sink: int
    layers: list[list[int]]
    segments: list[Segment]
    widths: dict[int, float]
    x: dict[int, float]
    """Centres, the leftmost edge of the drawing being 0."""

    def is_bend(self, vertex: int) -> bool:
        """Tell whether the vertex only carries an edge through a layer."""
        return vertex > self.sink

    @property
    def width(self) -> float:
        """Right edge of the drawing."""
        return max((self.x[v] + self.widths[v] / 2 for v in self.x), default=0.0)


def arrange(
    graph: FlowGraph,
    size: Callable[[int], float],
    *,
    gap: float,
    bend_width: float,
    max_width: float,
    grid: bool = False,
) -> Layout:
    """Lay out a graph whose vertex `v` is `size(v)` wide; `grid` rounds positions to whole
    columns.
    """
    sink = len(graph.nodes)
    edges = sorted(
        {Segment(s, t, c) for s, t, c in graph.edges()}
        | {Segment(node, sink, False) for node in graph.outputs}
    )
    used = {v for edge in edges for v in (edge.source, edge.target)}
    vertices = [v for v in (FEED, *range(sink), sink) if v in used or 0 <= v < sink]
    widths = {v: size(v) for v in vertices}
    layer_of = _layer(vertices, edges, widths, gap, max_width, sink)
    layers: list[list[int]] = [[] for _ in range(max(layer_of.values(), default=-1) + 1)]
    for v in vertices:
        layers[layer_of[v]].append(v)
    segments = _insert_bends(layers, layer_of, edges, widths, sink, bend_width)
    _reduce_crossings(layers, segments)
    x = _positions(layers, segments, widths, gap, grid, sink)
    return Layout(sink, layers, segments, widths, x)


def spread(
    desired: Sequence[float], separations: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """Return positions nearest to `desired` (weighted squares) whose neighbours keep their
    separations.

    Subtracting the cumulated separations turns this into isotonic regression: pool neighbours that
    violate the order.
    """
    offsets = [0.0]
    for separation in separations:
        offsets.append(offsets[-1] + separation)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, count
    for want, offset, weight in zip(desired, offsets, weights, strict=True):
        mean, total, count = want - offset, weight, 1
        while blocks and blocks[-1][0] > mean:
            left_mean, left_total, left_count = blocks.pop()
            mean = (mean * total + left_mean * left_total) / (total + left_total)
            total, count = total + left_total, count + left_count
        blocks.append((mean, total, count))
    flat = [mean for mean, _, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(flat, offsets, strict=True)]


def _layer(
    vertices: list[int],
    edges: list[Segment],
    widths: dict[int, float],
    gap: float,
    max_width: float,
    sink: int,
) -> dict[int, int]:
    """Give each vertex the first layer below its sources that has room left."""
    sources: dict[int, list[int]] = {}
    for edge in edges:
        sources.setdefault(edge.target, []).append(edge.source)
    filled: dict[int, float] = {}
    layer_of: dict[int, int] = {}
    for v in vertices:  # call order is topological
        layer = 1 + max((layer_of[s] for s in sources.get(v, ())), default=-1)
        layer = max(layer, 1) if v != FEED and FEED in widths else layer
        while layer in filled and filled[layer] + gap + widths[v] > max_width:
            layer += 1
        if v == sink:  # below everything: what leaves the flow stands at the picture's end
            layer = max(layer, max(layer_of.values()) + 1)
        filled[layer] = filled[layer] + gap + widths[v] if layer in filled else widths[v]
        layer_of[v] = layer
    return layer_of


def _insert_bends(
    layers: list[list[int]],
    layer_of: dict[int, int],
    edges: list[Segment],
    widths: dict[int, float],
    sink: int,
    bend_width: float,
) -> list[Segment]:
    """Cut edges that span several layers into segments, through bends that a source's edges
    share.
    """
    bends: dict[tuple[int, bool, int], int] = {}
    segments: set[Segment] = set()
    for edge in edges:
        above = edge.source
        for layer in range(layer_of[edge.source] + 1, layer_of[edge.target]):
            key = (edge.source, edge.control, layer)
            if key not in bends:
                bends[key] = sink + 1 + len(bends)
                widths[bends[key]] = bend_width
                layers[layer].append(bends[key])
            segments.add(Segment(above, bends[key], edge.control))
            above = bends[key]
        segments.add(Segment(above, edge.target, edge.control))
    return sorted(segments)


def _neighbours(segments: list[Segment]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for segment in segments:
        above.setdefault(segment.target, []).append(segment.source)
        below.setdefault(segment.source, []).append(segment.target)
    return above, below


def _reduce_crossings(layers: list[list[int]], segments: list[Segment]) -> None:
    """Reorder the layers in place: sweeps by barycentre and neighbour swaps, keeping the best
    order met.
    """
    above, below = _neighbours(segments)
    best, fewest = [list(layer) for layer in layers], _crossings(layers, segments)
    for sweep in range(12):
        if fewest == 0:
            break
        downwards = sweep % 2 == 0
        order = range(1, len(layers)) if downwards else range(len(layers) - 2, -1, -1)
        fixed, near = (-1, above) if downwards else (1, below)
        for i in order:
            rank = {v: r for r, v in enumerate(layers[i + fixed])}
            own = {v: r for r, v in enumerate(layers[i])}
            keys = {v: _mean([rank[n] for n in near.get(v, [])], own[v]) for v in layers[i]}
            layers[i].sort(key=lambda v, keys=keys: keys[v])
        _swap_neighbours(layers, above, below)
        count = _crossings(layers, segments)
        if count < fewest:
            best, fewest = [list(layer) for layer in layers], count
    layers[:] = best


def _swap_neighbours(
    layers: list[list[int]], above: dict[int, list[int]], below: dict[int, list[int]]
) -> None:
    """Swap neighbours of a layer wherever that removes crossings."""
    rank = {v: r for layer in layers for r, v in enumerate(layer)}
    for layer in layers:
        for j in range(len(layer) - 1):
            left, right = layer[j], layer[j + 1]
            gain = 0
            for near in (above, below):
                for a in near.get(left, ()):
                    for b in near.get(right, ()):
                        gain += (rank[a] > rank[b]) - (rank[a] < rank[b])
            if gain > 0:
                layer[j], layer[j + 1] = right, left
                rank[left], rank[right] = j + 1, j


def _crossings(layers: list[list[int]], segments: list[Segment]) -> int:
    """Count the pairs of segments that cross."""
    rank = {v: r for layer in layers for r, v in enumerate(layer)}
    row = {v: i for i, layer in enumerate(layers) for v in layer}
    by_row: dict[int, list[tuple[int, int]]] = {}
    for segment in segments:
        ends = (rank[segment.source], rank[segment.target])
        by_row.setdefault(row[segment.source], []).append(ends)
    return sum(
        (a[0] - b[0]) * (a[1] - b[1]) < 0
        for ends in by_row.values()
        for i, a in enumerate(ends)
        for b in ends[i + 1 :]
    )


def _positions(
    layers: list[list[int]],
    segments: list[Segment],
    widths: dict[int, float],
    gap: float,
    grid: bool,
    sink: int,
) -> dict[int, float]:
    """Put every vertex near its neighbours: sweeps down, up, and at the end over both sides."""
    above, below = _neighbours(segments)
    both = {v: above.get(v, []) + below.get(v, []) for v in widths}
    straight = dict(both)
    for chain in _bend_chains(layers, above, sink):
        ends = [n for v in chain for n in both[v] if n not in chain]
        both.update((v, ends) for v in chain)  # a long edge goes where its ends draw it as a whole
        straight.update((v, chain) for v in chain)  # and is then straightened where it stands
    separations = [
        [(widths[a] + widths[b]) / 2 + gap for a, b in itertools.pairwise(layer)]
        for layer in layers
    ]
    x: dict[int, float] = {}
    for layer, separation in zip(layers, separations, strict=True):
        x.update(
            zip(layer, spread([0.0] * len(layer), separation, [1.0] * len(layer)), strict=True)
        )
    for sweep, near in enumerate([below, above] * 8 + [both] * 40 + [straight] * 12):
        indices = list(range(len(layers)))
        for i in indices if sweep % 2 else reversed(indices):
            layer = layers[i]
            desired = [_mean([x[n] for n in near.get(v, [])], x[v]) for v in layer]
            firm = 60 if near is straight else 8
            weights = [1.0 + len(near.get(v, [])) + firm * (v > sink) for v in layer]
            x.update(zip(layer, spread(desired, separations[i], weights), strict=True))
    for layer in (layers[0], layers[-1]) if len(layers) > 1 else ():
        if len(layer) == 1:
            x[layer[0]] = _mean([x[n] for n in both[layer[0]]], x[layer[0]])
    if grid:
        for layer, separation in zip(layers, separations, strict=True):
            x.update(_on_grid([x[v] for v in layer], separation, layer))
    left = min((x[v] - widths[v] / 2 for v in x), default=0.0)
    return {v: x[v] - left for v in x}


def _bend_chains(
    layers: list[list[int]], above: dict[int, list[int]], sink: int
) -> list[list[int]]:
    """Group the bends of every long edge, which shall stand exactly below each other."""
    chains: dict[int, list[int]] = {}
    for v in (v for layer in layers for v in layer if v > sink):
        parent = above[v][0]
        chains[v] = chains[parent] if parent > sink else []
        chains[v].append(v)
    return [chain for v, chain in chains.items() if chain[0] == v]


def _on_grid(xs: list[float], separations: list[float], layer: list[int]) -> dict[int, float]:
    """Round to whole columns without breaking a separation."""
    placed: list[float] = []
    for i, x in enumerate(xs):
        column = float(int(x + 0.5) if x >= 0 else -int(0.5 - x))
        placed.append(max(column, placed[-1] + separations[i - 1]) if placed else column)
    return dict(zip(layer, placed, strict=True))


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
