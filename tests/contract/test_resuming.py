# SPDX-License-Identifier: Apache-2.0
"""A run that failed or was stopped anywhere goes on as if it never had been: hooks, random numbers, checkpoints."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_modules import Batch, as_format_1

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.errors import CheckpointError, ModuleError

Raised = KeyboardInterrupt, ModuleError


class World:
    """What the modules of a test did, and where one of them fails: which method of which module in which episode."""

    def __init__(self, place: tuple[str, int] | None = None, error: BaseException | None = None):
        self.place, self.error, self.episode = place, error, 0
        self.events: list[Any] = []

    def reach(self, place: str) -> None:
        if (place, self.episode) == self.place:
            self.place = None
            assert self.error is not None
            raise self.error


def drawn() -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), float(np.random.rand())


class Drawing(BaseModule):
    """Draws random numbers in every method, takes them down, and keeps how many episodes it has ended."""

    def __init__(self, name: str, world: World) -> None:
        super().__init__(name)
        self.world = world

    def setup(self) -> None:
        self.ended: list[float] = []

    def note(self, method: str) -> None:
        if method == "before_episode" and self.name == "first":
            self.world.episode += 1
        numbers = drawn()
        self.world.reach(f"{self.name}.{method}")
        self.world.events.append((self.world.episode, self.name, method, numbers, sum(self.ended)))

    def before_episode(self) -> None:
        self.note("before_episode")

    def after_episode(self) -> None:
        self.note("after_episode")
        self.ended.append(random.random())

    def forward_step(self, data: Batch) -> Batch:
        self.note("forward_step")
        return data

    def eval_step(self, data: Batch, iteration: int) -> Batch:
        number = drawn()[0]
        self.world.reach(f"{self.name}.eval_step")
        self.log(level=sum(self.ended) + number, calls=float(iteration))
        return data

    def train_step(self, data_list: list[Batch], iteration: int) -> None:
        self.note(f"train_step {iteration}")

    def training_state(self) -> dict[str, Any]:
        return {"ended": self.ended}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.ended = state["ended"]

    def save_checkpoint(self, iteration: int) -> None:
        self.world.reach(f"{self.name}.save_checkpoint")

    def load_checkpoint(self, iteration: int) -> None:
        if self.name == "first":
            self.world.episode = iteration // 2


def learn(world: World, folder: Path, episodes: int, **more: Any) -> list[Any]:
    values = {"num_episode": episodes, "output_dir": str(folder), "train_global_batch_size": 2}
    chatlearn.init(
        {"runtime": {"sample_per_episode": 4, "generation_batch_size": 2, **values, **more}}
    )
    first, second, last = (Drawing(name, world) for name in ("first", "second", "last"))
    engine = Engine(
        Environment(lambda b: second.forward_step(first.forward_step(b))),
        Trainer(lambda b: last.train_step(b)),
        Evaluator(lambda b: first.eval_step(b)).set_dataset(["e"]),
    )
    engine.set_dataset(list("abcdefg")).learn()
    return world.events


def saved(folder: Path) -> list[str]:
    return sorted(path.name[-1] for path in (folder / "checkpoints").glob("episode-*"))


def due(folder: Path, episode: int) -> list[str]:
    path = folder / f"checkpoints/episode-{episode:06d}/checkpoint.json"
    return json.loads(path.read_text())["after_episode_due"]


# ---- after_episode, which comes after the checkpoint of its episode ------------------------------------------------


@pytest.mark.parametrize("interval", [None, 1, 2])
def test_hooks_and_what_they_draw_go_on_from_every_checkpoint(
    tmp_path: Path, interval: int | None
) -> None:
    whole = learn(World(), tmp_path / "whole", 4)
    parts = learn(World(), tmp_path / "part", 2, save_episode_interval=interval)
    assert due(tmp_path / "part", 2) == (["first", "second", "last"] if interval else [])
    parts += resumed(
        tmp_path / "part", 4, after_again=bool(interval), save_episode_interval=interval
    )
    assert parts == whole


def resumed(folder: Path, episodes: int, *, after_again: bool, **more: Any) -> list[Any]:
    """Resume; return the events but for the repeated end of the last episode, which must have been repeated."""
    events = learn(World(), folder, episodes, resume="auto", **more)
    assert events[0][2] == ("after_episode" if after_again else "before_episode")
    return events[3:] if after_again else events


def test_the_repeated_after_episode_sees_what_the_first_one_saw(tmp_path: Path) -> None:
    whole = learn(World(), tmp_path, 4, save_episode_interval=1)
    shutil.rmtree(tmp_path / "checkpoints/episode-000004")
    shutil.rmtree(tmp_path / "checkpoints/episode-000003")
    again = learn(World(), tmp_path, 4, resume="auto")
    start = next(i for i, e in enumerate(whole) if e[:3] == (2, "first", "after_episode"))
    assert again == whole[start:]


def test_a_run_with_nothing_left_to_do_calls_no_hook(tmp_path: Path) -> None:
    learn(World(), tmp_path, 2, save_episode_interval=1)
    assert learn(World(), tmp_path, 2, resume="auto") == []
    assert due(tmp_path, 2) == ["first", "second", "last"]


def test_checkpoints_from_before_it_was_kept_go_on_as_they_did(tmp_path: Path) -> None:
    learn(World(), tmp_path, 2, save_episode_interval=1)
    as_format_1(tmp_path / "checkpoints/episode-000002", "after_episode_due")
    assert learn(World(), tmp_path, 3, resume="auto")[0][2] == "before_episode"


def test_resuming_elsewhere_leaves_a_checkpoint_there_whatever_stops_it(tmp_path: Path) -> None:
    whole = learn(World(), tmp_path / "whole", 4)
    learn(World(), tmp_path / "a", 2, save_episode_interval=1)
    world = World(("first.forward_step", 3), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        learn(world, tmp_path / "b", 4, resume=str(tmp_path / "a/checkpoints/episode-000002"))
    assert due(tmp_path / "b", 2) == []
    again = learn(World(), tmp_path / "b", 4, resume="auto")
    assert again == [event for event in whole if event[0] > 2]


# ---- failures ------------------------------------------------------------------------------------------------------

PLACES = [
    "first.before_episode",
    "second.before_episode",
    "first.forward_step",
    "second.forward_step",
    "last.train_step 4",
    "last.train_step 5",
    "first.eval_step",
    "first.save_checkpoint",
    "first.after_episode",
    "second.after_episode",
    "last.after_episode",
]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), ValueError("wrong")], ids=repr
)
@pytest.mark.parametrize(
    ("place", "interval"),
    [
        (place, interval)
        for place in PLACES
        for interval in (None, 1)
        if interval or place != "first.save_checkpoint"  # without an interval nothing is saved then
    ],
)
def test_whatever_fails_where_the_run_goes_on_as_if_it_had_not(
    tmp_path: Path, place: str, interval: int | None, error: BaseException, capsys: Any
) -> None:
    """The third of five episodes fails once."""
    more = {"save_episode_interval": interval, "eval_episode_interval": 1}
    whole = learn(World(), tmp_path / "whole", 5, **more)
    run, world = tmp_path / "run", World((place, 3), error)
    capsys.readouterr()
    with pytest.raises(Raised) as raised:
        learn(world, run, 5, **more)
    if isinstance(error, KeyboardInterrupt):
        assert raised.value is error
    else:  # a script that exits in the middle of a run has failed, whatever its exit status was to be
        assert isinstance(raised.value, ModuleError)
        assert raised.value.__cause__ is error
    said = capsys.readouterr().out
    is_trained = "train_step" in place
    done = 3 if place.split(".")[1] in ("eval_step", "save_checkpoint", "after_episode") else 2
    if is_trained:
        assert "episode 3 had begun to train, which cannot be saved" in said
        latest = "the last checkpoint is " if interval else "there is no checkpoint"
        assert latest in said
    if is_trained and not interval:
        assert not saved(run)
        return
    assert saved(run)[-1] == str(done)
    rows = [
        json.loads(line)["episode"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[1:] == [*range(1, done + 1)]
    again = learn(World(), run, 5, resume="auto", **more)
    module, method = place.split(".")
    first = (done, "first", "after_episode")
    if not interval and method == "after_episode":
        first = (3, module, "after_episode")  # those before it have had it
    elif not interval and done == 2:
        first = (3, "first", "before_episode")
    assert again[0][:3] == first
    assert again == whole[whole.index(again[0]) :]


def test_a_run_that_failed_has_a_summary(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match="wrong"):
        learn(World(("first.forward_step", 3), ValueError("wrong")), tmp_path, 5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["episodes"], summary["complete"]) == (2, False)


def test_a_keyboard_interrupt_in_another_thread_is_kept(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            learn(World(("first.forward_step", 3), KeyboardInterrupt()), tmp_path, 5)
        except KeyboardInterrupt as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught
    assert saved(tmp_path) == ["2"]


# ---- damage --------------------------------------------------------------------------------------------------------


def test_auto_goes_on_from_the_newest_whole_checkpoint_and_says_so(
    tmp_path: Path, capsys: Any
) -> None:
    whole = learn(World(), tmp_path / "whole", 4)
    run = tmp_path / "run"
    learn(World(), run, 3, save_episode_interval=1)
    (run / "checkpoints/episode-000003/rng.pt").write_bytes(b"123")
    capsys.readouterr()
    again = learn(World(), run, 4, resume="auto")
    said = capsys.readouterr().out
    assert "not resumed from episode-000003: the checkpoint is damaged: rng.pt has 3 bytes" in said
    assert f"resumed from {run / 'checkpoints/episode-000002'}" in said
    assert again == whole[-len(again) :]
    assert again[0][:3] == (2, "first", "after_episode")
    assert not (run / "earlier").exists()


def test_no_whole_checkpoint_is_an_error_that_moves_nothing(tmp_path: Path) -> None:
    learn(World(), tmp_path, 2, save_episode_interval=1)
    for path in (tmp_path / "checkpoints").glob("episode-*/rng.pt"):
        path.unlink()
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(CheckpointError, match="no whole checkpoint") as raised:
        learn(World(), tmp_path, 3, resume="auto")
    assert "episode-000001: the checkpoint is damaged: rng.pt is missing" in str(raised.value)
    assert "fix: bring the files back, or start anew with runtime.resume=never" in str(raised.value)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before
    named = str(tmp_path / "checkpoints/episode-000002")
    with pytest.raises(CheckpointError, match=r"rng\.pt is missing"):
        learn(World(), tmp_path, 3, resume=named)
    learn(World(), tmp_path, 1, resume="never")
    assert (tmp_path / "earlier/0001/checkpoints/episode-000002").is_dir()


def test_a_checkpoint_set_aside_by_a_crash_is_resumed_from(tmp_path: Path, capsys: Any) -> None:
    learn(World(), tmp_path, 2)
    path = tmp_path / "checkpoints/episode-000002"
    path.rename(path.with_name(".replaced-1"))
    capsys.readouterr()
    assert learn(World(), tmp_path, 3, resume="auto")[0][0] == 3
    assert f"resumed from {path}: 2 episodes" in capsys.readouterr().out
    assert saved(tmp_path) == ["2", "3"]


# ---- evaluations that were interrupted, or failed -------------------------------------------------------------------


def measured(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]


@pytest.mark.parametrize("interval", [None, 1])
@pytest.mark.parametrize("last", [3, 5], ids=["in the last episode", "in between"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("wrong")], ids=repr)
def test_an_evaluation_that_was_not_done_is_made_on_resume(
    tmp_path: Path, error: BaseException, last: int, interval: int | None
) -> None:
    """It is part of its episode's row, before its `after_episode`, and of what checkpoints are ranked by."""
    more = {"save_episode_interval": interval, "eval_episode_interval": 1}
    more |= {"keep_last": 1, "keep_best": 1, "best_metric": "eval/first/level"}
    whole = learn(World(), tmp_path / "whole", last, **more)
    run = tmp_path / "run"
    with pytest.raises(Raised):
        learn(World(("first.eval_step", 3), error), run, last, **more)
    rows = measured(run)
    assert [any(name.startswith("eval/") for name in row) for row in rows] == [
        False,
        True,
        True,
        False,
    ]
    assert due(run, 3) == ["first", "second", "last"]
    again = learn(World(), run, last, resume="auto", **more)
    assert again == whole[whole.index((3, "first", "after_episode", *again[0][3:])) :]
    assert measured(run) == measured(tmp_path / "whole")
    assert due(run, last) == due(tmp_path / "whole", last)
    if interval:  # what was resumed from stays, and is ranked now
        found = json.loads((run / "checkpoints/episode-000003/checkpoint.json").read_text())
        assert found["metrics"]["eval/first/level"] == measured(run)[3]["eval/first/level"]
        assert not found["evaluation_due"]
    assert learn(World(), run, last, resume="auto", **more) == []
    assert measured(run) == measured(tmp_path / "whole")
