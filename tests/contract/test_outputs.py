# SPDX-License-Identifier: Apache-2.0
"""What a step returned: nobody sees another node's changes, and it is kept no longer than somebody takes it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from contract_modules import Batch, Step

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.runtime.protocol import Piece
from chatlearn.runtime.store import OutputStore, SampleStore


def make(data: Batch) -> Batch:
    count = len(data["prompt"])
    data["tensor"], data["nested"] = torch.zeros(count, 2), [{"k": [0]} for _ in range(count)]
    return data


def spoil(data: Batch) -> Batch:
    """Write into everything it gets, in place."""
    data["tensor"] += 1
    for entry in data["nested"]:
        entry["k"].append(1)
    return {"spoiled": data["tensor"]}


def look(data: Batch) -> Batch:
    assert data["tensor"].sum() == 0, "saw another node's changes"
    assert all(entry == {"k": [0]} for entry in data["nested"])
    return {"seen": data["tensor"]}


class Learner(BaseModule):
    def train_step(self, data_list: list[Batch]) -> list[Batch]:
        for data in data_list:
            look(data)
            spoil(data)
        return data_list

    def again(self, data_list: list[Batch]) -> None:
        for data in data_list:
            look(data)


@pytest.mark.parametrize("size", [1, 2, None])
@pytest.mark.parametrize("spoils_first", [True, False])
@pytest.mark.parametrize("returned", ["source", "all"])
def test_changes_in_place_reach_nobody_else(size, spoils_first, returned):
    source, second, third = Step("source", make), Step("second"), Step("third")
    second.function, third.function = (spoil, look) if spoils_first else (look, spoil)
    learner = Learner("learner")

    def flow(batch: Any) -> Any:
        made = source.forward_step(batch)
        others = second.forward_step(made), third.forward_step(made)
        return made if returned == "source" else (made, *others)

    def trainer_flow(batch: Any) -> None:
        learner.train_step(batch)
        learner.again(batch)

    chatlearn.init({"runtime": {"generation_batch_size": size, "num_training_epoch": 2}})
    Engine(Environment(flow), Trainer(trainer_flow)).set_dataset(list("abcd")).learn()
    results = Evaluator(flow).set_dataset(list("abcd")).eval()
    for batch in results["source"]:
        look(batch)


def test_a_module_may_go_on_writing_into_what_it_returned():
    buffer = torch.zeros(1)
    seen: list[float] = []

    def reuse(data: Batch) -> Batch:
        buffer[0] += 1
        return {"number": buffer}

    def collect(data: Batch) -> Batch:
        seen.extend(data["number"].tolist())
        return data

    source, sink = Step("source", reuse), Step("sink", collect)
    sink_config = {"sink": {"generation_batch_size": 4}}
    chatlearn.init({"runtime": {"generation_batch_size": 1}, "models": sink_config})
    env = Environment(lambda batch: sink.forward_step(source.forward_step(batch), batch))
    Engine(env).set_dataset(list("abcd")).learn()
    assert seen == [1.0, 2.0, 3.0, 4.0]


class Tracked:
    """A sample's object that can be watched; the engine passes such objects on as they are."""


def alive_while_running(flow_of: Any, *, evaluates: bool = False, **runtime: Any) -> list[int]:
    """Run eight samples one by one; return how many of the first node's objects live at each call of the last."""
    living: list[weakref.ref[Tracked]] = []
    counts: list[int] = []

    def produce(data: Batch) -> Batch:
        objects = [Tracked() for _ in data["prompt"]]
        living.extend(map(weakref.ref, objects))
        return {"object": objects, "prompt": data["prompt"]}

    def consume(data: Batch) -> Batch:
        gc.collect()
        counts.append(sum(ref() is not None for ref in living))
        return {"prompt": data["prompt"]}

    first, middle, last = Step("first", produce), Step("middle"), Step("last", consume)
    chatlearn.init({"runtime": {"generation_batch_size": 1, **runtime}})
    flow = flow_of(first, middle, last)
    if evaluates:
        Evaluator(flow).set_dataset(list("abcdefgh")).eval()
    else:
        Engine(Environment(flow)).set_dataset(list("abcdefgh")).learn()
    assert len(living) == len(counts) == 8
    return counts


def test_an_output_is_released_once_all_who_take_it_have_taken_it():
    chain = lambda a, b, c: lambda batch: c.forward_step(b.forward_step(a.forward_step(batch)))  # noqa: E731
    for evaluates in (False, True):
        assert alive_while_running(chain, evaluates=evaluates) == [1] * 8


def test_an_output_that_nobody_takes_is_not_kept():
    def alone(first: Step, middle: Step, last: Step) -> Any:
        def flow(batch: Any) -> Any:
            first.forward_step(batch)
            return last.forward_step(middle.forward_step(batch))

        return flow

    assert max(alive_while_running(alone)) == 0


def test_what_a_flow_returns_is_kept():
    both = lambda a, b, c: lambda batch: (c.forward_step(x := a.forward_step(batch)), x)  # noqa: E731
    for evaluates in (False, True):
        assert alive_while_running(both, evaluates=evaluates) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_output_store_counts_every_taker() -> None:
    store = OutputStore()
    store.put(3, "output", 2 * 4)  # four samples, two takers
    for start, stop in ((0, 3), (0, 2), (3, 4)):
        assert store.take(Piece(3, start, stop)) == "output"
        assert len(store) == 1
    assert store[3] == "output"
    store.take(Piece(3, 2, 4))
    assert len(store) == 0
    store.put(4, "nobody's", 0)
    assert len(store) == 0


def test_samples_are_handed_out_without_touching_the_rest() -> None:
    """A growing episode: a step's samples come from the chunks that hold them, so streaming stays linear."""
    store = SampleStore()
    for i in range(100):
        store.append({"x": torch.full((2,), i)})
        assert store.gather((2 * i, 2 * i + 1))["x"].tolist() == [i, i]
        assert store.gather(range(max(2 * i - 3, 0), 2 * i + 1))["x"][-1] == i
    assert len(store._chunks) == 100
    assert store.gather((199, 0))["x"].tolist() == [99, 0]
    assert store.gather((7, 8, 9))["x"].tolist() == [3, 4, 4]
