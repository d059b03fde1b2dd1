# SPDX-License-Identifier: Apache-2.0
"""Every wrong program has its own error, found before any module is set up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chatlearn
from chatlearn import BaseModule, Engine, Environment, EvalEngine, Evaluator, Trainer
from chatlearn.errors import ChatLearnError, ConfigError, DataError, EngineError, FlowError


class Module(BaseModule):
    def setup(self) -> None:
        raise AssertionError("set up although the program is wrong")

    def forward_step(self, data: Any) -> Any:
        return data

    def train_step(self, data: Any) -> None: ...


class Filter(Module):
    filters_samples = True


class Particular(Module):
    def check_config(self) -> list[ChatLearnError]:
        return [ConfigError("no model at /nowhere"), ConfigError("no tokenizer either")]


def env(*modules: BaseModule) -> Environment:
    def env_flow(batch: Any) -> Any:
        for module in modules or (Module("m"),):
            batch = module.forward_step(batch)  # type: ignore[attr-defined]
        return batch

    return Environment(env_flow)


def trainer(module: BaseModule | None = None) -> Trainer:
    module = module or Module("t")
    return Trainer(lambda batch: module.train_step(batch))  # type: ignore[attr-defined]


def straddling(batch: Any) -> Any:
    return Module("after").forward_step(batch, Filter("filter").forward_step(batch))


def nothing_returned(batch: Any) -> None:
    Module("m").forward_step(batch)


def engine(*parts: Any, data: Any = ("p",)) -> Engine:
    return Engine(*parts).set_dataset(list(data))


def evaluated() -> Evaluator:
    return Evaluator(lambda batch: Module("e").forward_step(batch))


def trainers(*modules: BaseModule) -> Trainer:
    def trainer_flow(batch: Any) -> None:
        for module in modules:
            module.train_step(batch)  # type: ignore[attr-defined]

    return Trainer(trainer_flow)


def newest(buffers: Any) -> Any:
    return buffers[-1].samples


M, T, U = Module("m"), Module("t"), Module("u")

WRONG: dict[str, tuple[dict[str, Any], Callable[[], Engine], type[ChatLearnError], str]] = {
    "no flow": ({}, Engine, FlowError, "has no flow"),
    "no dataset": ({}, lambda: Engine(env()), DataError, "has no dataset"),
    "empty dataset": ({}, lambda: engine(env(), data=[]), DataError, "is empty"),
    "missing file": (
        {},
        lambda: Engine(env()).set_dataset("no.jsonl"),
        DataError,
        "does not exist",
    ),
    "evaluator without dataset": (
        {},
        lambda: engine(env(), None, evaluated()),
        DataError,
        "evaluator has no dataset",
    ),
    "evaluator with an empty one": (
        {},
        lambda: engine(env(), None, evaluated().set_dataset([])),
        DataError,
        "eval_flow is empty",
    ),
    "nothing for the trainer": (
        {},
        lambda: engine(Environment(nothing_returned), trainer()),
        FlowError,
        "returns nothing, but the trainer flow needs",
    ),
    "one name twice": ({}, lambda: engine(env(M), trainer(Module("m"))), FlowError, "two modules"),
    "a trainer of replicas": (
        {"models": {"t": {"num_replica": 2}}},
        lambda: engine(env(), trainer()),
        ConfigError,
        "cannot have replicas",
    ),
    "sync of a stranger": (
        {},
        lambda: engine(env(M)).set_parameter_sync(T, M),
        FlowError,
        "stands in no flow",
    ),
    "sync with itself": (
        {},
        lambda: engine(env(M)).set_parameter_sync(M, M),
        FlowError,
        "with itself",
    ),
    "unknown module field": (
        {"models": {"m": {"num_replicas": 2}}},
        lambda: engine(env(M)),
        ConfigError,
        "did you mean",
    ),
    "unknown module": (
        {"models": {"polcy": {}}},
        lambda: engine(env(Module("policy"))),
        ConfigError,
        "polcy",
    ),
    "what a module checks itself": (
        {},
        lambda: engine(env(Particular("m"))),
        ConfigError,
        "2 problems:\n1. no model at /nowhere\n2. no tokenizer either",
    ),
    "ratio of another length": (
        {"runtime": {"data_ratio": [1, 2]}},
        lambda: engine(env()),
        ConfigError,
        "2 numbers for 1 dataset\n  at: code runtime.data_ratio\n  fix: give one positive number",
    ),
    "no full update": (
        {"runtime": {"train_global_batch_size": 9, "incomplete_step": "drop_last"}},
        lambda: engine(env(), trainer()),
        ConfigError,
        "no update is ever full: train_global_batch_size=9 exceeds the episode's 1 samples, and incomplete_step is "
        "'drop_last'\n  at: code runtime.train_global_batch_size",
    ),
    "another backend": (
        {"runtime": {"backend": "ray"}},
        lambda: engine(env()),
        ConfigError,
        "not available in this version",
    ),
    "a replay sampler that is never asked": (
        {},
        lambda: engine(env(), trainer()).set_replay_sampler(newest),
        ConfigError,
        "the replay sampler newest",
    ),
    "a replay offset without replay": (
        {"runtime": {"replay_episode_offset": 3}},
        lambda: engine(env(), trainer()),
        ConfigError,
        "replay_episode_offset=3 has no effect: no episodes are kept\n  at: code runtime.replay_episode_offset",
    ),
    "two syncs into one module": (
        {},
        lambda: engine(env(M), trainers(T, U)).set_parameter_sync(T, M).set_parameter_sync(U, M),
        FlowError,
        "2 modules sync into 'm', which would keep the weights of the last only: t -> m; u -> m",
    ),
    "syncs in a circle": (
        {},
        lambda: (
            engine(env(M), trainers(T, U))
            .set_parameter_sync(T, U)
            .set_parameter_sync(U, M)
            .set_parameter_sync(M, T)
        ),
        FlowError,
        "go in a circle",
    ),
    "datasets of different columns": (
        {},
        lambda: Engine(env()).set_multiple_datasets(
            [[{"prompt": "p", "answer": 1, "level": 2}], ["p"], [{"prompt": "p", "level": 1}]]
        ),
        DataError,
        "dataset_0 and dataset_1 have different columns, but their rows share micro-batches: "
        "only dataset_0 has 'answer', 'level'",
    ),
    "inputs on both sides of a filter": (
        {},
        lambda: engine(Environment(straddling)),
        FlowError,
        "both sides of a filter",
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_wrong_programs_are_refused_before_setup(case: str) -> None:
    config, make, kind, what = WRONG[case]
    chatlearn.init(config)
    made = make()
    with pytest.raises(kind) as raised:
        made.learn()
    assert what in str(raised.value)
    assert [type(problem) for problem in made.check().problems][:1] == [kind]


def test_all_problems_are_told_at_once() -> None:
    chatlearn.init({"runtime": {"backend": "ray"}, "models": {"m": {"num_gpus": 1}}})
    wrong = Engine(env(M), trainer()).set_parameter_sync(Module("other"), M)
    problems = [str(problem) for problem in wrong.check().problems]
    assert len(problems) == 4
    for what in ("num_gpus", "backend", "stands in no flow", "no dataset"):
        assert sum(what in problem for problem in problems) == 1
    with pytest.raises(ChatLearnError, match=r"4 problems:\n1\. "):
        wrong.learn()


def test_setters_refuse_the_wrong_kind() -> None:
    with pytest.raises(EngineError, match="wrap the flow: Environment"):
        Engine(lambda batch: batch)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="takes Trainer or nothing, not Environment"):
        Engine().set_trainer(env())  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="takes two modules"):
        Engine().set_parameter_sync(M, "m")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="neither environment nor trainer"):
        Engine().set_dataset(["p"])
    with pytest.raises(DataError, match="non-empty list of datasets"):
        env().set_multiple_datasets("data.jsonl")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="takes a plain function"):
        evaluated().set_post_process_func(3)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="no evaluator"):
        engine(env()).eval()
    with pytest.raises(EngineError, match="an evaluation flow or an Evaluator"):
        EvalEngine()


def test_a_right_program_has_no_problems_and_sets_nothing_up() -> None:
    program = engine(env(M), trainer(T), evaluated().set_dataset(["e"])).check()
    assert program.problems == []
    assert [module.name for module in program.modules] == ["m", "t", "e"]
    assert program.graphs.keys() == {"env_flow", "trainer_flow", "eval_flow"}
    assert program.plan().samples == 1


def test_datasets_in_files_are_named_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "easy.jsonl").write_text('{"prompt": "p", "answer": "1"}\n')
    (tmp_path / "hard.jsonl").write_text('{"prompt": "p", "level": 3}\n')
    made = Engine(env()).set_multiple_datasets(["easy.jsonl", "hard.jsonl"])
    [problem] = made.check().problems
    assert str(problem) == (
        "easy.jsonl and hard.jsonl have different columns, but their rows share micro-batches: "
        "only easy.jsonl has 'answer'; only hard.jsonl has 'level'\n"
        "  at: the datasets of env_flow\n"
        "  fix: give both 'answer' and 'level', with None where there is no value"
    )
    evaluator = evaluated().set_multiple_datasets(["easy.jsonl", "hard.jsonl"])
    assert engine(env(), None, evaluator).check().problems == []  # there they do not meet


def test_every_problem_names_its_place_and_a_way_out() -> None:
    chatlearn.init({"runtime": {"replay_episode_offset": 1, "data_ratio": [1, 2]}})
    wrong = engine(env(M), trainers(T, U)).set_replay_sampler(newest)
    wrong.set_parameter_sync(T, M).set_parameter_sync(U, M).set_parameter_sync(M, T)
    problems = wrong.check().problems
    assert len(problems) == 5
    for problem in problems:
        assert problem.place, problem
        assert problem.fix, problem
