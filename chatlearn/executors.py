# SPDX-License-Identifier: Apache-2.0
"""`Environment`, `Trainer`, `Evaluator`: a flow each, with the datasets it runs on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from chatlearn.compilation import compile_program
from chatlearn.config import active
from chatlearn.data.prompts import FILE_SUFFIXES, Rows, Source, load_prompts
from chatlearn.errors import DataError, EngineError
from chatlearn.flow.graph import FlowGraph
from chatlearn.flow.trace import Flow, trace
from chatlearn.inspection import intercept
from chatlearn.program import Program, raise_problems
from chatlearn.result import EvalInfo

if TYPE_CHECKING:
    from chatlearn.stage import Results, Stage

Datasets = Sequence[Source] | Mapping[str, Source]
PostProcess = Callable[["Results", EvalInfo], Any]


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
        self.said: set[str] = set()
        """Warnings and notes that were shown: once is enough."""

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
        from chatlearn.evaluating import evaluate_alone  # what is only checked needs no torch

        return evaluate_alone(self, program)

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
