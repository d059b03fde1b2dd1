# SPDX-License-Identifier: Apache-2.0
"""A record gives every call's inputs and outputs back exactly as they were, whatever the flows and settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.flow.batch import Batch
from chatlearn.flow.batching import isolate
from chatlearn.record.reading import RunRecord
from chatlearn.record.recording import Recording
from chatlearn.record.sameness import same

Seen = dict[tuple[int, str, str], list[tuple[list[Batch], list[Batch], Any, Mapping[str, float]]]]


class Spy(Recording):
    """Keeps copies of what it is shown, beside doing its work."""

    seen: Seen

    def beginning(self, flow: Any, trainer: Any) -> None:
        for work in (flow, trainer):
            if work is not None and self._last_flow != (self._number, work.graph.name):
                self._last_flow = (self._number, work.graph.name)
                for key in [k for k in self.seen if k[:2] == self._last_flow]:
                    del self.seen[key]  # an episode that is run again replaces its record
        super().beginning(flow, trainer)

    _last_flow: Any = None

    def entering(self, flow: str, node: Any, call: Any, data: Any) -> None:
        self._entered[flow, call.id] = [
            isolate(b) for b in (data if isinstance(data, list) else [data])
        ]
        super().entering(flow, node, call, data)

    def returned(self, flow: str, node: Any, call: Any, output: Any, metrics: Any) -> None:
        batches = output if isinstance(output, list) else [output] if output else []
        copy = [isolate(batch) for batch in batches]
        key = (self._number, flow, node.name)
        self.seen.setdefault(key, []).append((self._entered[flow, call.id], copy, call, metrics))
        super().returned(flow, node, call, output, metrics)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found: Seen = {}
    monkeypatch.setattr(Spy, "seen", found, raising=False)
    monkeypatch.setattr(Spy, "_entered", {}, raising=False)
    monkeypatch.setattr("chatlearn.record_keeping.Recording", Spy)
    return found


class Sampler(BaseModule):
    """Draws from the global generators: ragged, padded and narrow columns."""

    def forward_step(self, data: Batch) -> Batch:
        count = len(data["prompt"])
        data["response_ids"] = [torch.randint(0, 9, (random.randint(0, 4),)) for _ in range(count)]
        data["padded"] = torch.rand(count, random.randint(2, 3))
        data["mean/x"] = torch.rand(count).bfloat16()
        return data

    eval_step = forward_step


class Judge(BaseModule):
    writes = frozenset({"rewards", "prompt", "uid", "asked"})

    def forward_step(self, data: Batch) -> Batch:
        data["rewards"] = torch.tensor([float(ids.sum()) for ids in data["response_ids"]])
        data["prompt"] = [f"{prompt}!" for prompt in data["prompt"]]
        data["uid"] += 0
        return data

    def ask(self, data: Batch) -> Batch:
        return {"asked": [[{"role": "user", "content": prompt}] for prompt in data["prompt"]]}


class Filter(BaseModule):
    filters_samples = True

    def forward_step(self, data: Batch) -> Batch:
        keep = [i for i, uid in enumerate(data["uid"]) if int(uid) % 3]
        return {
            name: column[keep] if torch.is_tensor(column) else [column[i] for i in keep]
            for name, column in data.items()
        }


class Whiten(BaseModule):
    batch_by = "group"
    writes = frozenset({"advantages"})

    def forward_step(self, data: Batch) -> Batch:
        return {"advantages": data["rewards"] - data["rewards"].mean()}


class Learner(BaseModule):
    def train_step(self, data_list: list[Batch], iteration: int) -> list[Batch]:
        self.log(loss=float(iteration))
        return [{"ratio": [torch.rand(2) for _ in batch["prompt"]]} for batch in data_list]

    def second(self, data_list: list[Batch]) -> dict[str, float]:
        return {"loss": 2.0}


class Padding(BaseModule):
    """Brings a dataset whose columns depend on who is in the batch."""

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        class Rows(list[dict[str, Any]]):
            def collate_fn(self, rows: list[dict[str, Any]]) -> Batch:
                longest = max(len(row["prompt"]) for row in rows)
                width = torch.zeros(len(rows), longest)
                return {"prompt": [row["prompt"] for row in rows], "mask": width}

        return Rows({"prompt": prompt * (i + 1)} for i, prompt in enumerate(prompts))

    def forward_step(self, data: Batch) -> Batch:
        return data


class Shaky(BaseModule):
    """Fails on some samples: by raising, and by saying so."""

    def forward_step(self, data: Batch) -> Batch:
        if any(int(uid) % 7 == 2 for uid in data["uid"]):
            raise ValueError("no score")
        data["rewards"] = torch.rand(len(data["uid"]))
        data["count"] = torch.arange(len(data["uid"]))
        numbers = torch.arange(len(data["uid"]))
        data["either"] = list(numbers) if int(data["uid"][0]) % 2 else numbers
        data["outcome"] = ["failed" if int(uid) % 7 == 5 else "ok" for uid in data["uid"]]
        return data


class Counter(BaseModule):
    def forward_step(self, data: Batch) -> Batch:
        count = torch.full((len(data["uid"]),), 0.5, dtype=torch.float64)
        return {"count": count, "either": count.clone()}


def parts() -> tuple[Any, ...]:
    return (
        Sampler("sampler"),
        Judge("judge: <ü>?"),
        Filter("filter"),
        Whiten("whiten"),
        Learner("learner"),
    )


def wide(**runtime: Any) -> Engine:
    """Namesake columns, a filter, groups, two nodes that train, a node whose output nobody takes."""
    sampler, judge, filters, whiten, learner = parts()

    def env_flow(batch: Any) -> Any:
        first = sampler.forward_step(batch)
        second = judge.forward_step(first, batch)
        asked = judge.ask(batch, first)
        judge.ask(second)
        kept = filters.forward_step(second, asked)
        return kept, whiten.forward_step(kept)

    def trainer_flow(batch: Any) -> None:
        learner.second(batch, learner.train_step(batch))

    def eval_flow(batch: Any) -> Any:
        return judge.forward_step(sampler.eval_step(batch))

    evaluator = Evaluator(eval_flow).set_multiple_datasets({"easy": ["x", "y"], "hard": ["z"]})
    return Engine(Environment(env_flow), Trainer(trainer_flow), evaluator)


def twice(**runtime: Any) -> Engine:
    """Two calls of one method, a namespace, two trainers."""
    first, second, judge = Sampler("sampler"), Sampler("sampler"), Judge("judge")
    learners = Learner("learner"), Learner("other")

    def env_flow(batch: Any) -> Any:
        return judge.forward_step(first.forward_step(first.forward_step(batch)))

    def trainer_flow(batch: Any) -> None:
        for learner in learners:
            learner.train_step(batch)

    del second
    return Engine(Environment(env_flow), Trainer(trainer_flow))


def padded(**runtime: Any) -> Engine:
    """Two nodes that take the flow's own batch in other portions."""
    source, judge = Padding("source"), Sampler("sampler", generation_batch_size=4)
    learner = Learner("learner")

    def env_flow(batch: Any) -> Any:
        return source.forward_step(batch), judge.forward_step(batch)

    return Engine(Environment(env_flow), Trainer(lambda b: learner.train_step(b)))


