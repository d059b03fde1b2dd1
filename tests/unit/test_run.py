# SPDX-License-Identifier: Apache-2.0
"""Runs of the engine as processes: signals, resuming, output folders, several runs at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer
from chatlearn.errors import CheckpointError, OutputError

SCRIPT = """
import sys, time, pathlib, torch, chatlearn
from chatlearn import *
chatlearn.init({"runtime": {
    "num_episode": 6, "sample_per_episode": 4, "generation_batch_size": 1, "train_global_batch_size": 2,
    "output_dir": sys.argv[1], "resume": "auto"}})
log = open(sys.argv[2], "a", buffering=1)
slow = sys.argv[3]

class Policy(BaseModule):
    def forward_step(self, data, iteration):
        if slow == "sampling":
            log.write(f"sampling {iteration}\\n")
            time.sleep(0.08)
        data["noise"] = torch.rand(len(data["prompt"]))
        return data

class Learner(BaseModule):
    def setup(self):
        self.model = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(self.model.weight)
    def train_step(self, data_list, iteration):
        if slow == "training":
            log.write(f"training {iteration}\\n")
            time.sleep(0.15)
        with torch.no_grad():
            self.model.weight += data_list[0]["noise"].sum()
        prompts = ",".join(p for d in data_list for p in d["prompt"])
        log.write(f"trained {iteration} {prompts} {self.model.weight.item()}\\n")

policy, learner = Policy("policy"), Learner("learner")
engine = Engine(Environment(lambda b: policy.forward_step(b)), Trainer(lambda b: learner.train_step(b)))
engine.set_dataset([f"p{i}" for i in range(7)]).learn()
log.write("finished\\n")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, folder: str, log: str, slow: str = "none") -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script), folder, log, slow],
        cwd=script.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, line: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and line in path.read_text():
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"{line!r} never came")


def trained(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("trained")]


