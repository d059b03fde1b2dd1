# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed and resumed, each in a process of its own, forked from one that has imported everything.

As a script it reads jobs from standard input and prints what became of them:

    python killed_runs.py < jobs.json > results.json

A job is a folder, the name of a variant of the run and a list of deaths, one per process; None lets a process live. All
of them resume with `auto`. A death is one of

    {"event": 812}      SIGKILL from within, at the 812th call of a function of chatlearn's or of this file
    {"file": 31}        SIGKILL from within, before the 31st operation on a file of the run folder
    {"event": 3, "part": "training"}    the same, counting only what falls into a part of the run (`PARTS`)
    {"torn": 2}         SIGKILL from within, when half of the 2nd text appended to a file of rows is written
    {"after_ms": 140}   SIGKILL from outside, whatever the process is doing then, in C or in Python
    {"watch": true}     none: what would have been the choice is noted, the kind of every event and file operation

The kind of a moment is the innermost part of a run that it falls into (`PARTS`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import chatlearn
from chatlearn import Engine, Environment, Evaluator, Trainer
from chatlearn.checkpoint import folder as checkpoint_folder
from chatlearn.checkpoint.retention import Retention
from chatlearn.checkpointing import Checkpointing
from chatlearn.episode import EpisodeFlows
from chatlearn.evaluating import evaluate
from chatlearn.models import (
    FunctionReward,
    GroupAdvantage,
    PolicyInference,
    PolicyReference,
    PolicyTrainer,
)
from chatlearn.observability import jsonl
from chatlearn.observability.recorder import Recorder
from chatlearn.record_keeping import RecordKeeping
from chatlearn.run import Run
from chatlearn.stage import Stage
from chatlearn.testing import tiny_pair

EPISODES = 4
PROMPTS = (["1+1=", "2+2=", "3+4=", "5+6=", "7+1="], ["a", "b?", "c!"])
PACKAGE = str(Path(chatlearn.__file__).parent)
FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


# ---- the run ------------------------------------------------------------------------------------------------------


def spread(completions: list[str]) -> list[float]:
    return [len(set(text)) / 4 for text in completions]


class Reward(FunctionReward):
    """A reward with state of its own, that its hooks change."""

    def setup(self) -> None:
        super().setup()
        self.drawn: list[float] = []

    def before_episode(self) -> None:
        self.drawn.append(random.random())

    def after_episode(self) -> None:
        self.drawn.append(float(torch.rand(1)))

    def training_state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


def some_old_ones(buffers: Any) -> list[Any]:
    """Choose what is trained on with random numbers, as samplers do."""
    *older, new = buffers
    pool = [sample for buffer in older for sample in buffer.samples]
    return [*new.samples, *random.sample(pool, k=min(4, len(pool)))]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"save_episode_interval": 1, "keep_last": 1, "keep_best": 1},
    "replay": {"save_episode_interval": 2, "max_replay_episode": 2, "record": True},
    "dynamic": {
        "save_episode_interval": 1,
        "stream_data_loader_type": "dynamic",
        "num_training_epoch": 2,
        "generation_batch_size": 2,
    },
}


def learn(folder: Path, variant: str) -> None:
    """Run a variant to its end, from where it is."""
    runtime: dict[str, Any] = {
        "num_episode": EPISODES,
        "output_dir": str(folder),
        "resume": "auto",
        "sample_per_episode": 8,
        "num_inference_per_prompt": 4,
        "train_global_batch_size": 4,
        "train_micro_batch_size": 2,
        "generation_batch_size": 8,
        "data_shuffle": True,
        "data_ratio": [2, 1],
        "enable_eval_before_training": True,
        **VARIANTS[variant],
    }
    often = {"replay": {"sync_frequency": 3}, "dynamic": {"num_replica": 2}}
    chatlearn.init({"runtime": runtime, "models": {"policy": often.get(variant, {})}})
    policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=5)
    reference = PolicyReference("reference", model=tiny_pair)
    reward, advantage = Reward("reward", spread), GroupAdvantage("advantage")
    schedule: dict[str, Any] = {"lr_schedule": "cosine", "warmup_steps": 2, "total_steps": 16}
    learner = PolicyTrainer("learner", model=tiny_pair, lr=1e-2, kl_coef=0.02, **schedule)

    def env_flow(batch: Any) -> Any:
        rollout = reference.forward_step(policy.forward_step(batch))
        return advantage.forward_step(reward.forward_step(rollout))

    evaluator = Evaluator(lambda batch: reward.eval_step(policy.eval_step(batch)))
    engine = Engine(
        Environment(env_flow),
        Trainer(lambda batch: learner.train_step(batch)),
        evaluator.set_dataset(["9+9=", "z"]),
    )
    engine.set_parameter_sync(learner, policy).set_multiple_datasets(list(PROMPTS))
    if variant == "replay":
        engine.set_replay_sampler(some_old_ones)
    engine.learn()


# ---- death --------------------------------------------------------------------------------------------------------