def shaky(fate: str) -> Callable[..., Engine]:
    def make(**runtime: Any) -> Engine:
        sampler, learner = Sampler("sampler"), Learner("learner")
        judge = Shaky("judge", on_failure=fate)

        def env_flow(batch: Any) -> Any:
            return judge.forward_step(sampler.forward_step(batch))

        return Engine(Environment(env_flow), Trainer(lambda b: learner.train_step(b)))

    return make


def shaky_first(**runtime: Any) -> Engine:
    """What fails takes the flow's own batch; two returned nodes have a column of the same name."""
    judge, learner = Shaky("judge", on_failure="mask"), Learner("learner")
    counter = Counter("counter")

    def env_flow(batch: Any) -> Any:
        return counter.forward_step(batch), judge.forward_step(batch)

    return Engine(Environment(env_flow), Trainer(lambda b: learner.train_step(b)))


def alone(**runtime: Any) -> Engine:
    learner = Learner("learner")
    return Engine(trainer=Trainer(lambda b: learner.train_step(b)))


def picky(buffers: Any) -> list[dict[str, Any]]:
    samples = [sample for buffer in buffers for sample in buffer.samples]
    return [{**sample, "age": 1.0} for sample in samples[::-2]]


GROUPS = {"num_inference_per_prompt": 2}
STEPS = {"train_global_batch_size": 5, "train_micro_batch_size": 2, "num_training_epoch": 2}
CASES: list[tuple[str, Callable[..., Engine], dict[str, Any]]] = [
    ("everything at once", wide, GROUPS),
    ("one by one", wide, {**GROUPS, **STEPS, "generation_batch_size": 1}),
    ("streaming", wide, {**GROUPS, **STEPS, "generation_batch_size": 3, "stream_data_loader_type": "dynamic"}),
    ("shuffled, dropped", wide, {**GROUPS, **STEPS, "data_shuffle": True, "incomplete_step": "drop_last"}),
    ("replay", wide, {**GROUPS, **STEPS, "max_replay_episode": 2}),
    ("replay, from the second episode", wide, {**GROUPS, "max_replay_episode": -1, "replay_episode_offset": 1}),
    ("twice", twice, {**STEPS, "generation_batch_size": 4}),
    ("padded", padded, {"generation_batch_size": 3, **STEPS}),
    ("masked", shaky("mask"), {"generation_batch_size": 4, **STEPS}),
    ("masked, streaming", shaky("mask"), {"generation_batch_size": 4, **STEPS, "stream_data_loader_type": "dynamic"}),
    ("groups dropped", shaky("drop_group"), {**GROUPS, **STEPS, "generation_batch_size": 4}),
    ("straight from the batch", shaky_first, {"generation_batch_size": 4, **STEPS}),
    ("no environment", alone, STEPS),
]  # fmt: skip


