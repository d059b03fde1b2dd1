# SPDX-License-Identifier: Apache-2.0
"""Damaged and crafted checkpoints: found before anything is loaded, passed over by `newest`, never run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import nn

from chatlearn import BaseModule
from chatlearn.checkpoint import folder as checkpoints
from chatlearn.checkpoint.changes import refuse_other_shapes
from chatlearn.checkpoint.newest import newest
from chatlearn.checkpoint.state import RunState
from chatlearn.errors import CheckpointError

FILES = (
    "checkpoint.json",
    "rng.pt",
    "replay.pt",
    "metrics.jsonl",
    "modules/m/weights.safetensors",
    "modules/m/training.pt",
    "modules/m/training-1.pt",
)


class Module(BaseModule):
    def __init__(self, step: int = 0, replica: int = 0) -> None:
        super().__init__("m")
        self.model, self.step, self.replica_id = nn.Linear(3, 3), step, replica

    def training_state(self) -> dict[str, Any]:
        return {"step": self.step, "moments": torch.ones(8)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def save(root: Path, episode: int = 1) -> Path:
    replay = [{"episode_id": 0, "columns": {"x": torch.ones(2)}}]
    state = RunState(episode=episode, sequence=episode, metrics={"eval/x": 0.5})
    modules = [Module(episode), Module(episode, 1)]
    return checkpoints.save(
        root, state, modules, with_weights=["m"], replay=replay, metrics='{"episode":1}\n'
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def flip_last(path: Path) -> None:
    flip(path, path.stat().st_size - 1)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [cut, empty, flip_first, flip_middle, flip_last, become_a_folder, Path.unlink]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_before_anything_is_loaded(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    older, path = save(tmp_path, 1), save(tmp_path, 2)
    damage(path / name)
    with pytest.raises(CheckpointError) as raised:
        checkpoints.verify(path)
    assert raised.value.place.startswith(str(path))
    assert raised.value.fix
    found, notes = newest(tmp_path, verified=True)
    assert found == older
    (note,) = notes
    assert note.startswith("not resumed from episode-000002: ")


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    path = save(tmp_path)
    flip_middle(path / "modules/m/weights.safetensors")
    assert checkpoints.check(path).episode == 1  # the sizes are right
    with pytest.raises(CheckpointError, match=r"weights\.safetensors has other content than was"):
        checkpoints.verify(path)


def test_no_flipped_bit_changes_the_counters(tmp_path: Path) -> None:
    path = save(tmp_path)
    file = path / "checkpoint.json"
    content, state = file.read_bytes(), RunState.read(path)
    unnoticed = 0
    for at in range(0, len(content), 5):
        flip(file, at)
        with suppress(CheckpointError):
            assert RunState.read(path) == state, at  # a blank between values says nothing
            unnoticed += 1
        file.write_bytes(content)
    assert unnoticed < len(content) / 5 / 3


def seal(path: Path, **changes: Any) -> None:
    """Make a checkpoint's digests fit its files, as somebody may who means harm."""
    state = RunState.read(path)
    for name in state.files:
        if (file := path / name).is_file():
            state.files[name] = file.stat().st_size
            state.digests[name] = xxhash.xxh3_128(file.read_bytes()).hexdigest()
    for name, value in changes.items():
        setattr(state, name, value)
    (path / "checkpoint.json").write_text(state.to_json())


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".pt")])
@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_never_run(tmp_path: Path, name: str, is_archive: bool) -> None:
    older, path = save(tmp_path, 1), save(tmp_path, 2)
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps({"training": Bomb(exploded)})
    if is_archive:
        torch.save({"training": Bomb(exploded)}, path / name)
        with zipfile.ZipFile(path / name) as archive:
            assert any(entry.endswith("data.pkl") for entry in archive.namelist())
    else:
        (path / name).write_bytes(bomb)
    seal(path)
    with pytest.raises(CheckpointError, match="cannot be read") as raised:
        checkpoints.verify(path)
    assert raised.value.place == str(path / name)
    assert newest(tmp_path, verified=True)[0] == older
    with suppress(CheckpointError):
        checkpoints.load(path, [Module(), Module(replica=1)])
    with suppress(CheckpointError):
        checkpoints.load_replay(path)
    assert not exploded.exists()
    pickle.loads(bomb)  # which it would have done
    assert exploded.exists()


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/hostname", "modules/../../secret", "a\\..\\b", "x\0y"]
)
def test_names_that_lead_out_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    path = save(tmp_path / "checkpoints")
    seal(path, files={**RunState.read(path).files, name: 1})
    with pytest.raises(CheckpointError, match="names a file outside of it"):
        checkpoints.check(path)


