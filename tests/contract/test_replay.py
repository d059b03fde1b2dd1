# SPDX-License-Identifier: Apache-2.0
"""Replay through the public API: which samples are trained on, what a sampler gets and returns, resuming."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_modules import Batch, Learner, Step, plain

import chatlearn
from chatlearn import BaseModule, Engine, Environment, ModuleError, Trainer
from chatlearn.errors import BatchError, CheckpointError

PROMPTS = [f"p{i}" for i in range(8)]
DOCUMENT = Path(__file__).parents[2] / "docs" / "replay.md"


def runtime(**values: Any) -> None:
    chatlearn.init({"runtime": values})


def engine(
    learner: BaseModule,
    sampler: Callable[..., Any] | None = None,
    step: BaseModule | None = None,
    environment: bool = True,
) -> Engine:
    step = step or Step("step")
    made = Engine(
        Environment(lambda b: step.forward_step(b)) if environment else None,  # type: ignore[attr-defined]
        Trainer(lambda b: learner.train_step(b)),  # type: ignore[attr-defined]
    ).set_dataset(PROMPTS)
    return made if sampler is None else made.set_replay_sampler(sampler)


def replay(kept: int = -1, episodes: int = 3, samples: int = 2, **more: Any) -> None:
    runtime(max_replay_episode=kept, num_episode=episodes, sample_per_episode=samples, **more)


# ---- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [True, False])
@pytest.mark.parametrize("loader", ["fixed", "dynamic"])
def test_the_last_episodes_are_trained_on_oldest_first(environment: bool, loader: str) -> None:
    replay(2, episodes=4, stream_data_loader_type=loader)
    learner = Learner()
    engine(learner, environment=environment).learn()
    assert learner.trained == [
        ["p0", "p1"],
        ["p0", "p1", "p2", "p3"],
        ["p2", "p3", "p4", "p5"],
        ["p4", "p5", "p6", "p7"],
    ]


def test_all_episodes_and_an_offset() -> None:
    replay(-1, episodes=4, replay_episode_offset=1)
    learner = Learner()
    engine(learner).learn()
    assert [len(step) for step in learner.trained] == [2, 2, 4, 6]
    assert learner.trained[0] == ["p0", "p1"]
    assert learner.trained[3] == ["p2", "p3", "p4", "p5", "p6", "p7"]


@pytest.mark.parametrize("loader", ["fixed", "dynamic"])
def test_chosen_samples_are_cut_like_an_episodes(loader: str) -> None:
    replay(
        -1,
        episodes=2,
        samples=3,
        train_global_batch_size=4,
        train_micro_batch_size=2,
        num_training_epoch=2,
        stream_data_loader_type=loader,
    )
    learner = Learner()
    engine(learner).learn()
    assert learner.steps[0] == [["p0", "p1"], ["p2", "p0"]]
    assert learner.steps[2:4] == [[["p0", "p1"], ["p2", "p3"]], [["p4", "p5"], ["p0", "p1"]]]
    assert len(learner.steps) == 6  # one step per pass of 3 samples, two of 6
    later = [prompt for step in learner.trained[4:] for prompt in step]
    assert set(later) == set(PROMPTS[:6])
    assert later[:6] != PROMPTS[:6]


def test_without_replay_nothing_is_kept(tmp_path: Path) -> None:
    runtime(num_episode=2, sample_per_episode=2, output_dir=str(tmp_path))
    learner = Learner()
    engine(learner).learn()
    assert learner.trained == [["p0", "p1"], ["p2", "p3"]]
    assert not list(tmp_path.rglob("replay.pt"))


def test_numbers_and_transcripts(tmp_path: Path) -> None:
    replay(2, output_dir=str(tmp_path))

    def twice(buffers: Any) -> list[Any]:
        return [sample for buffer in buffers for sample in buffer.samples * 2]

    engine(Learner(), twice).learn()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = ("replay/episodes", "replay/samples", "replay/oldest_episode")
    got = [tuple(row[name] for name in names) for row in rows if row["episode"]]
    assert got == [(1, 4, 1), (2, 8, 1), (2, 8, 2)]
    shown = [json.loads(x) for x in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    assert [(row["episode"], row["prompt"]) for row in shown] == [
        (1, "p0"),
        (1, "p1"),
        (2, "p2"),
        (2, "p3"),
        (3, "p4"),
        (3, "p5"),
    ]


def test_a_filter_that_drops_everything_leaves_older_episodes() -> None:
    replay(-1, episodes=3)

    class Filter(Step):
        filters_samples = True

    def dropping(data: Batch) -> Batch:
        kept = [i for i, prompt in enumerate(data["prompt"]) if prompt not in PROMPTS[:2]]
        return {key: [column[i] for i in kept] for key, column in data.items()}

    asked: list[int] = []

    def everything(buffers: Any) -> list[Any]:
        asked.append(len(buffers))
        return [sample for buffer in buffers for sample in buffer.samples]

    for sampler in (None, everything):
        learner = Learner()
        engine(learner, sampler, Filter("filter", dropping)).learn()
        assert learner.trained == [["p2", "p3"], ["p2", "p3", "p4", "p5"]]
    assert asked == [2, 3]  # of nothing, nothing can be chosen


# ---- what a sampler gets and returns --------------------------------------------------------------


def test_a_sampler_gets_buffers_and_decides_number_and_order() -> None:
    replay(2, episodes=3, train_global_batch_size=3, incomplete_step="keep")
    seen: list[Any] = []

    def sampler(buffers: Any) -> Iterator[Any]:
        seen.append([(b.episode_id, [s["prompt"] for s in b.samples]) for b in buffers])
        for buffer in reversed(buffers):
            yield from buffer.samples
        yield buffers[0].samples[0]

    learner = Learner()
    engine(learner, sampler).learn()
    assert seen == [
        [(0, ["p0", "p1"])],
        [(0, ["p0", "p1"]), (1, ["p2", "p3"])],
        [(1, ["p2", "p3"]), (2, ["p4", "p5"])],
    ]
    assert learner.trained == [
        ["p0", "p1", "p0"],
        ["p2", "p3", "p0"],
        ["p1", "p0"],
        ["p4", "p5", "p2"],
        ["p3", "p2"],
    ]


def test_columns_stay_what_they_were() -> None:
    replay(2, episodes=2, samples=3)

    def made(data: Batch) -> Batch:
        count = len(data["prompt"])
        return {
            **data,
            "half": torch.arange(count, dtype=torch.float16),
            "matrix": torch.ones(count, 2, dtype=torch.int32),
            "ragged": [torch.arange(i + 1) for i in range(count)],
            "listed": [1.5] * count,
            "deep": [{"a": [i]} for i in range(count)],
        }

    def sampler(buffers: Any) -> list[Any]:
        chosen = [dict(buffer.samples[1]) for _ in range(2) for buffer in buffers]
        for number, sample in enumerate(chosen):
            sample["half"] = 0.25  # a plain number in a tensor column
            sample["new"] = float(number)
            sample["new_text"] = "x"
            del sample["uid"]
        return chosen

    got: list[Batch] = []

    class Looking(Learner):
        def train_step(self, data_list: list[Batch], iteration: int) -> None:
            got.extend(data_list)

    engine(Looking(), sampler, Step("step", made)).learn()
    last = got[-1]
    assert last["half"].dtype == torch.float16
    assert last["half"].tolist() == [0.25] * 4
    assert (last["matrix"].dtype, last["matrix"].shape) == (torch.int32, (4, 2))
    assert isinstance(last["ragged"], list)  # of tensors that are all of one shape here
    assert [row.tolist() for row in last["ragged"]] == [[0, 1]] * 4
    assert last["listed"] == [1.5] * 4
    assert last["new"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert last["new_text"] == ["x"] * 4
    assert "uid" not in last


def test_what_a_sampler_changes_it_changes_for_one_episode() -> None:
    replay(-1, episodes=3, samples=1)

    def made(data: Batch) -> Batch:
        return {
            **data,
            "row": torch.zeros(len(data["prompt"]), 2),
            "parts": [["a"] for _ in data["prompt"]],
        }

    seen: list[Any] = []

    def spoiling(buffers: Any) -> list[Any]:
        chosen = [sample for buffer in buffers for sample in buffer.samples]
        seen.append([(s["prompt"], s["row"].tolist(), list(s["parts"])) for s in chosen])
        for sample in chosen:
            sample["row"] += 1
            sample["parts"].append("b")
            sample["prompt"] = "spoiled"
        returned = list(chosen)
        for buffer in buffers:
            buffer.samples.clear()
        buffers.clear()
        return returned

    learner = Learner()
    engine(learner, spoiling, Step("step", made)).learn()
    assert seen[-1] == [(f"p{i}", [0.0, 0.0], ["a"]) for i in range(3)]
    assert learner.trained[-1] == ["spoiled"] * 3


def test_what_a_trainer_changes_is_not_kept() -> None:
    replay(-1, episodes=2, samples=1)
    seen: list[Any] = []

    class Spoiling(Learner):
        def train_step(self, data_list: list[Batch], iteration: int) -> None:
            seen.append([([*map(list, d["parts"])], d["row"].tolist()) for d in data_list])
            for data in data_list:
                data["row"] += 1
                data["parts"][0].append("b")

    def made(data: Batch) -> Batch:
        return {**data, "row": torch.zeros(len(data["prompt"])), "parts": [["a"]]}

    engine(Spoiling(), step=Step("step", made)).learn()
    assert seen == [[([["a"]], [0.0])], [([["a"], ["a"]], [0.0, 0.0])]]


# ---- what a sampler does wrong --------------------------------------------------------------------


async def asynchronous(buffers: Any) -> list[Any]:
    return []


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda buffers: None, "returned nothing"),
    "an empty list": (lambda buffers: [], "chose no samples"),
    "a number": (lambda buffers: 3, "returned a int"),
    "a batch": (lambda buffers: {"prompt": ["p0"]}, "returned a dict"),
    "a text": (lambda buffers: "p0", "returned a str"),
    "the buffers": (lambda buffers: buffers, "chose a EpisodeBuffer"),
    "texts": (lambda buffers: ["p0"], "chose a str"),
    "other columns": (lambda buffers: [{"a": 1}, {"a": 1, "b": 2}], r"different columns.*\['b'\]"),
    "no columns": (lambda buffers: [{}], "without columns"),
    "bad uids": (lambda buffers: [{"uid": "x", "prompt": "p"}], "column 'uid'"),
    "a coroutine": (asynchronous, "returned a coroutine"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", WRONG)
def test_wrong_samples_are_named_errors(what: str) -> None:
    replay(-1, episodes=1)
    sampler, words = WRONG[what]
    learner = Learner()
    with pytest.raises(BatchError, match=words) as raised:
        engine(learner, sampler).learn()
    assert learner.trained == []
    assert re.search(r"\((.*)test_replay.py:\d+\), episode 1$", raised.value.place)
    assert sampler.__qualname__ in raised.value.place
    assert raised.value.fix


def test_a_choice_that_would_be_dropped_whole_is_an_error() -> None:
    replay(-1, episodes=1, samples=4, train_global_batch_size=4, incomplete_step="drop_last")
    with pytest.raises(BatchError, match="chose 3 samples, fewer than one global batch of 4"):
        engine(Learner(), lambda buffers: buffers[0].samples[:3]).learn()


@pytest.mark.parametrize("lazily", [False, True])
def test_an_exception_in_a_sampler(lazily: bool) -> None:
    replay(-1, episodes=3)

    def choose(buffers: Any) -> Any:
        if len(buffers) == 2:
            raise KeyError("the original message")
        return buffers[-1].samples

    def choose_lazily(buffers: Any) -> Iterator[Any]:
        yield from choose(buffers)

    sampler = choose_lazily if lazily else choose
    with pytest.raises(ModuleError) as raised:
        engine(Learner(), sampler).learn()
    lines = str(raised.value).splitlines()
    assert "the original message" in lines[0]
    assert "replay sampler" in lines[-2]
    assert f"{sampler.__qualname__} (" in lines[-2]
    assert "test_replay.py:" in lines[-2]
    assert lines[-1] == "  episode: 2"
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_sampler_must_be_a_function() -> None:
    with pytest.raises(chatlearn.ChatLearnError, match="takes a function of the buffers"):
        engine(Learner()).set_replay_sampler([])  # type: ignore[arg-type]


def test_episodes_with_different_columns_cannot_be_joined() -> None:
    replay(-1, episodes=2)
    calls: list[int] = []

    def changing(data: Batch) -> Batch:
        calls.append(1)
        return data if len(calls) == 1 else {**data, "more": data["prompt"]}

    with pytest.raises(BatchError, match=r"episodes 0 and 1.*\['more'\]"):
        engine(Learner(), step=Step("step", changing)).learn()


def test_samples_that_no_checkpoint_could_keep_are_refused_before_training() -> None:
    replay(-1)
    learner = Learner()
    step = Step("step", lambda d: {**d, "thing": [{"a": object()} for _ in d["prompt"]]})
    with pytest.raises(CheckpointError, match="column 'thing' holds a object"):
        engine(learner, step=step).learn()
    assert learner.trained == []
    runtime()
    engine(learner, step=step).learn()  # without replay any object may travel
    assert learner.trained


# ---- saved and resumed ----------------------------------------------------------------------------


class Noisy(BaseModule):
    """Makes samples that differ with every draw, of every kind of column."""

    def forward_step(self, data: Batch, iteration: int) -> Batch:
        count = len(data["prompt"])
        lengths = torch.randint(1, 4, (count,)).tolist()
        return {
            **data,
            "noise": torch.rand(count),
            "ragged": [torch.rand(n) for n in lengths],
            "notes": [{"iteration": iteration, "n": n, "also": (1, None)} for n in lengths],
        }


class Hearing(BaseModule):
    """Takes down all that it is trained on."""

    def __init__(self, log: list[Any]) -> None:
        super().__init__("hearing")
        self.heard = log

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        for data in data_list:
            kinds = {key: type(column).__name__ for key, column in data.items()}
            ragged = [row.tolist() for row in data["ragged"]]
            numbers = plain(data["noise"]), ragged, data["notes"], plain(data["uid"])
            self.heard.append((iteration, data["prompt"], kinds, numbers))


def at_random(buffers: Any) -> list[Any]:
    pool = [sample for buffer in buffers for sample in buffer.samples]
    chosen = random.choices(pool, k=random.randint(3, 7))
    return [*chosen, pool[int(torch.randint(len(pool), ()))]]


def run(log: list[Any], folder: Path, episodes: int, **more: Any) -> Any:
    runtime(
        **{
            "output_dir": str(folder),
            "num_episode": episodes,
            "sample_per_episode": 4,
            "num_inference_per_prompt": 2,
            "train_global_batch_size": 3,
            "num_training_epoch": 2,
            "data_shuffle": True,
            "generation_batch_size": 3,
            "seed": 7,
            **more,
        }
    )
    return engine(Hearing(log), at_random, Noisy("noisy")).learn()


@pytest.mark.parametrize(
    "settings",
    [{"max_replay_episode": 2, "replay_episode_offset": 1}, {"max_replay_episode": -1}],
)
def test_a_resumed_run_trains_on_the_same_samples(tmp_path: Path, settings: Any) -> None:
    whole: list[Any] = []
    run(whole, tmp_path / "whole", 6, **settings)
    for every in (None, 1):
        parts: list[Any] = []
        folder = tmp_path / f"parts-{every}"
        for episodes in (1, 2, 5, 6):
            run(parts, folder, episodes, resume="auto", save_episode_interval=every, **settings)
        assert parts == whole
    older: list[Any] = []
    checkpoint = tmp_path / "parts-1/checkpoints/episode-000003"
    result = run(older, tmp_path / "older", 6, resume=str(checkpoint), **settings)
    assert older == whole[-len(older) :]
    assert 0 < len(older) < len(whole)
    assert result.metrics["replay/samples"] > 0


@pytest.mark.parametrize("where", ["environment", "sampler", "trainer"])
def test_a_failed_episode_is_repeated_exactly(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = {"max_replay_episode": 2, "resume": "auto"}
    whole: list[Any] = []
    run(whole, tmp_path / "whole", 4, **settings)
    parts: list[Any] = []
    calls: list[str] = []

    def failing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append("")
            if len(calls) == at:
                random.random()  # the failed attempt has drawn numbers
                torch.rand(1)
                raise OSError("failed")
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        if where == "environment":  # two calls per episode: the second of the third episode
            patched.setattr(Noisy, "forward_step", failing(Noisy.forward_step, 6))
        elif where == "sampler":
            patched.setitem(globals(), "at_random", failing(at_random, 3))
        else:  # what a train step has touched is not saved: the last checkpoint counts
            patched.setattr(Hearing, "train_step", failing(Hearing.train_step, whole[-1][0]))
            settings["save_episode_interval"] = 1
        with pytest.raises(ModuleError, match="failed"):
            run(parts, tmp_path / "parts", 4, **settings)
    if where == "trainer":
        parts = [heard for heard in parts if heard[0] < steps_of_checkpoint(tmp_path / "parts")]
    run(parts, tmp_path / "parts", 4, **settings)
    assert parts == whole


def test_a_failed_choice_loses_no_episode_of_a_lone_trainer(tmp_path: Path) -> None:
    settings: Any = {"kept": -1, "episodes": 4, "output_dir": str(tmp_path), "resume": "auto"}

    def failing(buffers: Any) -> Any:
        if len(buffers) == 3:
            raise OSError("failed")
        return buffers[-1].samples

    first, rest = Learner(), Learner()
    replay(**settings)
    with pytest.raises(ModuleError, match="failed"):
        engine(first, failing, environment=False).learn()
    engine(rest, environment=False).learn()
    assert first.trained == [["p0", "p1"], ["p2", "p3"]]
    assert rest.trained == [PROMPTS[:6], PROMPTS]


def steps_of_checkpoint(folder: Path) -> int:
    root = folder / "checkpoints"
    newest = root / (root / "latest").read_text().strip()
    return int(json.loads((newest / "checkpoint.json").read_text())["train_iteration"])


def test_replay_that_was_changed_between_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def resumed(name: str, **settings: Any) -> tuple[list[list[str]], str]:
        first = {"num_episode": 3, "sample_per_episode": 1, "output_dir": str(tmp_path / name)}
        runtime(**first, **saved)
        engine(Learner()).learn()
        capsys.readouterr()
        runtime(**{**first, "num_episode": 5, "resume": "auto"}, **settings)
        learner = Learner()
        engine(learner).learn()
        return learner.trained, capsys.readouterr().out

    saved: dict[str, Any] = {"max_replay_episode": 2}
    trained, out = resumed("more", max_replay_episode=4)
    assert trained == [["p1", "p2", "p3"], ["p1", "p2", "p3", "p4"]]
    assert "2 of 2 kept episodes: max_replay_episode=4 instead of 2" in out
    trained, out = resumed("fewer", max_replay_episode=1)
    assert trained == [["p3"], ["p4"]]
    assert "1 of 2 kept episodes" in out
    trained, out = resumed("later", max_replay_episode=2, replay_episode_offset=2)
    assert trained == [["p2", "p3"], ["p3", "p4"]]
    assert "1 of 2 kept episodes: replay_episode_offset=2 instead of 0" in out
    trained, out = resumed("off")
    assert trained == [["p3"], ["p4"]]
    assert "no replay now: 2 episodes kept for it are left behind" in out
    saved = {}
    trained, out = resumed("on", max_replay_episode=-1)
    assert trained == [["p3"], ["p3", "p4"]]
    assert "replay keeps episodes from 4 on: the run was saved without it" in out
    trained, out = resumed("on, later", max_replay_episode=-1, replay_episode_offset=4)
    assert trained == [["p3"], ["p4"]]
    assert "keeps episodes" not in out


# ---- the document ---------------------------------------------------------------------------------


def test_the_documents_example_runs(tmp_path: Path) -> None:
    (program,) = re.findall(
        r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL
    )
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(program, "replay.md", "exec"), names)
    assert names["trained"][0] == ["p0", "p1"]
    assert names["trained"][2][:2] == ["p4", "p5"]
    assert [len(samples) for samples in names["trained"]] == [2, 4, 4, 4]
    assert set(names["trained"][3][2:]) <= {"p2", "p3", "p4", "p5"}