def learn(make: Callable[..., Engine], runtime: dict[str, Any], **models: Any) -> Path:
    values = {"num_episode": 3, "record": True, "output_dir": "run", **runtime}
    chatlearn.init({"runtime": values, "models": models})
    engine = make(**runtime)
    if runtime.get("sampler"):
        engine.set_replay_sampler(picky)
    with engine.set_dataset(list("abcdefg")):
        engine.learn()
    return Path("run")


def assert_recorded(run: Path, seen: Seen) -> None:
    assert seen
    record = RunRecord(run)
    for (number, flow, name), calls in seen.items():
        node = record.episode(number).flow(flow).node(name)
        assert len(node.calls) == len(calls)
        for recorded, (inputs, outputs, call, metrics) in zip(node.calls, calls, strict=True):
            assert same(recorded.inputs(), inputs), (number, name)
            assert same(recorded.outputs(), outputs), (number, name)
            assert same(recorded.entry.numbers, dict(metrics))
            assert recorded.entry.iteration == call.iteration
            assert recorded.entry.replica == call.replica
            if call.step is not None:
                assert recorded.entry.step == call.step.index
                positions = [p for part in call.step.micro_batches for p in part]
                rows = range(recorded.start, recorded.start + recorded.entry.rows)
                assert [node.table.meta("position")[row] for row in rows] == positions


