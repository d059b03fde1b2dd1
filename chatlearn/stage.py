# SPDX-License-Identifier: Apache-2.0
"""Modules set up in a runtime, ready to run flows: what learning and evaluating share."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from chatlearn.checkpoint.rng import restore_rng, rng_states, seed_all
from chatlearn.config import RuntimeConfig
from chatlearn.data.feed import Dataset, Feed
from chatlearn.data.prompts import PromptDataset, Rows
from chatlearn.data.sampler import Draw
from chatlearn.errors import DataError
from chatlearn.flow.batch import Batch
from chatlearn.flow.graph import FlowGraph
from chatlearn.module import BaseModule, refuse_running
from chatlearn.runtime.local import LocalRuntime
from chatlearn.runtime.scheduler import Iterations
from chatlearn.runtime.work import FlowWork, Observer, Starting, Tap

Results = dict[str, list[Batch]]


class Stage:
    """Hold modules from their setup to `close()`, and run evaluation flows over them."""

    def __init__(self, modules: Sequence[BaseModule], runtime: RuntimeConfig) -> None:
        self.modules = list(modules)
        refuse_running(self.modules)
        self.config = runtime
        self.iterations: Iterations = Counter()
        self.runtime = LocalRuntime(self.modules)
        self.episode = 0
        """Episodes that these modules have gone through."""
        self.train_iteration = 0
        """Train steps that these modules have gone through."""
        self._eval_datasets: tuple[Sequence[Rows], list[Dataset]] | None = None

    def set_up(self, *, anew: bool = False) -> None:
        """Run every module's `setup()`, but for those that another stage in this process has set up.

        What is drawn afterwards does not depend on how much setups have drawn: a run with an evaluator's modules
        trains as one without.
        """
        seed_all(self.config.seed)
        self.runtime.set_up(anew=anew)
        seed_all(_derived(self.config.seed, "run"))

    @contextmanager
    def showing_tokens(self, tick: Callable[[int], None]) -> Generator[None]:
        """Within the block, have every module tell `tick` of the tokens that a call under way produces."""
        modules = [w.module for workers in self.runtime.workers.values() for w in workers]
        before = [module.progress for module in modules]
        for module in modules:
            module.progress = tick
        try:
            yield
        finally:
            for module, progress in zip(modules, before, strict=True):
                module.progress = progress

    def build_datasets(
        self,
        graph: FlowGraph,
        sources: Sequence[Rows],
        *,
        is_eval: bool,
        names: Sequence[str] = (),
    ) -> list[Dataset]:
        """Ask the flow's first module for datasets over the prompts, or make the default ones.

        `names` are those of several datasets, for errors.
        """
        first = graph.nodes[0].module
        worker = self.runtime.workers[first.name][0]
        takes_flag = "is_eval" in inspect.signature(first.build_dataset).parameters
        keywords: dict[str, Any] = {"is_eval": is_eval} if takes_flag else {}
        datasets: list[Dataset] = []
        for number, rows in enumerate(sources):
            built = worker.hook("build_dataset", rows, **keywords)
            if built is None:
                worker.hook("check_rows", rows)
            dataset = PromptDataset(rows) if built is None else built
            if type(built) is list and not any(
                isinstance(x, dict) for x in cast("list[Any]", built)
            ):
                dataset = PromptDataset(cast("Rows", built))  # prompts, as if they had been given
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise DataError(
                    f"build_dataset returned a {type(dataset).__name__} without length or rows by index",
                    place=f"{type(first).__name__}.build_dataset",
                    fix="return a dataset with __len__ and __getitem__, e.g. a list of dicts",
                )
            if len(dataset) == 0:
                raise DataError(
                    f"the dataset {f'{names[number]!r} ' if names else ''}of {graph.name} is empty",
                    place=f"{type(first).__name__}.build_dataset",
                    fix="keep at least one row",
                )
            datasets.append(dataset)
        return datasets

    def eval_datasets(
        self, graph: FlowGraph, rows: Sequence[Rows], names: Sequence[str] = ()
    ) -> list[Dataset]:
        """Return an evaluation flow's datasets, built when they are first asked for."""
        if self._eval_datasets is None or self._eval_datasets[0] is not rows:
            with numbers_of_its_own(self.config.seed):
                built = self.build_datasets(graph, rows, is_eval=True, names=names)
            self._eval_datasets = (rows, built)
        return self._eval_datasets[1]

    def evaluate(
        self,
        graph: FlowGraph,
        dataset: Dataset,
        *,
        first_prompt: int = 0,
        episode: int = 0,
        starting: Starting | None = None,
        observer: Observer | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        tap: Tap | None = None,
    ) -> dict[int, list[Batch]]:
        """Run an evaluation flow over a whole dataset, each prompt `eval_num_inference_per_prompt` times, in order.

        Args:
            graph: the flow.
            dataset: of this evaluation, or one of several.
            first_prompt: number of its first prompt; goes on over several datasets.
            episode: number from 1, for errors.
            starting: told of every call before it is made.
            observer: told of every finished call.
            interrupted: asked before every call whether to stop.
            tap: sees what goes into and comes out of every call.

        Returns:
            The batches of every returned node, by its index in the graph.
        """
        draws = [Draw(0, row) for row in range(len(dataset))]
        feed = Feed([dataset], draws, self.config.eval_num_inference_per_prompt, first_prompt)
        outcome = self.runtime.run(
            episode,
            self.iterations,
            flow=FlowWork(graph, feed, keeps_batches=True),
            batch_size=self.config.generation_batch_size,
            starting=starting,
            observer=observer,
            interrupted=interrupted,
            tap=tap,
        )
        return outcome.results

    def close(self) -> None:
        """Let go of every module; safe to call twice."""
        self.runtime.close()


@contextmanager
def numbers_of_its_own(seed: int) -> Generator[None]:
    """Give the block random numbers of its own, the same every time; those outside go on as if none were drawn.

    So training does not depend on whether, when and on what is evaluated, and two evaluations differ by the weights
    alone. It holds for torch's, Python's and numpy's global generators; a generator that a module keeps is its own.
    """
    before = rng_states()
    seed_all(_derived(seed, "evaluation"))
    try:
        yield
    finally:
        restore_rng(before)


def _derived(seed: int, what: str) -> int:
    return random.Random(f"{seed}/{what}").getrandbits(63)
