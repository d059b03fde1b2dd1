# SPDX-License-Identifier: Apache-2.0
"""What users of the original fell into, by the numbers of the list; none of it may happen here.

Not here: what concerns its GPUs, Ray and DeepSpeed placement (15, 17), its own options (23), or what another test
of the contract already holds (7, 10, 11, 14, 19, 20, 25).
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from contract_modules import Batch, Learner, Step, generate, train

import chatlearn
from chatlearn import BaseModule, Engine, Environment, EvalEngine, ModuleError, Trainer

PROMPTS = ["p0", "p1", "p2", "p3"]


def collect(flow: Any) -> dict[str, list[Batch]]:
    return EvalEngine(flow).set_dataset(PROMPTS).eval()


GLOBAL = Step("global")


def test_1_ordinary_python_in_flows() -> None:
    m, models = Step("m"), {"m": Step("in_dict")}

    def flow(batch: Any) -> Any:
        """A docstring."""
        print()
        started = time.time()
        n = 3
        if n > 2:
            batch = m.forward_step(data=batch)
        for _ in range(n):
            batch = models["m"].forward_step(m.forward_step(batch))
        assert started
        return m.forward_step(batch)

    assert collect(flow)["m"][0]["prompt"] == PROMPTS
    assert m.sizes == [4] * 5


def test_2_globals_beside_closures() -> None:
    closed_over = Step("closed_over")

    def flow(batch: Any) -> Any:
        return closed_over.forward_step(GLOBAL.forward_step(batch))

    assert collect(flow)["closed_over"][0]["prompt"] == PROMPTS


def test_3_lambdas_and_annotated_assignments() -> None:
    a, b = Step("a"), Step("b")
    assert collect(lambda batch: b.forward_step(a.forward_step(batch))).keys() == {"b"}
    assert a.prompts == PROMPTS

    def annotated(batch: Any) -> Any:
        x: dict[str, Any] = a.forward_step(batch)
        return b.forward_step(x)

    collect(annotated)
    assert a.prompts == PROMPTS * 2


def test_4_a_model_twice_and_an_input_twice() -> None:
    a = Step("a")

    def flow(batch: Any) -> Any:
        once = a.forward_step(batch)
        return a.eval_step(once, once)

    assert collect(flow)["a"][0]["prompt"] == PROMPTS
    assert a.sizes == [4, 4]


def test_5_one_class_for_two_models() -> None:
    chatlearn.init({"runtime": {"num_episode": 4}})
    a, b = Step("a"), Step("b")
    generate(lambda batch: b.forward_step(a.forward_step(batch)), PROMPTS)
    assert a.iterations == b.iterations == [0, 1, 2, 3]


def test_6_a_class_and_its_subclass() -> None:
    class Child(Step):
        def forward_step(self, data: Batch, iteration: int) -> Batch | None:
            return super().forward_step(data, iteration)

    parent, child = Step("parent"), Child("child")
    collect(lambda batch: child.forward_step(parent.forward_step(batch)))
    assert parent.iterations == child.iterations == [0]


def test_8_none_from_a_split_batch() -> None:
    chatlearn.init({"runtime": {"generation_batch_size": 1}})
    silent, last = Step("silent", lambda d: None), Step("last")

    def flow(batch: Any) -> Any:
        silent.forward_step(batch)
        return last.forward_step(batch)

    assert len(collect(flow)["last"]) == 4
    assert silent.sizes == [1] * 4


def test_9_the_batch_keeps_its_position_among_the_arguments() -> None:
    rename = Step("rename", lambda d: {"prompt": ["new"] * len(d["prompt"])})
    last = Step("last")
    collect(lambda batch: last.forward_step(rename.forward_step(batch), batch))
    assert last.prompts == PROMPTS


def test_12_no_shuffling_unless_asked() -> None:
    chatlearn.init({"runtime": {"num_episode": 2}})
    assert train(PROMPTS).trained == [PROMPTS, PROMPTS]


def test_13_the_configuration_of_the_last_init_holds() -> None:
    chatlearn.init({"runtime": {"num_episode": 3}})
    with pytest.raises(Exception, match="frozen"):
        chatlearn.init().runtime.num_episode = 5
    chatlearn.init({"runtime": {"num_episode": 2}})
    assert len(train(PROMPTS).steps) == 2


def test_16_and_18_state_set_in_the_driver_and_init_twice() -> None:
    chatlearn.init()
    chatlearn.init()
    step = Step("step")
    step.secret = 42  # type: ignore[attr-defined]
    step.function = lambda d: {"secret": [step.secret] * len(d["prompt"])}  # type: ignore[attr-defined]
    assert collect(lambda batch: step.forward_step(batch))["step"][0]["secret"] == [42] * 4


def test_21_plain_modules_are_synced_and_22_frozen_parameters_keep_up() -> None:
    chatlearn.init({"runtime": {"num_episode": 2}})

    class Plain(BaseModule):
        def setup(self) -> None:
            self.model = torch.nn.Linear(2, 2)

        def forward_step(self, data: Batch) -> Batch:
            return data

        def train_step(self, data_list: list[Batch], iteration: int) -> None:
            self.model.bias.requires_grad_(False)  # frozen after the first sync
            with torch.no_grad():
                self.model.weight += 1
                self.model.bias += 1

    source, destination = Plain("source"), Plain("destination")
    env = Environment(lambda b: destination.forward_step(b))
    engine = Engine(env, Trainer(lambda b: source.train_step(b)))
    engine.set_parameter_sync(source, destination).set_dataset(PROMPTS).learn()
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, destination.model.state_dict()[name])


def test_24_a_failing_train_step_does_not_pass_unnoticed() -> None:
    class Bad(Learner):
        def train_step(self, data_list: list[Batch], iteration: int) -> None:
            raise ValueError("noticed")

    with pytest.raises(ModuleError, match="noticed"):
        train(PROMPTS, Bad())


def test_26_iterations_go_on_after_resume() -> None:
    for episodes, expected in ((2, [0, 1]), (4, [2, 3])):
        chatlearn.init(
            {"runtime": {"num_episode": episodes, "output_dir": "run", "resume": "auto"}}
        )
        assert train(PROMPTS).iterations == expected
