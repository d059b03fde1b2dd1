# SPDX-License-Identifier: Apache-2.0
"""`kill -9` at any moment, then `runtime.resume=auto`: curves, samples and weights are those of a run that never died.

Real processes and real SIGKILL (`killed_runs.py`). What is compared is everything that a run computes: the rows of
`metrics.jsonl` without what was measured by a clock, `transcripts.jsonl` byte by byte, and the files of the last
checkpoint (weights, optimiser, schedule, generators, replay), of the exported model and of the record, byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CLOCKS = re.compile(r"time_s|time/.*|.*_per_s|.*/seconds|.*_seconds|.*_ms")
EPISODES = 4
Death = dict[str, Any] | None


def run_jobs(jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Run jobs in forks of one process; return how each of their processes ended."""
    command = [sys.executable, str(HERE / "killed_runs.py")]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def curves(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not CLOCKS.fullmatch(k)} for row in rows]


def computed(folder: Path) -> dict[str, Any]:
    """Return everything that a run has computed."""
    last = folder / "checkpoints" / f"episode-{EPISODES:06d}"
    state = json.loads((last / "checkpoint.json").read_text())
    files = {n: d for n, d in state["digests"].items() if n != "metrics.jsonl"}
    counted = ("episode", "train_iteration", "prompts_drawn", "iterations", "policy_versions")
    return {
        "curves": curves(folder),
        "transcripts": (folder / "transcripts.jsonl").read_text(),
        "checkpoint": files,
        "counts": {name: state[name] for name in counted},
        "model": digests(folder / "model"),
        "record": digests(folder / "record"),
    }


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.suffix != ".json"  # those of a record tell how each process was started
    }


def assert_never_died(folder: Path, whole: dict[str, Any], log: str) -> None:
    found = computed(folder)
    assert [row["episode"] for row in found["curves"]] == [*range(EPISODES + 1)], log
    for what, expected in whole.items():
        assert found[what] == expected, f"{what} of {folder.name}\n{log}"
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert not [name for name in names if name.startswith(".")], (names, log)


def survive(tmp_path: Path, variant: str, lives: list[list[Death]]) -> Counter[str]:
    """Run a variant once for each list of deaths, hold it against the run that never dies, and count the kinds."""
    jobs = [{"folder": str(tmp_path / "whole"), "variant": variant, "deaths": [None]}]
    jobs += [
        {"folder": str(tmp_path / f"{number:03d}"), "variant": variant, "deaths": [*deaths, None]}
        for number, deaths in enumerate(lives)
    ]
    whole, *killed = run_jobs(jobs)
    assert whole == [{"code": 0, "noted": None}], (tmp_path / "whole.note.log").read_text()
    expected, kinds = computed(tmp_path / "whole"), Counter[str]()
    for job, deaths, ends in zip(jobs[1:], lives, killed, strict=True):
        folder = Path(job["folder"])
        log = f"{deaths}: {ends}\n{folder.with_name(folder.name + '.note.log').read_text()}"
        *deadly, last = ends
        assert last == {"code": 0, "noted": None}, log
        for death, end in zip(deaths, deadly, strict=True):
            assert death is not None
            if "after_ms" in death:
                assert end["code"] in (-9, 0), log  # it may have been done before
                kinds["from outside"] += end["code"] == -9
            else:
                assert end["code"] == -9, log
                kinds[end["noted"]] += 1
        assert_never_died(folder, expected, log)
    return kinds


A_DOZEN: list[list[Death]] = [
    [{"part": "setup", "event": 20}],
    [{"part": "generation", "event": 400}],
    [{"part": "reward and advantage", "event": 150}],
    [{"part": "training", "event": 700}],
    [{"part": "sync", "event": 900}],
    [{"part": "evaluation", "event": 2000}],
    [{"part": "before_episode", "event": 3}],
    [{"part": "after_episode", "event": 2}],
    [{"part": "checkpoint", "file": 45}],
    [{"part": "checkpoint: between write and latest", "file": 9}],
    [{"part": "checkpoint: between write and latest", "file": 12}],
    [{"part": "retention", "file": 9}],
    [{"part": "metrics row", "event": 600}],
    [{"torn": 7}],
    [{"after_ms": 180}],
    [{"part": "training", "event": 500}, {"part": "resume", "event": 60}, {"file": 12}],
]


def test_a_dozen_deaths(tmp_path: Path) -> None:
    kinds = survive(tmp_path, "plain", A_DOZEN)
    places = {str(death["part"]) for (death, *_) in A_DOZEN if death and "part" in death}
    assert places < set(kinds), kinds
    assert kinds.total() >= 17


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """Return the kind of every event and of every file operation of the runs, in order."""
    folder, variants = tmp_path_factory.mktemp("watched"), ("plain", "replay", "dynamic")
    jobs = [
        {"folder": str(folder / variant), "variant": variant, "deaths": [{"watch": True}]}
        for variant in variants
    ]
    ends = run_jobs(jobs)
    return {
        variant: json.loads(end["noted"]) for variant, (end,) in zip(variants, ends, strict=True)
    }


def some_of_each(
    kinds: list[str], chosen: random.Random, most: int, what: str
) -> Iterator[dict[str, Any]]:
    """Yield up to `most` moments of every kind, each counted within its kind: how many there are outside of it may vary
    by what a clock says.
    """
    for kind, count in Counter(kinds).items():
        last = count if count < 20 else count * 9 // 10
        for number in chosen.sample(range(1, last + 1), k=min(most, last)):
            yield {"part": kind, what: number}


@pytest.mark.soak
@pytest.mark.parametrize("variant", ["plain", "replay", "dynamic"])
def test_whatever_a_run_does_when_it_dies(
    tmp_path: Path, variant: str, moments: dict[str, dict[str, list[str]]]
) -> None:
    chosen = random.Random(f"deaths of {variant}")
    events, files = moments[variant]["event"], moments[variant]["file"]
    lives: list[list[Death]] = [[d] for d in some_of_each(events, chosen, 2, "event")]
    lives += [[d] for d in some_of_each(files, chosen, 5, "file")]
    lives += [[{"torn": number}] for number in (1, 3, 6)]
    lives += [[{"after_ms": chosen.randrange(5, 350)}] for _ in range(8)]
    # Killed again while it resumes, and again while that one resumes.
    anywhere = [{"event": chosen.randrange(1, len(events))} for _ in range(4)]
    lives += [[d, {"event": 600 + 400 * n}, {"file": 3 + 5 * n}] for n, d in enumerate(anywhere)]
    kinds = survive(tmp_path, variant, lives)
    print(f"{variant}: {sum(kinds.values())} deaths in {len(lives)} runs: {dict(kinds)}")
    assert kinds.total() >= 30
    assert {*events, *files} <= {*kinds}
