# SPDX-License-Identifier: Apache-2.0
"""`Environment`, `Trainer`, `Evaluator`: a flow each, with the datasets it runs on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from chatlearn.compilation import compile_program
from chatlearn.config import active
from chatlearn.data.feed import Dataset
from chatlearn.data.prompts import FILE_SUFFIXES, Rows, Source, load_prompts
from chatlearn.errors import (
    ChatLearnError,
    DataError,
    EngineError,
    HookError,
    describe_function,
)
from chatlearn.flow.batching import Batch, is_number, numbers
from chatlearn.flow.graph import FlowGraph
from chatlearn.flow.trace import Flow, trace
from chatlearn.inspection import intercept
from chatlearn.module import state_of
from chatlearn.observability.evaluation import EvaluationMetrics
from chatlearn.observability.evaluation_progress import EvaluationProgress
from chatlearn.program import Program, raise_problems
from chatlearn.runtime.work import CallReport, Observer, Starting, Tap
from chatlearn.stage import Results, Stage, numbers_of_its_own

Datasets = Sequence[Source] | Mapping[str, Source]
PostProcess = Callable[[Results, "EvalInfo"], Any]


class Executor:
    """A flow function and the datasets it runs on."""

    flow_name: ClassVar[str] = "flow"

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.sources: list[Source] = []
        self.names: list[str] = []
        """A name for each dataset, for messages and metrics."""
        self._rows: list[Rows] | None = None

    def set_dataset(self, dataset: Source) -> Self:
        """Run on `dataset`: a list, a torch or Hugging Face dataset, or a path (see `data.prompts`)."""
        return self.set_multiple_datasets([dataset])

    def set_multiple_datasets(self, datasets: Datasets) -> Self:
        """Run on several datasets, a list of them or a mapping that names them.

        Training takes them in turn by `runtime.data_ratio`; evaluation runs one after the other. Without names a file
        is called by its stem and anything else `dataset_0`, `dataset_1`, ...; an equal name gets a number.
        """
        if isinstance(datasets, str | Path) or not hasattr(datasets, "__iter__"):
            given: list[Source] = []
        elif isinstance(datasets, Mapping):
            given = list(datasets.values())
        else:
            given = list(datasets)
        if not given:
            raise DataError(
                "set_multiple_datasets takes a non-empty list of datasets, or a mapping that names them",
                fix='write .set_multiple_datasets([first, second]) or ({"math": first, "code": second})',
            )
        self.sources, self._rows = given, None
        if isinstance(datasets, Mapping):
            self.names = [_checked_name(name) for name in cast("Mapping[Any, Source]", datasets)]
        else:
            self.names = _names_of(given)
        return self

    def trace(self) -> FlowGraph:
        """Run the flow function once on a symbolic batch and return its graph."""
        return trace(self.flow, self.flow_name)

    def rows(self) -> list[Rows]:
        """Load and validate the datasets; an empty one is refused."""
        if self._rows is None:
            several = len(self.sources) > 1
            self._rows = [
                load_prompts(
                    source, what=f"the dataset {f'{name!r} ' if several else ''}of {self.flow_name}"
                )
                for name, source in zip(self.names, self.sources, strict=True)
            ]
        return self._rows


class Environment(Executor):
    """Who samples and who scores: runs `env_flow` over `sample_per_episode` samples per episode.

    Example:
        >>> def env_flow(batch):
        ...     return reward.forward_step(policy.forward_step(batch))
        >>> environment = Environment(env_flow).set_dataset(["1+1=", "2+3="])
    """

    flow_name: ClassVar[str] = "env_flow"


class Trainer(Executor):
    """Who learns: runs `trainer_flow` over global batches of what the environment flow returned.

    Each node gets a list of micro-batches. Without an environment the trainer runs on the dataset itself.
    """

    flow_name: ClassVar[str] = "trainer_flow"


class EvalInfo(dict[str, int]):
    """What a post-process function learns besides the results; keys are attributes too.

    `episode_iteration` counts episodes from 0 (-1: before the first); `train_iteration` counts train steps done.
    """

    datasets: dict[str, Results]
    """The results again, per dataset: the same batches under the dataset's name."""

    @classmethod
    def of(cls, episode_iteration: int, train_iteration: int) -> EvalInfo:
        """Make the info of one evaluation."""
        info = cls(episode_iteration=episode_iteration, train_iteration=train_iteration)
        info.datasets = {}
        return info

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Evaluator(Executor):
    """Who is measured: runs `eval_flow` over whole datasets, in order, each prompt once.

    `runtime.eval_num_inference_per_prompt` samples each prompt several times and measures `pass@k`. Training never
    notices an evaluation: its data and its random numbers go on as if there had been none.

    Example:
        >>> evaluator = Evaluator(eval_flow).set_dataset(val_prompts)
        >>> evaluator.eval()["reward"][0]["rewards"]
        tensor([1., 0.])
    """

    flow_name: ClassVar[str] = "eval_flow"

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow)
        self.post_process: PostProcess | None = None
        self.stage: Stage | None = None
        """The modules, set up: by `eval()` itself, or by the engine that this evaluator belongs to."""
        self.was_stopped = False
        """Whether the engine that trained these modules was stopped: what they learned is released."""
        self.metrics: dict[str, float] = {}
        """What the last evaluation measured: `<module>/<name>` as logged, and what the hook returned."""
        self._said: set[str] = set()

    def set_post_process_func(self, function: PostProcess) -> Self:
        """Call `function(results, info)` after every evaluation; numbers in a dict it returns are logged."""
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise EngineError(
                f"set_post_process_func takes a plain function, not {function!r}",
                fix="write def process(results, info): ...",
            )
        self.post_process = function
        return self

    def eval(self) -> Results:
        """Evaluate now and return `{model_name: [batch, ...]}` for the returned nodes; numbers are in `metrics`.

        Works with no training engine: the modules are set up on the first call and kept until `stop()`.
        """
        intercept(self)
        program = self.check()
        raise_problems(program.problems)
        if self.was_stopped:
            raise EngineError(
                "the engine that trained these modules was stopped, so their weights are released",
                fix="evaluate before engine.stop(), or set a new evaluator up on the exported model",
            )
        graph, runtime = program.graphs[self.flow_name], program.config.runtime
        if self.stage is None:
            stage = Stage(program.modules, runtime)
            with numbers_of_its_own(runtime.seed):
                stage.set_up()
            self.stage = stage
            lost = [m.name for m in program.modules if state_of(m).has_lost_weights]
        else:
            lost = []
        stage = self.stage
        stage.config = runtime  # of now, whatever it was when the modules were set up
        prompts = sum(map(len, self._datasets(stage, graph).values()))
        samples = prompts * runtime.eval_num_inference_per_prompt
        with EvaluationProgress(samples, len(graph.nodes)) as display:
            self._say_once([f"warning: {warning}" for warning in program.warnings], display.note)
            if lost:
                display.note(
                    f"{', '.join(lost)}: measured with the weights that setup() makes; what a parameter sync "
                    "brought was released when its engine was stopped"
                )
            with stage.showing_tokens(display.tick):
                results = self.run(
                    stage,
                    graph,
                    EvalInfo.of(stage.episode - 1, stage.train_iteration),
                    starting=partial(_show_call, display),
                    observer=display.advance,
                    note=display.note,
                )
            display.evaluated(self.metrics)
        return results

    def run(
        self,
        stage: Stage,
        graph: FlowGraph,
        info: EvalInfo,
        *,
        starting: Starting | None = None,
        observer: Observer | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        note: Callable[[str], None] = lambda _: None,
        tap: Tap | None = None,
    ) -> Results:
        """Evaluate on a stage whose modules are set up; leaves what was measured in `metrics`.

        `note` is told, once each, what could not be measured or logged; `tap` sees every call.
        """
        runtime = stage.config
        measured = EvaluationMetrics(
            graph,
            self.names,
            runtime.eval_num_inference_per_prompt,
            runtime.eval_pass_at_k,
            runtime.eval_pass_threshold,
        )

        def observe(call: CallReport) -> None:
            measured.call(call)
            if observer is not None:
                observer(call)

        results: Results = {}
        first_prompt = 0
        datasets = self._datasets(stage, graph)
        with numbers_of_its_own(runtime.seed):
            for name, dataset in datasets.items():
                measured.begin(name)
                batches = stage.evaluate(
                    graph,
                    dataset,
                    first_prompt=first_prompt,
                    episode=info.episode_iteration + 1,
                    starting=starting,
                    observer=observe,
                    interrupted=interrupted,
                    tap=tap,
                )
                measured.returned(batches, prompts=len(dataset))
                info.datasets[name] = _by_module(graph, batches)
                for module, parts in info.datasets[name].items():
                    results.setdefault(module, []).extend(parts)
                first_prompt += len(dataset)
            self.metrics = measured.summary()
            notes = [*measured.notes, *self._post_processed(results, info)]
        self._say_once(notes, note)
        return results

    def _say_once(self, texts: Sequence[str], note: Callable[[str], None]) -> None:
        for text in texts:
            if text not in self._said:
                self._said.add(text)
                note(text)

    def _datasets(self, stage: Stage, graph: FlowGraph) -> dict[str, Dataset]:
        """Return the datasets that the flow's first module makes, by name; they are made once."""
        names = self.names if len(self.names) > 1 else ()
        datasets = stage.eval_datasets(graph, self.rows(), names)
        return dict(zip(self.names, datasets, strict=True))

    def _post_processed(self, results: Results, info: EvalInfo) -> list[str]:
        """Call the hook, take its numbers over, and return what of its answer cannot be logged."""
        hook = self.post_process
        if hook is None:
            return []
        try:
            returned = hook(results, info)
        except Exception as error:
            text = (
                str(error)
                if isinstance(error, ChatLearnError)
                else f"{type(error).__name__}: {error}"
            )
            raise HookError(
                f"{text}\n  hook: {describe_function(hook)}, set by set_post_process_func\n"
                f"  episode: {info.episode_iteration + 1 or 'none yet'}"
            ) from error
        if returned is None:
            return []
        who = f"the post-process function {describe_function(hook)}"
        if not isinstance(returned, Mapping):
            kind = type(returned).__name__
            return [
                f"{who} returned a {kind}, of which nothing is logged: return a dict of numbers"
            ]
        given = cast("Mapping[Any, Any]", returned)
        self.metrics.update(numbers(given))
        others = [f"{k} ({type(v).__name__})" for k, v in given.items() if not is_number(v)]
        return (
            [f"{who} returned no numbers for, and not logged are: {', '.join(others)}"]
            if others
            else []
        )

    def check(self, *, dry_run: bool = False) -> Program:
        """Trace and validate the flow, its modules and its dataset without setting anything up.

        Args:
            dry_run: as `Engine.check` takes it.
        """
        return compile_program(active(), None, None, self, dry_run=dry_run)

    def stop(self) -> None:
        """Release the modules that `eval()` set up; safe to call twice."""
        if self.stage is not None:
            self.stage.close()
            self.stage = None


def _show_call(
    display: EvaluationProgress, module: str, method: str, _: bool, uids: Sequence[int]
) -> None:
    display.phase(name := f"{module}.{method}", name, uids)


def _by_module(graph: FlowGraph, batches: Mapping[int, list[Batch]]) -> Results:
    """Return `{model_name: [batch, ...]}`; two returned nodes of one module follow each other."""
    results: Results = {}
    for node, parts in batches.items():
        results.setdefault(graph.nodes[node].module.name, []).extend(parts)
    return results


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise DataError(
            f"the name of a dataset is {name!r}, not a text",
            fix='write .set_multiple_datasets({"math": first, "code": second})',
        )
    return name


def _names_of(sources: Sequence[Source]) -> list[str]:
    """Name datasets by their files, else by number; an equal name gets a number behind it."""
    names: list[str] = []
    for number, source in enumerate(sources):
        path = Path(source) if isinstance(source, str | Path) else Path()
        name = (path.stem if path.suffix in FILE_SUFFIXES else path.name) or f"dataset_{number}"
        tries = (f"{name}_{i}" if i > 1 else name for i in range(1, len(sources) + 2))
        names.append(next(candidate for candidate in tries if candidate not in names))
    return names
