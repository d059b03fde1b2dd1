# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the whole set exactly once, several samples and datasets, its hook, and that training never notices."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_modules import Batch, Learner, Step, plain
from hypothesis import given, settings
from hypothesis import strategies as st

import chatlearn
from chatlearn import BaseModule, Engine, Environment, EvalEngine, Evaluator, ModuleError, Trainer
from chatlearn.errors import DataError, EngineError, HookError
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.testing import tiny_pair

PROMPTS = [f"p{i}" for i in range(8)]


def runtime(models: dict[str, Any] | None = None, **values: Any) -> None:
    chatlearn.init({"runtime": values, "models": models or {}})


def column(batches: list[Batch], name: str) -> list[Any]:
    return [value for batch in batches for value in plain(batch[name])]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Reward(BaseModule):
    """Rewards a sample by a function of its uid, in a column of the name given."""

    def __init__(self, name: str = "reward", function: Any = None, column: str = "rewards") -> None:
        super().__init__(name)
        self.function = function or (lambda uid: float(uid % 2))
        self.column = column

    def eval_step(self, data: Batch) -> Batch:
        data[self.column] = torch.tensor([self.function(int(uid)) for uid in data["uid"]])
        self.log({self.column: float(data[self.column].mean())})
        return data


class Keep(BaseModule):
    """A filter that keeps the uids it is told to."""

    filters_samples = True

    def __init__(self, name: str, keep: Any) -> None:
        super().__init__(name)
        self.keep = keep

    def eval_step(self, data: Batch) -> Batch:
        kept = [i for i, uid in enumerate(data["uid"]) if self.keep(int(uid))]
        return {
            key: values[kept] if isinstance(values, torch.Tensor) else [values[i] for i in kept]
            for key, values in data.items()
        }


# ---- the whole set exactly once --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "call", "own", "replicas"),
    [
        (1, None, None, 1),
        (1, 4, None, 3),
        (13, 4, 5, 3),
        (14, 4, None, 3),
        (7, 3, 2, 1),
        (5, 8, None, 2),
        (97, 10, 7, 4),
        (4, 4, 1, 2),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_the_whole_set_exactly_once_in_order(samples, call, own, replicas, n) -> None:
    models = {"a": {"num_replica": replicas}, "b": {"generation_batch_size": own}}
    runtime(models, generation_batch_size=call, eval_num_inference_per_prompt=n)
    a, b, prompts = Step("a"), Step("b"), [f"p{i}" for i in range(samples)]
    results = EvalEngine(lambda x: b.eval_step(a.eval_step(x))).set_dataset(prompts).eval()
    assert column(results["b"], "prompt") == [p for p in prompts for _ in range(n)]
    assert column(results["b"], "uid") == list(range(samples * n))
    assert column(results["b"], "prompt_uid") == [i for i in range(samples) for _ in range(n)]
    assert max(b.sizes) <= (own or call or samples * n)
    assert b.prompts == [p for p in prompts for _ in range(n)]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    call=st.one_of(st.none(), st.integers(1, 9)),
    n=st.integers(1, 4),
    replicas=st.integers(1, 3),
    kept=st.integers(1, 5),
)
def test_any_sizes_with_a_filter(sizes, call, n, replicas, kept) -> None:
    runtime(
        {"a": {"num_replica": replicas}},
        generation_batch_size=call,
        eval_num_inference_per_prompt=n,
    )
    a, keep, b = Step("a"), Keep("keep", lambda uid: uid % kept == 0), Step("b")
    datasets = [[f"{d}-{i}" for i in range(size)] for d, size in enumerate(sizes)]
    engine = EvalEngine(lambda x: b.eval_step(keep.eval_step(a.eval_step(x))))
    results = engine.set_multiple_datasets(datasets).eval()
    everything = [prompt for rows in datasets for prompt in rows for _ in range(n)]
    assert column(results["b"], "uid") == [u for u in range(len(everything)) if u % kept == 0]
    assert column(results["b"], "prompt") == everything[::kept]