PARTS: dict[str, list[Callable[..., Any]]] = {
    "before the run": [Engine.check],
    "setup": [Stage.set_up],
    "resume": [Checkpointing.to_resume, Checkpointing.check, Checkpointing.resume, Recorder.go_on],
    "between calls": [EpisodeFlows.run],
    "generation": [PolicyInference.forward_step],
    "reference": [PolicyReference.forward_step],
    "reward and advantage": [FunctionReward.forward_step, GroupAdvantage.forward_step],
    "training": [PolicyTrainer.train_step],
    "sync": [Run.sync_parameters],
    "evaluation": [evaluate],
    "before_episode": [Reward.before_episode],
    "after_episode": [Reward.after_episode],
    "checkpoint": [Checkpointing.save],
    "checkpoint: between write and latest": [checkpoint_folder._publish],
    "retention": [Retention.apply],
    "metrics row": [Recorder.episode_done],
    "transcripts": [Recorder.samples],
    "record": [RecordKeeping.keep],
    "end of the run": [Run._finish],
}


class Watch:
    """Counts events and file operations of this process, knows the part they fall into, and ends it where asked to."""

    def __init__(self, folder: Path, death: dict[str, Any], note: Path) -> None:
        self.folder, self.death, self.note = str(folder), death, note
        self.parts: list[str] = []
        self.kinds: dict[str, list[str]] = {"event": [], "file": []}
        self.counts = {"event": 0, "file": 0, "torn": 0}
        self.codes: dict[CodeType, str] = {
            function.__code__: part for part, functions in PARTS.items() for function in functions
        }

    def start(self) -> None:
        sys.addaudithook(self.on_audit)
        if "torn" in self.death:
            jsonl._write_all = self.tearing(jsonl._write_all)
        sys.setprofile(self.on_profile)

    def on_profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if (part := self.codes.get(code)) is not None:
                self.parts.append(part)
            name = code.co_filename
            if name.startswith(PACKAGE) or name == __file__:
                self.count("event")
        elif event == "return" and frame.f_code in self.codes:
            self.parts.pop()

    def on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_OPERATIONS and any(self.is_ours(given) for given in arguments[:2]):
            self.count("file")

    def is_ours(self, given: object) -> bool:
        return isinstance(given, str | Path) and str(given).startswith(self.folder)

    def tearing(self, write: Callable[[Any, bytes], None]) -> Callable[[Any, bytes], None]:
        def half(stream: Any, content: bytes) -> None:
            self.counts["torn"] += 1
            if self.counts["torn"] == self.death["torn"]:
                write(stream, content[: len(content) // 2])
                self.die()
            write(stream, content)

        return half

    def count(self, what: str) -> None:
        if self.part != self.death.get("part", self.part):
            return
        self.counts[what] += 1
        if "watch" in self.death:
            self.kinds[what].append(self.part)
        elif self.counts[what] == self.death.get(what):
            self.die()

    @property
    def part(self) -> str:
        return self.parts[-1] if self.parts else "elsewhere"

    def die(self) -> None:
        sys.setprofile(None)
        self.death = {}
        self.note.write_text(f"torn row in {self.part}" if self.counts["torn"] else self.part)
        os.kill(os.getpid(), signal.SIGKILL)


# ---- processes ----------------------------------------------------------------------------------------------------


def live(folder: Path, variant: str, death: dict[str, Any] | None, note: Path) -> None:
    """Be the child: run until the end or the death that was chosen."""
    log = os.open(f"{note}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    watch = Watch(folder, death or {}, note)
    if death and "after_ms" not in death:
        watch.start()
    learn(folder, variant)
    sys.setprofile(None)
    if death and "watch" in death:
        note.write_text(json.dumps(watch.kinds))


def fork(folder: Path, variant: str, death: dict[str, Any] | None, note: Path) -> int:
    """Start a process and return its number; it ends by itself."""
    note.unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        live(folder, variant, death, note)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Job:
    """One run that dies several times."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.folder = Path(given["folder"])
        self.variant: str = given["variant"]
        self.deaths: list[dict[str, Any] | None] = list(given["deaths"])
        self.note = self.folder.with_name(f"{self.folder.name}.note")
        self.ends: list[dict[str, Any]] = []
        self.child = 0
        self.due = 0.0

    def next(self) -> bool:
        """Start the next process, if one is left."""
        if len(self.ends) == len(self.deaths):
            return False
        death = self.deaths[len(self.ends)]
        self.child = fork(self.folder, self.variant, death, self.note)
        after = (death or {}).get("after_ms")
        self.due = time.monotonic() + after / 1000 if after is not None else float("inf")
        return True

    def poll(self) -> bool:
        """Note the end of the process, if it has ended; kill it from outside, if it is time."""
        if time.monotonic() >= self.due:
            os.kill(self.child, signal.SIGKILL)
            self.due = float("inf")
        ended, status = os.waitpid(self.child, os.WNOHANG)
        if ended:
            noted = self.note.read_text() if self.note.exists() else None
            self.ends.append({"code": os.waitstatus_to_exitcode(status), "noted": noted})
        return bool(ended)


def warm_up(variants: set[str]) -> None:
    """Run every variant once, so that children find everything imported and cost a quarter of a second."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for variant in sorted(variants):
            learn(Path(folder, variant), variant)
    assert threading.active_count() == 1, "a fork would lose the others"


def main() -> None:
    """Run all jobs, as many at a time as there are cores."""
    torch.set_num_threads(1)
    jobs = [Job(given) for given in json.load(sys.stdin)]
    warm_up({job.variant for job in jobs})
    waiting, running = list(jobs), list[Job]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            job = waiting.pop(0)
            if job.next():
                running.append(job)
        for job in [job for job in running if job.poll()]:
            if not job.next():
                running.remove(job)
        time.sleep(0.002)
    json.dump([job.ends for job in jobs], sys.stdout)


if __name__ == "__main__":
    main()