@pytest.mark.parametrize(
    ("slow", "line", "number", "code"),
    [
        ("sampling", "sampling 9", signal.SIGINT, 130),
        ("training", "training 3", signal.SIGTERM, 143),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    script: Path, tmp_path: Path, slow: str, line: str, number: int, code: int
) -> None:
    whole = start(script, "whole", "whole.log")
    part = start(script, "part", "part.log", slow)
    wait_for(tmp_path / "part.log", line, part)
    part.send_signal(number)
    _, errors = part.communicate(timeout=60)
    assert part.returncode == code
    assert "Traceback" not in errors
    (name,) = (tmp_path / "part/checkpoints/latest").read_text().split()
    assert (
        0
        < json.loads((tmp_path / "part/checkpoints" / name / "checkpoint.json").read_text())[
            "episode"
        ]
        < 6
    )

    again = start(script, "part", "part.log")
    out, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert "resumed" in out
    whole.communicate(timeout=60)
    assert trained(tmp_path / "part.log") == trained(tmp_path / "whole.log")
    assert len(trained(tmp_path / "whole.log")) == 12


REPLAYING = (
    SCRIPT.replace('"output_dir"', '"max_replay_episode": 2, "output_dir"')
    .replace("import sys,", "import random, sys,")
    .replace(
        "engine.set_dataset(",
        """
def chosen(buffers):
    log.write(f"choosing of {len(buffers)} up to {buffers[-1].episode_id}\\n")
    if slow == "choosing":
        time.sleep(0.15)
    pool = [sample for buffer in buffers for sample in buffer.samples]
    return random.choices(pool, k=random.randint(2, 6))
engine.set_replay_sampler(chosen).set_dataset(""",
    )
)


@pytest.mark.parametrize(
    ("slow", "line"),
    [("sampling", "sampling 14"), ("choosing", "of 2 up to 3"), ("training", "training 5")],
)
def test_replay_goes_on_after_an_interruption(
    script: Path, tmp_path: Path, slow: str, line: str
) -> None:
    script.write_text(REPLAYING)
    whole = start(script, "whole", "whole.log")
    part = start(script, "part", "part.log", slow)
    wait_for(tmp_path / "part.log", line, part)
    part.send_signal(signal.SIGINT)
    _, errors = part.communicate(timeout=60)
    assert part.returncode == 130, errors
    again = start(script, "part", "part.log")
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    whole.communicate(timeout=60)
    assert trained(tmp_path / "part.log") == trained(tmp_path / "whole.log")
    assert len(trained(tmp_path / "whole.log")) > 6


def test_a_second_signal_ends_at_once(script: Path, tmp_path: Path) -> None:
    script.write_text(SCRIPT.replace("time.sleep(0.15)", "time.sleep(30)"))
    process = start(script, "run", "run.log", "training")
    wait_for(tmp_path / "run.log", "training 0", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "finished" not in (tmp_path / "run.log").read_text()


class Echo(BaseModule):
    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return data


def engine(module: BaseModule | None = None) -> Engine:
    echo = module or Echo("echo")
    return Engine(Environment(lambda b: echo.forward_step(b))).set_dataset(["p"])  # type: ignore[attr-defined]


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    engine().learn()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_learn_works_in_a_thread() -> None:
    import threading

    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(engine().learn()))
    thread.start()
    thread.join()
    assert results[0].episodes == 1


def test_an_output_folder_that_is_a_file_is_refused_before_setup(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    chatlearn.init({"runtime": {"output_dir": str(tmp_path / "file")}})

    class Expensive(Echo):
        def setup(self) -> None:
            raise AssertionError("set up before the folder was looked at")

    with pytest.raises(OutputError, match="cannot be used"):
        engine(Expensive("echo")).learn()


def test_two_runs_at_once_write_to_two_folders() -> None:
    folders: list[Path] = []

    class Nesting(Echo):
        def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
            folders.append(engine(Echo("inner")).learn().folder)  # type: ignore[union-attr]
            return data

    result = engine(Nesting("outer")).learn()
    assert result is not None
    assert folders[0] != result.folder
    assert folders[0].parent == result.folder.parent == Path("runs")


def test_a_second_run_moves_the_first_aside() -> None:
    engine().learn()
    result = engine().learn()
    assert result is not None
    assert (result.folder / "earlier/0001/metrics.jsonl").exists()


def test_resuming_elsewhere_leaves_what_lies_there_alone(tmp_path: Path) -> None:
    chatlearn.init({"runtime": {"output_dir": "a", "num_episode": 2}})
    engine().learn()
    chatlearn.init({"runtime": {"output_dir": "b"}})
    engine().learn()
    chatlearn.init(
        {
            "runtime": {
                "output_dir": "b",
                "num_episode": 3,
                "resume": "a/checkpoints/episode-000002",
            }
        }
    )
    result = engine().learn()
    assert result is not None
    assert result.episodes == 3
    rows = [json.loads(x) for x in (tmp_path / "b/metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [0, 1, 2, 3]  # the checkpoint brings those before
    assert (tmp_path / "b/earlier/0001/metrics.jsonl").exists()


def test_a_resume_path_that_names_no_checkpoint_moves_nothing(tmp_path: Path) -> None:
    engine().learn()
    chatlearn.init({"runtime": {"resume": str(tmp_path / "nowhere")}})
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        engine().learn()
    assert not list((tmp_path / "runs").glob("*/earlier"))


def test_numbers_of_a_call_and_of_train_steps_are_logged() -> None:
    import torch

    chatlearn.init({"runtime": {"train_global_batch_size": 1, "generation_batch_size": 2}})

    class Logging(Echo):
        def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
            for number in (1.0, 2.0):
                self.log(mean=number, made_tokens=number, most_max=number, least_min=number)
            return data

        def train_step(self, data_list: Any) -> dict[str, Any]:
            return {"loss": torch.tensor(0.5, requires_grad=True), "note": "text", "grad": [1.0]}

    module = Logging("m")
    env, trainer = Environment(lambda b: module.forward_step(b)), None
    trainer = Trainer(lambda b: module.train_step(b))
    result = Engine(env, trainer).set_dataset(["a", "b"]).learn()
    assert result is not None
    expected = {"mean": 1.5, "made_tokens": 3.0, "most_max": 2.0, "least_min": 1.0, "loss": 0.5}
    assert {k[2:]: v for k, v in result.metrics.items() if k[:2] == "m/" and "_per_s" not in k} == (
        expected
    )


def test_six_idle_modules_cost_little() -> None:
    chatlearn.init({"runtime": {"num_episode": 30}})

    class Idle(Echo):
        def train_step(self, data_list: Any, iteration: int) -> None:
            pass

    a, b, c, d, e, f = (Idle(name) for name in "abcdef")

    def env_flow(batch: Any) -> Any:
        out = a.forward_step(batch)
        return d.forward_step(out, b.forward_step(out), c.forward_step(out))

    def trainer_flow(batch: Any) -> None:
        e.train_step(batch)
        f.train_step(batch)

    run = Engine(Environment(env_flow), Trainer(trainer_flow))
    result = run.set_dataset([f"p{i}" for i in range(16)]).learn()
    assert result is not None
    rows = [json.loads(x) for x in (result.folder / "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(row["time/episode"] for row in rows if row["episode"])
    assert seconds[len(seconds) // 2] < 0.02
