# SPDX-License-Identifier: Apache-2.0
"""Gather what one flow did in one episode, and write it as a folder.

::

    env_flow/
      flow.json                      the nodes, what they take, which file is whose
      batch.parquet                  what entered the flow (in a trainer flow: the samples delivered to it)
      policy.forward_step.parquet    a row per sample of a call; columns `in:<name>` and `out:<name>`

A column is stored where it was made. An input that is another node's output, and an output that is the unchanged
input, are references (`Place.source`); what enters the flow stands in `batch.parquet` once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from torch import Tensor

from chatlearn.columns import UID
from chatlearn.flow.batch import Batch, Column, size, take
from chatlearn.flow.batching import isolate, select
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.record.cells import UnkeepableError, dtype_name
from chatlearn.record.sameness import same_column
from chatlearn.record.seen import Call, Feed
from chatlearn.record.table import FORMAT, CallEntry, Layout, Place, Side, TableWriter

BATCH: Final = "batch.parquet"
FLOW: Final = "flow.json"
_LONGEST_NAME: Final = 120

LeftOut = Callable[[str, str, str], None]
"""Told of a column that cannot be kept: whose it is, its name, the type of what it holds."""


@dataclass(frozen=True)
class _Entered:
    """A call under way: its samples and inputs as they were before the module got them."""

    uids: list[int]
    data: list[Batch]
    """One batch, or one per micro-batch."""
    random: int | None
    policy_version: int


class FlowWriter:
    """Gathers one flow; `entered` and `returned` are called around every call."""

    def __init__(self, graph: FlowGraph, feed: Feed | None, left_out: LeftOut) -> None:
        self.graph = graph
        self._feed = feed
        self._uids = [] if feed is None else list(feed.uids)
        self._groups = [] if feed is None else list(feed.groups)
        self._left_out = left_out
        self._batch = TableWriter()
        self._ranges: dict[tuple[int, int], int] = {}
        """What was taken from the flow's own batch: the entry that holds it."""
        self._columns_of: list[tuple[str, ...]] = []
        """The columns of each entry."""
        self._nodes = [TableWriter() for _ in graph.nodes]
        self._done: dict[int, list[dict[str, str]]] = {}
        """Per call, the columns of its output and what they hold: of one batch, or per micro-batch."""
        self._open: dict[int, _Entered] = {}
        self._entries: dict[int, list[int]] = {}
        """Per call, what it took from the flow's own batch."""
        self._returned: list[dict[int, int]] = [{} for _ in graph.nodes]
        """Per node, the call that returned each uid."""
        self._delivered_uids: list[int | None] = []
        self._delivered_columns: set[str] = set()
        self._is_given = False
        self._losses: dict[int, dict[str, Any]] = {}
        """Of the samples that were given up, by uid; of several nodes that gave one up, the first."""

    def goes_on(self, feed: Feed) -> None:
        """Take samples of a further feed, with other uids: the next dataset of an evaluation."""
        self._feed = feed
        self._uids += feed.uids
        self._groups += feed.groups
        self._ranges.clear()

    # ---- calls --------------------------------------------------------------------------------------------------

    def entered(self, node: Node, call: Call, data: Sequence[Batch], random: int) -> None:
        """Keep what a call gets until it returns; one that fails never does."""
        batches = [isolate(batch) for batch in data]
        version = node.module.policy_version
        self._open[call.id] = _Entered(list(call.uids), batches, random, version)
        if call.step is None:
            self._entries[call.id] = self._batch_entries(node, call)

    def returned(
        self, node: Node, call: Call, output: list[Batch], numbers: Mapping[str, float]
    ) -> None:
        """Keep a call that ended well; `call.uids` are those that it did not fail on."""
        entered = self._open.pop(call.id)
        table, at = self._nodes[node.index], self._nodes[node.index].rows
        entry = CallEntry(
            rows=sum(map(size, entered.data)),
            replica=call.replica,
            iteration=call.iteration,
            policy_version=entered.policy_version,
            random=entered.random,
            numbers=dict(numbers),
        )
        came_out = list(call.uids)
        if call.step is None:
            if node.module.filters_samples:
                came_out = [int(uid) for uid in output[0].get(UID, [])] if output else []
            if came_out != entered.uids:
                position = {uid: i for i, uid in enumerate(entered.uids)}
                entry.kept = [position[uid] for uid in came_out]
            entry.batch = self._entries[call.id]
        else:
            entry.step = call.step.index
            entry.micro_batches = [size(data) for data in entered.data]
        for number, data in enumerate(entered.data):
            layout = self._input_layout(node, call, number, data, table, at)
            entry.inputs.append(table.layout(layout))
            if number < len(output):
                before = data if entry.kept is None else select(data, entry.kept)
                offsets = range(size(data)) if entry.kept is None else entry.kept
                layout = self._output_layout(node, before, output[number], offsets, table, at)
                entry.outputs.append(table.layout(layout))
            at += size(data)
        self._done[call.id] = [{n: _signature(c) for n, c in batch.items()} for batch in output]
        if output and output[0] and call.step is None:
            self._returned[node.index].update(dict.fromkeys(came_out, call.id))
        table.add(entry, self._meta(len(table.calls), call, entry, entered))

    def lost(
        self, node: Node, outcomes: Mapping[int, str], cause: str, *, drops_groups: bool
    ) -> None:
        """Keep why samples were given up: the first line of it, for the rest stands in the log."""
        line = cause.strip().partition("\n")[0]
        for uid, outcome in outcomes.items():
            loss = {
                "node": node.name,
                "outcome": outcome,
                "cause": line,
                "drops_group": drops_groups,
            }
            self._losses.setdefault(uid, {"uid": uid, **loss})

    def _meta(
        self, number: int, call: Call, entry: CallEntry, entered: _Entered
    ) -> dict[str, Sequence[Any]]:
        """Return the numbers that stand in each row of a call."""
        meta: dict[str, Sequence[Any]] = {"uid": entered.uids}
        if call.step is not None:
            positions = [p for part in call.step.micro_batches for p in part]
            meta = {
                "uid": [self._uid_at(position) for position in positions],
                "step": [call.step.index] * entry.rows,
                "micro_batch": [
                    m for m, batch in enumerate(entered.data) for _ in range(size(batch))
                ],
                "position": positions,
            }
        each = {
            "call": number,
            "replica": call.replica,
            "iteration": call.iteration,
            "policy_version": entry.policy_version,
        }
        return {**meta, **{name: [value] * entry.rows for name, value in each.items()}}

    def _uid_at(self, position: int) -> int | None:
        return self._delivered_uids[position]

    # ---- where columns come from ----------------------------------------------------------------------------------

    def _providers(self, node: Node, call: Call, number: int) -> dict[str, int]:
        """Return, per column that a call takes, the number of the node whose output it is, or `FEED`."""
        found: dict[str, int] = {}
        for source, pieces in zip(node.inputs, call.inputs, strict=True):
            names: Iterable[str] = ()
            if source == FEED and call.step is not None:
                names = self._delivered_columns
            elif source == FEED:
                names = self._columns_of[self._entries[call.id][0]]
            elif pieces and (done := self._done.get(pieces[0].call)) is not None:
                names = done[number] if number < len(done) else ()
            found.update(dict.fromkeys(names, source))
        return found

    def _input_layout(
        self, node: Node, call: Call, number: int, data: Batch, table: TableWriter, at: int
    ) -> Layout:
        providers = self._providers(node, call, number)
        layout: Layout = []
        for name, column in data.items():
            source = providers.get(name)
            if source == FEED:
                layout.append(_placed(name, column, "batch"))
            elif source is not None:
                layout.append(_placed(name, column, "node", node=source))
            elif (
                stored := self._store(table, node.name, "in", name, column, None, at)
            ) is not None:
                layout.append(_placed(name, column, "stored", stored=stored))
        return layout

    def _output_layout(
        self,
        node: Node,
        before: Batch,
        output: Batch,
        offsets: Sequence[int],
        table: TableWriter,
        at: int,
    ) -> Layout:
        layout: Layout = []
        for name, column in output.items():
            if name in before and same_column(before[name], column):
                layout.append(_placed(name, column, "input"))
            elif (
                stored := self._store(table, node.name, "out", name, column, offsets, at)
            ) is not None:
                layout.append(_placed(name, column, "stored", stored=stored))
        return layout

    def _store(
        self,
        table: TableWriter,
        owner: str,
        side: Side,
        name: str,
        column: Column,
        offsets: Sequence[int] | None,
        at: int,
    ) -> str | None:
        """Store a column; None, and a word about it, if it cannot be kept."""
        try:
            return table.store(side, name, column, offsets or range(len(column)), at)
        except UnkeepableError as error:
            self._left_out(owner, name, str(error))
            return None

    # ---- what enters the flow --------------------------------------------------------------------------------------

    def fed(self, start: int, stop: int, batch: Batch) -> None:
        """Keep what a call takes from the flow's own batch, samples `start` to `stop` of it; once for equal ranges."""
        assert self._feed is not None, "only flows with a feed are fed"
        if (start, stop) not in self._ranges:
            uids = list(self._feed.uids[start:stop])
            self._ranges[start, stop] = self._add_batch(batch, {"uid": uids})

    def _batch_entries(self, node: Node, call: Call) -> list[int]:
        """Return the entries of `batch.parquet` that a call has taken samples from."""
        if call.origin >= 0:  # samples that are tried again, as they were taken then
            return self._entries[call.origin]
        if FEED not in node.inputs:
            return []
        pieces = call.inputs[node.inputs.index(FEED)]
        return [self._ranges[piece.start, piece.stop] for piece in pieces]

    def _add_batch(
        self,
        batch: Batch,
        meta: Mapping[str, Sequence[Any]],
        known: Mapping[str, int] | None = None,
    ) -> int:
        """Append samples to `batch.parquet`; columns in `known` are outputs of that node of the flow before."""
        layout: Layout = []
        for name, column in batch.items():
            if known is not None and name in known:
                layout.append(_placed(name, column, "node", node=known[name]))
                continue
            stored = self._store(
                self._batch, "the batch", "in", name, column, None, self._batch.rows
            )
            if stored is not None:
                layout.append(_placed(name, column, "stored", stored=stored))
        entry = CallEntry(rows=size(batch), inputs=[self._batch.layout(layout)])
        self._batch.add(entry, meta)
        self._columns_of.append(tuple(batch))
        return len(self._batch.calls) - 1

    def given(self, samples: Batch) -> None:
        """Keep the samples that a trainer flow gets from no flow of this episode: a dataset's, or replay's."""
        positions = list(range(size(samples)))
        self._is_given = True
        if UID in samples:
            self._delivered_uids = [int(uid) for uid in samples[UID]]
        else:
            self._delivered_uids = [None] * len(positions)
        self._delivered_columns = set(samples)
        self._add_batch(samples, {"position": positions, "uid": self._delivered_uids})

    def delivered(self, source: FlowWriter, uids: Sequence[int], samples: Batch) -> None:
        """Take note of samples that another flow delivered to this one: references, where that flow made them."""
        outputs = source.graph.outputs
        whole = [all(uid in source._returned[node] for node in outputs) for uid in uids]
        self._delivered_columns |= samples.keys()
        start = 0
        for is_known, run in groupby(whole):
            stop = start + len(list(run))
            part, at = take(samples, start, stop), len(self._delivered_uids)
            known = source.unchanged(uids[start], part) if is_known else None
            self._delivered_uids += uids[start:stop]
            meta = {"position": list(range(at, at + stop - start)), "uid": uids[start:stop]}
            self._add_batch(part, meta, known)
            start = stop

    def unchanged(self, uid: int, samples: Batch) -> dict[str, int]:
        """Return, per column that leaves the flow as a node returned it, the number of that node.

        Where lost samples stand among others, columns may have been given another dtype, and are nobody's output.
        """
        found: dict[str, int] = {}
        for node in self.graph.outputs:
            columns = self._done[self._returned[node][uid]][0]
            for name, held in columns.items():
                found.pop(name, None)
                if name in samples and _signature(samples[name]) == held:
                    found[name] = node
        return found

    # ---- writing ---------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> int:
        """Write the flow's folder and return its bytes."""
        folder.mkdir(parents=True)
        files = _file_names(node.name for node in self.graph.nodes)
        written = self._batch.write(folder / BATCH)
        for name, table in zip(files, self._nodes, strict=True):
            written += table.write(folder / name)
        content = {
            "format": FORMAT,
            "name": self.graph.name,
            "outputs": list(self.graph.outputs),
            "is_given": self._is_given,
            "uids": self._uids,
            "groups": self._groups,
            "losses": list(self._losses.values()),
            "nodes": [
                {
                    "name": node.name,
                    "file": file,
                    "module": node.module.name,
                    "class": f"{type(node.module).__module__}.{type(node.module).__qualname__}",
                    "method": node.method,
                    "inputs": list(node.inputs),
                    "turn": node.turn,
                    "filters": node.module.filters_samples,
                    "place": node.place,
                }
                for node, file in zip(self.graph.nodes, files, strict=True)
            ],
        }
        text = json.dumps(content)
        (folder / FLOW).write_text(text, encoding="utf-8")
        return written + len(text)


