# SPDX-License-Identifier: Apache-2.0
"""One Parquet file of a record: a row per sample of a call, stored columns beside the numbers that say which it is.

The file's own metadata (key `chatlearn`, JSON) says of each stored column whose it is and what its cells are, and of
each call which columns it had, in order, and where their cells are to be found.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, cast

import pyarrow as _pyarrow  # noqa: ICN001
import pyarrow.parquet as _parquet

from chatlearn.errors import RecordError
from chatlearn.flow.batch import Batch, Column
from chatlearn.flow.batching import merge
from chatlearn.record.cells import Kind, UnkeepableError, decode, encode

pa: Any = _pyarrow  # comes without types
pq: Any = _parquet

FORMAT: Final = 1
Side = Literal["in", "out"]
_KEY: Final = b"chatlearn"
_COMPRESSION: Final = "zstd"
_LEVEL: Final = 1
"""By measurement (benchmarks/recording.py): higher levels take longer and hardly save anything on log-probs."""


@dataclass(frozen=True)
class Place:
    """One column of one call: its name, where its cells are and what it looked like.

    `source` is `stored` (with the name of the `stored` column), `input` (an output that is the call's unchanged
    input), `batch` (what entered the flow) or `node` (with the number of the node whose output it is).
    """

    name: str
    source: Literal["stored", "input", "batch", "node"]
    stored: str = ""
    node: int = -1
    dtype: str = ""
    """Of a column that was one tensor; empty for a list. Cells of several calls may have been promoted to it."""
    shape: tuple[int, ...] | None = None
    """Of a tensor without samples: the shape of the cells that it has none of."""


Layout = list[Place]


@dataclass
class CallEntry:
    """One call, as the metadata of its node's file tells of it."""

    rows: int
    """Rows of the file that are this call's."""
    replica: int = 0
    iteration: int = 0
    policy_version: int = 0
    kept: list[int] | None = None
    """Which of its samples came out, if not all: a filter drops some, a step may fail on some."""
    batch: list[int] = field(default_factory=list[int])
    """The entries of the flow's `batch.parquet` that samples were taken from."""
    random: int | None = None
    """Which of the episode's states the random generators were in."""
    step: int | None = None
    """Number of the train step."""
    micro_batches: list[int] | None = None
    """Of a train step: samples of each micro-batch."""
    inputs: list[int] = field(default_factory=list[int])
    """Number of the layout of its input: one, or one per micro-batch."""
    outputs: list[int] = field(default_factory=list[int])
    """The same of its output; empty where it returned nothing."""
    numbers: dict[str, float] = field(default_factory=dict[str, float])
    """What the call logged."""


class TableWriter:
    """Gathers the calls of one node, encoded, until they are written as one file."""

    def __init__(self) -> None:
        self.calls: list[CallEntry] = []
        self.rows = 0
        self._meta: dict[str, list[Any]] = {}
        self._columns: dict[tuple[Side, str, Kind], str] = {}
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        self._layouts: dict[str, int] = {}

    def store(self, side: Side, name: str, column: Column, offsets: Sequence[int], at: int) -> str:
        """Keep the cells of a column in the rows `at + offsets`; return the name that it is stored under.

        Raises:
            UnkeepableError: a cell holds an object that could not be made again.
        """
        kind, array = encode(column)
        key = (side, name, kind)
        if key not in self._columns:
            stored = f"{side}:{name}"
            while stored in self._parts:  # of another kind in another call
                stored += "#"
            self._columns[key] = stored
            self._parts[stored] = []
        stored = self._columns[key]
        for offset, stop in _runs(offsets):
            length = stop - offset
            self._parts[stored].append((at + offsets[offset], array.slice(offset, length)))
        return stored

    def layout(self, places: Layout) -> int:
        """Return the number of a layout; equal ones share theirs."""
        text = json.dumps([vars(place) for place in places])
        return self._layouts.setdefault(text, len(self._layouts))

    def add(self, entry: CallEntry, meta: Mapping[str, Sequence[Any]]) -> None:
        """Append a call whose columns have been stored, with the numbers that stand in its rows."""
        self.calls.append(entry)
        for name, values in meta.items():
            self._meta.setdefault(name, []).extend(values)
        self.rows += entry.rows

    def write(self, path: Path) -> int:
        """Write the file and return its bytes."""
        arrays: list[Any] = [pa.array(values, pa.int64()) for values in self._meta.values()]
        names = list(self._meta)
        kinds = {stored: kind for (_, _, kind), stored in self._columns.items()}
        for stored, parts in self._parts.items():
            arrays.append(_filled(parts, kinds[stored].arrow, self.rows))
            names.append(stored)
        content = {
            "format": FORMAT,
            "columns": {
                stored: {"side": side, "name": name, "kind": asdict(kind)}
                for (side, name, kind), stored in self._columns.items()
            },
            "layouts": [json.loads(text) for text in self._layouts],
            "calls": [asdict(entry) for entry in self.calls],
        }
        table = pa.table(arrays, names=names)
        table = table.replace_schema_metadata({_KEY: json.dumps(content).encode()})
        pq.write_table(table, path, compression=_COMPRESSION, compression_level=_LEVEL)
        return path.stat().st_size


