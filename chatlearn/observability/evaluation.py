# SPDX-License-Identifier: Apache-2.0
"""From the calls and results of one evaluation to its flat metrics: overall and, of several datasets, for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from chatlearn.columns import PROMPT_UID, REWARDS, UID
from chatlearn.flow.batch import Batch
from chatlearn.flow.batching import is_number, select
from chatlearn.flow.graph import FlowGraph, Node
from chatlearn.observability.metrics import EpisodeMetrics
from chatlearn.observability.outcomes import OutcomeCounts, kept_rows
from chatlearn.observability.pass_at_k import Tally, measured_ks
from chatlearn.observability.progress import Call as ShownCall


class Call(ShownCall, Protocol):
    """What is known of a finished call of a module, beyond what the display shows of it."""

    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def outcomes(self) -> Mapping[str, int]: ...
    @property
    def cause(self) -> str: ...


class EvaluationMetrics:
    """Collect what an evaluation measures, over the samples that have values; lost ones are counted.

    Args:
        graph: the evaluation flow.
        datasets: their names, in order; with several, every metric stands under `<dataset>/` too.
        samples_per_prompt: above 1, `avg@n` and `pass@k` of the rewards are measured.
        ks: the k of `pass@k`; None takes those of `measured_ks`, if there are several samples per prompt.
        threshold: reward from which on a sample has passed.

    Example:
        >>> measured = EvaluationMetrics(graph, ["math", "code"], samples_per_prompt=8)
        >>> measured.begin("math")
        >>> measured.call(report)
        >>> measured.returned(batches_by_node, prompts=100)
        >>> measured.summary()
        {'reward/rewards': 0.4, 'reward/pass@8': 0.9, ..., 'math/reward/rewards': 0.4, ...}
    """

    def __init__(
        self,
        graph: FlowGraph,
        datasets: Sequence[str],
        samples_per_prompt: int = 1,
        ks: Sequence[int] | None = None,
        threshold: float = 1.0,
    ) -> None:
        self._graph = graph
        self._samples = samples_per_prompt
        self._ks = measured_ks(samples_per_prompt, ks)
        self._threshold = threshold
        self._overall = EpisodeMetrics()
        self._parts = {name: EpisodeMetrics() for name in datasets}
        self._tallies: dict[str, dict[str, Tally]] = {name: {} for name in datasets}
        self._rewards: dict[str, dict[int, dict[str, list[float]]]] = {d: {} for d in datasets}
        self._outcomes = OutcomeCounts()
        self._outcomes_of = {name: OutcomeCounts() for name in datasets}
        self._logged: set[str] = set()
        """Modules that logged rewards themselves."""
        self._now = ""
        self.notes: list[str] = []
        """What could not be measured, and why."""

    def begin(self, dataset: str) -> None:
        """Count what follows to `dataset`."""
        self._now = dataset

    def call(self, call: Call) -> None:
        """Take the numbers that a call logged."""
        for metrics in (self._overall, self._parts[self._now]):
            metrics.add(call.module, call.method, call.metrics, call.samples)
        for counts in (self._outcomes, self._outcomes_of[self._now]):
            counts.add(call)
        if any(_holds_rewards(name) for name in call.metrics):
            self._logged.add(call.module)

    def returned(self, batches: Mapping[int, Sequence[Batch]], prompts: int) -> None:
        """Take the batches of the returned nodes over one whole dataset of `prompts` prompts."""
        batches = {index: [_living(part) for part in parts] for index, parts in batches.items()}
        if not self._ks:
            self._keep_rewards(batches)
            return
        found = self._tallies[self._now]
        for index, parts in batches.items():
            node = self._graph.nodes[index]
            names = dict.fromkeys(name for part in parts for name in part if _holds_rewards(name))
            for name in names:
                tally = self._tally(node, name, parts, prompts)
                if tally is not None:
                    found[self._owner(node) + name.removesuffix(REWARDS)] = tally
        if not any(self._tallies.values()) and not self.notes:
            self.notes.append(
                "no pass@k: no returned node of the evaluation flow has a column of rewards, one number per sample"
            )

    def _keep_rewards(self, batches: Mapping[int, Sequence[Batch]]) -> None:
        """Keep the rewards of one sample per prompt, whose mean is measured."""
        for index, parts in batches.items():
            columns = self._rewards[self._now].setdefault(index, {})
            filled = [part for part in parts if part]
            for name in dict.fromkeys(n for part in filled for n in part if _holds_rewards(n)):
                if all(name in part and _is_numeric(part[name]) for part in filled):
                    columns[name] = [float(r) for part in filled for r in part[name]]

    def summary(self) -> dict[str, float]:
        """Return the flat metrics, those over all datasets first."""
        parts = list(self._tallies.values())
        owners = dict.fromkeys(owner for part in parts for owner in part)
        whole = {o: Tally.together(part[o] for part in parts if o in part) for o in owners}
        flat = {**self._overall.summary(), **self._of(whole), **self._means(*self._rewards)}
        flat |= self._outcomes.metrics()
        if len(self._parts) > 1:
            for dataset, metrics in self._parts.items():
                tallies = self._of(self._tallies[dataset])
                own = {**metrics.summary(), **tallies, **self._means(dataset)}
                own |= self._outcomes_of[dataset].metrics()
                named = {f"{dataset}/{name}": value for name, value in own.items()}
                if taken := flat.keys() & named:
                    self.notes.append(
                        f"metrics of dataset {dataset!r} have names of others: {sorted(taken)}"
                    )
                flat = {**named, **flat} if taken else {**flat, **named}
        return flat

    def _means(self, *datasets: str) -> dict[str, float]:
        """Return the mean rewards of the returned nodes whose modules logged none."""
        found: dict[str, list[float]] = {}
        for dataset in datasets:
            for index, columns in self._rewards[dataset].items():
                node = self._graph.nodes[index]
                if node.module.name not in self._logged:
                    for name, rewards in columns.items():
                        found.setdefault(self._owner(node) + name, []).extend(rewards)
        return {name: sum(rewards) / len(rewards) for name, rewards in found.items() if rewards}

    def _of(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        return {
            f"{owner}{name}": value
            for owner, tally in tallies.items()
            for name, value in tally.metrics(self._samples, self._ks).items()
        }

    def _owner(self, node: Node) -> str:
        """Return the module's name; the node's, if several nodes of the module are returned."""
        modules = [self._graph.nodes[index].module for index in set(self._graph.outputs)]
        return f"{node.module.name if modules.count(node.module) == 1 else node.name}/"

    def _tally(self, node: Node, name: str, parts: Sequence[Batch], prompts: int) -> Tally | None:
        """Sort a node's rewards by prompt; None if they are not one number per sample."""
        groups: dict[Any, tuple[list[float], list[bool]]] = {}
        position = 0
        for part in (part for part in parts if part):
            column = part.get(name)
            if column is None or not _is_numeric(column):
                return None
            rewards = [float(reward) for reward in column]
            keys = self._prompts(part, position)
            for key, reward, passed in zip(
                keys, rewards, _passed(column, self._threshold), strict=True
            ):
                group = groups.setdefault(key, ([], []))
                group[0].append(reward)
                group[1].append(passed)
            position += len(rewards)
        by_position = any(part and PROMPT_UID not in part and UID not in part for part in parts)
        if by_position and position != prompts * self._samples:
            self.notes.append(
                f"no pass@k of {node.name}: it returned {position} of {prompts * self._samples} samples, and neither "
                f"`{PROMPT_UID}` nor `{UID}` tells which belong to one prompt; keep one of these columns"
            )
            return None
        tally = Tally(prompts)
        for rewards, passed in groups.values():
            tally.add(rewards, passed)
        return tally

    def _prompts(self, part: Batch, position: int) -> list[Any]:
        """Tell per sample which prompt it belongs to."""
        size = len(next(iter(part.values())))
        if PROMPT_UID in part:
            return [_plain(uid) for uid in part[PROMPT_UID]]
        if UID in part:
            return [int(uid) // self._samples for uid in part[UID]]
        return [(position + i) // self._samples for i in range(size)]


def _living(batch: Batch) -> Batch:
    """Return the samples of a batch that have values."""
    kept = kept_rows(batch)
    return batch if kept is None else select(batch, kept)


def _holds_rewards(name: str) -> bool:
    """Tell whether a column is `rewards`, or `<namespace>/rewards`."""
    namespace, _, last = name.rpartition("/")
    return last == REWARDS and "/" not in namespace and namespace != REWARDS


def _is_numeric(column: Any) -> bool:
    if hasattr(column, "dim"):
        return column.dim() == 1 and not column.is_complex()
    return all(is_number(value) for value in cast("list[Any]", column))


def _passed(column: Any, threshold: float) -> list[bool]:
    """Compare in the column's own precision: the float32 nearest to 0.9 has reached 0.9."""
    if hasattr(column, "dim"):
        return (column >= threshold).tolist()
    return [bool(value >= threshold) for value in column]


def _plain(uid: Any) -> Any:
    value = uid.item() if hasattr(uid, "item") else uid
    return value if isinstance(value, int | str) else str(value)