def _signature(column: Column) -> str:
    """Say what a column's cells are: the dtype of tensors, else that it is a list."""
    if isinstance(column, Tensor):
        return dtype_name(column)
    kinds = {dtype_name(cell) if isinstance(cell, Tensor) else "list" for cell in column}
    return kinds.pop() if len(kinds) == 1 else "list"


def _placed(name: str, column: Column, source: Any, *, stored: str = "", node: int = -1) -> Place:
    if not isinstance(column, Tensor):
        return Place(name, source, stored, node)
    shape = None if len(column) else tuple(column.shape[1:])
    return Place(name, source, stored, node, dtype_name(column), shape)


def _file_names(names: Iterable[str]) -> list[str]:
    """Return a file name per node: its own where that is one, else with what no file name may have written as %2F."""
    found: list[str] = []
    taken = {BATCH.lower()}
    for name in names:
        file = quote(name, safe="#@+=, ()[]").replace("~", "%7E")
        if len(file) > _LONGEST_NAME or file.startswith(".") or f"{file}.parquet".lower() in taken:
            digest = hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).hexdigest()[:12]
            file = f"{file.lstrip('.')[:_LONGEST_NAME]}-{digest}"
        taken.add(f"{file}.parquet".lower())
        found.append(f"{file}.parquet")
    return found
