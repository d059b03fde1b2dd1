# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not there, what they hold, what is refused."""

from __future__ import annotations

import collections
import enum
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from chatlearn import BaseModule
from chatlearn.checkpoint import folder as checkpoints
from chatlearn.checkpoint.newest import newest
from chatlearn.checkpoint.state import GivenData, RunState
from chatlearn.errors import CheckpointError


class Module(BaseModule):
    def __init__(self, name: str = "m", model: nn.Module | None = None, **state: Any) -> None:
        super().__init__(name)
        self.model = model
        self.state = state

    def training_state(self) -> dict[str, Any]:
        return self.state

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.state = state


def save(root: Path, *modules: Module, episode: int = 1) -> Path:
    names = [module.name for module in modules]
    return checkpoints.save(root, RunState(episode=episode), modules, with_weights=names)


def test_modules_come_back_as_they_were(tmp_path: Path) -> None:
    tied = nn.Module()
    tied.a = nn.Linear(2, 2)
    tied.b = tied.a
    tied.register_buffer("steps", torch.tensor(3))
    state = {"lr": 0.1, "steps": [1, 2], "moments": {0: torch.ones(2)}, "none": None}
    path = save(tmp_path, Module("m", tied, **state), Module("empty"))
    assert not (path / "modules/empty").exists()
    other = nn.Module()
    other.a = nn.Linear(2, 2)
    other.b = other.a
    other.register_buffer("steps", torch.tensor(0))
    loaded = Module("m", other)
    checkpoints.load(path, [loaded], required=["m"])
    assert torch.equal(other.b.weight, tied.a.weight)
    assert int(other.steps) == 3
    assert str(loaded.state) == str(state)


def test_plain_values_in_a_state_dict(tmp_path: Path) -> None:
    class Plain(Module):
        def state_dict(self) -> dict[str, Any]:
            return {"n": 3, "t": torch.ones(1), "s": "x"}

        def load_state_dict(self, state: Any) -> None:
            self.got = dict(state)

    path = save(tmp_path, Plain())
    loaded = Plain()
    checkpoints.load(path, [loaded], required=["m"])
    assert loaded.got == {"n": 3, "t": torch.ones(1), "s": "x"}


def test_random_generators_go_on(tmp_path: Path) -> None:
    path = save(tmp_path)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    checkpoints.load(path, [])
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    first, second = save(tmp_path, episode=1), save(tmp_path, episode=2)
    assert newest(tmp_path)[0] == second
    (second / "checkpoint.json").unlink()  # somebody removed it
    assert newest(tmp_path)[0] == first
    (tmp_path / "latest").unlink()
    assert newest(tmp_path)[0] == first


