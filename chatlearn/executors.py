# SPDX-License-Identifier: Apache-2.0
"""`Environment`, `Trainer`, `Evaluator`: a flow each, with the datasets it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from chatlearn.compilation import compile_program
from chatlearn.config import active
from chatlearn.data.prompts import Rows, Source, load_prompts
from chatlearn.errors import DataError, EngineError
from chatlearn.flow.batching import numbers
from chatlearn.flow.graph import FlowGraph
from chatlearn.flow.trace import Flow, trace
from chatlearn.inspection import intercept
from chatlearn.observability.metrics import EpisodeMetrics
from chatlearn.program import Program, raise_problems
from chatlearn.runtime.local import CallReport, Observer, Starting
from chatlearn.stage import Results, Stage

PostProcess = Callable[[Results, "EvalInfo"], Any]


class Executor:
    """A flow function and the datasets it runs on."""

    flow_name: ClassVar[str] = "flow"

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.sources: list[Source] = []
        self._rows: list[Rows] | None = None

    def set_dataset(self, dataset: Source) -> Self:
        """Run on `dataset`: a list, a torch or Hugging Face dataset, or a path (see `data.prompts`)."""
        return self.set_multiple_datasets([dataset])

    def set_multiple_datasets(self, datasets: Sequence[Source]) -> Self:
        """Run on several datasets; training takes them in turn by `runtime.data_ratio`."""
        if isinstance(datasets, str | Path) or not list(datasets):
            raise DataError(
                "set_multiple_datasets takes a non-empty list of datasets",
                fix="write .set_multiple_datasets([first, second])",
            )
        self.sources, self._rows = list(datasets), None
        return self

    def trace(self) -> FlowGraph:
        """Run the flow function once on a symbolic batch and return its graph."""
        return trace(self.flow, self.flow_name)

    def rows(self) -> list[Rows]:
        """Load and validate the datasets; an empty one is refused."""
        if self._rows is None:
            what = f"the dataset of {self.flow_name}"
            self._rows = [load_prompts(source, what=what) for source in self.sources]
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

    @classmethod
    def of(cls, episode_iteration: int, train_iteration: int) -> EvalInfo:
        """Make the info of one evaluation."""
        return cls(episode_iteration=episode_iteration, train_iteration=train_iteration)

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Evaluator(Executor):
    """Who is measured: runs `eval_flow` over whole datasets, each sample exactly once, in order.

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

    def set_post_process_func(self, function: PostProcess) -> Self:
        """Call `function(results, info)` after every evaluation; numbers in a dict it returns are logged."""
        if not callable(function):
            raise EngineError(f"set_post_process_func takes a function, not {function!r}")
        self.post_process = function
        return self

    def eval(self) -> Results:
        """Evaluate now and return `{model_name: [batch, ...]}` for the returned nodes.

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
        if self.stage is None:
            stage = Stage(program.modules, program.config.runtime)
            stage.set_up()
            self.stage = stage
        return self.run(self.stage, program.graphs[self.flow_name], EvalInfo.of(-1, 0))

    def run(
        self,
        stage: Stage,
        graph: FlowGraph,
        info: EvalInfo,
        *,
        starting: Starting | None = None,
        observer: Observer | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Results:
        """Evaluate on a stage whose modules are set up; leaves what was measured in `metrics`."""
        measured = EpisodeMetrics()

        def observe(call: CallReport) -> None:
            measured.add(call.module, call.method, call.metrics, call.samples)
            if observer is not None:
                observer(call)

        results = stage.evaluate(
            graph,
            self.rows(),
            episode=info.episode_iteration + 1,
            starting=starting,
            observer=observe,
            interrupted=interrupted,
        )
        self.metrics = measured.summary()
        if self.post_process is not None:
            returned = self.post_process(results, info)
            if isinstance(returned, Mapping):
                self.metrics.update(numbers(cast("Mapping[Any, Any]", returned)))
        return results

    def check(self) -> Program:
        """Trace and validate the flow, its modules and its dataset without setting anything up."""
        return compile_program(active(), None, None, self)

    def stop(self) -> None:
        """Release the modules that `eval()` set up; safe to call twice."""
        if self.stage is not None:
            self.stage.close()
            self.stage = None
