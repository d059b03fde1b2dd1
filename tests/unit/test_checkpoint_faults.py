# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disks that fail: full, read-only, gone, at every single operation; and retention on them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chatlearn import BaseModule
from chatlearn.checkpoint import folder as checkpoints
from chatlearn.checkpoint.newest import named, newest
from chatlearn.checkpoint.retention import Retention
from chatlearn.checkpoint.state import RunState
from chatlearn.errors import CheckpointError


class Module(BaseModule):
    def __init__(self, step: int = 0) -> None:
        super().__init__("m")
        self.model = nn.Linear(40, 40)
        self.step = step

    def training_state(self) -> dict[str, Any]:
        return {"step": self.step, "moments": torch.ones(3000)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def save(root: Path, episode: int, step: int) -> Path:
    state = RunState(episode=episode, sequence=step)
    replay = [{"episode_id": 0, "columns": {"x": torch.ones(500)}}]
    rows = '{"episode":1}\n' * 100
    return checkpoints.save(
        root, state, [Module(step)], with_weights=["m"], replay=replay, metrics=rows
    )


def step_of(path: Path) -> int:
    loaded = Module()
    checkpoints.load(path, [loaded], required=["m"])
    return loaded.step


class Faults:
    """Makes the nth of the operations on files fail, those of Python and of pathlib; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root, self.patch = str(root), monkeypatch
        self.count, self.fails_at, self.number = 0, 0, errno.ENOSPC
        self.armed = False

    def arm(self, fails_at: int, number: int) -> None:
        self.count, self.fails_at, self.number, self.armed = 0, fails_at, number, True

    def check(self, path: object) -> None:
        is_ours = isinstance(path, int) or str(path).startswith(self.root)
        if not (self.armed and is_ours):
            return
        self.count += 1
        if self.count == self.fails_at:
            raise OSError(self.number, os.strerror(self.number), None)

    def install(self) -> None:
        import io

        for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "open"):
            self.patch.setattr(os, name, self.wrapped(getattr(os, name)))
        opened = io.open

        def opening(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            self.check(path)
            stream = opened(path, mode, *rest, **more)
            return Writing(stream, self) if mode == "wb" and self.armed else stream

        self.patch.setattr(io, "open", opening)  # what pathlib opens with

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(path: Any, *rest: Any, **more: Any) -> Any:
            self.check(path)
            return function(path, *rest, **more)

        return checked


class Writing:
    """A file whose every write is an operation that may fail."""

    def __init__(self, stream: Any, faults: Faults) -> None:
        self.stream, self.faults = stream, faults

    def write(self, content: Any) -> int:
        self.faults.check(0)
        return self.stream.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Faults:
    found = Faults(monkeypatch, tmp_path)
    found.install()
    return found


def error_of(function: Callable[[], object]) -> CheckpointError | None:
    try:
        function()
    except CheckpointError as error:
        return error
    return None


FIXES = {
    errno.ENOSPC: ("No space left on device", "free space there"),
    errno.EROFS: ("Read-only file system", "make the folder writable"),
    errno.EIO: ("Input/output error", "see whether that disk works"),
}


@pytest.mark.parametrize("number", FIXES, ids=errno.errorcode.get)
@pytest.mark.parametrize("episode", [2, 1], ids=["next", "replacing"])
def test_every_operation_of_a_write_may_fail(
    tmp_path: Path, faults: Faults, number: int, episode: int
) -> None:
    """The nth fails, for all n: an error with cause, place and fix, or a checkpoint; always a whole one remains."""
    root = tmp_path / "checkpoints"
    save(root, 1, 1)
    fails_at, failed = 0, 0
    while True:
        fails_at += 1
        faults.arm(fails_at, number)
        error = error_of(partial(save, root, episode, fails_at + 1))
        faults.armed = False
        if error is not None:
            failed += 1
            cause, fix = FIXES[number]
            assert cause in error.cause, fails_at
            assert error.place.startswith(str(root))
            assert fix in error.fix
        found, notes = newest(root, verified=True)
        assert found is not None, fails_at
        assert not notes, fails_at
        latest = named(root)
        assert latest is not None
        checkpoints.verify(root / latest)  # what it names is always whole
        assert step_of(found) in (1, *range(2, fails_at + 2))
        if fails_at > faults.count:
            break
    assert step_of(found) == fails_at + 1  # the last one met no fault
    assert failed > 20
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]


def test_all_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, the folders that name them, and what `latest` will say; then the renames; then their folder."""
    done: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    open_, fsync, rename, replace = os.open, os.fsync, os.rename, os.replace

    def opening(path: Any, *rest: Any, **more: Any) -> int:
        descriptor = open_(path, *rest, **more)
        opened[descriptor] = str(path)
        return descriptor

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(first: Any, *rest: Any, **more: Any) -> Any:
            done.append((what, opened[first] if what == "fsync" else str(first)))
            return call(first, *rest, **more)

        return calling

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", noted("fsync", fsync))
    monkeypatch.setattr(os, "rename", noted("rename", rename))
    monkeypatch.setattr(os, "replace", noted("replace", replace))
    path = save(tmp_path, 1, 1)
    renames = [number for number, (what, _) in enumerate(done) if what != "fsync"]
    partial, pointer = (Path(done[number][1]) for number in renames)
    inside = [str(partial / found.relative_to(path)) for found in path.rglob("*")]
    before = {name for what, name in done[: renames[0]]}
    assert before == {*inside, str(partial), str(pointer), str(tmp_path)}
    assert len(inside) > 5
    assert [what for what, _ in done[renames[0] : renames[1] + 1]] == ["rename", "replace"]
    assert done[renames[1] + 1 :] == [("fsync", str(tmp_path))]


def limited(root: Path, limit: int) -> int:
    """Save in a process whose files can have `limit` bytes, and return its exit status: 3 for a named error."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(root, 2, 2)
    except CheckpointError as error:
        os._exit(3 if "File too large" in error.cause and "free space" in error.fix else 4)
    except BaseException:
        os._exit(5)
    os._exit(0)


def test_every_byte_may_be_the_last_that_fits(tmp_path: Path) -> None:
    """Real failures of real writes, in C++, Rust and Python: no file can have more than so many bytes."""
    path = save(tmp_path, 1, 1)
    largest = max(file.stat().st_size for file in path.rglob("*"))
    limits = [0, 1, 17, 64, 500, 1300, 1500, 2500, 4000, 6000, 6500, 9000, 12000, largest * 9 // 10]
    ends = [limited(tmp_path, limit) for limit in limits]
    assert ends == [3] * len(limits)
    assert newest(tmp_path, verified=True) == (path, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "latest"]
    assert limited(tmp_path, 10 * largest) == 0
    assert step_of(tmp_path / "episode-000002") == 2


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of `size` bytes at `folder`, where this user may."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "96k") as disk:
        saved = save(disk, 1, 1)
        error = None
        while error is None:
            episode = int(saved.name[-6:])
            assert episode < 9
            error = error_of(partial(save, disk, episode + 1, episode + 1))
            saved = checkpoints.path_of(disk, episode + (error is None))
        assert "No space left on device" in error.cause
        assert "free space there" in error.fix
        assert newest(disk, verified=True) == (saved, [])
        assert not list(disk.glob(".*"))


def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        first = save(disk, 1, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match="Read-only file system") as raised:
            save(disk, 2, 2)
        assert "make the folder writable" in raised.value.fix
        assert newest(disk, verified=True) == (first, [])


def test_a_run_folder_that_vanished_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory") as raised:
        save(tmp_path / "run" / "checkpoints", 1, 1)
    assert "leave the run's folder in place" in raised.value.fix
    assert not (tmp_path / "run").exists()


# ---- retention ----------------------------------------------------------------------------------------------------


def measured(root: Path, *scores: float | None) -> None:
    for number, score in enumerate(scores, 1):
        metrics = {} if score is None else {"eval/r/rewards": score}
        state = RunState(episode=number, sequence=number, metrics=metrics)
        checkpoints.save(root, state, [Module(number)], with_weights=["m"])


def left(root: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in root.glob("episode-*"))


@pytest.mark.parametrize(
    ("last", "best", "metric", "stay"),
    [
        (None, 2, "eval/r/rewards", [1, 2, 3, 4, 5, 6]),
        (1, 0, None, [6]),
        (2, 0, "eval/r/rewards", [5, 6]),
        (9, 0, None, [1, 2, 3, 4, 5, 6]),
        (1, 1, "eval/r/rewards", [4, 6]),  # of equals the newer
        (1, 2, "eval/r/rewards", [2, 4, 6]),
        (1, 1, "-eval/r/rewards", [1, 6]),
        (2, 1, "eval/other", [5, 6]),
        (1, 9, "eval/r/rewards", [1, 2, 4, 5, 6]),  # the third was not measured
    ],
)
def test_what_stays(
    tmp_path: Path, last: int | None, best: int, metric: str | None, stay: list[int]
) -> None:
    measured(tmp_path, 0.1, 0.9, None, 0.9, 0.5, 0.3)

    def score(metrics: Mapping[str, float]) -> float | None:
        value = metrics.get((metric or "").removeprefix("-"))
        return -value if value is not None and str(metric).startswith("-") else value

    assert Retention(last, best, score).apply(tmp_path, keep=[]) == []
    assert left(tmp_path) == stay
    assert newest(tmp_path) == (tmp_path / "episode-000006", [])


def test_what_latest_names_and_what_was_resumed_from_stay(tmp_path: Path) -> None:
    measured(tmp_path, *[None] * 6)
    (tmp_path / "latest").write_text("episode-000003\n")
    Retention(1).apply(tmp_path, keep=[tmp_path / "episode-000002"])
    assert left(tmp_path) == [2, 3]
    (tmp_path / "latest").unlink()
    Retention(1).apply(tmp_path, keep=[])
    assert left(tmp_path) == [3]


def test_damaged_ones_neither_count_nor_go(tmp_path: Path) -> None:
    measured(tmp_path, *[None] * 4)
    (tmp_path / "episode-000004/rng.pt").unlink()
    (tmp_path / "episode-000001/checkpoint.json").write_text("")
    (tmp_path / "latest").unlink()
    Retention(1).apply(tmp_path, keep=[])
    assert left(tmp_path) == [1, 3, 4]


def test_newest_is_what_was_written_last(tmp_path: Path) -> None:
    measured(tmp_path, *[None] * 3)
    state = RunState(episode=2, sequence=4)  # after going back to the first
    checkpoints.save(tmp_path, state, [Module(9)], with_weights=["m"])
    (tmp_path / "latest").unlink()
    assert newest(tmp_path)[0] == tmp_path / "episode-000002"
    Retention(1).apply(tmp_path, keep=[])
    assert left(tmp_path) == [2]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_a_removal_that_fails_is_told_and_tried_again(
    tmp_path: Path, faults: Faults, number: int
) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    fails_at, problems = 0, list[str]()
    while True:
        fails_at += 1
        measured(root, None, None, None)
        faults.arm(fails_at, number)
        problems += Retention(1).apply(root, keep=[])
        faults.armed = False
        assert newest(root, verified=True) == (root / "episode-000003", [])
        if fails_at > faults.count:
            break
        Retention(1).apply(root, keep=[])
        assert left(root) == [3], fails_at
    message = f"episode-000002 should go (runtime.keep_last), but: [Errno {number}]"
    assert any(problem.startswith(message) for problem in problems)
    checkpoints.clear(root)
    assert sorted(path.name for path in root.iterdir()) == ["episode-000003", "latest"]


def test_half_deleted_is_no_checkpoint(tmp_path: Path) -> None:
    measured(tmp_path, None, None)
    (tmp_path / "episode-000001").rename(tmp_path / ".removed-7-episode-000001")
    assert newest(tmp_path) == (tmp_path / "episode-000002", [])
    (tmp_path / "latest").unlink()
    assert newest(tmp_path) == (tmp_path / "episode-000002", [])
    measured(tmp_path, None)
    assert not list(tmp_path.glob(".removed*"))
