# SPDX-License-Identifier: Apache-2.0
"""Several engines, several runs, and what must not leak from one call, run or engine to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chatlearn
from chatlearn import (
    BaseModule,
    ConfigError,
    Engine,
    Environment,
    Evaluator,
    FlowError,
    Trainer,
)
from chatlearn.config import ModuleConfig
from chatlearn.errors import ChatLearnError
from chatlearn.models import GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.testing import tiny_pair

PROMPTS = list("abcdef")


class Weight(BaseModule):
    """One number as its model."""

    shares_weights = True

    def setup(self) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)

    @property
    def value(self) -> float:
        return self.model.weight.item()


class Sampler(Weight):
    shares_weights = True

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        data["weight"] = torch.full((len(data["prompt"]),), self.value)
        return data

    eval_step = forward_step


class Learner(Weight):
    shares_weights = True

    class Config(ModuleConfig):
        lr: float = 1.0

    def train_step(self, data: list[dict[str, Any]]) -> None:
        with torch.no_grad():
            self.model.weight += self.config.lr


def engine_of(learner: Learner, sampler: Sampler, evaluator: Evaluator | None = None) -> Engine:
    env = Environment(lambda batch: sampler.forward_step(batch))
    trainer = Trainer(lambda batch: learner.train_step(batch))
    engine = Engine(env, trainer, evaluator).set_parameter_sync(learner, sampler)
    return engine.set_dataset(PROMPTS)


def test_every_learn_is_a_new_run_with_the_configuration_of_its_time():
    learner, sampler = Learner("learner"), Sampler("sampler")
    values = []
    for lr in (1.0, 0.5):
        chatlearn.init({"runtime": {"num_episode": 2}, "models": {"learner": {"lr": lr}}})
        engine = engine_of(learner, sampler)
        engine.learn()
        values.append(learner.value)
        engine.learn()
        values.append(learner.value)
    assert values == [2.0, 2.0, 1.0, 1.0]


def test_an_engine_does_not_touch_what_another_trained():
    first, second, sampler = Learner("first"), Learner("second"), Sampler("sampler")
    engine_of(first, sampler).learn()  # shares storage while it runs
    trained = first.value
    chatlearn.init({"runtime": {"num_episode": 5, "stream_data_loader_type": "dynamic"}})
    engine_of(second, sampler).learn()  # copies into the sampler
    assert (first.value, second.value, sampler.value) == (trained, 5.0, 5.0)


def test_replicas_in_a_second_run():
    learner, sampler = Learner("learner"), Sampler("sampler")
    engine = engine_of(learner, sampler)
    engine.learn()
    chatlearn.init({"models": {"sampler": {"num_replica": 2, "generation_batch_size": 1}}})
    assert engine.learn().train_iteration == 1


def test_evaluation_after_stop_does_not_measure_untrained_weights():
    learner, sampler = Learner("learner"), Sampler("sampler")
    evaluator = Evaluator(lambda batch: sampler.eval_step(batch)).set_dataset(PROMPTS[:2])
    engine = engine_of(learner, sampler, evaluator)
    engine.learn()
    assert evaluator.eval()["sampler"][0]["weight"].tolist() == [1.0, 1.0]
    engine.stop()
    with pytest.raises(ChatLearnError, match="was stopped"):
        evaluator.eval()
    engine.learn()
    assert evaluator.eval()["sampler"][0]["weight"].tolist() == [1.0, 1.0]


def test_a_new_evaluator_after_stop_says_that_weights_were_released(capsys):
    learner, sampler = Learner("learner"), Sampler("sampler")
    with engine_of(learner, sampler) as engine:
        engine.learn()
    fresh = Evaluator(lambda batch: sampler.eval_step(batch)).set_dataset(PROMPTS[:2])
    capsys.readouterr()
    fresh.eval()
    assert "sampler: measured with the weights that setup() makes" in capsys.readouterr().err
    fresh.stop()
    engine.learn()
    capsys.readouterr()
    assert fresh.eval()["sampler"][0]["weight"].tolist() == [1.0, 1.0]
    assert "setup()" not in capsys.readouterr().err


def test_what_a_module_returned_stays_as_it_was():
    class Reusing(BaseModule):
        def setup(self) -> None:
            self.buffer = torch.zeros(2, dtype=torch.long)

        def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
            self.buffer[:] = data["uid"]
            return {"v": self.buffer}

    seen: list[int] = []

    class Reading(BaseModule):
        def train_step(self, data: list[dict[str, Any]]) -> None:
            seen.extend(data[0]["v"].tolist())

    chatlearn.init({"runtime": {"generation_batch_size": 2}})
    source, sink = Reusing("source"), Reading("sink")
    env = Environment(lambda batch: source.forward_step(batch))
    Engine(env, Trainer(lambda batch: sink.train_step(batch))).set_dataset(PROMPTS).learn()
    assert seen == [0, 1, 2, 3, 4, 5]


def test_any_method_is_a_node():
    calls: list[str] = []

    class Odd(BaseModule):
        def _private(self, data: dict[str, Any]) -> dict[str, Any]:
            calls.append("private")
            return data

        @staticmethod
        def static(data: dict[str, Any], times: int = 1) -> dict[str, Any]:
            calls.append(f"static {times}")
            return data

    odd = Odd("odd")
    Engine(Environment(lambda b: odd.static(odd._private(b), times=3))).set_dataset(["x"]).learn()
    assert calls == ["private", "static 3"]


def test_iteration_belongs_to_the_engine():
    sampler = Sampler("sampler")

    class Counting(BaseModule):
        def forward_step(self, data: dict[str, Any], iteration: int) -> dict[str, Any]:
            return data

    counting = Counting("counting")
    flow = Environment(lambda b: counting.forward_step(sampler.forward_step(b), iteration=7))
    with pytest.raises(FlowError, match="the engine counts iterations"):
        Engine(flow).set_dataset(PROMPTS).learn()


def test_a_refusal_that_the_flow_swallows_is_raised_all_the_same():
    sampler = Sampler("sampler")

    def env_flow(batch):
        out = sampler.forward_step(batch)
        try:
            if out:
                return None
        except Exception:
            pass
        return out

    with pytest.raises(FlowError, match="branch"):
        Engine(Environment(env_flow)).set_dataset(PROMPTS).learn()


def test_a_returned_node_may_give_nothing_if_nobody_reads_it():
    class Quiet(BaseModule):
        calls = 0

        def forward_step(self, data: dict[str, Any]) -> None:
            Quiet.calls += 1

    quiet = Quiet("quiet")
    Engine(Environment(lambda b: quiet.forward_step(b))).set_dataset(PROMPTS).learn()
    assert Quiet.calls == 1


def test_names_may_be_mapped_where_weights_arrive():
    class Renaming(Sampler):
        def load_state_dict(self, state: Any) -> None:
            self.model.load_state_dict({"weight": state["renamed"]})

    class Source(Learner):
        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"renamed": self.model.weight.detach()}

    learner, sampler = Source("learner"), Renaming("sampler")
    engine_of(learner, sampler).learn()
    assert sampler.value == learner.value == 1.0


def test_an_evaluator_alone_leaves_a_run_folder(tmp_path: Path):
    chatlearn.init({"runtime": {"output_dir": tmp_path / "run"}})
    sampler = Sampler("sampler")
    evaluator = Evaluator(lambda b: sampler.eval_step(b)).set_dataset(PROMPTS)
    evaluator.set_post_process_func(lambda results, info: {"found": 3})
    result = Engine(evaluator=evaluator).learn()
    assert result.evaluations == [(0, {"found": 3.0})]
    assert '"eval/found":3.0' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"runtime": {"max_staleness": 2}}, "max_staleness"),
        ({"runtime": {"colocation": [["learner", "nobody"]]}}, "nobody"),
        ({"models": {"sampler": {"trainable": True}}}, "trainable"),
        ({"models": {"learner": {"trainable": False}}}, "trainable"),
        ({"runtime": {"resume": "nowhere/at/all"}}, "no checkpoint"),
        ({"models": {"samplr": {"num_cpu": 2}}}, "sampler"),
    ],
)
def test_configuration_that_would_do_nothing_is_refused(config: dict[str, Any], match: str):
    chatlearn.init(config)
    with pytest.raises(ChatLearnError, match=match):
        engine_of(Learner("learner"), Sampler("sampler")).learn()


def test_placement_that_one_process_ignores_is_noted():
    chatlearn.init({"models": {"sampler": {"num_gpu": 1}}})
    program = engine_of(Learner("learner"), Sampler("sampler")).check()
    assert not program.problems
    assert any("models.sampler.num_gpu: no effect" in note for note in program.notes)


def test_a_typo_is_refused_in_evaluation_too():
    chatlearn.init({"models": {"samplr": {"num_cpu": 2}, "learner": {"lr": 3}}})
    sampler = Sampler("sampler")
    with pytest.raises(ConfigError, match="samplr") as caught:
        Evaluator(lambda b: sampler.eval_step(b)).set_dataset(PROMPTS).eval()
    assert "learner" not in str(caught.value), "a training run's other modules are no mistake here"


@pytest.mark.parametrize("key", ["seed", "num_inference_per_prompt", "data_shuffle"])
def test_a_run_does_not_go_on_with_other_samples(tmp_path: Path, key: str):
    base = {"output_dir": tmp_path / "run", "num_episode": 1}
    chatlearn.init({"runtime": base})
    engine_of(Learner("learner"), Sampler("sampler")).learn()
    changed = {"seed": 5, "num_inference_per_prompt": 2, "data_shuffle": True}[key]
    chatlearn.init({"runtime": {**base, "num_episode": 2, "resume": "auto", key: changed}})
    with pytest.raises(ConfigError, match=key):
        engine_of(Learner("learner"), Sampler("sampler")).learn()


def test_a_failure_leaves_the_episodes_that_are_done(tmp_path: Path):
    class Failing(Sampler):
        def forward_step(self, data: dict[str, Any], iteration: int) -> dict[str, Any]:
            if iteration == 2:
                raise ValueError("broken")
            return data

    runtime = {"output_dir": tmp_path / "run", "num_episode": 5}
    chatlearn.init({"runtime": runtime})
    with pytest.raises(chatlearn.ModuleError, match="broken"):
        engine_of(Learner("learner"), Failing("sampler")).learn()
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert latest == "episode-000002"
    assert (tmp_path / "run" / "report.html").exists()
    chatlearn.init({"runtime": {**runtime, "resume": "auto"}})
    learner = Learner("learner")
    assert engine_of(learner, Sampler("sampler")).learn().train_iteration == 5
    assert learner.value == 5.0


def test_two_calls_of_a_policy_draw_different_numbers():
    chatlearn.init({"runtime": {"num_episode": 1}})
    policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=8)
    other = PolicyInference("other", model=tiny_pair, max_new_tokens=8)
    learner = PolicyTrainer("learner", model=tiny_pair)
    seen: dict[str, list[str]] = {}

    class Keep(BaseModule):
        def first(self, data: dict[str, Any]) -> dict[str, Any]:
            seen["first"] = data["completion"]
            return {"prompt": data["prompt"], "uid": data["uid"]}

        def rest(self, data: dict[str, Any], name: str) -> None:
            seen[name] = data["completion"]

    keep = Keep("keep")

    def env_flow(batch):
        again = policy.forward_step(keep.first(policy.forward_step(batch)))
        keep.rest(again, name="again")
        keep.rest(other.forward_step(batch), name="other")

    assert learner.name == "learner"
    Engine(Environment(env_flow)).set_dataset(PROMPTS).learn()
    assert seen["first"] != seen["again"]
    assert seen["first"] != seen["other"]


def test_groups_of_one_are_warned_of_at_their_line():
    advantage = GroupAdvantage("advantage")
    scored = [{"prompt": prompt, "rewards": 0.0} for prompt in PROMPTS]
    flow = lambda b: advantage.forward_step(b)  # noqa: E731
    engine = Engine(Environment(flow), None, Evaluator(flow)).set_dataset(scored)
    engine.evaluator.set_dataset(scored)
    (warning,) = engine.check().warnings
    assert warning.cause == (
        "advantage compares the samples of a prompt, but every prompt has one sample"
    )
    assert warning.place.startswith(f"{__file__}:{flow.__code__.co_firstlineno} ")
    assert warning.fix == "set runtime.num_inference_per_prompt, e.g. to 8"
    chatlearn.init({"runtime": {"num_inference_per_prompt": 2}})
    assert engine.check().warnings == []  # though evaluations sample each prompt once
    evaluated = Evaluator(flow).set_dataset(scored)
    (warning,) = evaluated.check().warnings
    assert warning.fix == "set runtime.eval_num_inference_per_prompt, e.g. to 8"
