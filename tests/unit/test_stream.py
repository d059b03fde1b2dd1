# SPDX-License-Identifier: Apache-2.0
"""`StreamDataset`: the same steps in the same order, whenever they are handed out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.arithmetic import train_plan
from chatlearn.config import RuntimeConfig
from chatlearn.data.stream import StreamDataset
from chatlearn.flow.steps import Step

sizes = st.none() | st.integers(1, 7)


def steps_of(stream: StreamDataset, parts: list[int]) -> list[Step]:
    return [step for part in parts for step in stream.extend(part)] + stream.close()


def flat(step: Step) -> list[int]:
    return [position for part in step.micro_batches for position in part]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    sizes,
    sizes,
    st.integers(1, 3),
    st.sampled_from(["fill", "keep", "drop_last"]),
)
def test_every_sample_once_per_pass(
    parts: list[int], size: int | None, micro: int | None, epochs: int, incomplete: Any
) -> None:
    options: dict[str, Any] = {
        "global_batch_size": size,
        "micro_batch_size": micro,
        "epochs": epochs,
        "incomplete_step": incomplete,
        "seed": 3,
    }
    fixed = steps_of(StreamDataset("fixed", **options), parts)
    dynamic = steps_of(StreamDataset("dynamic", **options), parts)
    assert fixed == dynamic
    assert [step.index for step in fixed] == list(range(len(fixed)))
    total, full = sum(parts), size or sum(parts)
    per_pass = total // full if incomplete == "drop_last" else -(-total // full)
    assert len(fixed) == per_pass * epochs
    for number, step in enumerate(fixed):
        assert all(len(part) == (micro or full) for part in step.micro_batches[:-1])
        last = number % per_pass == per_pass - 1 if per_pass else False
        assert len(flat(step)) == full or (last and incomplete == "keep")
    for epoch in range(epochs):
        pass_ = [p for step in fixed[epoch * per_pass : (epoch + 1) * per_pass] for p in flat(step)]
        counted = Counter(pass_[:total])
        assert all(count == 1 for count in counted.values())
        if incomplete != "drop_last":
            assert len(counted) == total
        if epoch == 0:
            assert pass_ == [i % total for i in range(len(pass_))]


def test_when_steps_come() -> None:
    fixed, dynamic = (StreamDataset(k, global_batch_size=2) for k in ("fixed", "dynamic"))  # type: ignore[arg-type]
    assert fixed.extend(5) == []
    assert [flat(s) for s in dynamic.extend(5)] == [[0, 1], [2, 3]]
    assert [flat(s) for s in dynamic.extend(1)] == [[4, 5]]
    assert dynamic.close() == []


def test_no_samples_are_no_steps() -> None:
    assert StreamDataset().close() == []
    assert StreamDataset("dynamic", global_batch_size=4, epochs=2).close() == []


def test_a_rest_larger_than_the_episode_wraps() -> None:
    stream = StreamDataset(global_batch_size=7)
    stream.extend(3)
    assert [flat(s) for s in stream.close()] == [[0, 1, 2, 0, 1, 2, 0]]


@pytest.mark.parametrize("seed", [0, "5/1"])
def test_later_passes_depend_on_the_seed_alone(seed: int | str) -> None:
    def later(seed: int | str) -> list[int]:
        stream = StreamDataset(epochs=2, seed=seed)
        stream.extend(20)
        return flat(stream.close()[1])

    assert later(seed) == later(seed) != later("other")


@st.composite
def episodes(draw: st.DrawFn) -> tuple[RuntimeConfig, int, list[int]]:
    """A configuration, a number of samples, and the portions in which they are delivered."""
    group = draw(st.integers(1, 4))
    samples = group * draw(st.integers(1, 12))
    step = draw(st.none() | st.integers(1, 30))
    micro = draw(st.none() | st.integers(1, step or 30))
    runtime = RuntimeConfig(
        sample_per_episode=samples,
        num_inference_per_prompt=group,
        train_global_batch_size=step,
        train_micro_batch_size=micro,
        num_training_epoch=draw(st.integers(1, 3)),
        incomplete_step=draw(st.sampled_from(["fill", "drop_last", "keep"])),
        stream_data_loader_type=draw(st.sampled_from(["fixed", "dynamic"])),
    )
    borders = sorted(draw(st.lists(st.integers(0, samples), max_size=5)))
    parts = [b - a for a, b in zip([0, *borders], [*borders, samples], strict=True)]
    return runtime, samples, parts


def stream_of(runtime: RuntimeConfig, loader: Any = None, seed: int = 0) -> StreamDataset:
    return StreamDataset(
        loader or runtime.stream_data_loader_type,
        global_batch_size=runtime.train_global_batch_size,
        micro_batch_size=runtime.train_micro_batch_size,
        epochs=runtime.num_training_epoch,
        incomplete_step=runtime.incomplete_step,
        seed=seed,
    )


@given(episodes())
def test_steps_are_what_the_arithmetic_says(case: tuple[RuntimeConfig, int, list[int]]) -> None:
    runtime, samples, parts = case
    plan = train_plan(runtime, samples)
    steps = steps_of(stream_of(runtime), parts)
    assert len(steps) == plan.updates
    assert [len(flat(step)) for step in steps] == plan.step_sizes() * plan.passes
    for step in steps:
        assert all(len(part) == plan.micro_batch_size for part in step.micro_batches[:-1])
        assert 1 <= len(step.micro_batches[-1]) <= plan.micro_batch_size
        if len(flat(step)) == plan.step_samples:
            assert len(step.micro_batches) == plan.micro_batches
    for number in range(plan.passes):
        own = steps[number * plan.steps_per_pass : (number + 1) * plan.steps_per_pass]
        counts = Counter(position for step in own for position in flat(step))
        dropped = plan.rest if runtime.incomplete_step == "drop_last" else 0
        once = samples - dropped
        filled = Counter(i % samples for i in range(plan.filled))  # the episode's first samples
        counts.subtract(filled)
        assert sum(counts.values()) == once
        assert all(times in (0, 1) for times in counts.values())
        if number == 0:
            order = [position for step in own for position in flat(step)]
            assert order == [i % samples for i in range(once + plan.filled)]


@given(episodes(), st.lists(st.integers(1, 9), max_size=60))
def test_neither_loader_nor_portions_change_what_is_trained(
    case: tuple[RuntimeConfig, int, list[int]], cuts: list[int]
) -> None:
    runtime, samples, parts = case
    expected = steps_of(stream_of(runtime, "fixed", seed=7), [samples])
    others: list[int] = []
    while sum(others) < samples:
        others.append(min(cuts.pop() if cuts else samples, samples - sum(others)))
    for loader in ("fixed", "dynamic"):
        for portions in (parts, others):
            assert steps_of(stream_of(runtime, loader, seed=7), portions) == expected


@given(episodes())
def test_dynamic_hands_out_a_step_with_its_last_sample(
    case: tuple[RuntimeConfig, int, list[int]],
) -> None:
    runtime, _, parts = case
    stream, size = stream_of(runtime, "dynamic"), runtime.train_global_batch_size
    delivered = handed_out = 0
    for part in parts:
        delivered += part
        handed_out += len(stream.extend(part))
        assert handed_out == (0 if size is None else delivered // size)
    fixed = stream_of(runtime, "fixed")
    assert not any(fixed.extend(part) for part in parts)


def test_later_passes_are_shuffled_each_in_its_own_way() -> None:
    stream = StreamDataset(epochs=3, seed="0/5")
    stream.extend(30)
    first, second, third = (tuple(flat(step)) for step in stream.close())
    assert first == tuple(range(30))
    assert len({first, second, third}) == 3
    assert sorted(second) == sorted(third) == list(first)
