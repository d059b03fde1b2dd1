# SPDX-License-Identifier: Apache-2.0
"""`StreamDataset`: the same steps in the same order, whenever they are handed out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
