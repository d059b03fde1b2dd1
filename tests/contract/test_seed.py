# SPDX-License-Identifier: Apache-2.0
"""The four code blocks of the seed document, verbatim, with small modules of a user's own and no configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatlearn import BaseModule

CUSTOM_FLOW = """
policy = PolicyInference("policy")
value = ValueInference("value")
reference = PolicyReference("reference")
reward = RewardInference("reward")
def env_flow(batch):
    policy_out = policy.forward_step(batch)
    ref_out = reference.forward_step(policy_out)
    value_out = value.forward_step(policy_out)
    reward_out = reward.forward_step(policy_out, ref_out, value_out)
    return reward_out
"""

CUSTOM_ENGINE = """
from chatlearn import Engine, Environment, Trainer
from chatlearn import BaseModule
class CustomEngine(Engine):
    def __init__(self,
                 reference: BaseModule,
                 policy_trainer: BaseModule):
        def env_flow(batch):
            ref_out = reference.forward_step(batch)
            return ref_out
        def trainer_flow(batch):
            policy_trainer.train_step(batch)
        env = Environment(env_flow)
        trainer = Trainer(trainer_flow)
        super().__init__(env, trainer)
"""

CUSTOM_ENGINE_CALL = """
reference = PolicyReference("reference")
ppo_policy = PolicyTrainer("policy_trainer")
engine = CustomEngine(reference, ppo_policy) \\
         .set_dataset(train_prompts)
engine.learn()
"""

CUSTOM_ENGINE_EVALUATED = """
reference = PolicyReference("reference")
ppo_policy = PolicyTrainer("policy_trainer")
def eval_flow(batch):
    r0 = reference.eval_step(batch)
    return r0
evaluator = Evaluator(eval_flow).set_dataset(val_prompts)
engine = CustomEngine(reference, ppo_policy) \\
         .set_evaluator(evaluator) \\
         .set_dataset(train_prompts)
engine.learn()
"""

ENGINE_DIRECTLY = """
policy = PolicyInference("policy")
value = ValueInference("value")
reference = PolicyReference("reference")
reward = RewardInference("reward")
ppo_policy = PolicyTrainer("ppo_policy")
ppo_value = ValueTrainer("ppo_value")
def env_flow(batch):
    policy_out = policy.forward_step(batch)
    ref_out = reference.forward_step(policy_out)
    value_out = value.forward_step(policy_out)
    reward_out = reward.forward_step(policy_out, ref_out, value_out)
    return reward_out
def trainer_flow(batch):
    ppo_policy.train_step(batch)
    ppo_value.train_step(batch)
def eval_flow(batch):
    r0 = policy.eval_step(batch)
    r1 = reward.eval_step(r0)
    return r1
env = Environment(env_flow)
trainer = Trainer(trainer_flow)
evaluator = Evaluator(eval_flow).set_dataset(val_prompts)
engine = Engine(env, trainer, evaluator) \\
         .set_parameter_sync(ppo_policy, policy) \\
         .set_parameter_sync(ppo_value, value) \\
         .set_dataset(train_prompts)
engine.learn()
"""


class Recording(BaseModule):
    """Counts what the engine calls, and adds a column named like itself."""

    def setup(self) -> None:
        self.model = torch.nn.Linear(2, 2)
        self.calls: list[tuple[str, int]] = []

    def _step(self, method: str, data: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((method, len(data["prompt"])))
        data[self.name] = [f"{self.name}({prompt})" for prompt in data["prompt"]]
        return data

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return self._step("forward_step", data)

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return self._step("eval_step", data)


class Training(Recording):
    def train_step(self, data_list: list[dict[str, Any]], iteration: int) -> None:
        self.columns = set(data_list[0])
        self.calls.append(("train_step", sum(len(data["prompt"]) for data in data_list)))
        with torch.no_grad():
            self.model.weight.add_(1.0)


@pytest.fixture
def names() -> dict[str, Any]:
    inference = ("PolicyInference", "ValueInference", "PolicyReference", "RewardInference")
    scope: dict[str, Any] = {name: type(name, (Recording,), {}) for name in inference}
    scope |= {name: type(name, (Training,), {}) for name in ("PolicyTrainer", "ValueTrainer")}
    prompts = {"train_prompts": [f"t{i}" for i in range(10)], "val_prompts": ["v0", "v1", "v2"]}
    return {**scope, **prompts}


def run(scope: dict[str, Any], *blocks: str) -> dict[str, Any]:
    for block in blocks:
        exec(compile(block, "<seed>", "exec"), scope)
    return scope


IMPORTS = "from chatlearn import Engine, Environment, Trainer, Evaluator\n"


def test_custom_flow(names: dict[str, Any]) -> None:
    scope = run(names, CUSTOM_FLOW)
    run(
        scope, IMPORTS + "result = Engine(Environment(env_flow)).set_dataset(train_prompts).learn()"
    )
    assert scope["result"].episodes == 1
    assert scope["reward"].calls == [("forward_step", 10)]


def test_custom_engine(names: dict[str, Any]) -> None:
    scope = run(names, CUSTOM_ENGINE, CUSTOM_ENGINE_CALL)
    assert scope["reference"].calls == [("forward_step", 10)]
    assert scope["ppo_policy"].calls == [("train_step", 10)]
    assert {"prompt", "reference"} <= scope["ppo_policy"].columns


def test_custom_engine_with_evaluator(names: dict[str, Any]) -> None:
    scope = run(names, CUSTOM_ENGINE, "from chatlearn import Evaluator", CUSTOM_ENGINE_EVALUATED)
    assert scope["reference"].calls == [("forward_step", 10), ("eval_step", 3)]
    results = scope["evaluator"].eval()
    assert [row for batch in results["reference"] for row in batch["prompt"]] == ["v0", "v1", "v2"]


def test_engine_directly(names: dict[str, Any]) -> None:
    scope = run(names, IMPORTS, ENGINE_DIRECTLY)
    assert scope["reward"].calls == [("forward_step", 10), ("eval_step", 3)]
    assert {"policy", "value", "reference", "reward"} <= scope["ppo_policy"].columns
    assert scope["ppo_policy"].calls == scope["ppo_value"].calls == [("train_step", 10)]
    for source, destination in (("ppo_policy", "policy"), ("ppo_value", "value")):
        assert torch.equal(scope[source].model.weight, scope[destination].model.weight)
