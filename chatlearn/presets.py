# SPDX-License-Identifier: Apache-2.0
"""Engines whose flows are written already: a few lines each over the public API, to use, or to copy and change.

Each takes modules, yours or ours, and pairs its trainers with the modules they teach. Further setters chain as ever:
`GRPOEngine(...).set_evaluator(evaluator).set_dataset(prompts).learn()`.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, Self

from chatlearn.columns import ADVANTAGES
from chatlearn.data.prompts import Source
from chatlearn.engine import Engine
from chatlearn.errors import EngineError
from chatlearn.executors import Datasets, Environment, Evaluator, PostProcess, Trainer
from chatlearn.flow.symbol import placed_at, user_place
from chatlearn.flow.trace import Flow
from chatlearn.models.advantage import GroupAdvantage
from chatlearn.models.policy import PolicyInference
from chatlearn.models.policy_trainer import PolicyTrainer
from chatlearn.models.reference import PolicyReference
from chatlearn.models.reward import FunctionReward
from chatlearn.module import BaseModule
from chatlearn.program import Program

if TYPE_CHECKING:
    from chatlearn.stage import Results

Module = Any
"""A `BaseModule`; that it has the step methods which a flow calls only its own class knows."""


class _Preset(Engine):
    """An engine whose flows stand in this file; to errors and graphs they stand where the user constructs it."""

    def __init__(self, name: str, env_flow: Flow, trainer_flow: Flow) -> None:
        place = user_place()
        environment, trainer = _placed(env_flow, place), _placed(trainer_flow, place)
        super().__init__(Environment(environment), Trainer(trainer), name=name)


def _placed(flow: Flow, place: str) -> Flow:
    @wraps(flow)
    def placed(batch: Any) -> Any:
        with placed_at(place):
            return flow(batch)

    return placed


def _require(preset: str, method: str, **arguments: Module) -> None:
    """Refuse arguments that are no modules with the step `method`, at the user's line."""
    for name, module in arguments.items():
        if not isinstance(module, BaseModule):
            is_class = isinstance(module, type) and BaseModule in module.__mro__
            example = module if is_class else _EXAMPLES.get(name, BaseModule)
            raise EngineError(
                f"{preset}: {name} is {module!r:.80}, not a module",
                place=user_place(),
                fix=f"pass a module with a method {method}, e.g. {example.__name__}({name!r}, ...)",
            )
        if not callable(getattr(module, method, None)):
            raise EngineError(
                f"{preset}: {name} is {module!r}, which has no method {method}",
                place=user_place(),
                fix=f"pass the arguments by name, as {name}=..., should they be in another order; "
                f"or define {method} on {type(module).__name__}",
            )


def _require_advantages(preset: str, trainer: Module, *makers: Module, fix: str) -> None:
    """Refuse a trainer that needs advantages behind modules that are all known not to make them."""
    declared = [maker.writes for maker in makers]
    nobody = all(writes is not None and ADVANTAGES not in writes for writes in declared)
    if isinstance(trainer, PolicyTrainer) and nobody:
        raise EngineError(
            f"{preset}: {trainer!r} reads the column {ADVANTAGES!r}, which no module of this engine makes",
            place=user_place(),
            fix=fix,
        )


_EXAMPLES: dict[str, type[BaseModule]] = {
    "policy": PolicyInference,
    "reference": PolicyReference,
    "reward": FunctionReward,
    "advantage": GroupAdvantage,
    "policy_trainer": PolicyTrainer,
}


class RLHFEngine(_Preset):
    """PPO: a policy samples; reference, value and reward score; a policy and a value trainer learn.

    Example:
        >>> RLHFEngine(policy, reference, reward, value, ppo_policy, ppo_value).set_dataset(prompts).learn()
    """

    def __init__(
        self,
        policy: Module,
        reference: Module,
        reward: Module,
        value: Module,
        policy_trainer: Module,
        value_trainer: Module,
    ) -> None:
        scorers = {"reference": reference, "reward": reward, "value": value}
        _require("RLHFEngine", "forward_step", policy=policy, **scorers)
        trainers = {"policy_trainer": policy_trainer, "value_trainer": value_trainer}
        _require("RLHFEngine", "train_step", **trainers)
        _require_advantages(
            "RLHFEngine",
            policy_trainer,
            policy,
            *scorers.values(),
            fix="have the value or reward module make them of `rewards` and `values`, and declare it in its `writes`",
        )

        def env_flow(batch: Any) -> Any:
            policy_out = policy.forward_step(batch)
            ref_out = reference.forward_step(policy_out)
            value_out = value.forward_step(policy_out)
            return reward.forward_step(policy_out, ref_out, value_out)

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)
            value_trainer.train_step(batch)

        super().__init__("rlhf", env_flow, trainer_flow)
        self.set_parameter_sync(policy_trainer, policy).set_parameter_sync(value_trainer, value)