def write_batches(path: Path, batches: Sequence[Batch]) -> None:
    """Write batches as a plain table: a row per sample, each column under its own name.

    Raises:
        RecordError: a column holds something that no file can keep.
    """
    whole = merge(batches)
    arrays: list[Any] = []
    for name, column in whole.items():
        try:
            arrays.append(encode(column)[1])
        except UnkeepableError as error:
            raise RecordError(
                f"column {name!r} holds a {error}, which cannot be kept in a file", place=str(path)
            ) from None
    pq.write_table(pa.table(arrays, names=list(whole)), path, compression=_COMPRESSION)


def _runs(offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Return the stretches of neighbours among ascending offsets, as positions in the list."""
    starts = [i for i in range(len(offsets)) if i == 0 or offsets[i] != offsets[i - 1] + 1]
    return list(zip(starts, [*starts[1:], len(offsets)], strict=True)) if offsets else []


def _filled(parts: Sequence[tuple[int, Any]], arrow: Any, rows: int) -> Any:
    """Put arrays to their rows, with nulls between them."""
    chunks: list[Any] = []
    position = 0
    for start, array in parts:
        if start > position:
            chunks.append(pa.nulls(start - position, arrow))
        chunks.append(array)
        position = start + len(array)
    if position < rows:
        chunks.append(pa.nulls(rows - position, arrow))
    return pa.chunked_array(chunks, type=arrow)


class Table:
    """One file of a record, read when it is first asked for.

    Raises:
        RecordError: the file is missing, damaged or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cells: dict[str, list[Any]] = {}

    @cached_property
    def _content(self) -> tuple[Any, dict[str, Any]]:
        try:
            # Neither threads nor read-ahead: their pool may outlive the interpreter, which then aborts.
            table = pq.ParquetFile(self.path, pre_buffer=False).read(use_threads=False)
            metadata: dict[bytes, bytes] = table.schema.metadata or {}
            content = json.loads(metadata.get(_KEY, b"null"))
        except FileNotFoundError:
            raise RecordError(
                "a file of the record is missing", place=str(self.path), fix=_ANEW
            ) from None
        except (OSError, ValueError, pa.ArrowException) as error:
            raise RecordError(
                f"a file of the record is damaged: {error}", place=str(self.path), fix=_ANEW
            ) from error
        if not isinstance(content, dict):
            raise RecordError(
                "this Parquet file is no part of a record", place=str(self.path), fix=_ANEW
            )
        found = cast("dict[str, Any]", content)
        if found.get("format") != FORMAT:
            raise RecordError(
                f"the record has format {found.get('format')}, and this version reads format {FORMAT}",
                place=str(self.path),
                fix="read it with the version of chatlearn that wrote it",
            )
        return table, found

    @cached_property
    def calls(self) -> list[CallEntry]:
        """The calls, in the order in which they returned."""
        with self._guarded():
            return [CallEntry(**entry) for entry in self._content[1]["calls"]]

    @cached_property
    def layouts(self) -> list[Layout]:
        """The layouts that calls refer to."""
        with self._guarded():
            return [[_place(place) for place in layout] for layout in self._content[1]["layouts"]]

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each call."""
        starts = [0]
        for call in self.calls:
            starts.append(starts[-1] + call.rows)
        return starts[:-1]

    @contextmanager
    def _guarded(self) -> Generator[None]:
        try:
            yield
        except (KeyError, TypeError) as error:
            raise RecordError(
                f"a file of the record is damaged: {error}", place=str(self.path), fix=_ANEW
            ) from error

    @property
    def rows(self) -> int:
        """Rows of all calls."""
        return self._content[0].num_rows

    def meta(self, name: str) -> list[Any]:
        """Return the numbers `name` (`uid`, `step`, ...) of all rows; None where a row has none."""
        table = self._content[0]
        return table.column(name).to_pylist() if name in table.column_names else [None] * self.rows

    def cells(self, stored: str) -> list[Any]:
        """Return the cells of a stored column, one per row; None in rows that have none."""
        if stored not in self._cells:
            table, content = self._content
            kind = Kind(**content["columns"][stored]["kind"])
            self._cells[stored] = decode(kind, table.column(stored))
        return self._cells[stored]


_ANEW: Final = "choose another episode, or run this one again with runtime.record=true"


def _place(stored: Mapping[str, Any]) -> Place:
    given = dict(stored)
    given["shape"] = None if given["shape"] is None else tuple(given["shape"])
    return Place(**given)