def test_files_that_nobody_wrote_are_not_read(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, RunState(episode=1), [Module(7)], with_weights=["m"])
    torch.save({"training": {"step": 99}}, path / "modules/m/training-1.pt")
    torch.save([{"episode_id": 0, "columns": {}}], path / "replay.pt")
    module = Module(replica=1)
    checkpoints.load(path, [module])
    assert module.step == 7
    assert checkpoints.load_replay(path) is None


GARBAGE: dict[str, dict[str, Any]] = {
    "a text for a number": {"episode": "1"},
    "a fraction": {"episode": 1.5},
    "a truth": {"train_iteration": True},
    "below zero": {"prompts_drawn": -1},
    "huge": {"episode": 10**30},
    "huge within": {"iterations": {"a.b": 10**30}},
    "no method": {"iterations": {"a": 1}},
    "nothing": {"files": None},
    "sizes as texts": {"files": {"rng.pt": "1"}},
    "rows of texts": {"dataset_sizes": ["8"]},
    "datasets without rows": {"datasets": [{"sha256": ""}]},
    "a list of lists": {"datasets": [[]]},
    "a metric that is a text": {"metrics": {"a": "b"}},
    "keys of another version": {"later": 1},
}


@pytest.mark.parametrize("what", GARBAGE)
@pytest.mark.parametrize("form", [1, 2])
def test_garbage_in_the_counters_is_named(tmp_path: Path, what: str, form: int) -> None:
    values: dict[str, Any] = {"format": form, **GARBAGE[what]}
    if form == 2:  # as if it had been written so
        ordered = json.dumps(values, sort_keys=True).encode()
        values["digest"] = xxhash.xxh3_128(ordered).hexdigest()
    (tmp_path / "checkpoint.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="the checkpoint is damaged: ") as raised:
        RunState.read(tmp_path)
    (key,) = GARBAGE[what]
    assert key in raised.value.cause


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 2}', "null", "NaN", '"x"', "1e999"])
def test_other_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match="the checkpoint is damaged: "):
        RunState.read(tmp_path)


@pytest.mark.parametrize("found", [3, 0, -1, "2", None, 2.0, True, [1]])
def test_other_formats_are_named(tmp_path: Path, found: Any) -> None:
    (tmp_path / "checkpoint.json").write_text(json.dumps({"format": found}))
    with pytest.raises(
        CheckpointError, match=r"has format .*, and this version of chatlearn reads"
    ):
        RunState.read(tmp_path)


def test_tensors_that_do_not_fit_are_named() -> None:
    then = {"a": (2, 3), "b": (4,), "extra": (1,)}
    now = {"a": (3, 2), "b": (4,), "new": (1,)}
    with pytest.raises(CheckpointError) as raised:
        refuse_other_shapes(Path("c"), "policy", then, now)
    assert raised.value.cause == (
        "the checkpoint does not fit module 'policy': new is not in the checkpoint, "
        "extra is not in the model, a has shape [3, 2] instead of [2, 3]"
    )
    refuse_other_shapes(Path("c"), "policy", then, dict(then))
    with pytest.raises(CheckpointError, match=", and 92 more"):
        refuse_other_shapes(Path("c"), "policy", {}, {str(n): () for n in range(100)})
