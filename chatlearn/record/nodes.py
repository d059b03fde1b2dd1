# SPDX-License-Identifier: Apache-2.0
"""A recorded node and its calls: batches made of stored columns and of references to other nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from chatlearn.flow.batch import Batch, Column
from chatlearn.record.table import CallEntry, Layout, Place, Table

if TYPE_CHECKING:
    from chatlearn.record.reading import FlowRecord

ABSENT: Final = object()
"""Stands where a sample has no cell of a column."""


class NodeRecord:
    """One recorded node: what it is, and its calls."""

    def __init__(self, flow: FlowRecord, number: int, meta: Mapping[str, Any]) -> None:
        self.flow = flow
        self.number = number
        self.name = str(meta["name"])
        self.module = str(meta["module"])
        self.kind = str(meta["class"])
        """Of the module's class, with its package."""
        self.method = str(meta["method"])
        self.inputs: list[int] = meta["inputs"]
        self.turn = int(meta["turn"])
        self.place = str(meta["place"])
        self.table = Table(flow.folder / meta["file"])
        self._inputs: dict[str, list[Any]] = {}
        self._outputs: dict[str, list[Any]] = {}

    @property
    def trains(self) -> bool:
        """Whether it is a node of the trainer flow."""
        return self.flow.name == "trainer_flow"

    @cached_property
    def calls(self) -> list[CallRecord]:
        """Its calls, in the order in which they returned."""
        starts = self.table.starts
        return [
            CallRecord(self, number, entry, starts[number])
            for number, entry in enumerate(self.table.calls)
        ]

    @cached_property
    def uids(self) -> list[int | None]:
        """Of every row; the same uid may stand in several train steps."""
        return self.table.meta("uid")

    @cached_property
    def row_of(self) -> dict[int, int]:
        """The row of each uid, in flows where it has one."""
        return {uid: row for row, uid in enumerate(self.uids) if uid is not None}

    @cached_property
    def made(self) -> list[str]:
        """Columns that the node made or changed, in order."""
        found: dict[str, None] = {}
        for call in self.calls:
            for layout in call.output_layouts:
                found.update(dict.fromkeys(p.name for p in layout if p.source != "input"))
        return list(found)

    @cached_property
    def came_out(self) -> list[int]:
        """Uids of the samples that the node returned, in flows where each has one row."""
        rows = (row for c in self.calls if c.entry.outputs for row in c.kept_parts[0])
        return [cast("int", self.uids[row]) for row in rows]

    @cached_property
    def output_names(self) -> list[str]:
        """Columns of what the node returned, in order."""
        layouts = (layout for call in self.calls for layout in call.output_layouts)
        return list(dict.fromkeys(place.name for layout in layouts for place in layout))

    def cells_of(self, name: str, uids: Sequence[int]) -> list[Any]:
        """Return the cells of an output column for samples; `ABSENT` where there is none."""
        cells = self.output(name)
        return [cells[self.row_of[uid]] if uid in self.row_of else ABSENT for uid in uids]

    def input(self, name: str) -> list[Any]:
        """Return an input column, one cell per row; `ABSENT` where a call had no such column."""
        if name not in self._inputs:
            self._inputs[name] = cells = [ABSENT] * self.table.rows
            for call in self.calls:
                for layout, rows in zip(call.input_layouts, call.parts, strict=True):
                    if (place := find_place(layout, name)) is not None:
                        for row, cell in zip(
                            rows, self._input_cells(place, call, rows), strict=True
                        ):
                            cells[row] = cell
        return self._inputs[name]

    def output(self, name: str) -> list[Any]:
        """Return an output column, one cell per row; `ABSENT` where a call returned no such column or sample."""
        if name not in self._outputs:
            self._outputs[name] = cells = [ABSENT] * self.table.rows
            for call in self.calls:
                for layout, rows in zip(call.output_layouts, call.kept_parts, strict=False):
                    if (place := find_place(layout, name)) is None:
                        continue
                    source = (
                        self.input(name)
                        if place.source == "input"
                        else self.table.cells(place.stored)
                    )
                    for row in rows:
                        cells[row] = source[row]
        return self._outputs[name]

    def _input_cells(self, place: Place, call: CallRecord, rows: Sequence[int]) -> list[Any]:
        if place.source == "stored":
            cells = self.table.cells(place.stored)
            return [cells[row] for row in rows]
        if place.source == "batch":
            cells = self.flow.batch_cells(place.name)
            if not self.trains:
                entered = self.flow.batch_rows(call.entry.batch)
                return [cells[entered[cast("int", self.uids[row])]] for row in rows]
            positions = self.table.meta("position")
            return [cells[self.flow.positions[positions[row]]] for row in rows]
        source = self.flow.nodes[place.node]
        if not self.trains:
            return source.cells_of(place.name, [cast("int", self.uids[row]) for row in rows])
        other = next(c for c in source.calls if c.entry.step == call.entry.step)
        cells = source.output(place.name)
        return [cells[other.start + row - call.start] for row in rows]


class CallRecord:
    """One recorded call."""

    def __init__(self, node: NodeRecord, number: int, entry: CallEntry, start: int) -> None:
        self.node = node
        self.number = number
        self.entry = entry
        self.start = start
        """Its first row."""

    @property
    def uids(self) -> list[int]:
        """Of its samples."""
        uids = self.node.uids[self.start : self.start + self.entry.rows]
        return [-1 if uid is None else uid for uid in uids]

    @property
    def parts(self) -> list[range]:
        """The rows of its input: one stretch, or one per micro-batch."""
        if self.entry.micro_batches is None:
            return [range(self.start, self.start + self.entry.rows)]
        parts: list[range] = []
        at = self.start
        for count in self.entry.micro_batches:
            parts.append(range(at, at + count))
            at += count
        return parts

    @property
    def kept_parts(self) -> list[Sequence[int]]:
        """The rows of its output: those of its input, but for samples that were dropped or failed."""
        if self.entry.kept is not None:
            return [[self.start + offset for offset in self.entry.kept]]
        return list(self.parts)

    @property
    def input_layouts(self) -> list[Layout]:
        """The columns of its input, per batch."""
        return [self.node.table.layouts[number] for number in self.entry.inputs]

    @property
    def output_layouts(self) -> list[Layout]:
        """The columns of its output, per batch."""
        return [self.node.table.layouts[number] for number in self.entry.outputs]

    def inputs(self) -> list[Batch]:
        """Return what it got: one batch, or of a train step one per micro-batch."""
        return [
            {p.name: make_column(p, [self.node.input(p.name)[row] for row in rows]) for p in layout}
            for layout, rows in zip(self.input_layouts, self.parts, strict=True)
        ]

    def outputs(self) -> list[Batch]:
        """Return what it returned: nothing, one batch, or of a train step one per micro-batch."""
        return [
            {
                p.name: make_column(p, [self.node.output(p.name)[row] for row in rows])
                for p in layout
            }
            for layout, rows in zip(self.output_layouts, self.kept_parts, strict=False)
        ]


def find_place(layout: Layout, name: str) -> Place | None:
    return next((place for place in layout if place.name == name), None)


def make_column(place: Place, cells: list[Any]) -> Column:
    """Make a column of cells that looks as it did."""
    if not place.dtype:
        return cells
    dtype: torch.dtype = getattr(torch, place.dtype)
    if not cells:
        return torch.empty((0, *(place.shape or ())), dtype=dtype)
    return torch.stack([cell.to(dtype) for cell in cells])
