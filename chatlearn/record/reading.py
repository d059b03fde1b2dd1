# SPDX-License-Identifier: Apache-2.0
"""Read a record: the batches that each call got and returned, made again as they were.

Example:
    >>> episode = RunRecord("runs/grpo").episode(7)
    >>> for call in episode.flow("env_flow").node("advantage.forward_step").calls:
    ...     print(call.uids, call.inputs()[0]["rewards"], call.outputs()[0]["advantages"])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from chatlearn.config_problems import closest
from chatlearn.errors import RecordError
from chatlearn.flow.batch import Batch
from chatlearn.record.flow_writer import BATCH, FLOW
from chatlearn.record.nodes import ABSENT, NodeRecord, find_place, make_column
from chatlearn.record.recording import EPISODE, RANDOM, recorded_episodes
from chatlearn.record.table import FORMAT, Table

_SHOWN = 8


class RunRecord:
    """What a run recorded.

    Raises:
        RecordError: the folder is none, or nothing was recorded there.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.root = self.run.resolve() / "record"  # a replay works in another folder
        if not self.run.is_dir():
            raise RecordError(
                f"there is no run folder {self.run}", fix="give the `runtime.output_dir` of a run"
            )
        if not self.root.is_dir() or not recorded_episodes(self.root):
            raise RecordError(
                "this run was not recorded",
                place=str(self.run),
                fix="run with runtime.record=true; a run that lies in earlier/ has its record there",
            )

    @property
    def episodes(self) -> list[int]:
        """Numbers of the recorded episodes, from 1; 0 holds the evaluation before the first."""
        return list(recorded_episodes(self.root))

    def episode(self, number: int) -> EpisodeRecord:
        """Return the record of one episode.

        Raises:
            RecordError: it is not there.
        """
        path = recorded_episodes(self.root).get(number)
        if path is None:
            raise RecordError(
                f"episode {number} is not recorded; there are {describe_numbers(self.episodes)}",
                place=str(self.root),
                fix="choose one of these; runtime.record_last says how many a run keeps",
            )
        return EpisodeRecord(path)


