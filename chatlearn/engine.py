# SPDX-License-Identifier: Apache-2.0
"""`Engine`: three flows, the datasets they run on, and the loop that runs them."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from chatlearn.compilation import compile_program
from chatlearn.config import active
from chatlearn.data.prompts import Source
from chatlearn.errors import EngineError
from chatlearn.executors import Datasets, Environment, Evaluator, Trainer
from chatlearn.flow.symbol import user_place
from chatlearn.inspection import intercept
from chatlearn.module import BaseModule, refuse_running
from chatlearn.program import Program, SyncPair, raise_problems
from chatlearn.result import RunResult

if TYPE_CHECKING:
    from chatlearn.data.replay import ReplaySampler
    from chatlearn.run import Run
    from chatlearn.stage import Results, Stage


class Engine:
    """Run an environment, a trainer and an evaluator flow; each may be left out.

    With an environment and no trainer the engine generates; with a trainer and no environment it trains on the
    dataset itself; with an evaluator alone it evaluates.

    Example:
        >>> engine = Engine(Environment(env_flow), Trainer(trainer_flow), Evaluator(eval_flow).set_dataset(val))
        >>> engine.set_parameter_sync(learner, policy).set_dataset(prompts).learn()
    """

    def __init__(
        self,
        environment: Environment | None = None,
        trainer: Trainer | None = None,
        evaluator: Evaluator | None = None,
        name: str = "engine",
    ) -> None:
        self.name = name
        self._sync_pairs: list[SyncPair] = []
        self._replay_sampler: ReplaySampler | None = None
        self._stage: Stage | None = None
        self.environment = _component(environment, Environment, "set_environment")
        self.trainer = _component(trainer, Trainer, "set_trainer")
        self.evaluator = _component(evaluator, Evaluator, "set_evaluator")

    def learn(self) -> RunResult:
        """Run `runtime.num_episode` episodes; the whole loop stands here.

        Every call is a new run: modules are set up anew, whatever they learned before. An engine with an evaluator
        alone evaluates once.

        Raises:
            ChatLearnError: something is wrong with the flows, the configuration or the data (before any module is
                set up), or a module failed (`ModuleError`; its original exception is the cause).
        """
        intercept(self)
        program = self._checked()
        try:
            with self._run(program) as run:
                run.sync_parameters(first=True)
                if run.evaluates_first:
                    run.evaluate()
                for _ in run.episodes():
                    run.generate_and_train()
                    run.sync_parameters()
                    run.evaluate_if_due()
                    run.save_if_due()
        except BaseException:
            self.stop()
            raise
        return run.result

    def eval(self) -> Results:
        """Evaluate now, with the modules as they are, and return `{model_name: [batch, ...]}`."""
        intercept(self)
        if self.evaluator is None:
            raise EngineError(
                "the engine has no evaluator", fix="write engine.set_evaluator(evaluator)"
            )
        return self.evaluator.eval()

    def check(self, *, dry_run: bool = False) -> Program:
        """Trace and validate everything without setting modules up; see `Program.problems` and `.warnings`.

        Args:
            dry_run: whether to call steps that declare no columns once, on copies of their modules and made-up
                samples, to learn which they read and write; their side effects happen.
        """
        return compile_program(
            active(),
            self.environment,
            self.trainer,
            self.evaluator,
            self._sync_pairs,
            self._replay_sampler,
            dry_run=dry_run,
        )

    def set_dataset(self, dataset: Source) -> Self:
        """Run episodes over `dataset`: a list, a torch or Hugging Face dataset, or a path."""
        return self.set_multiple_datasets([dataset])

    def set_multiple_datasets(self, datasets: Datasets) -> Self:
        """Run episodes over several datasets, a list or a mapping of names, in turn by `runtime.data_ratio`."""
        owner = self.environment or self.trainer
        if owner is None:
            raise EngineError(
                "the engine has neither environment nor trainer to give a dataset to",
                fix="give the evaluator its own: Evaluator(eval_flow).set_dataset(prompts)",
            )
        owner.set_multiple_datasets(datasets)
        return self

    def set_parameter_sync(self, source: BaseModule, destination: BaseModule) -> Self:
        """Carry the weights of `source` to `destination` before the first and after every due episode."""
        for module in (source, destination):
            if not isinstance(module, BaseModule):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise EngineError(
                    f"set_parameter_sync takes two modules, not {module!r}",
                    fix="write engine.set_parameter_sync(trainer, policy), the one that learns first",
                )
        self._sync_pairs.append(SyncPair(source, destination, user_place()))
        return self

    def set_replay_sampler(self, sampler: ReplaySampler) -> Self:
        """Let `sampler(buffers)` choose what is trained on, from the episodes that `runtime.max_replay_episode` keeps.

        It gets one `EpisodeBuffer` per kept episode, oldest first, and returns per-sample dicts; their number and
        order are its decision. Without one, all samples of all kept episodes are trained on, oldest first.
        """
        if not callable(sampler):
            raise EngineError(
                f"set_replay_sampler takes a function of the buffers, not {sampler!r}",
                fix="write def sampler(buffers): ... that returns the samples to train on",
            )
        self._replay_sampler = sampler
        return self

    def set_environment(self, environment: Environment | None) -> Self:
        """Set who samples and scores."""
        self.environment = _component(environment, Environment, "set_environment")
        return self

    def set_trainer(self, trainer: Trainer | None) -> Self:
        """Set who learns."""
        self.trainer = _component(trainer, Trainer, "set_trainer")
        return self

    def set_evaluator(self, evaluator: Evaluator | None) -> Self:
        """Set who is measured."""
        self.evaluator = _component(evaluator, Evaluator, "set_evaluator")
        return self

    def stop(self) -> None:
        """Release the modules; safe to call twice and after a failure."""
        if self.evaluator is not None:
            self.evaluator.was_stopped |= self._stage is not None
            self.evaluator.stop()
        if self._stage is not None:
            self._stage.close()
            self._stage = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()

    def _checked(self) -> Program:
        program = self.check()
        raise_problems(program.problems)
        refuse_running(program.modules)
        return program

    def _run(self, program: Program) -> Run:
        from chatlearn.run import Run  # what runs a program needs torch, what checks it does not
        from chatlearn.stage import Stage

        if self._stage is not None:
            self.stop()
        self._stage = Stage(program.modules, program.config.runtime)
        if self.evaluator is not None:
            self.evaluator.stage, self.evaluator.was_stopped = self._stage, False
        return Run(program, self._stage, self.evaluator)


def _component(value: Any, kind: type[Any], setter: str) -> Any:
    if value is not None and not isinstance(value, kind):
        raise EngineError(
            f"{setter} takes {kind.__name__} or nothing, not {type(value).__name__}",
            fix=f"wrap the flow: {kind.__name__}(flow)",
        )
    return value
