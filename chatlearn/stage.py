# SPDX-License-Identifier: Apache-2.0
"""Modules set up in a runtime, ready to run flows: what learning and evaluating share."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from chatlearn.config import RuntimeConfig
from chatlearn.data.feed import Dataset, Feed
from chatlearn.data.prompts import PromptDataset, Rows
from chatlearn.data.sampler import Draw
from chatlearn.errors import DataError
from chatlearn.flow.batching import Batch
from chatlearn.flow.graph import FlowGraph
from chatlearn.module import BaseModule
from chatlearn.runtime.local import FlowWork, LocalRuntime, Observer, Starting
from chatlearn.runtime.scheduler import Iterations

Results = dict[str, list[Batch]]


class Stage:
    """Hold modules from their setup to `close()`, and run evaluation flows over them."""

    def __init__(self, modules: Sequence[BaseModule], runtime: RuntimeConfig) -> None:
        self.modules = list(modules)
        self.config = runtime
        self.iterations: Iterations = Counter()
        self.runtime = LocalRuntime(self.modules)
        self._eval_datasets: tuple[Sequence[Rows], list[Dataset]] | None = None

    def set_up(self, *, anew: bool = False) -> None:
        """Run every module's `setup()`, but for those that another stage in this process has set up."""
        self.runtime.set_up(anew=anew)

    def build_datasets(
        self, graph: FlowGraph, sources: Sequence[Rows], *, is_eval: bool
    ) -> list[Dataset]:
        """Ask the flow's first module for datasets over the prompts, or make the default ones."""
        first = graph.nodes[0].module
        worker = self.runtime.workers[first.name][0]
        takes_flag = "is_eval" in inspect.signature(first.build_dataset).parameters
        keywords: dict[str, Any] = {"is_eval": is_eval} if takes_flag else {}
        datasets: list[Dataset] = []
        for rows in sources:
            built = worker.hook("build_dataset", rows, **keywords)
            if built is None:
                worker.hook("check_rows", rows)
            dataset = PromptDataset(rows) if built is None else built
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise DataError(
                    f"build_dataset returned a {type(dataset).__name__} without length or rows by index",
                    place=f"{type(first).__name__}.build_dataset",
                    fix="return a dataset with __len__ and __getitem__, e.g. a list of dicts",
                )
            if len(dataset) == 0:
                raise DataError(
                    f"the dataset of {graph.name} is empty",
                    place=f"{type(first).__name__}.build_dataset",
                    fix="keep at least one row",
                )
            datasets.append(dataset)
        return datasets

    def evaluate(
        self,
        graph: FlowGraph,
        rows: Sequence[Rows],
        *,
        episode: int = 0,
        starting: Starting | None = None,
        observer: Observer | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Results:
        """Run an evaluation flow over whole datasets, each sample once, in order.

        Returns:
            `{model_name: [batch, ...]}` for the returned nodes; two nodes of one model follow each other.
        """
        if self._eval_datasets is None or self._eval_datasets[0] is not rows:
            self._eval_datasets = (rows, self.build_datasets(graph, rows, is_eval=True))
        datasets = self._eval_datasets[1]
        draws = [Draw(d, row) for d, dataset in enumerate(datasets) for row in range(len(dataset))]
        outcome = self.runtime.run(
            episode,
            self.iterations,
            flow=FlowWork(graph, Feed(datasets, draws, group_size=1)),
            batch_size=self.config.generation_batch_size,
            starting=starting,
            observer=observer,
            interrupted=interrupted,
        )
        results: Results = {}
        for node, batches in outcome.results.items():
            results.setdefault(graph.nodes[node].module.name, []).extend(batches)
        return results

    def close(self) -> None:
        """Let go of every module; safe to call twice."""
        self.runtime.close()