class EpisodeRecord:
    """One recorded episode."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta = _read_json(path / EPISODE)
        self.number = int(self.meta["episode"])
        """From 1; 0: only an evaluation, before the first."""
        self._flows: dict[str, FlowRecord] = {}

    @cached_property
    def start(self) -> dict[str, Any]:
        """How the run was started: script, arguments, configuration."""
        return _read_json(self.path.parent / self.meta["start"])

    @property
    def flows(self) -> list[str]:
        """Names of the recorded flows."""
        return sorted(path.parent.name for path in self.path.glob(f"*/{FLOW}"))

    def flow(self, name: str) -> FlowRecord:
        """Return the record of one flow.

        Raises:
            RecordError: it is not there.
        """
        if name not in self._flows:
            folder = self.path / name
            if not folder.is_dir():
                raise RecordError(
                    f"{name} of episode {self.number} is not recorded; there are {', '.join(self.flows)}",
                    place=str(self.path),
                )
            try:
                self._flows[name] = FlowRecord(self, folder)
            except (KeyError, TypeError, ValueError) as error:
                raise RecordError(
                    f"a file of the record is damaged: {type(error).__name__}: {error}",
                    place=str(folder / FLOW),
                ) from error
        return self._flows[name]

    def nodes(self) -> list[NodeRecord]:
        """Return every node of the environment and trainer flow, in order."""
        names = [name for name in ("env_flow", "trainer_flow") if name in self.flows]
        return [node for name in names for node in self.flow(name).nodes]


@dataclass(frozen=True)
class Loss:
    """Why a sample was given up."""

    uid: int
    node: str
    """The node that failed on it; of several the first."""
    outcome: str
    """`failed` or `timed_out`."""
    cause: str
    """The error; in a record its first line."""
    drops_group: bool
    """Whether its group went with it."""

    @property
    def what(self) -> str:
        """What happened, where: `failed in reward.forward_step`."""
        return f"{self.outcome.replace('_', ' ')} in {self.node}"


class FlowRecord:
    """One recorded flow."""

    def __init__(self, episode: EpisodeRecord, folder: Path) -> None:
        self.episode = episode
        self.folder = folder
        self.meta = _read_json(folder / FLOW)
        self.name = str(self.meta["name"])
        self.uids: list[int] = self.meta["uids"]
        """Of the samples that entered it, in order."""
        self.groups: list[int] = self.meta["groups"]
        self.outputs: list[int] = self.meta["outputs"]
        """Numbers of the nodes that it returns."""
        self.losses = {int(loss["uid"]): Loss(**loss) for loss in self.meta["losses"]}
        """The samples that were given up, by uid."""
        self.is_given = bool(self.meta["is_given"])
        """Of a trainer flow: whether it trained on a dataset or on replay's choice, not on what a flow delivered."""
        self.batch = Table(folder / BATCH)
        self._cells: dict[str, list[Any]] = {}
        self.nodes = [NodeRecord(self, number, n) for number, n in enumerate(self.meta["nodes"])]

    @cached_property
    def random(self) -> list[dict[str, Any]]:
        """States of the random generators that calls refer to."""
        path = next(
            (p for p in (self.folder / RANDOM, self.folder.parent / RANDOM) if p.is_file()), None
        )
        if path is None:
            return []
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise RecordError(
                f"a file of the record is damaged: {type(error).__name__}: {error}", place=str(path)
            ) from error

    def node(self, name: str) -> NodeRecord:
        """Return a node by its name.

        Raises:
            RecordError: there is none of that name.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        names = [node.name for node in self.nodes]
        near = closest(name, names)
        raise RecordError(
            f"{self.name} of episode {self.episode.number} has no node {name!r}; it has {', '.join(names)}",
            place=str(self.folder),
            fix=f"did you mean {near!r}?" if near else "choose one of these",
        )

    # ---- what entered ---------------------------------------------------------------------------------------------

    @cached_property
    def positions(self) -> list[int]:
        """In a trainer flow: the row of `batch` of every sample delivered, by position."""
        rows = self.batch.meta("position")
        by_position = {position: row for row, position in enumerate(rows)}
        return [by_position[position] for position in range(len(by_position))]

    @cached_property
    def delivered_uids(self) -> list[int | None]:
        """In a trainer flow: uids of the samples delivered, by position."""
        uids = self.batch.meta("uid")
        return [uids[row] for row in self.positions]

    def batch_cells(self, name: str) -> list[Any]:
        """Return a column of what entered the flow, one cell per row of `batch`."""
        if name not in self._cells:
            self._cells[name] = self._read_batch(name)
        return self._cells[name]

    def _read_batch(self, name: str) -> list[Any]:
        cells: list[Any] = []
        uids = self.batch.meta("uid")
        for entry, start in zip(self.batch.calls, self.batch.starts, strict=True):
            place = find_place(self.batch.layouts[entry.inputs[0]], name)
            rows = range(start, start + entry.rows)
            if place is None:
                cells += [ABSENT] * entry.rows
            elif place.source == "node":  # of the flow that delivered it
                node = self.episode.flow("env_flow").nodes[place.node]
                cells += node.cells_of(name, [uids[row] for row in rows])
            else:
                stored = self.batch.cells(place.stored)
                cells += stored[start : start + entry.rows]
        return cells

    def batch_rows(self, entries: Sequence[int]) -> dict[int, int]:
        """Return the row of `batch` of each uid in some of its entries."""
        uids = self.batch.meta("uid")
        found: dict[int, int] = {}
        for entry in entries:
            start = self.batch.starts[entry]
            found |= {uids[row]: row for row in range(start, start + self.batch.calls[entry].rows)}
        return found

    def batch_of(self, entry: int, rows: Sequence[int] | None = None) -> Batch:
        """Return an entry of `batch` as it entered, or only those of its samples (counted from 0) in `rows`."""
        call, start = self.batch.calls[entry], self.batch.starts[entry]
        chosen = range(call.rows) if rows is None else rows
        return {
            place.name: make_column(
                place, [self.batch_cells(place.name)[start + i] for i in chosen]
            )
            for place in self.batch.layouts[call.inputs[0]]
        }

    def delivered(self) -> Batch:
        """Return the samples that a trainer flow got, all of them, by position."""
        layouts = [self.batch.layouts[entry.inputs[0]] for entry in self.batch.calls]
        if not layouts:
            return {}
        places = {place.name: place for layout in layouts for place in layout}
        batch: Batch = {}
        for name, place in places.items():
            cells = self.batch_cells(name)
            batch[name] = make_column(place, [cells[row] for row in self.positions])
        return batch


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError("a file of the record is missing", place=str(path)) from None
    except (OSError, ValueError) as error:
        raise RecordError(f"a file of the record is damaged: {error}", place=str(path)) from error
    found = cast("dict[str, Any]", content if isinstance(content, dict) else {})
    if found.get("format") != FORMAT:
        raise RecordError(
            f"the record has format {found.get('format')}, and this version reads format {FORMAT}",
            place=str(path),
            fix="read it with the version of chatlearn that wrote it",
        )
    return found


def describe_numbers(numbers: Sequence[int]) -> str:
    """Write numbers for people, neighbours as ranges: `1-4, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(texts if len(texts) <= _SHOWN else [*texts[: _SHOWN - 1], "...", texts[-1]])
