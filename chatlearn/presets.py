# SPDX-License-Identifier: Apache-2.0
"""Engines whose flows are written already: a few lines each over the public API, to use, or to copy and change.

Each takes modules, yours or ours, and pairs its trainers with the modules they teach. Further setters chain as ever:
`GRPOEngine(...).set_evaluator(evaluator).set_dataset(prompts).learn()`.
"""

from __future__ import annotations

from typing import Any, Self

from chatlearn.data.prompts import Source
from chatlearn.engine import Engine
from chatlearn.errors import EngineError
from chatlearn.executors import Datasets, Environment, Evaluator, PostProcess, Trainer
from chatlearn.flow.trace import Flow
from chatlearn.models.advantage import GroupAdvantage
from chatlearn.models.policy_trainer import PolicyTrainer
from chatlearn.program import Program
from chatlearn.stage import Results

Module = Any
"""A `BaseModule`; that it has the step methods which a flow calls only its own class knows."""


class RLHFEngine(Engine):
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
        def env_flow(batch: Any) -> Any:
            policy_out = policy.forward_step(batch)
            ref_out = reference.forward_step(policy_out)
            value_out = value.forward_step(policy_out)
            return reward.forward_step(policy_out, ref_out, value_out)

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)
            value_trainer.train_step(batch)

        super().__init__(Environment(env_flow), Trainer(trainer_flow), name="rlhf")
        self.set_parameter_sync(policy_trainer, policy).set_parameter_sync(value_trainer, value)


class GRPOEngine(Engine):
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

        def env_flow(batch: Any) -> Any:
            policy_out = policy.forward_step(batch)
            ref_out = reference.forward_step(policy_out)
            scored = reward.forward_step(policy_out, ref_out)
            return scored if advantage is None else advantage.forward_step(scored)

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)

        super().__init__(Environment(env_flow), Trainer(trainer_flow), name="grpo")
        self.set_parameter_sync(policy_trainer, policy)


class OnlineDPOEngine(Engine):
    """Online DPO: a policy samples, a reference and a reward compare the samples of a prompt, a trainer learns.

    Example:
        >>> OnlineDPOEngine(policy, reference, reward, dpo_trainer).set_dataset(prompts).learn()
    """

    def __init__(
        self, policy: Module, reference: Module, reward: Module, policy_trainer: Module
    ) -> None:
        def env_flow(batch: Any) -> Any:
            policy_out = policy.forward_step(batch)
            ref_out = reference.forward_step(policy_out)
            return reward.forward_step(policy_out, ref_out)

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)

        super().__init__(Environment(env_flow), Trainer(trainer_flow), name="online_dpo")
        self.set_parameter_sync(policy_trainer, policy)


class DPOEngine(Engine):
    """DPO: a reference scores pairs of the dataset, a trainer learns from them; nobody samples.

    Example:
        >>> DPOEngine(reference, dpo_trainer).set_dataset(pairs).learn()
    """

    def __init__(self, reference: Module, policy_trainer: Module) -> None:
        def env_flow(batch: Any) -> Any:
            return reference.forward_step(batch)

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)

        super().__init__(Environment(env_flow), Trainer(trainer_flow), name="dpo")


class EvalEngine:
    """Evaluate without training.

    Example:
        >>> EvalEngine(eval_flow).set_dataset(prompts).eval()
    """

    def __init__(self, flow: Flow | None = None, evaluator: Evaluator | None = None) -> None:
        if isinstance(flow, Evaluator):
            flow, evaluator = None, flow
        if (flow is None) == (evaluator is None):
            raise EngineError("EvalEngine takes an evaluation flow, or an Evaluator")
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

    def check(self) -> Program:
        """Trace and validate everything without setting modules up."""
        return self.evaluator.check()

    def stop(self) -> None:
        """Release the modules; safe to call twice."""
        self.evaluator.stop()
