# SPDX-License-Identifier: Apache-2.0
"""Record a run, episode by episode.

::

    record/
      start-000000.json       how the run was started: script, arguments, resolved configuration; one per (re)start
      tokenizers/policy/      of modules that sample: what their token ids mean
      episode-000007/         appears whole, when the episode is done
        episode.json          where it began: counts of calls; which start it belongs to
        random.pt             states of the global random generators that calls found
        env_flow/  trainer_flow/
        eval_flow/            of the evaluation after it, if there was one
      episode-000000/eval_flow/   of the evaluation before the first episode

An episode is gathered in memory, encoded, and written when it is done: under another name first, renamed when it is
whole. A resumed run drops the records of the episodes that it runs again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote

import torch

from chatlearn.checkpoint.files import write_values
from chatlearn.errors import OutputError, os_error_behind, write_failure
from chatlearn.flow.batch import Batch
from chatlearn.flow.graph import Node
from chatlearn.record.flow_writer import FlowWriter
from chatlearn.record.seen import Call, FlowWork, TrainWork
from chatlearn.record.table import FORMAT

EPISODE: Final = "episode.json"
RANDOM: Final = "random.pt"
_NAME: Final = re.compile(r"episode-(\d{6,})")
_PARTIAL: Final = ".partial-"

States = Callable[[], dict[str, Any]]


def path_of(root: Path, episode: int) -> Path:
    """Return where the record of an episode (from 1; 0: before the first) lies."""
    return root / f"episode-{episode:06d}"


def tokenizer_of(root: Path, module: str) -> Path:
    """Return where the tokenizer of a module that samples lies, if it has one."""
    return root / "tokenizers" / quote(module, safe="")


def recorded_episodes(root: Path) -> dict[int, Path]:
    """Return the folders of the recorded episodes, by number, in order."""
    if not root.is_dir():
        return {}
    found = {int(m[1]): path for path in root.iterdir() if (m := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def tidy(root: Path) -> None:
    """Drop what a crash left half-written or half-deleted."""
    for leftover in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def rewind(root: Path, done: int) -> None:
    """Drop the record of episodes after `done`, which a resumed run runs again, and what a crash left half-written."""
    tidy(root)
    for episode, path in recorded_episodes(root).items():
        if episode > done:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder so that a crash meanwhile leaves none that looks whole."""
    aside = path.with_name(f"{_PARTIAL}gone-{path.name}")
    path.rename(aside)
    shutil.rmtree(aside)


