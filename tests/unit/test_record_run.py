# SPDX-License-Identifier: Apache-2.0
"""A run's record: whole episodes only, the newest ones, none of a future that was gone back from."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer
from chatlearn.errors import ModuleError, OutputError, RecordError
from chatlearn.flow.batch import Batch
from chatlearn.record.reading import RunRecord, describe_numbers
from chatlearn.record.recording import Recording, recorded_episodes, rewind


class Echo(BaseModule):
    fails_in: int | None = None
    episode = 0

    def before_episode(self) -> None:
        self.episode += 1

    def forward_step(self, data: Batch) -> Batch:
        data["x"] = torch.rand(len(data["prompt"]))
        return data

    def train_step(self, data_list: list[Batch]) -> None:
        self.log(loss=float(data_list[0]["x"].sum()))
        if self.episode == self.fails_in:
            raise ValueError("on purpose")


def learn(episodes: int = 3, fails_in: int | None = None, **runtime: Any) -> Path:
    values = {"num_episode": episodes, "record": True, "output_dir": "run", **runtime}
    chatlearn.init({"runtime": values})
    echo, learner = Echo("echo"), Echo("learner")
    learner.fails_in = fails_in
    engine = Engine(
        Environment(lambda b: echo.forward_step(b)), Trainer(lambda b: learner.train_step(b))
    )
    with engine.set_dataset(["a", "b", "c"]):
        engine.learn()
    return Path("run")


def numbers(run: Path) -> list[int]:
    return list(recorded_episodes(run / "record"))


def values(run: Path, episode: int) -> list[float]:
    column = RunRecord(run).episode(episode).flow("env_flow").node("echo.forward_step").output("x")
    return [float(x) for x in column]


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["episode"]]


def losses(run: Path) -> dict[int, float]:
    return {
        n: RunRecord(run).episode(n).flow("trainer_flow").nodes[0].calls[0].entry.numbers["loss"]
        for n in numbers(run)
    }


def test_every_episode_is_recorded_with_the_numbers_of_its_updates() -> None:
    run = learn()
    rows = metrics(run)
    assert losses(run) == {row["episode"]: row["learner/loss"] for row in rows}


def test_size_and_time_are_metrics_and_the_size_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    run = learn()
    for row in metrics(run):
        folder = run / f"record/episode-{row['episode']:06d}"
        files = [
            path for path in folder.rglob("*") if path.is_file() and path.name != "episode.json"
        ]
        assert row["record/bytes"] == sum(path.stat().st_size for path in files)
        assert 0 < row["time/record"] < row["record/seconds"] < row["time/episode"]
    assert "of 3 episodes in run/record" in capsys.readouterr().out
    assert "recorded" in (run / "report.html").read_text()


def test_the_newest_episodes_stay() -> None:
    assert numbers(learn(5, record_last=2)) == [4, 5]


def test_nothing_is_recorded_unless_asked_for() -> None:
    run = learn(record=False)
    assert not (run / "record").exists()
    assert "record/bytes" not in (run / "metrics.jsonl").read_text()


def test_a_new_run_moves_the_record_of_an_earlier_one_aside() -> None:
    learn(3)
    assert numbers(learn(1)) == [1]
    assert numbers(Path("run/earlier/0001")) == [1, 2, 3]


def test_an_episode_that_failed_leaves_no_record() -> None:
    with pytest.raises(ModuleError):
        learn(3, fails_in=2)
    assert numbers(Path("run")) == [1]
    assert [p.name for p in Path("run/record").iterdir() if p.name.startswith(".")] == []


def test_a_resumed_run_replaces_what_it_runs_again() -> None:
    run = learn(3, save_episode_interval=1)
    whole = losses(run)
    first = run / "checkpoints/episode-000001"
    learn(2, resume=str(first))
    assert numbers(run) == [1, 2]
    assert losses(run) == {1: whole[1], 2: whole[2]}
    starts = {n: RunRecord(run).episode(n).meta["start"] for n in (1, 2)}
    assert starts == {1: "start-000000.json", 2: "start-000001.json"}


def test_a_run_that_goes_on_without_recording_drops_what_it_runs_again() -> None:
    run = learn(3, save_episode_interval=1)
    learn(3, resume=str(run / "checkpoints/episode-000001"), record=False)
    assert numbers(run) == [1]


def test_going_back_keeps_what_was_before_whatever_lies_behind() -> None:
    """Of the future that a run was resumed from nothing counts as one of the newest episodes."""
    run = learn(4, save_episode_interval=1, record_last=3)
    assert numbers(run) == [2, 3, 4]
    learn(3, resume=str(run / "checkpoints/episode-000002"), record_last=3)
    assert numbers(run) == [2, 3]


# ---- crashes and disks ---------------------------------------------------------------------------------------------


def test_what_a_crash_left_half_written_or_half_deleted_is_tidied() -> None:
    run = learn(3)
    root = run / "record"
    (root / "episode-000003").rename(root / ".partial-99")
    (root / "episode-000001").rename(root / ".partial-gone-episode-000001")
    rewind(root, 3)
    assert numbers(run) == [2]
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


class Crash(BaseException):
    """The process is gone: nothing that would tidy up gets to the disk."""


class Disk:
    """Counts operations on files while a record is written; from the n-th on, all fail as after a crash."""

    crash_at: int | None = None
    count = 0
    is_watched = False

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_watched and event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            self.count += 1
            if self.crash_at is not None and self.count >= self.crash_at:
                raise Crash


DISK = Disk()
_hooked: list[bool] = []


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    if not _hooked:  # a hook stays as long as the process
        sys.addaudithook(lambda event, arguments: DISK.see(event, arguments))
        _hooked.append(True)
    keep = Recording.keep

    def watched(self: Recording) -> None:
        DISK.is_watched = True
        try:
            keep(self)
        finally:
            DISK.is_watched = False

    monkeypatch.setattr(Recording, "keep", watched)
    DISK.crash_at, DISK.count = None, 0
    yield DISK
    DISK.is_watched = False


def test_a_crash_at_any_moment_leaves_whole_episodes(disk: Disk) -> None:
    """While episode 2 is written and episode 1 dropped, at every operation on a file in turn, everything ends."""
    run = learn(2, save_episode_interval=1)
    expected = {n: values(run, n) for n in (1, 2)}
    shutil.copytree(run / "record", "pristine")
    first = str(run / "checkpoints/episode-000001")
    disk.count = 0
    learn(2, resume=first, record_last=1)
    operations = disk.count
    survivors: set[tuple[int, ...]] = set()
    for at in range(1, operations + 1):
        shutil.rmtree(run / "record")
        shutil.copytree("pristine", run / "record")
        disk.crash_at, disk.count = at, 0
        with pytest.raises(Crash):
            learn(2, resume=first, record_last=1)
        disk.crash_at = None
        rewind(run / "record", 2)
        for number in numbers(run):
            assert values(run, number) == expected[number]
        survivors.add(tuple(numbers(run)))
    assert survivors == {(1,), (1, 2), (2,)}


def test_a_full_disk_is_an_error_by_name_and_costs_no_episode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = pq.write_table

    def full(table: Any, path: Path, **more: Any) -> None:
        if "learner" in str(path) and "episode-000001" in str(list(Path("run/record").iterdir())):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(table, path, **more)

    monkeypatch.setattr("chatlearn.record.table.pq.write_table", full)
    with pytest.raises(OutputError) as raised:
        learn(3)
    assert (
        raised.value.cause == "the record of episode 2 cannot be written: No space left on device"
    )
    assert "runtime.record_last" in raised.value.fix
    assert numbers(Path("run")) == [1]
    assert [p.name for p in Path("run/record").iterdir() if p.name.startswith(".")] == []
    state = json.loads(Path("run/checkpoints/episode-000002/checkpoint.json").read_text())
    assert state["episode"] == 2


def test_a_killed_run_leaves_nothing_half_written_behind_the_next_start() -> None:
    run = learn(2)
    (run / "record/.partial-99").mkdir()
    learn(1)
    assert (run / "earlier/0001/record/episode-000002").is_dir()
    assert not list(run.rglob(".partial-*"))


WRITERS = {
    "random.pt": "(r.Recording, '_write_random')",
    "a table": "(r.FlowWriter, 'write')",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_may_not_grow_is_such_an_error_too(name: str) -> None:
    """The kernel itself refuses the write, half-way through a file: of torch, of Arrow."""
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import test_record_run as t\n"
        "from chatlearn.errors import OutputError\n"
        "import chatlearn.record.recording as r\n"
        "def limited(write):\n"
        "    def inner(*arguments):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))\n"
        "        try: return write(*arguments)\n"
        "        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "    return inner\n"
        f"place = {WRITERS[name]}\n"
        "setattr(*place, limited(getattr(*place)))\n"
        "try: t.learn(1)\n"
        "except OutputError as error: print('NAMED', error)\n"
        "print('LEFT', list(t.Path('run/record').glob('.partial-*')))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", code]
    here = Path(__file__).parent  # and the checkout that it is part of, whichever is installed
    environment = {"PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "NAMED the record of episode 1 cannot be written: File too large" in done.stdout, (
        done.stderr
    )
    assert "LEFT []" in done.stdout
    assert done.returncode == 0


# ---- reading -------------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(RecordError, match="there is no run folder nowhere"):
        RunRecord("nowhere")
    learn(1, record=False)
    with pytest.raises(RecordError, match="this run was not recorded"):
        RunRecord("run")
    run = learn(4, record_last=3)
    with pytest.raises(RecordError, match="episode 1 is not recorded; there are 2-4"):
        RunRecord(run).episode(1)
    with pytest.raises(
        RecordError, match="eval_flow of episode 2 is not recorded; there are env_flow"
    ):
        RunRecord(run).episode(2).flow("eval_flow")
    with pytest.raises(RecordError, match=r"did you mean 'echo.forward_step'\?"):
        RunRecord(run).episode(2).flow("env_flow").node("echo.forward_stp")


NODE = "env_flow/echo.forward_step.parquet"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage")


def other(path: Path) -> None:
    pq.write_table(pq.ParquetFile(path).read().replace_schema_metadata(None), path)


def newer(path: Path) -> None:
    table = pq.ParquetFile(path).read()
    content = json.loads(table.schema.metadata[b"chatlearn"])
    changed = json.dumps({**content, "format": 99}).encode()
    pq.write_table(table.replace_schema_metadata({b"chatlearn": changed}), path)


def strange(path: Path) -> None:
    table = pq.ParquetFile(path).read()
    content = {**json.loads(table.schema.metadata[b"chatlearn"]), "calls": [{"rows": 3, "what": 1}]}
    pq.write_table(table.replace_schema_metadata({b"chatlearn": json.dumps(content)}), path)


def bare(path: Path) -> None:
    path.write_text(json.dumps({"format": 1}))


def newer_json(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        (NODE, cut, "a file of the record is damaged"),
        (NODE, garbage, "a file of the record is damaged"),
        (NODE, Path.unlink, "a file of the record is missing"),
        (NODE, other, "this Parquet file is no part of a record"),
        (NODE, newer, "the record has format 99"),
        (NODE, strange, "a file of the record is damaged"),
        ("env_flow/flow.json", bare, "a file of the record is damaged: KeyError"),
        ("env_flow/flow.json", cut, "a file of the record is damaged"),
        ("env_flow/flow.json", Path.unlink, "a file of the record is missing"),
        ("env_flow/flow.json", newer_json, "the record has format 99"),
        ("episode.json", garbage, "a file of the record is damaged"),
        ("random.pt", garbage, "a file of the record is damaged"),
    ],
)
def test_a_damaged_file_is_named(name: str, harm: Any, message: str) -> None:
    run = learn(1)
    path = run / "record/episode-000001" / name
    harm(path)

    def read() -> None:
        flow = RunRecord(run).episode(1).flow("env_flow")
        flow.node("echo.forward_step").output("x")
        assert flow.random

    with pytest.raises(RecordError, match=message) as raised:
        read()
    assert Path(raised.value.place).name == path.name


def test_a_pickle_bomb_among_the_random_states_is_never_run() -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("exploded"),)

    run = learn(1)
    torch.save([Bomb()], run / "record/episode-000001/random.pt")
    with pytest.raises(RecordError, match="damaged"):
        assert RunRecord(run).episode(1).flow("env_flow").random
    assert not Path("exploded").exists()


def test_a_record_may_be_moved() -> None:
    run = learn(2)
    expected = values(run, 2)
    shutil.move(run, "elsewhere")
    assert values(Path("elsewhere"), 2) == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([1], "1"),
        ([3, 1, 2], "1-3"),
        ([1, 3, 4, 9], "1, 3-4, 9"),
        (list(range(0, 40, 2)), "0, 2, 4, 6, 8, 10, 12, ..., 38"),
    ],
)
def test_numbers_are_written_as_ranges(given: list[int], text: str) -> None:
    assert describe_numbers(given) == text