def test_latest_decides_after_going_back(tmp_path: Path) -> None:
    save(tmp_path, episode=9)
    again = save(tmp_path, episode=4)
    assert newest(tmp_path)[0] == again


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut": lambda p: (p / "modules/m/weights.safetensors").write_bytes(b"123"),
    "weights gone": lambda p: (p / "modules/m/weights.safetensors").unlink(),
    "rng gone": lambda p: (p / "rng.pt").unlink(),
    "counters empty": lambda p: (p / "checkpoint.json").write_text(""),
    "counters cut": lambda p: (p / "checkpoint.json").write_text('{"format": 1,'),
    "counters of another kind": lambda p: (p / "checkpoint.json").write_text("[]"),
    "counters binary": lambda p: (p / "checkpoint.json").write_bytes(b"\xff\x00"),
    "counters gone": lambda p: (p / "checkpoint.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_passed_over(tmp_path: Path, damage: str) -> None:
    paths = [save(tmp_path, Module("m", nn.Linear(2, 2)), episode=n) for n in (1, 2, 3)]
    before = sorted(tmp_path.rglob("*"))
    DAMAGES[damage](paths[2])
    found, notes = newest(tmp_path)
    assert found == paths[1]
    (note,) = notes
    assert note.startswith("not resumed from episode-000003: ")
    DAMAGES[damage](paths[1])
    assert newest(tmp_path)[0] == paths[0]
    assert len(newest(tmp_path)[1]) == 2
    DAMAGES[damage](paths[0])
    with pytest.raises(CheckpointError, match="no whole checkpoint") as raised:
        newest(tmp_path)
    assert all(f"episode-00000{n}: " in raised.value.cause for n in (1, 2, 3))
    assert "runtime.resume=never" in raised.value.fix
    assert set(tmp_path.rglob("*")) <= set(before)


def test_episodes_are_ordered_by_number(tmp_path: Path) -> None:
    save(tmp_path, episode=999_999)
    last = save(tmp_path, episode=1_000_000)
    (tmp_path / "latest").unlink()
    assert newest(tmp_path) == (last, [])


def folder(latest: Path) -> None:
    latest.unlink()
    latest.mkdir()


def dangling(latest: Path) -> None:
    latest.unlink()
    latest.symlink_to("nowhere")


LATEST: dict[str, Callable[[Path], object]] = {
    "binary": lambda latest: latest.write_bytes(b"\xff\xfe\x00"),
    "empty": lambda latest: latest.write_text(""),
    "names nothing": lambda latest: latest.write_text("episode-000099\n"),
    "leads elsewhere": lambda latest: latest.write_text("../../episode-000001"),
    "gone": lambda latest: latest.unlink(),
    "folder": folder,
    "dangling": dangling,
}


@pytest.mark.parametrize("what", LATEST)
def test_latest_only_helps(tmp_path: Path, what: str) -> None:
    save(tmp_path, episode=1)
    last = save(tmp_path, episode=2)
    LATEST[what](tmp_path / "latest")
    assert newest(tmp_path) == (last, [])
    save(tmp_path, episode=1)
    assert (tmp_path / "latest").read_text() == "episode-000001\n"


def test_a_folder_with_files_where_latest_belongs_is_named_before_writing(tmp_path: Path) -> None:
    save(tmp_path, episode=1)
    folder(tmp_path / "latest")
    (tmp_path / "latest/mine").write_text("")
    with pytest.raises(CheckpointError, match="latest is a folder") as raised:
        save(tmp_path, episode=2)
    assert raised.value.place == str(tmp_path / "latest")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["episode-000001", "latest"]
    assert (tmp_path / "latest/mine").exists()


def crash_while_replacing(tmp_path: Path) -> None:
    """Save episode 2 anew in a process that dies when the old one was set aside, before the new one has its name."""
    child = os.fork()
    if child == 0:
        rename = Path.rename

        def dying(self: Path, target: Path) -> Path:
            if self.name.startswith(".partial"):
                os._exit(9)
            return rename(self, target)

        Path.rename = dying  # pyright: ignore[reportAttributeAccessIssue]
        save(tmp_path, Module(step="new"), episode=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def step_of(path: Path) -> Any:
    loaded = Module()
    checkpoints.load(path, [loaded])
    return loaded.state["step"]


def test_a_crash_while_replacing_loses_no_episode(tmp_path: Path) -> None:
    save(tmp_path, Module(step=1), episode=1)
    path = save(tmp_path, Module(step=2), episode=2)
    crash_while_replacing(tmp_path)
    assert not path.exists()
    found, notes = newest(tmp_path)
    assert found is not None
    assert (step_of(found), notes) == (2, [])
    checkpoints.restore(tmp_path)
    assert newest(tmp_path) == (path, [])
    crash_while_replacing(tmp_path)
    save(tmp_path, Module(step=3), episode=3)  # which clears what crashes left
    assert step_of(path) == 2
    names = [f"episode-00000{n}" for n in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "latest"]


def test_a_failure_while_replacing_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, Module(step=2), episode=2)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(tmp_path, Module(step="new"), episode=2)
    assert newest(tmp_path) == (path, [])
    assert step_of(path) == 2


def test_what_was_set_aside_never_hides_the_newer_one(tmp_path: Path) -> None:
    path = save(tmp_path, Module(step="old"), episode=2)
    path.rename(tmp_path / ".replaced-1")
    save(tmp_path / "elsewhere", Module(step="new"), episode=2).rename(path)
    checkpoints.restore(tmp_path)
    assert newest(tmp_path) == (path, [])
    assert step_of(path) == "new"


def test_saving_the_same_episode_anew_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, Module(step=1))
    path = save(tmp_path, Module(step=2))
    loaded = Module()
    checkpoints.load(path, [loaded])
    assert loaded.state == {"step": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["episode-000001", "latest"]


def test_what_a_crash_left_behind_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-1").mkdir()
    save(tmp_path)
    assert not (tmp_path / ".partial-1").exists()


def test_a_failed_save_leaves_the_last_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, episode=1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, episode=2)
    assert newest(tmp_path)[0] == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["episode-000001", "latest"]


