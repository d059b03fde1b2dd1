# SPDX-License-Identifier: Apache-2.0
"""Learn what undeclared steps read and write by calling them once, on copies of their modules and made-up samples.

Only on demand: a step may write files, ask a server or count its calls, and a copy of its module undoes none of that.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import torch

from chatlearn.checks.columns import declared_step
from chatlearn.columns import COLUMNS
from chatlearn.data.feed import Feed
from chatlearn.data.prompts import PromptDataset, Rows
from chatlearn.data.row_columns import kinds_shown, row_columns
from chatlearn.data.sampler import Draw
from chatlearn.errors import ChatLearnError
from chatlearn.flow.batch import Batch, size
from chatlearn.flow.batching import isolate, normalise, pad
from chatlearn.flow.declaration import Declaration, Kinds, Need
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.flow.passage import enter
from chatlearn.module import BaseModule, resolved_config, state_of, written_columns
from chatlearn.program import Executor, Program
from chatlearn.runtime.deadline import Deadline, DeadlinePassed

TIMEOUT_S: Final = 5.0
"""How long one call may take before nothing is learned from it."""
_SAMPLES: Final = 2
_MADE_UP: Final[dict[str, Callable[[], Any]]] = {
    "text": lambda: ["made up", "made up"],
    "messages": lambda: [[{"role": "user", "content": "made up"}] for _ in range(_SAMPLES)],
    "number": lambda: torch.tensor([0.0, 1.0]),
    "tokens": lambda: [torch.tensor([1, 2]), torch.tensor([1, 2, 3])],
    "floats": lambda: [torch.tensor([-0.5, -1.0]), torch.tensor([-0.5, -1.0, -2.0])],
    "flags": lambda: [torch.tensor([True, False]), torch.tensor([True, False, True])],
}


@dataclass
class DryRun:
    """What was learned, by flow and node, and what could not be."""

    learned: dict[tuple[str, int], Declaration] = field(
        default_factory=dict[tuple[str, int], Declaration]
    )
    tried: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])


class MissingColumnError(KeyError):
    """A step asked for a column that is not there."""


class Watched(dict[str, Any]):
    """A batch that remembers what was asked of it."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        super().__init__(columns)
        self.read: set[str] = set()
        self.was_walked = False
        """Whether somebody looked at all columns at once, as `{**data}` does."""

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> Any:
        raise MissingColumnError(name)

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a column, or the default."""
        self.read.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        """Take a column out."""
        self.read.add(name)
        if not default and not super().__contains__(name):
            raise MissingColumnError(name)
        return super().pop(name, *default)

    def __iter__(self) -> Any:
        self.was_walked = True
        return super().__iter__()

    def keys(self) -> Any:
        """Return the names of the columns."""
        self.was_walked = True
        return super().keys()

    def values(self) -> Any:
        """Return the columns."""
        self.was_walked = True
        return super().values()

    def items(self) -> Any:
        """Return names and columns."""
        self.was_walked = True
        return super().items()

    def copy(self) -> Watched:
        """Return a copy that goes on remembering in the same place."""
        copied = Watched(super().copy())
        copied.read = self.read
        self.was_walked = True
        return copied

    def __or__(self, other: Any) -> Any:
        return {**self, **other}


@dataclass(frozen=True)
class _Samples:
    """Made-up samples at one point of a flow."""

    batch: Batch = field(default_factory=dict[str, Any])
    is_known: bool = False
    """Whether they have all the columns that real ones have."""


class _NotLearnedError(Exception):
    """A step could not be tried, and why."""


def try_steps(program: Program, timeout_s: float = TIMEOUT_S) -> DryRun:
    """Call every undeclared step whose module has no `setup()` of its own, in the order of the flows.

    Args:
        program: with its graphs; modules are copied, and never set up.
        timeout_s: how long one call may take.
    """
    return _Trial(program, timeout_s).run()


class _Trial:
    def __init__(self, program: Program, timeout_s: float) -> None:
        self._program = program
        self._timeout_s = timeout_s
        self._found = DryRun()
        self._copies: dict[int, BaseModule] = {}

    def run(self) -> DryRun:
        program, graphs = self._program, self._program.graphs
        delivered = _Samples()
        if (graph := graphs.get("env_flow")) and program.environment is not None:
            made = self._flow(graph, _first_rows(program.environment, graph))
            delivered = _joined([made[index] for index in graph.outputs])
            if program.replay_sampler is not None:  # which may give any column
                delivered = replace(delivered, is_known=False)
        if (graph := graphs.get("trainer_flow")) and program.trainer is not None:
            alone = program.environment is None
            self._flow(graph, _first_rows(program.trainer, graph) if alone else delivered)
        if (graph := graphs.get("eval_flow")) and program.evaluator is not None:
            self._flow(graph, _first_rows(program.evaluator, graph))
        if self._found.tried:
            names = ", ".join(dict.fromkeys(self._found.tried))
            self._found.notes.insert(0, f"tried in a dry run: {names}")
        return self._found

    def _flow(self, graph: FlowGraph, feed: _Samples) -> list[_Samples]:
        """Try the steps of a flow; return the samples that each node gave, as far as they are known."""
        made: list[_Samples] = []
        for node in graph.nodes:
            given = _joined([feed if index == FEED else made[index] for index in node.inputs])
            said = declared_step(self._program, node)
            if said.needs is not None and said.writes is not None:
                made.append(_Samples(_made_up(said, given.batch, node), given.is_known))
                continue
            try:
                learned, output = self._step(graph, node, said, given)
            except _NotLearnedError as error:
                self._found.notes.append(
                    f"{node.name} was not learned from, so nothing is known of its columns: {error}"
                )
                made.append(replace(given, is_known=False))
            else:
                self._found.tried.append(node.name)
                self._found.learned[graph.name, node.index] = learned
                made.append(_Samples(output, given.is_known and learned.writes is not None))
        return made

    def _step(
        self, graph: FlowGraph, node: Node, said: Declaration, given: _Samples
    ) -> tuple[Declaration, Batch]:
        """Call a step on made-up samples; return what it did with their columns, and what it gave."""
        module = self._copy(node.module)
        namespace, inside = resolved_config(module).namespace, isolate(given.batch)
        if namespace is not None:
            inside = enter(inside, namespace, written_columns(module))
        pad(inside, state_of(module).padding)
        watched = Watched(inside)
        trains = graph.name == "trainer_flow"
        try:
            value = self._called(module, node, [watched] if trains else watched)
        except MissingColumnError as error:
            return _wanting(said, str(error.args[0]), given), given.batch
        try:
            value = _only(value) if trains else value
            learned, output = _learned(said, inside, value, watched, node.name)
        except ChatLearnError as error:
            raise _NotLearnedError(error.cause) from error
        if namespace is not None:  # what leaves it is what the class declares
            return replace(learned, writes=said.writes, drops=frozenset()), given.batch
        return learned, output

    def _called(self, module: BaseModule, node: Node, data: Any) -> Any:
        function = getattr(module, node.method)
        keywords = dict(node.constants)
        if "iteration" in inspect.signature(function).parameters:
            keywords["iteration"] = 0
        deadline = Deadline(self._timeout_s, f"dry run of {node.name}")
        try:
            return deadline.run(lambda: _finished(function(data, **keywords)))
        except DeadlinePassed as error:
            why = f"it took longer than {self._timeout_s:g} s, and was at {error.place}"
            raise _NotLearnedError(why) from error
        except MissingColumnError:
            raise
        except (Exception, SystemExit) as error:
            raise _NotLearnedError(f"it raised {type(error).__name__}: {error}") from error

    def _copy(self, module: BaseModule) -> BaseModule:
        if type(module).setup is not BaseModule.setup or "setup" in vars(module):
            raise _NotLearnedError(f"{type(module).__name__} has a setup() of its own")
        if id(module) not in self._copies:
            try:
                self._copies[id(module)] = copy.deepcopy(module)
            except Exception as error:
                raise _NotLearnedError(f"it cannot be copied: {error}") from error
        return self._copies[id(module)]


def _finished(value: Any) -> Any:
    async def result() -> Any:
        return await value

    return asyncio.run(result()) if inspect.isawaitable(value) else value


def _wanting(said: Declaration, column: str, given: _Samples) -> Declaration:
    """Return what is known of a step that asked for a column in vain: that it needs it."""
    if not given.is_known:
        raise _NotLearnedError(
            f"it asked for {column!r}, which there may be, but nobody knows what it is given"
        )
    need = Need.of({column: "any"}, because="a dry run failed without it")
    return replace(said, needs=(*(said.needs or ()), need))


def _only(value: Any) -> Any:
    """Return what a train step gave for its only micro-batch, if it gave any."""
    parts = cast("list[Any]", value) if isinstance(value, list) else []
    return parts[0] if len(parts) == 1 else None


def _learned(
    said: Declaration, given: Batch, value: Any, watched: Watched, name: str
) -> tuple[Declaration, Batch]:
    """Return what a step did with the columns that it was given, and its output."""
    read, was_walked = sorted(watched.read), watched.was_walked  # before looking at it ourselves
    output = {} if value is None else normalise(value, name)
    changed = {name: c for name, c in output.items() if given.get(name) is not c}
    passes_on: bool | None = value is watched or not given.keys().isdisjoint(output)
    if not passes_on and was_walked:  # it may have chosen, and these were not all
        passes_on = None
    learned = Declaration(
        needs=said.needs or (),
        optional=dict.fromkeys(read, frozenset[str]()),
        reads_all=was_walked,
        writes={name: kinds_shown(list(column)) for name, column in changed.items()},
        passes_on=passes_on,
        drops=frozenset(given.keys() - output.keys()) if passes_on else frozenset(),
        is_of_method=False,
        is_learned=True,
    )
    return learned, output


def _first_rows(executor: Executor, graph: FlowGraph) -> _Samples:
    """Return the first samples of a flow's first dataset; only their numbers where a module makes the dataset."""
    first = graph.nodes[0].module
    makes_own = type(first).build_dataset is not BaseModule.build_dataset
    nothing: list[dict[str, Any]] = [{}]
    try:
        rows: Rows = nothing if makes_own else executor.rows()[0]
        draws = [Draw(0, number % len(rows)) for number in range(_SAMPLES)]
        batch = Feed([PromptDataset(rows)], draws, 1).batch(0, _SAMPLES)
    except (ChatLearnError, IndexError):  # a problem already
        return _Samples()
    return _Samples(batch, is_known=not makes_own and row_columns(rows) is not None)


def _joined(parts: Sequence[_Samples]) -> _Samples:
    joined: Batch = {}
    for part in parts:
        joined.update(part.batch)
    count = min((size(part.batch) for part in parts if part.batch), default=0)
    cut = {name: column[:count] for name, column in joined.items()}  # behind a filter are fewer
    return _Samples(cut, all(part.is_known for part in parts))


def _made_up(said: Declaration, given: Batch, node: Node) -> Batch:
    """Return what a declared step would give, with samples made up from the kinds of its columns."""
    passed = {} if said.passes_on is False else dict(given)
    namespace = resolved_config(node.module).namespace
    for name, kinds in (said.writes or {}).items():
        outside = name if namespace is None else f"{namespace}/{name}"
        passed[outside] = _MADE_UP[_one_kind(name, kinds)]()
    return passed


def _one_kind(name: str, kinds: Kinds) -> str:
    if not kinds and name in COLUMNS:
        return COLUMNS[name].kind.split(" | ")[0]
    return next((kind for kind in _MADE_UP if kind in kinds), "number")