def test_an_empty_set_is_refused_before_setup() -> None:
    class Heavy(Step):
        def setup(self) -> None:
            pytest.fail("was set up")

    step = Heavy("step")
    flow = lambda x: step.eval_step(x)  # noqa: E731
    with pytest.raises(DataError, match="the dataset of eval_flow is empty"):
        EvalEngine(flow).set_dataset([]).eval()
    with pytest.raises(DataError, match="the dataset 'code' of eval_flow is empty"):
        EvalEngine(flow).set_multiple_datasets({"math": ["a"], "code": []}).eval()
    env = Environment(lambda x: step.forward_step(x))
    engine = Engine(env, None, Evaluator(flow).set_dataset([])).set_dataset(PROMPTS)
    with pytest.raises(DataError, match="the dataset of eval_flow is empty"):
        engine.learn()


def test_group_wise_modules_see_whole_groups() -> None:
    runtime(eval_num_inference_per_prompt=3, generation_batch_size=4)

    class Groups(Step):
        batch_by = "group"

    groups = Groups("groups", lambda d: d)
    results = EvalEngine(lambda x: groups.eval_step(x)).set_dataset(PROMPTS[:5]).eval()
    for batch in results["groups"]:
        uids = plain(batch["prompt_uid"])
        assert all(uids.count(uid) == 3 for uid in uids)


def test_two_returned_nodes_of_one_module_follow_each_other() -> None:
    step = Step("step", lambda d: {"uid": d["uid"]})
    evaluator = Evaluator(lambda x: (step.eval_step(x), step.forward_step(x))).set_dataset(["a"])
    assert column(evaluator.eval()["step"], "uid") == [0, 0]


# ---- pass@k ----------------------------------------------------------------------------------------


def test_pass_at_k_is_measured_for_every_returned_node_with_rewards() -> None:
    runtime(eval_num_inference_per_prompt=4)
    silent, reward = Step("silent", lambda d: {"uid": d["uid"]}), Reward()
    evaluator = Evaluator(lambda x: (silent.eval_step(x), reward.eval_step(x)))
    evaluator.set_dataset(["a", "b", "c"]).eval()
    assert evaluator.metrics == pytest.approx(
        {
            "reward/rewards": 0.5,
            "reward/avg@4": 0.5,
            "reward/pass@1": 0.5,
            "reward/pass@2": 1 - 1 / 6,
            "reward/pass@4": 1.0,
        }
    )


def test_with_one_sample_per_prompt_nothing_new_is_logged() -> None:
    reward = Reward()
    evaluator = Evaluator(lambda x: reward.eval_step(x)).set_dataset(["a", "b"])
    evaluator.eval()
    assert evaluator.metrics == {"reward/rewards": 0.5}


def test_a_namespaced_reward_and_settings() -> None:
    runtime(eval_num_inference_per_prompt=4, eval_pass_at_k=[3], eval_pass_threshold=0.0)
    reward = Reward(column="solver/rewards")
    engine = EvalEngine(lambda x: reward.eval_step(x)).set_dataset(["a"])
    engine.eval()
    assert engine.metrics == {
        "reward/solver/rewards": 0.5,
        "reward/solver/avg@4": 0.5,
        "reward/solver/pass@3": 1.0,
    }


def test_a_filter_leaves_prompts_out_of_large_k() -> None:
    runtime(eval_num_inference_per_prompt=2, eval_pass_at_k=[1, 2])
    keep, reward = Keep("keep", lambda uid: uid not in (1, 4, 5)), Reward()
    evaluator = Evaluator(lambda x: reward.eval_step(keep.eval_step(x))).set_dataset(PROMPTS[:3])
    evaluator.eval()
    found = {k: v for k, v in evaluator.metrics.items() if "@" in k}
    assert found == pytest.approx(
        {
            "reward/avg@2": 1 / 3,
            "reward/pass@1": 0.25,
            "reward/pass@1_left_out": 1,
            "reward/pass@2": 1.0,
            "reward/pass@2_left_out": 2,
        }
    )


def test_several_samples_without_rewards_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    runtime(eval_num_inference_per_prompt=2)
    step = Step("step")
    evaluator = Evaluator(lambda x: step.eval_step(x)).set_dataset(["a"])
    evaluator.eval()
    evaluator.eval()
    assert capsys.readouterr().err.count("no pass@k") == 1  # said once