@pytest.mark.parametrize(
    "name", ["checkpoint.json", "rng.pt", "modules/m/weights.safetensors", "modules/m/training.pt"]
)
@pytest.mark.parametrize("damage", ["cut", "scrambled", "removed"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, Module("m", nn.Linear(2, 2), step=1))
    file = path / name
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(b"\xff" * len(content))
    loaded = Module("m", nn.Linear(2, 2))
    with pytest.raises(CheckpointError) as raised:
        checkpoints.load(path, [loaded], required=["m"])
    place = name if (name, damage) != ("checkpoint.json", "removed") else path.name
    assert place in raised.value.place


def test_modules_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, Module("m", nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match="does not fit module 'm'"):
        checkpoints.load(path, [Module("m", nn.Linear(3, 2))])
    with pytest.raises(CheckpointError, match="no weights of module 'other'"):
        checkpoints.load(path, [Module("other", nn.Linear(2, 2))], required=["other"])
    checkpoints.load(path, [Module("other", nn.Linear(2, 2))])


class Kind(enum.StrEnum):
    A = "a"


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {"deep": [np.float32(1)]},
        Path("x"),
        Kind.A,  # a text, but of a class that would have to be unpickled
        collections.namedtuple("Pair", "a b")(1, 2),
        collections.defaultdict(list),
        {Path("key"): 1},
    ],
)
def test_state_that_could_not_be_loaded_again_is_refused_at_once(
    tmp_path: Path, value: Any
) -> None:
    with pytest.raises(CheckpointError, match="module 'm' holds a"):
        save(tmp_path, Module(x=value))
    assert newest(tmp_path) == (None, [])


def test_what_is_not_refused_can_be_loaded(tmp_path: Path) -> None:
    values = [1, 2.5, True, None, "é", b"x", 1j, 2**80, torch.float16, torch.ones(2, 0)]
    state = {
        "values": [*values, torch.nn.Parameter(torch.ones(1)), torch.Size([1]), bytearray(b"x")],
        "containers": [(1, {2}), {(1, "a"): {}}, collections.OrderedDict(a=[]), Counter("ab")],
    }
    path = save(tmp_path, Module(**state))
    loaded = Module()
    checkpoints.load(path, [loaded])
    assert str(loaded.state) == str(state)


def test_episodes_kept_for_replay(tmp_path: Path) -> None:
    kept = [{"episode_id": 3, "columns": {"x": torch.ones(2), "y": ["a", {"b": (1, None)}]}}]
    path = checkpoints.save(tmp_path, RunState(episode=4), [], with_weights=[], replay=kept)
    assert str(checkpoints.load_replay(path)) == str(kept)
    assert checkpoints.load_replay(save(tmp_path)) is None
    file = path / "replay.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match=r"replay\.pt has"):
        checkpoints.check(path)
    file.write_bytes(b"\xff" * len(content))
    with pytest.raises(CheckpointError, match="damaged") as raised:
        checkpoints.load_replay(path)
    assert "replay.pt" in raised.value.place


def test_checking_reads_no_large_file(tmp_path: Path) -> None:
    state = RunState(episode=1, datasets=[GivenData(2, "x")], replay={"a": 1})
    path = checkpoints.save(tmp_path, state, [Module(x=1)], with_weights=["m"])
    (path / "rng.pt").write_bytes(b"\xff" * (path / "rng.pt").stat().st_size)
    assert checkpoints.check(path) == state


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"format": 99}, "has format 99, and this version of chatlearn reads 1 to 2"),
        ({"format": 1, "unknown": 1}, "damaged"),
        ([], "damaged: checkpoint.json: it holds no JSON object"),
        ({"format": 1, "files": []}, "damaged: checkpoint.json: files: Input should be an object"),
        (
            {"format": 1, "episode": "3"},
            "damaged: checkpoint.json: episode: Input should be a valid integer",
        ),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, content: Any, what: str) -> None:
    (tmp_path / "checkpoint.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=what):
        RunState.read(tmp_path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").touch()
    with pytest.raises(CheckpointError, match=r"is damaged: checkpoint\.json: Expecting"):
        RunState.read(tmp_path)


def test_counters_survive(tmp_path: Path) -> None:
    state = RunState(3, 12, 24, [8], {"a.b.forward_step": 5}, {"a": 2}, config_digest="digest")
    path = checkpoints.save(tmp_path, state, [], with_weights=[])
    assert RunState.read(path) == state
    assert state.counts() == Counter({("a.b", "forward_step"): 5})
