# SPDX-License-Identifier: Apache-2.0
"""The engine's contract, training to errors, sentence by sentence, through the public API alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_modules import Batch, Learner, Step, generate, plain, train

import chatlearn
from chatlearn import (
    BaseModule,
    ChatLearnError,
    Engine,
    Environment,
    EvalEngine,
    Evaluator,
    ModuleError,
    Trainer,
)

PROMPTS = [f"p{i}" for i in range(8)]


def runtime(**values: Any) -> None:
    chatlearn.init({"runtime": values})


# ---- training -------------------------------------------------------------------------------------


def test_a_rest_is_filled_from_the_episodes_first_samples() -> None:
    runtime(train_global_batch_size=3, train_micro_batch_size=2)
    assert train(PROMPTS).steps == [
        [["p0", "p1"], ["p2"]],
        [["p3", "p4"], ["p5"]],
        [["p6", "p7"], ["p0"]],
    ]


@pytest.mark.parametrize(("what", "last"), [("drop_last", []), ("keep", [["p6", "p7"]])])
def test_a_rest_is_dropped_or_kept_as_configured(what: str, last: list[list[str]]) -> None:
    runtime(train_global_batch_size=3, incomplete_step=what)
    assert train(PROMPTS).trained == [["p0", "p1", "p2"], ["p3", "p4", "p5"], *last]


def test_later_passes_are_shuffled_by_seed() -> None:
    def passes() -> list[list[str]]:
        runtime(num_training_epoch=3, num_episode=2)
        return train(PROMPTS).trained

    first = passes()
    assert first[0] == first[3] == PROMPTS
    assert all(sorted(p) == PROMPTS for p in first)
    assert first[1] != PROMPTS
    assert len({tuple(p) for p in (first[1], first[2], first[4], first[5])}) == 4
    assert passes() == first


def test_several_trainers_see_the_same_steps() -> None:
    runtime(train_global_batch_size=3, num_training_epoch=2)
    a, b, echo = Learner("a"), Learner("b"), Step("echo")

    def flow(batch: Any) -> None:
        a.train_step(batch)
        b.train_step(batch)

    env = Environment(lambda x: echo.forward_step(x))
    result = Engine(env, Trainer(flow)).set_dataset(PROMPTS).learn()
    assert a.steps == b.steps
    assert a.iterations == b.iterations == list(range(6))
    assert result.train_iteration == 6


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
@pytest.mark.parametrize(("samples", "micro", "call"), [(16, 5, 4), (8, 2, 3), (9, 4, 1)])
def test_loaders_deliver_every_sample_once(kind: str, samples: int, micro: int, call: int) -> None:
    runtime(
        stream_data_loader_type=kind,
        train_global_batch_size=micro,
        generation_batch_size=call,
        incomplete_step="keep",
    )
    prompts = [f"p{i}" for i in range(samples)]
    assert [p for step in train(prompts).trained for p in step] == prompts


def test_when_loaders_hand_out_data() -> None:
    def order(kind: str) -> str:
        runtime(stream_data_loader_type=kind, train_global_batch_size=4, generation_batch_size=4)
        events: list[str] = []

        class Noting(Learner):
            def train_step(self, data_list: list[Batch], iteration: int) -> None:
                events.append("T")

        train(PROMPTS, Noting(), echo=Step("echo", lambda d: events.append("g") or d))
        return "".join(events)

    assert order("fixed") == "ggTT"
    assert order("dynamic") == "gTgT"


# ---- parameter sync -------------------------------------------------------------------------------


class Weights(BaseModule):
    """A model of one number; as a trainer it adds one per step."""

    def setup(self) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.seen: list[float] = []
        with torch.no_grad():
            self.model.weight.fill_(float(self.name == "source"))

    @property
    def value(self) -> float:
        return float(self.model.weight.detach())

    def forward_step(self, data: Batch) -> Batch:
        self.seen.append(self.value)
        return {**data, "value": [self.value] * len(data["prompt"])}

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        with torch.no_grad():
            self.model.weight.add_(1.0)


def synced(**models: Any) -> tuple[Weights, Weights, Engine]:
    source, destination = Weights("source"), Weights("destination")
    env = Environment(lambda b: destination.forward_step(b))
    engine = Engine(env, Trainer(lambda b: source.train_step(b)))
    return source, destination, engine.set_parameter_sync(source, destination).set_dataset(PROMPTS)


def test_sync_before_the_first_and_after_every_episode() -> None:
    runtime(num_episode=3)
    source, destination, engine = synced()
    engine.learn()
    assert destination.seen == [1.0, 2.0, 3.0]
    assert source.value == destination.value == 4.0


def test_sync_frequency_of_the_destination() -> None:
    chatlearn.init(
        {"runtime": {"num_episode": 5}, "models": {"destination": {"sync_frequency": 2}}}
    )
    _, destination, engine = synced()
    engine.learn()
    assert destination.seen == [1.0, 1.0, 3.0, 3.0, 5.0]


def test_every_replica_is_synced() -> None:
    chatlearn.init(
        {
            "runtime": {"num_episode": 2, "generation_batch_size": 2},
            "models": {"destination": {"num_replica": 3}},
        }
    )
    values: list[set[float]] = []

    class Collecting(Weights):
        def train_step(self, data_list: list[Batch], iteration: int) -> None:
            values.append({v for data in data_list for v in data["value"]})
            super().train_step(data_list, iteration)

    source, destination = Collecting("source"), Weights("destination")
    env = Environment(lambda b: destination.forward_step(b))
    engine = Engine(env, Trainer(lambda b: source.train_step(b)))
    engine.set_parameter_sync(source, destination).set_dataset(PROMPTS).learn()
    assert values == [{1.0}, {2.0}]


def test_modules_in_no_pair_keep_their_weights() -> None:
    runtime(num_episode=2)
    _, destination, engine = synced()
    other = Weights("other")
    engine.set_environment(
        Environment(lambda b: other.forward_step(destination.forward_step(b)))
    ).set_dataset(PROMPTS)
    engine.learn()
    assert other.seen == [0.0, 0.0]


def test_evaluation_sees_the_synced_weights() -> None:
    runtime(num_episode=2, enable_eval_before_training=True)
    _, destination, engine = synced()
    seen: list[float] = []
    evaluator = Evaluator(lambda b: destination.forward_step(b)).set_dataset(["e"])
    evaluator.set_post_process_func(lambda results, info: seen.append(destination.value))
    engine.set_evaluator(evaluator).learn()
    assert seen == [1.0, 2.0, 3.0]


def test_overridden_state_dicts_with_plain_values() -> None:
    class Plain(Step):
        value = 0

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: Any) -> None:
            self.value = state["value"]

        def train_step(self, data_list: Any, iteration: int) -> None:
            self.value += 1

    source, destination = Plain("source"), Plain("destination")
    env = Environment(lambda b: destination.forward_step(b))
    engine = Engine(env, Trainer(lambda b: source.train_step(b)))
    engine.set_parameter_sync(source, destination).set_dataset(PROMPTS).learn()
    assert destination.value == 1


def test_a_sync_without_parameters_on_one_side_is_an_error() -> None:
    source, destination = Learner("source"), Weights("destination")
    env = Environment(lambda b: destination.forward_step(b))
    engine = Engine(env, Trainer(lambda b: source.train_step(b)))
    with pytest.raises(ChatLearnError, match="no parameters"):
        engine.set_parameter_sync(source, destination).set_dataset(PROMPTS).learn()


# ---- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "call", "replicas"), [(14, 4, 3), (7, 3, 1), (5, 8, 2)])
def test_the_whole_set_exactly_once_in_order(samples: int, call: int, replicas: int) -> None:
    chatlearn.init(
        {"runtime": {"generation_batch_size": call}, "models": {"a": {"num_replica": replicas}}}
    )
    a, prompts = Step("a"), [f"p{i}" for i in range(samples)]
    evaluator = Evaluator(lambda b: a.eval_step(b)).set_dataset(prompts)
    batches = evaluator.eval()["a"]
    assert [p for batch in batches for p in batch["prompt"]] == prompts
    assert [len(b["prompt"]) for b in batches[:-1]] == [call] * (len(batches) - 1)


def test_evaluation_leaves_training_data_alone() -> None:
    runtime(num_episode=2, sample_per_episode=3)
    learner, echo, judge = Learner(), Step("echo"), Step("judge")
    engine = Engine(
        Environment(lambda b: echo.forward_step(b)),
        Trainer(lambda b: learner.train_step(b)),
        Evaluator(lambda b: judge.eval_step(b)).set_dataset(["e0", "e1"]),
    ).set_dataset(PROMPTS)
    engine.learn()
    assert learner.trained == [["p0", "p1", "p2"], ["p3", "p4", "p5"]]
    assert judge.prompts == ["e0", "e1"] * 2  # a module of no other flow, every episode


def test_several_evaluation_datasets() -> None:
    step = Step("step")
    engine = EvalEngine(lambda b: step.forward_step(b)).set_multiple_datasets([["a"], ["b", "c"]])
    assert [p for batch in engine.eval()["step"] for p in batch["prompt"]] == ["a", "b", "c"]


def test_post_process_and_its_numbers() -> None:
    runtime(num_episode=4, eval_episode_interval=2, train_global_batch_size=4)
    infos: list[tuple[int, int]] = []
    learner, echo = Learner(), Step("echo")

    def process(results: Any, info: Any) -> dict[str, Any]:
        assert results.keys() == {"echo"}
        infos.append((info["episode_iteration"], info.train_iteration))
        return {"accuracy": torch.tensor(0.5), "count": len(results["echo"]), "text": "ignored"}

    evaluator = Evaluator(lambda b: echo.eval_step(b)).set_dataset(["e"])
    engine = Engine(
        Environment(lambda b: echo.forward_step(b)),
        Trainer(lambda b: learner.train_step(b)),
        evaluator.set_post_process_func(process),
    )
    result = engine.set_dataset(PROMPTS).learn()
    assert infos == [(1, 4), (3, 8)]
    assert [episode for episode, _ in result.evaluations] == [2, 4]
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["episode"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    assert evaluated == {2: 0.5, 4: 0.5}


def test_evaluation_lines_name_their_episode(capsys: pytest.CaptureFixture[str]) -> None:
    runtime(num_episode=1, enable_eval_before_training=True)
    echo = Step("echo")
    evaluator = Evaluator(lambda b: echo.eval_step(b)).set_dataset(["e"])
    env = Environment(lambda b: echo.forward_step(b))
    Engine(env, None, evaluator).set_dataset(PROMPTS).learn()
    lines = [line for line in capsys.readouterr().out.splitlines() if "evaluation" in line]
    assert "before training" in lines[0]
    assert "after episode 1" in lines[1]


def test_an_evaluator_may_come_later() -> None:
    step, other = Step("step"), Step("other")
    engine = Engine(Environment(lambda b: step.forward_step(b))).set_dataset(PROMPTS)
    engine.learn()
    engine.set_evaluator(Evaluator(lambda b: other.eval_step(step.eval_step(b))).set_dataset(["e"]))
    assert engine.eval()["other"][0]["prompt"] == ["e"]
    engine.stop()


# ---- checkpoints ----------------------------------------------------------------------------------


class Drifting(BaseModule):
    """A trainer whose every state matters: weights, optimiser, random numbers, iterations, data order."""

    def __init__(self, name: str, log: list[Any]) -> None:
        super().__init__(name)
        self.log_ = log

    def setup(self) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Linear(3, 1)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.loaded: list[int] = []

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        self.optimiser.zero_grad()
        noise = torch.randn(4, 3) * random.random()
        loss = (self.model(noise) ** 2).mean() + len(data_list[0]["prompt"][0])
        loss.backward()
        self.optimiser.step()
        prompts = [p for data in data_list for p in data["prompt"]]
        self.log_.append((iteration, prompts, self.model.weight.flatten().tolist()))

    def training_state(self) -> dict[str, Any]:
        return self.optimiser.state_dict()

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state)

    def load_checkpoint(self, iteration: int) -> None:
        self.loaded.append(iteration)


class Counting(BaseModule):
    """An environment module with a state of its own."""

    count = 0

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        self.count += len(data["prompt"])
        prompts = [f"{p}/{iteration}/{self.count}/{torch.rand(1).item()}" for p in data["prompt"]]
        return {**data, "prompt": prompts}

    def training_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def drift(log: list[Any], folder: Path, episodes: int, **more: Any) -> Any:
    runtime(
        num_episode=episodes,
        output_dir=str(folder),
        sample_per_episode=6,
        num_inference_per_prompt=2,
        train_global_batch_size=4,
        num_training_epoch=2,
        data_shuffle=True,
        generation_batch_size=3,
        seed=5,
        **more,
    )
    counting, drifting = Counting("counting"), Drifting("drifting", log)
    env, trainer = Environment(lambda b: counting.forward_step(b)), None
    trainer = Trainer(lambda b: drifting.train_step(b))
    result = Engine(env, trainer).set_dataset(PROMPTS).learn()
    return result, drifting


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole: list[Any] = []
    drift(whole, tmp_path / "whole", 6)
    parts: list[Any] = []
    drift(parts, tmp_path / "parts", 2, resume="auto")
    drift(parts, tmp_path / "parts", 5, resume="auto", save_episode_interval=1)
    result, module = drift(parts, tmp_path / "parts", 6, resume="auto")
    assert parts == whole
    assert module.loaded == [20]
    assert (result.episodes, result.train_iteration) == (6, 24)
    rows = [
        json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["episode"] for row in rows if row["episode"]] == [1, 2, 3, 4, 5, 6]

    older: list[Any] = []
    path = tmp_path / "parts/checkpoints/episode-000003"
    drift(older, tmp_path / "parts", 6, resume=str(path))
    assert older == whole[12:]


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    drift([], tmp_path, 3, save_episode_interval=2)
    root = tmp_path / "checkpoints"
    assert sorted(p.name for p in root.glob("episode-*")) == ["episode-000002", "episode-000003"]
    assert (root / "latest").read_text().strip() == "episode-000003"
    content = json.loads((root / "episode-000003/checkpoint.json").read_text())
    assert (content["episode"], content["train_iteration"]) == (3, 12)


def test_a_finished_run_has_nothing_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[Any] = []
    drift(log, tmp_path, 2)
    before = len(log)
    result, _ = drift(log, tmp_path, 2, resume="auto")
    assert len(log) == before
    assert result.episodes == 2
    assert "nothing left to do" in capsys.readouterr().out


def test_resume_never_and_auto_without_checkpoint_start_anew(tmp_path: Path) -> None:
    first: list[Any] = []
    drift(first, tmp_path, 1)
    again: list[Any] = []
    result, _ = drift(again, tmp_path, 1)
    assert again == first
    assert result.episodes == 1
    fresh: list[Any] = []
    drift(fresh, tmp_path / "fresh", 1, resume="auto")
    assert fresh == first


def test_auto_after_a_run_that_left_no_checkpoint(tmp_path: Path) -> None:
    runtime(output_dir=str(tmp_path), num_episode=3, resume="auto")
    calls: list[int] = []

    def fail_in_the_second(data: Batch) -> Batch:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("once")
        return data

    with pytest.raises(ModuleError):
        train(PROMPTS, echo=Step("echo", fail_in_the_second))
    train(PROMPTS, echo=Step("echo", fail_in_the_second))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows if row["episode"]] == [1, 2, 3]


def test_a_dataset_that_changed_is_refused(tmp_path: Path) -> None:
    runtime(output_dir=str(tmp_path))
    train(PROMPTS)
    runtime(output_dir=str(tmp_path), resume="auto", num_episode=2)
    with pytest.raises(ChatLearnError, match="8"):
        train(PROMPTS[:5])


def test_save_checkpoint_gets_the_number_of_train_steps(tmp_path: Path) -> None:
    runtime(num_episode=3, save_episode_interval=2, train_global_batch_size=4)
    saved: list[int] = []

    class Saving(Learner):
        def save_checkpoint(self, iteration: int) -> None:
            saved.append(iteration)

    train(PROMPTS, Saving())
    assert saved == [4, 6]


# ---- errors ---------------------------------------------------------------------------------------


def failing(data: Batch) -> Batch:
    if "p5" in data["prompt"]:
        raise ValueError("the original message")
    return data


@pytest.mark.parametrize("flow", ["env", "eval"])
def test_an_exception_names_everything(flow: str) -> None:
    runtime(generation_batch_size=2)
    bad = Step("bad", failing)
    evaluator = EvalEngine(lambda b: bad.eval_step(b)).set_dataset(PROMPTS)
    environment = Engine(Environment(lambda b: bad.forward_step(b))).set_dataset(PROMPTS)
    with pytest.raises(ModuleError) as raised:
        environment.learn() if flow == "env" else evaluator.eval()
    lines = str(raised.value).splitlines()
    assert "the original message" in lines[0]
    method = "forward_step" if flow == "env" else "eval_step"
    for word in ("bad", method, "replica: 0", "episode", "4, 5"):
        assert any(word in line for line in lines[1:]), word
    assert isinstance(raised.value.__cause__, ValueError)
    assert raised.value.__cause__.__traceback__ is not None


@pytest.mark.parametrize("environment", [True, False])
def test_an_exception_in_training_names_the_steps_samples(environment: bool) -> None:
    runtime(num_episode=2, sample_per_episode=4, train_global_batch_size=2)

    class Bad(Learner):
        def train_step(self, data_list: list[Batch], iteration: int) -> None:
            if iteration == 3:
                raise KeyError("missing")

    bad, echo = Bad("bad"), Step("echo")
    env = Environment(lambda b: echo.forward_step(b)) if environment else None
    engine = Engine(env, Trainer(lambda b: bad.train_step(b))).set_dataset(PROMPTS)
    with pytest.raises(ModuleError, match=r"episode: 2\n  samples: uid 6, 7"):
        engine.learn()


def test_output_of_another_size_names_everything() -> None:
    def shrink(data: Batch) -> Batch:
        return {"x": [0] if 2 in plain(data["uid"]) else [0, 0]}

    chatlearn.init({"runtime": {"generation_batch_size": 2}})
    with pytest.raises(ChatLearnError) as caught:
        generate(lambda batch: Step("shrink", shrink).forward_step(batch), PROMPTS[:4])
    text = str(caught.value)
    assert "returned 1 samples for 2" in text
    for part in ("module: shrink (Step)", "method: forward_step", "replica: 0", "episode: 1"):
        assert part in text
    assert "samples: uid 2, 3 (2 in all)" in text


@pytest.mark.parametrize("hook", ["setup", "before_episode", "after_episode", "build_dataset"])
def test_an_exception_in_a_hook_names_module_and_hook(hook: str) -> None:
    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError("the original message")

    bad = type("Bad", (Step,), {hook: fail})("bad")
    with pytest.raises(ModuleError, match=rf"the original message\n(.*\n)*.*method: {hook}"):
        generate(lambda b: bad.forward_step(b), PROMPTS)


def test_a_script_exits_non_zero_with_the_place_in_its_last_lines(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from chatlearn import *\n"
        "class Bad(BaseModule):\n"
        "    def forward_step(self, data):\n"
        "        raise ValueError('the original message')\n"
        "bad = Bad('bad')\n"
        "Engine(Environment(lambda b: bad.forward_step(b))).set_dataset(['p']).learn()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 1
    assert "line 4, in forward_step" in done.stderr
    last = "\n".join(done.stderr.strip().splitlines()[-6:])
    for word in (
        "the original message",
        "bad",
        "forward_step",
        "replica: 0",
        "episode: 1",
        "uid 0",
    ):
        assert word in last


def test_stop_is_safe_twice_and_after_a_failure() -> None:
    bad = Step("bad", failing)
    engine = Engine(Environment(lambda b: bad.forward_step(b))).set_dataset(PROMPTS)
    engine.stop()
    with pytest.raises(ModuleError):
        engine.learn()
    engine.stop()
    engine.stop()
    bad.function = lambda d: d
    with engine as same:
        assert same is engine
        engine.learn()
    engine.stop()


def test_a_second_learn_is_a_new_run_and_engines_follow_each_other() -> None:
    runtime(num_episode=2, sample_per_episode=2)
    setups: list[str] = []

    class Counted(Step):
        def setup(self) -> None:
            setups.append(self.name)

    a, b = Counted("a"), Counted("b")
    engine = Engine(Environment(lambda x: a.forward_step(x))).set_dataset(PROMPTS)
    assert engine.learn().episodes == 2
    assert engine.learn().episodes == 2
    assert a.prompts == ["p0", "p1", "p2", "p3"] * 2
    assert a.iterations == [0, 1] * 2
    engine.stop()
    generate(lambda x: b.forward_step(x), PROMPTS)
    assert setups == ["a", "a", "b"]


def test_a_run_without_output_dir_writes_to_runs_beside_the_caller(tmp_path: Path) -> None:
    step = Step("step")
    result = Engine(Environment(lambda b: step.forward_step(b))).set_dataset(PROMPTS).learn()
    assert result.folder.resolve().parent == tmp_path / "runs"
    assert plain(list(step.prompts)) == PROMPTS
