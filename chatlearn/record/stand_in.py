# SPDX-License-Identifier: Apache-2.0
"""What answers from a record instead of running: the samples that entered a flow, and nodes that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chatlearn.errors import RecordError
from chatlearn.flow.batch import Batch, Column
from chatlearn.flow.batching import isolate
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.module import BaseModule, resolved_config, state_of
from chatlearn.record.nodes import ABSENT, NodeRecord
from chatlearn.record.reading import FlowRecord
from chatlearn.record.seen import Call
from chatlearn.record.table import Layout


class RecordedFeed:
    """Give the samples that entered a recorded flow.

    Args:
        flow: the flow.
        uids: of the samples to give; None gives all.
    """

    def __init__(self, flow: FlowRecord, uids: Sequence[int] | None = None) -> None:
        self._flow = flow
        chosen = None if uids is None else set(uids)
        kept = [i for i, uid in enumerate(flow.uids) if chosen is None or uid in chosen]
        self.uids = [flow.uids[i] for i in kept]
        self.groups = [flow.groups[i] for i in kept]
        self._entries: dict[tuple[int, ...], int] = {}
        self._rows: dict[int, tuple[int, int]] = {}
        entered = flow.batch.meta("uid")
        for number, start in enumerate(flow.batch.starts):
            there = entered[start : start + flow.batch.calls[number].rows]
            self._entries.setdefault(tuple(there), number)
            for offset, uid in enumerate(there):
                self._rows.setdefault(uid, (number, start + offset))

    def batch(self, start: int, stop: int) -> Batch:
        """Return samples `start` to `stop` as they entered, for the taker to change as it likes."""
        uids = self.uids[start:stop]
        entry = self._entries.get(tuple(uids))
        if entry is not None:
            return isolate(self._flow.batch_of(entry))
        missing = [uid for uid in uids if uid not in self._rows]
        if missing:
            raise RecordError(
                f"what entered {self._flow.name} is not recorded for {len(missing)} samples, such as uid {missing[0]}",
                place=str(self._flow.folder),
                fix="no recorded call took them from the flow's own batch; take them from another node",
            )
        layouts = [self._flow.batch.layouts[self._flow.batch.calls[n].inputs[0]] for n in
                   dict.fromkeys(self._rows[uid][0] for uid in uids)]  # fmt: skip
        columns = {
            name: [self._flow.batch_cells(name)[self._rows[uid][1]] for uid in uids]
            for name in _names(layouts)
        }
        return isolate(assemble(columns, layouts))


class StandIn(BaseModule):
    """Answers a node's calls with what the record says it returned.

    It takes the place of the node's module in a graph, so its calls are cut as that module's are.
    """

    def __init__(self, node: Node, record: NodeRecord) -> None:
        super().__init__(f"{node.name}, recorded")
        # As the node's own module has it, but columns come with the names that they have outside any namespace. Of
        # samples that the node failed on the record has nothing, so they are lost here as they were then.
        own = resolved_config(node.module)
        fate = own.after_retries if own.on_failure == "retry" else own.on_failure
        changes = {"namespace": None, "num_replica": 1, "on_failure": fate, "timeout_s": None}
        state_of(self).config = own.model_copy(update=changes)
        self.batch_by = node.module.batch_by  # pyright: ignore[reportAttributeAccessIssue]
        self.filters_samples = node.module.filters_samples  # pyright: ignore[reportAttributeAccessIssue]
        self._record = record
        self._by_uids = {tuple(call.uids): call for call in record.calls}
        self._by_step = {call.entry.step: call for call in record.calls}
        self._call: Call | None = None

    def expect(self, call: Call) -> None:
        """Take note of the call that is made next."""
        self._call = call

    def answer(self, data: Any) -> Any:
        """Return what the node returned for the samples of the call that is expected."""
        assert self._call is not None, "every call is announced"
        if self._call.step is not None:
            recorded = self._by_step.get(self._call.step.index)
            if recorded is None:
                raise self._missing(f"update {self._call.step.index + 1}")
            return [isolate(batch) for batch in recorded.outputs()] or None
        uids = list(self._call.uids)
        recorded = self._by_uids.get(tuple(uids))
        if recorded is not None:
            outputs = recorded.outputs()
            return isolate(outputs[0]) if outputs else None
        return self._gathered(uids)

    def _gathered(self, uids: Sequence[int]) -> Batch | None:
        """Make the output for samples that were not all of one call."""
        record = self._record
        if missing := [uid for uid in uids if uid not in record.row_of]:
            raise self._missing(f"sample uid {missing[0]}")
        layouts = [layout for call in record.calls for layout in call.output_layouts]
        columns = {name: record.cells_of(name, uids) for name in _names(layouts)}
        if self.filters_samples:
            columns = {
                name: [cell for cell in cells if cell is not ABSENT]
                for name, cells in columns.items()
            }
        columns = {name: cells for name, cells in columns.items() if ABSENT not in cells}
        return isolate(assemble(columns, layouts)) if layouts else None

    def _missing(self, what: str) -> RecordError:
        return RecordError(
            f"{self._record.name} is taken from the record, which has nothing of it for {what}",
            place=str(self._record.table.path),
            fix="what runs before it gives other samples now than it did then: run this node again, too",
        )


def assemble(columns: Mapping[str, list[Any]], layouts: Sequence[Layout]) -> Batch:
    """Make a batch of cells; a column that was a tensor everywhere becomes one, if its cells have one shape."""
    stacked = {
        name: all(bool(place.dtype) for layout in layouts for place in layout if place.name == name)
        for name in columns
    }
    return {name: _stack(cells) if stacked[name] else cells for name, cells in columns.items()}


def _stack(cells: list[Any]) -> Column:
    shapes = {cell.shape if isinstance(cell, Tensor) else None for cell in cells}
    return torch.stack(cells) if len(shapes) == 1 and None not in shapes else cells


def _names(layouts: Sequence[Layout]) -> list[str]:
    return list(dict.fromkeys(place.name for layout in layouts for place in layout))


def with_stand_ins(
    graph: FlowGraph, again: set[str], record: FlowRecord, *, delivers: bool
) -> FlowGraph:
    """Return the part of a graph that it takes to run the nodes `again` anew: them, and stand-ins for all they need.

    Args:
        graph: the flow of the present script.
        again: names of the nodes that run.
        record: of the flow; what else is needed answers from it.
        delivers: whether what the flow returns is needed, too.

    Raises:
        RecordError: a node that is needed is not in the record.
    """
    needed = {node.index for node in graph.nodes if node.name in again}
    if delivers:
        needed |= set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.index in needed:
            needed |= {source for source in node.inputs if source != FEED}
    kept = [node for node in graph.nodes if node.index in needed]
    number = {node.index: i for i, node in enumerate(kept)} | {FEED: FEED}
    nodes: list[Node] = []
    for node in kept:
        placed = replace(
            node,
            index=number[node.index],
            inputs=tuple(number[source] for source in node.inputs),
            after=tuple(number[source] for source in node.after if source in number),
        )
        if node.name not in again:
            stand_in = StandIn(node, record.node(node.name))
            placed = replace(placed, module=stand_in, method="answer", constants={})
        nodes.append(placed)
    outputs = tuple(number[source] for source in graph.outputs) if delivers else ()
    return FlowGraph(graph.name, tuple(nodes), outputs)