# ---- several datasets ------------------------------------------------------------------------------


def test_datasets_of_different_columns_and_metrics_of_each() -> None:
    runtime(generation_batch_size=2)
    reward = Reward(function=lambda uid: float(uid >= 3))
    engine = EvalEngine(lambda x: reward.eval_step(x)).set_multiple_datasets(
        {
            "math": [{"prompt": f"m{i}", "answer": str(i)} for i in range(3)],
            "code": [{"prompt": "c0", "tests": ["t"]}],
        }
    )
    batches = engine.eval()["reward"]
    assert [sorted(batch) for batch in batches] == [
        ["answer", "prompt", "prompt_uid", "rewards", "uid"],
        ["answer", "prompt", "prompt_uid", "rewards", "uid"],
        ["prompt", "prompt_uid", "rewards", "tests", "uid"],
    ]
    assert column(batches, "uid") == [0, 1, 2, 3]
    assert engine.metrics == {
        "reward/rewards": 0.25,
        "math/reward/rewards": 0.0,
        "code/reward/rewards": 1.0,
    }


def test_names_of_datasets(tmp_path: Path) -> None:
    for name in ("a/test.jsonl", "b/test.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"prompt": "x"}\n')
    step = Step("step")
    evaluator = Evaluator(lambda x: step.eval_step(x))
    evaluator.set_multiple_datasets(
        [tmp_path / "a/test.jsonl", ["p"], str(tmp_path / "b/test.jsonl")]
    )
    assert evaluator.names == ["test", "dataset_1", "test_2"]
    for wrong in ([], {}, "a.jsonl", 3, {"": ["p"]}, {3: ["p"]}):
        with pytest.raises(DataError):
            evaluator.set_multiple_datasets(wrong)  # pyright: ignore[reportArgumentType]


def test_a_hook_can_tell_the_datasets_apart() -> None:
    runtime(eval_num_inference_per_prompt=2)
    step, seen = Step("step"), {}

    def process(results: Any, info: Any) -> None:
        assert info == {"episode_iteration": -1, "train_iteration": 0}
        seen.update({name: column(part["step"], "prompt") for name, part in info.datasets.items()})
        assert [id(b) for b in results["step"]] == [
            id(b) for part in info.datasets.values() for b in part["step"]
        ]

    evaluator = Evaluator(lambda x: step.eval_step(x)).set_post_process_func(process)
    evaluator.set_multiple_datasets({"one": ["a"], "two": ["b", "c"]}).eval()
    assert seen == {"one": ["a", "a"], "two": ["b", "b", "c", "c"]}


def test_training_takes_named_datasets_too() -> None:
    runtime(sample_per_episode=4, data_ratio=[1, 1])
    learner, echo = Learner(), Step("echo")
    env, trainer = (
        Environment(lambda x: echo.forward_step(x)),
        Trainer(lambda x: learner.train_step(x)),
    )
    engine = Engine(env, trainer).set_multiple_datasets({"a": ["a0", "a1"], "b": ["b0", "b1"]})
    engine.learn()
    assert learner.trained == [["a0", "b0", "a1", "b1"]]


# ---- the hook --------------------------------------------------------------------------------------


def evaluated_with(hook: Any) -> Evaluator:
    step = Step("step")
    return Evaluator(lambda x: step.eval_step(x)).set_dataset(["a"]).set_post_process_func(hook)


def failing(results: Any, info: Any) -> None:
    raise KeyError("missing")


@pytest.mark.parametrize("alone", [True, False])
def test_a_hook_that_raises_is_named(alone: bool) -> None:
    evaluator, echo = evaluated_with(failing), Step("echo")
    engine = Engine(Environment(lambda x: echo.forward_step(x)), None, evaluator)
    engine.set_dataset(PROMPTS)
    with pytest.raises(HookError, match="missing") as caught:
        evaluator.eval() if alone else engine.learn()
    line = failing.__code__.co_firstlineno
    assert str(caught.value).splitlines() == [
        "KeyError: 'missing'",
        f"  hook: failing ({__file__}:{line}), set by set_post_process_func",
        f"  episode: {'none yet' if alone else 1}",
    ]
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value, ModuleError)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([0.5], "returned a list, of which nothing is logged"),
        (0.5, "returned a float"),
        ({"accuracy": 0.5, "by": {"a": 1}, "text": "x"}, "not logged are: by (dict), text (str)"),
    ],
)
def test_what_a_hook_returns_is_never_silently_dropped(returned, said, capsys) -> None:
    evaluator = evaluated_with(lambda results, info: returned)
    evaluator.eval()
    err = capsys.readouterr().err
    assert said in err
    assert "test_evaluation.py" in err
    assert evaluator.metrics == ({"accuracy": 0.5} if isinstance(returned, dict) else {})