@pytest.mark.parametrize(
    ("make", "runtime"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_every_call_comes_back_as_it_was(
    make: Callable[..., Engine], runtime: dict[str, Any], seen: Seen
) -> None:
    assert_recorded(learn(make, runtime), seen)


def test_a_replay_sampler_may_choose_and_change(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatlearn.init(
        {
            "runtime": {
                "num_episode": 3,
                "record": True,
                "output_dir": "run",
                "max_replay_episode": 2,
            }
        }
    )
    engine = twice().set_replay_sampler(picky).set_dataset(list("abcdefg"))
    engine.learn()
    assert_recorded(Path("run"), seen)
    rows = RunRecord("run").episode(3).flow("trainer_flow").node("learner.train_step")
    assert {int(uid or 0) // 7 for uid in rows.uids} == {1, 2}  # samples of two episodes


def test_replicas_and_a_namespace(seen: Seen) -> None:
    run = learn(wide, {**GROUPS, "generation_batch_size": 2}, sampler={"num_replica": 2},
                whiten={"namespace": "own"})  # fmt: skip
    assert_recorded(run, seen)
    node = RunRecord(run).episode(1).flow("env_flow").node("sampler.forward_step")
    assert {call.entry.replica for call in node.calls} == {0, 1}
    whiten = RunRecord(run).episode(1).flow("env_flow").node("whiten.forward_step")
    assert whiten.made == ["own/advantages"]


def test_nothing_is_stored_twice() -> None:
    """Of what nodes pass on, and of what trainers get, a file holds references."""
    run = learn(wide, {**GROUPS, **STEPS, "num_training_epoch": 4})
    episode = RunRecord(run).episode(2)
    stored = {
        (node.flow.name, node.name): sorted({p.stored for call in node.calls for layout in
            (*call.input_layouts, *call.output_layouts) for p in layout if p.source == "stored"})
        for node in episode.nodes()
    }  # fmt: skip
    assert stored == {
        ("env_flow", "sampler.forward_step"): ["out:mean/x", "out:padded", "out:response_ids"],
        ("env_flow", "judge: <ü>?.forward_step"): ["out:prompt", "out:rewards"],
        ("env_flow", "judge: <ü>?.ask"): ["out:asked"],
        ("env_flow", "judge: <ü>?.ask#2"): ["out:asked"],
        ("env_flow", "filter.forward_step"): [],
        ("env_flow", "whiten.forward_step"): ["out:advantages"],
        ("trainer_flow", "learner.train_step"): ["out:ratio"],
        ("trainer_flow", "learner.second"): [],
    }
    trainer = episode.flow("trainer_flow")
    places = [place for layout in trainer.batch.layouts for place in layout]
    assert {place.source for place in places} == {"node"}


def test_names_that_are_no_file_names_have_files() -> None:
    run = learn(wide, GROUPS)
    files = {path.name for path in (run / "record/episode-000001/env_flow").iterdir()}
    assert "judge%3A %3C%C3%BC%3E%3F.forward_step.parquet" in files
    assert all("/" not in name and not name.startswith("..") for name in files)


def test_what_cannot_be_kept_is_left_out_and_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Image:
        pass

    class Painter(BaseModule):
        def forward_step(self, data: Batch) -> Batch:
            data["image"] = [Image() for _ in data["prompt"]]
            data["size"] = [3 for _ in data["prompt"]]
            return data

    painter = Painter("painter")
    learn(lambda **_: Engine(Environment(lambda b: painter.forward_step(b))), {})
    told = [line for line in capsys.readouterr().out.splitlines() if "not recorded" in line]
    assert told == [
        "not recorded: column 'image' of painter.forward_step holds a Image, which cannot be kept in a file"
    ]
    node = RunRecord("run").episode(2).flow("env_flow").node("painter.forward_step")
    assert node.made == ["size"]
    assert node.output("size") == [3] * 7


def test_recording_changes_nothing_of_what_modules_draw() -> None:
    """The numbers that modules draw, and so all they make, are the same with and without a record."""
    drawn: list[list[float]] = []

    class Drawing(Sampler):
        def forward_step(self, data: Batch) -> Batch:
            made = super().forward_step(data)
            drawn[-1].append(float(made["padded"].sum()))
            return made

    for record in (False, True):
        drawn.append([])
        sampler = Drawing("sampler")
        engine = lambda sampler=sampler, **_: Engine(Environment(lambda b: sampler.forward_step(b)))  # noqa: E731
        learn(engine, {"record": record, "generation_batch_size": 2, "output_dir": f"run-{record}"})
    assert drawn[0] == drawn[1]
    assert not Path("run-False/record").exists()