class GRPOEngine(_Preset):
    """GRPO: a policy samples groups, a reference and a reward score them, a trainer learns.

    Args:
        policy: samples.
        reference: adds `ref_logprobs`.
        reward: adds `rewards`.
        policy_trainer: learns, and teaches `policy`.
        advantage: makes `advantages` of the rewards of a group. None puts a `GroupAdvantage` before a `PolicyTrainer`,
            which reads that column, and nothing before a trainer of another class, which may make its own.

    Example:
        >>> GRPOEngine(policy, reference, reward, learner).set_dataset(prompts).learn()
    """

    def __init__(
        self,
        policy: Module,
        reference: Module,
        reward: Module,
        policy_trainer: Module,
        advantage: Module | None = None,
    ) -> None:
        if advantage is None and isinstance(policy_trainer, PolicyTrainer):
            advantage = GroupAdvantage("advantage")
        scorers = {"policy": policy, "reference": reference, "reward": reward}
        if advantage is not None:
            scorers["advantage"] = advantage
        _require("GRPOEngine", "forward_step", **scorers)
        _require("GRPOEngine", "train_step", policy_trainer=policy_trainer)

        def env_flow(batch: Any) -> Any:
            policy_out = policy.forward_step(batch)
            ref_out = reference.forward_step(policy_out)
            scored = reward.forward_step(policy_out, ref_out)
            return scored if advantage is None else advantage.forward_step(scored)

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)

        super().__init__("grpo", env_flow, trainer_flow)
        self.set_parameter_sync(policy_trainer, policy)


class OnlineDPOEngine(_Preset):
    """Online DPO: a policy samples, a reference and a reward compare the samples of a prompt, a trainer learns.

    Example:
        >>> OnlineDPOEngine(policy, reference, reward, dpo_trainer).set_dataset(prompts).learn()
    """

    def __init__(
        self, policy: Module, reference: Module, reward: Module, policy_trainer: Module
    ) -> None:
        scorers = {"policy": policy, "reference": reference, "reward": reward}
        _require("OnlineDPOEngine", "forward_step", **scorers)
        _require("OnlineDPOEngine", "train_step", policy_trainer=policy_trainer)
        _require_advantages(
            "OnlineDPOEngine",
            policy_trainer,
            *scorers.values(),
            fix="pass a trainer of your own that compares the samples of a prompt; or use GRPOEngine",
        )

        def env_flow(batch: Any) -> Any:
            policy_out = policy.forward_step(batch)
            ref_out = reference.forward_step(policy_out)
            return reward.forward_step(policy_out, ref_out)

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)

        super().__init__("online_dpo", env_flow, trainer_flow)
        self.set_parameter_sync(policy_trainer, policy)


class DPOEngine(_Preset):
    """DPO: a reference scores pairs of the dataset, a trainer learns from them; nobody samples.

    Example:
        >>> DPOEngine(reference, dpo_trainer).set_dataset(pairs).learn()
    """

    def __init__(self, reference: Module, policy_trainer: Module) -> None:
        _require("DPOEngine", "forward_step", reference=reference)
        _require("DPOEngine", "train_step", policy_trainer=policy_trainer)

        def env_flow(batch: Any) -> Any:
            return reference.forward_step(batch)

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)

        super().__init__("dpo", env_flow, trainer_flow)


class EvalEngine:
    """Evaluate without training.

    Example:
        >>> EvalEngine(eval_flow).set_dataset(prompts).eval()
    """

    def __init__(self, flow: Flow | None = None, evaluator: Evaluator | None = None) -> None:
        if isinstance(flow, Evaluator):
            flow, evaluator = None, flow
        if (flow is None) == (evaluator is None):
            raise EngineError(
                "EvalEngine takes either an evaluation flow or an Evaluator",
                place=user_place(),
                fix="write EvalEngine(eval_flow), or EvalEngine(evaluator=evaluator)",
            )
        if not callable(flow) and not isinstance(evaluator, Evaluator):
            raise EngineError(
                f"EvalEngine: {evaluator or flow!r:.80} is neither a flow nor an Evaluator",
                place=user_place(),
                fix="pass a function of one batch: def eval_flow(batch): return policy.eval_step(batch)",
            )
        self.evaluator = evaluator or Evaluator(flow)  # pyright: ignore[reportArgumentType]

    def set_dataset(self, dataset: Source) -> Self:
        """Evaluate on `dataset`."""
        self.evaluator.set_dataset(dataset)
        return self

    def set_multiple_datasets(self, datasets: Datasets) -> Self:
        """Evaluate on several datasets, a list or a mapping of names, one after the other."""
        self.evaluator.set_multiple_datasets(datasets)
        return self

    def set_post_process_func(self, function: PostProcess) -> Self:
        """Call `function(results, info)` after every evaluation."""
        self.evaluator.set_post_process_func(function)
        return self

    @property
    def metrics(self) -> dict[str, float]:
        """What the last evaluation measured."""
        return self.evaluator.metrics

    def eval(self) -> Results:
        """Evaluate now and return `{model_name: [batch, ...]}`."""
        return self.evaluator.eval()

    def check(self, *, dry_run: bool = False) -> Program:
        """Trace and validate everything without setting modules up; `dry_run` as `Engine.check` takes it."""
        return self.evaluator.check(dry_run=dry_run)

    def stop(self) -> None:
        """Release the modules; safe to call twice."""
        self.evaluator.stop()