def test_what_a_hook_returns_is_noted_in_a_run_too(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Step("echo")
    env = Environment(lambda x: echo.forward_step(x))
    Engine(env, None, evaluated_with(lambda results, info: "x")).set_dataset(PROMPTS).learn()
    assert "returned a str, of which nothing is logged" in capsys.readouterr().out


@pytest.mark.parametrize("returned", [None, {}, {"a": np.float32(0.5), "b": torch.tensor(1)}])
def test_numbers_of_any_kind_and_nothing_need_no_words(returned, capsys) -> None:
    evaluator = evaluated_with(lambda results, info: returned)
    evaluator.eval()
    assert capsys.readouterr().err == ""
    assert evaluator.metrics == {name: float(value) for name, value in (returned or {}).items()}


def test_a_hook_that_is_no_function_is_refused() -> None:
    async def later(results: Any, info: Any) -> None: ...

    for hook in (later, 3):
        with pytest.raises(EngineError, match="takes a plain function"):
            evaluated_with(hook)


def test_the_hook_gets_all_results_once_and_knows_when(tmp_path: Path) -> None:
    runtime(num_episode=2, enable_eval_before_training=True, output_dir=tmp_path / "run")
    infos: list[dict[str, int]] = []
    evaluator, echo, learner = (
        evaluated_with(lambda r, i: infos.append(dict(i))),
        Step("echo"),
        Learner(),
    )
    env, trainer = (
        Environment(lambda x: echo.forward_step(x)),
        Trainer(lambda x: learner.train_step(x)),
    )
    with Engine(env, trainer, evaluator).set_dataset(PROMPTS) as engine:
        engine.learn()
        engine.eval()
        evaluator.eval()
    assert [tuple(info.values()) for info in infos] == [(-1, 0), (0, 1), (1, 2), (1, 2), (1, 2)]


# ---- the models of ours ----------------------------------------------------------------------------


def score(completions: list[str]) -> list[float]:
    return [float("a" in text) for text in completions]


def policy(**settings: Any) -> PolicyInference:
    defaults = {"model": tiny_pair, "device": "cpu", "max_new_tokens": 5}
    return PolicyInference("policy", **{**defaults, **settings})


def learn(
    evaluator_of: Any, folder: Path, **values: Any
) -> tuple[list[torch.Tensor], list[Any], Any]:
    """Train a tiny policy for three episodes; return its weights, what it was trained on, and the evaluator."""
    torch.set_num_threads(1)
    runtime(
        num_episode=3,
        sample_per_episode=8,
        num_inference_per_prompt=4,
        output_dir=folder,
        data_shuffle=True,
        **values,
    )
    sampler, reward = policy(), FunctionReward("reward", score)
    advantage, noise, noisy = GroupAdvantage("advantage"), Noise("noise"), []

    class Recording(PolicyTrainer):
        def train_step(self, data_list: list[Batch], iteration: int) -> Any:
            noisy.extend(
                (plain(data["uid"]), data["completion"], plain(data["noise"])) for data in data_list
            )
            return super().train_step(data_list, iteration)

    learner = Recording("learner", model=tiny_pair, device="cpu", lr=1e-2)

    def env_flow(batch: Any) -> Any:
        scored = reward.forward_step(policy_out := sampler.forward_step(batch))
        return advantage.forward_step(scored), noise.forward_step(policy_out)

    def trainer_flow(batch: Any) -> None:
        learner.train_step(batch)

    evaluator = evaluator_of(sampler, reward)
    engine = Engine(Environment(env_flow), Trainer(trainer_flow), evaluator)
    engine.set_parameter_sync(learner, sampler).set_dataset(["1+1=", "2+2=", "ab"]).learn()
    assert learner.model is not None
    return [p.detach().clone() for p in learner.model.parameters()], noisy, evaluator


class Noise(BaseModule):
    """Draws from every global generator, in its setup too."""

    def setup(self) -> None:
        self.layer = torch.nn.Linear(3, 3)
        random.random()

    def forward_step(self, data: Batch) -> Batch:
        drawn = torch.rand(len(data["uid"])) + random.random() + float(np.random.rand())
        return {"noise": drawn.double()}

    def eval_step(self, data: Batch) -> Batch:
        return self.forward_step(data)


def noisy_evaluator(sampler: PolicyInference, reward: FunctionReward) -> Evaluator:
    other = Noise("other_noise")

    def eval_flow(batch: Any) -> Any:
        return reward.eval_step(sampler.eval_step(batch)), other.eval_step(batch)

    def process(results: Any, info: Any) -> dict[str, float]:
        return {"drawn": random.random() + float(torch.rand(1))}

    evaluator = Evaluator(eval_flow).set_multiple_datasets([["3+3=", "4"], ["5+5="]])
    return evaluator.set_post_process_func(process)


def test_training_never_notices_an_evaluation(tmp_path: Path) -> None:
    weights, trained, _ = learn(lambda *_: None, tmp_path / "without")
    values = {"enable_eval_before_training": True, "eval_num_inference_per_prompt": 3}
    others, also, _ = learn(noisy_evaluator, tmp_path / "with", **values)
    assert trained == also
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert len({noise for _, _, drawn in trained for noise in drawn}) == 24  # drawn, and not anew
    drawn = [row["eval/drawn"] for row in rows_of(tmp_path / "with") if "eval/drawn" in row]
    assert len(drawn) == 4
    assert len(set(drawn)) == 1  # every evaluation draws the same


def test_evaluation_outside_a_run_leaves_the_generators_alone_and_repeats_itself() -> None:
    noise = Noise("noise")
    evaluator = Evaluator(lambda x: noise.eval_step(x)).set_dataset(PROMPTS)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = float(torch.rand(1)), random.random(), float(np.random.rand())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    first = column(evaluator.eval()["noise"], "noise")
    assert (float(torch.rand(1)), random.random(), float(np.random.rand())) == expected
    assert column(evaluator.eval()["noise"], "noise") == first
    runtime(seed=1)
    assert column(evaluator.eval()["noise"], "noise") != first


def test_evaluation_settings_of_the_sampler_alone_and_in_training(tmp_path: Path) -> None:
    temperatures: list[float] = []

    def evaluator_of(sampler: PolicyInference, reward: FunctionReward) -> Evaluator:
        def process(results: Any, info: Any) -> None:
            temperatures.extend(column(results["reward"], "temperature"))

        flow = lambda batch: reward.eval_step(sampler.eval_step(batch))  # noqa: E731
        return Evaluator(flow).set_dataset(["3+3=", "4"]).set_post_process_func(process)

    models = {"policy": {"eval_temperature": 0.0, "eval_max_new_tokens": 2}}
    chatlearn.init({"models": models})
    sampler = policy()
    alone = evaluator_of(sampler, FunctionReward("reward", score))
    greedy = column(alone.eval()["reward"], "completion")
    assert temperatures == [0.0, 0.0]
    assert all(len(text) <= 2 for text in greedy)
    assert column(alone.eval()["reward"], "completion") == greedy

    temperatures.clear()
    _, trained, _ = learn(evaluator_of, tmp_path / "run", models=models)
    assert temperatures == [0.0] * 6
    assert len({tuple(texts) for _, texts, _ in trained}) == 3  # training samples, at temperature 1


def test_several_samples_of_a_prompt_are_drawn_independently() -> None:
    runtime(eval_num_inference_per_prompt=4)
    sampler, reward = policy(), FunctionReward("reward", score)
    evaluator = Evaluator(lambda x: reward.eval_step(sampler.eval_step(x))).set_dataset(["1", "2"])
    texts = column(evaluator.eval()["reward"], "completion")
    assert len(set(texts[:4])) > 1
    assert texts[:4] != texts[4:]
    assert {"reward/pass@1", "reward/pass@2", "reward/pass@4", "reward/avg@4"} <= set(
        evaluator.metrics
    )
    assert evaluator.metrics["reward/avg@4"] == pytest.approx(evaluator.metrics["reward/rewards"])


class Weight(BaseModule):
    """One weight: a source trains it, a destination reports it; `setup()` makes it 0."""

    def setup(self) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        with torch.no_grad():
            self.model.weight += 1

    def forward_step(self, data: Batch) -> Batch:
        assert self.model is not None
        data["weight"] = [self.model.weight.item()] * len(data["uid"])
        return data

    eval_step = forward_step


@pytest.mark.parametrize("replicas", [1, 3])
def test_evaluations_in_and_after_training_see_what_was_learned(replicas: int) -> None:
    runtime(
        {"policy": {"num_replica": replicas}},
        num_episode=2,
        generation_batch_size=1,
        enable_eval_before_training=True,
    )
    learner, sampler, other, seen = Weight("learner"), Weight("policy"), Step("other"), []
    evaluator = Evaluator(lambda x: sampler.eval_step(x)).set_dataset(["a", "b", "c"])
    evaluator.set_post_process_func(lambda r, i: seen.append(column(r["policy"], "weight")))
    env = Environment(lambda x: sampler.forward_step(x))
    engine = Engine(env, Trainer(lambda x: learner.train_step(x)), evaluator)
    with engine.set_parameter_sync(learner, sampler).set_dataset(PROMPTS):
        engine.learn()
        engine.eval()
        assert seen == [[0.0] * 3, [1.0] * 3, [2.0] * 3, [2.0] * 3]
        later = Evaluator(lambda x: other.eval_step(sampler.eval_step(x))).set_dataset(["a", "b"])
        results = engine.set_evaluator(later).eval()
        assert column(results["other"], "weight") == [2.0, 2.0]


def test_an_evaluation_within_a_hook_leaves_the_run_s_display_alone() -> None:
    step, inner, told = Step("step"), [], []

    def process(results: Any, info: Any) -> None:
        told.append(step.progress)
        if not inner:
            inner.append(True)
            evaluator.eval()
        told.append(step.progress)

    evaluator = Evaluator(lambda x: step.eval_step(x)).set_dataset(["e"])
    env = Environment(lambda x: step.forward_step(x))
    Engine(env, None, evaluator.set_post_process_func(process)).set_dataset(PROMPTS).learn()
    outer = [told[0], told[-1]]
    assert outer[0] is not None
    assert outer[0] == outer[1]
    assert told[1] != told[0]
    assert step.progress is None


def test_metrics_stand_in_every_place(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    values = {"enable_eval_before_training": True, "eval_num_inference_per_prompt": 2}
    *_, evaluator = learn(noisy_evaluator, folder, **values)
    names = {
        f"eval/{d}reward/{m}" for d in ("", "dataset_0/", "dataset_1/") for m in ("pass@2", "avg@2")
    }
    rows = rows_of(folder)
    assert [row["episode"] for row in rows if names <= set(row)] == [0, 1, 2, 3]
    last = {f"eval/{name}": value for name, value in evaluator.metrics.items()}
    assert last.items() <= rows[-1].items()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert names <= set(events.Tags()["scalars"])
    page = (folder / "report.html").read_text()
    assert "pass@k of dataset_0/reward" in page
    assert "held-out pass@1" in page


def test_settings_of_now_count_whenever_they_were_made() -> None:
    reward = Reward()
    evaluator = Evaluator(lambda x: reward.eval_step(x)).set_dataset(["a", "b"])
    assert column(evaluator.eval()["reward"], "prompt") == ["a", "b"]
    runtime(eval_num_inference_per_prompt=2, generation_batch_size=1)
    assert column(batches := evaluator.eval()["reward"], "prompt") == ["a", "a", "b", "b"]
    assert len(batches) == 4
    evaluator.set_dataset(["c"])
    assert column(evaluator.eval()["reward"], "prompt") == ["c", "c"]