class Recording:
    """Sees every call of a run (a `Tap` of the runtime) and writes what it saw.

    Args:
        root: the run's `record` folder.
        start: how the run was started, JSON; written before the first episode.
        done: episodes done when it was started.
        last: episodes whose record stays; None keeps all.
        states: gives the states of the global random generators.
        note: told once of each column that cannot be kept.

    Example:
        >>> recording = Recording(folder / "record", start={}, done=0, last=None, states=rng_states, note=print)
        >>> with recording.episode(1, {"iterations": {}}):
        ...     runtime.run(1, iterations, flow=flow, trainer=trainer, tap=recording)
        >>> recording.keep()
    """

    def __init__(
        self,
        root: Path,
        *,
        start: Mapping[str, Any],
        done: int,
        last: int | None,
        states: States,
        note: Callable[[str], None],
    ) -> None:
        self._root = root
        self._start_name = f"start-{done:06d}.json"
        self._last = last
        self._states = states
        self._note = note
        self._noted: set[tuple[str, str]] = set()
        self._flows: dict[str, FlowWriter] = {}
        self._receiver: FlowWriter | None = None
        """The trainer flow that gets what is delivered, if one runs."""
        self._random: list[dict[str, Any]] = []
        self._number = 0
        self._opening: dict[str, Any] = {}
        self.seconds = 0.0
        """Time that recording has taken since the episode began."""
        self.bytes = 0
        """Of what was written last."""
        with _written(root, "the record of the run"):
            root.mkdir(parents=True, exist_ok=True)
            (root / self._start_name).write_text(
                json.dumps({"format": FORMAT, **start}, indent=1), encoding="utf-8"
            )

    # ---- one episode ---------------------------------------------------------------------------------------------

    @contextmanager
    def episode(self, number: int, opening: Mapping[str, Any]) -> Generator[None]:
        """Gather what runs within the block; if it fails, forget it.

        Args:
            number: of the episode, from 1; of an evaluation, the episodes done.
            opening: what a re-run needs to know of its beginning, JSON.
        """
        self._forget()
        self._number, self._opening, self.seconds, self.bytes = number, dict(opening), 0.0, 0
        try:
            yield
        except BaseException:
            self._forget()
            raise

    def keep(self) -> None:
        """Write the episode that was gathered, and drop the oldest ones beyond `last`.

        Raises:
            OutputError: it cannot be written; records of earlier episodes are untouched.
        """
        began = time.perf_counter()
        name = f"the record of episode {self._number}"
        target = path_of(self._root, self._number)
        with _written(self._root, name):
            self._write().rename(target)
            self._drop_oldest()
        self._forget()
        self.seconds += time.perf_counter() - began

    def keep_evaluation(self) -> None:
        """Write the evaluation that was gathered, beside the flows of its episode.

        Raises:
            OutputError: it cannot be written.
        """
        began = time.perf_counter()
        target = path_of(self._root, self._number)
        with _written(self._root, f"the record of the evaluation after episode {self._number}"):
            if not target.exists():  # before the first episode: it has no flows but this
                partial = self._write()
                partial.rename(target)
            else:
                for name, flow in self._flows.items():
                    partial = self._root / f"{_PARTIAL}{os.getpid()}-{name}"
                    shutil.rmtree(partial, ignore_errors=True)
                    self.bytes += flow.write(partial)
                    self._write_random(partial)
                    if (target / name).exists():
                        _remove(target / name)
                    partial.rename(target / name)
        self._forget()
        self.seconds += time.perf_counter() - began

    def _write(self) -> Path:
        partial = self._root / f"{_PARTIAL}{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, flow in self._flows.items():
            self.bytes += flow.write(partial / name)
        self._write_random(partial)
        content = {
            "format": FORMAT,
            "episode": self._number,
            "start": self._start_name,
            "bytes": self.bytes,
            **self._opening,
        }
        (partial / EPISODE).write_text(json.dumps(content), encoding="utf-8")
        return partial

    def _write_random(self, folder: Path) -> None:
        if self._random:
            write_values(folder / RANDOM, self._random)
            self.bytes += (folder / RANDOM).stat().st_size

    def _drop_oldest(self) -> None:
        if self._last is None:
            return
        episodes = list(recorded_episodes(self._root).items())
        for number, path in episodes[: -self._last]:
            if number <= self._number:  # of this run, not of the future it was resumed from
                _remove(path)

    def _forget(self) -> None:
        self._flows, self._random = {}, []

    # ---- what the runtime tells ------------------------------------------------------------------------------------

    def beginning(self, flow: FlowWork | None, trainer: TrainWork | None) -> None:
        """Open the flows that are about to run; an evaluation of several datasets goes on in the one it opened."""
        if flow is not None and flow.graph.name not in self._flows:
            self._flows[flow.graph.name] = FlowWriter(flow.graph, flow.feed, self._leave_out)
        elif flow is not None:
            self._flows[flow.graph.name].goes_on(flow.feed)
        self._receiver = None
        if trainer is not None:
            writer = self._flows[trainer.graph.name] = FlowWriter(
                trainer.graph, None, self._leave_out
            )
            if trainer.samples is None:
                self._receiver = writer
            else:
                with self._timed():
                    writer.given(trainer.samples)

    def fed(self, flow: str, start: int, stop: int, batch: Batch) -> None:
        """Keep what enters the flow."""
        with self._timed():
            self._flows[flow].fed(start, stop, batch)

    def entering(self, flow: str, node: Node, call: Call, data: Batch | list[Batch]) -> None:
        """Keep a copy of a call's inputs until it returns, and the state that it finds the random generators in."""
        with self._timed():
            batches = data if isinstance(data, list) else [data]
            self._flows[flow].entered(node, call, batches, self._random_state())

    def returned(
        self,
        flow: str,
        node: Node,
        call: Call,
        output: Batch | list[Batch],
        metrics: Mapping[str, float],
    ) -> None:
        """Encode what a call got and returned."""
        with self._timed():
            batches = output if isinstance(output, list) else [output] if output else []
            self._flows[flow].returned(node, call, batches, metrics)

    def lost(
        self,
        flow: str,
        node: Node,
        outcomes: Mapping[int, str],
        cause: str,
        *,
        drops_groups: bool,
    ) -> None:
        """Take note of samples that were given up."""
        self._flows[flow].lost(node, outcomes, cause, drops_groups=drops_groups)

    def delivered(self, flow: str, uids: Sequence[int], samples: Batch) -> None:
        """Take note of what a trainer flow gets."""
        if self._receiver is not None:
            with self._timed():
                self._receiver.delivered(self._flows[flow], uids, samples)

    @contextmanager
    def _timed(self) -> Generator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def _random_state(self) -> int:
        states = self._states()
        if not self._random or not _equal(self._random[-1], states):
            self._random.append(states)
        return len(self._random) - 1

    def _leave_out(self, owner: str, column: str, kind: str) -> None:
        if (owner, column) not in self._noted:
            self._noted.add((owner, column))
            self._note(
                f"not recorded: column {column!r} of {owner} holds a {kind}, which cannot be kept in a file"
            )


def _equal(first: Any, second: Any) -> bool:
    """Compare states of generators: tensors, and containers of them and of plain numbers."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return all(_equal(part, second[key]) for key, part in cast("Any", first).items())
    if isinstance(first, tuple):
        parts = cast("tuple[Any, ...]", first)
        return all(_equal(part, other) for part, other in zip(parts, second, strict=True))
    return first == second


@contextmanager
def _written(root: Path, what: str) -> Generator[None]:
    """Turn what the disk says into an error that names the record."""
    try:
        yield
    except Exception as error:
        for partial in root.glob(f"{_PARTIAL}{os.getpid()}*"):
            shutil.rmtree(partial, ignore_errors=True)
        behind = os_error_behind(error)  # libraries put errors of their own around it
        if behind is None:
            raise
        cause, fix = write_failure(behind)
        if behind.errno:  # pyarrow puts words of its own around it
            cause = os.strerror(behind.errno)
        raise OutputError(
            f"{what} cannot be written: {cause}",
            place=str(behind.filename or root),
            fix=f"{fix}; or keep fewer episodes with runtime.record_last, or none: runtime.record=false",
        ) from error
