# SPDX-License-Identifier: Apache-2.0
"""Plans: names matched over ties, and all that does not match said at once, before anything is moved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from chatlearn.errors import SyncError
from chatlearn.weights.plan import plan_sync, ties_of

ONE, TWO, THREE = torch.ones(1), torch.ones(2), torch.ones(3)


def plan(source: dict[str, object], destination: dict[str, object], **ties: dict[str, str]):
    return plan_sync(source, destination, pair="x -> y", place="here", **ties)  # type: ignore[arg-type]


def refused(
    source: dict[str, object], destination: dict[str, object], **ties: dict[str, str]
) -> str:
    with pytest.raises(SyncError, match="parameters of x -> y do not match") as caught:
        plan(source, destination, **ties)
    assert caught.value.place == "here"
    return caught.value.cause


def test_equal_names_and_plain_values() -> None:
    found = plan({"a": ONE, "n": 3}, {"n": 4, "a": ONE.bfloat16()})
    assert dict(found.origins) == {"n": "n", "a": "a"}
    assert found.bytes == 2


def test_all_that_does_not_match_is_said_at_once() -> None:
    cause = refused(
        {"weight": ONE, "new": TWO, "wide": TWO, "float": ONE},
        {"weigth": ONE, "old": THREE, "wide": THREE, "float": ONE.long()},
    )
    assert cause.splitlines()[1:] == [
        "  weigth is missing in the source (close: weight)",
        "  old is missing in the source",
        "  weight is missing in the destination (close: weigth)",
        "  new is missing in the destination",
        "  wide is [2] in the source, [3] in the destination",
        "  float is float32 in the source, int64 in the destination",
    ]


def test_a_close_name_of_another_shape_is_no_hint() -> None:
    assert "close" not in refused({"weight": ONE}, {"weigth": TWO})


def test_many_problems_are_counted() -> None:
    cause = refused({f"a{i}": ONE for i in range(50)}, {f"b{i}": ONE for i in range(25)})
    assert "and 5 more are missing in the source" in cause
    assert "and 30 more are missing in the destination" in cause
    assert len(cause.splitlines()) == 1 + 2 * 21
    shapes = {f"a{i}": TWO for i in range(23)}
    assert "and 3 more like these" in refused(dict.fromkeys(shapes, ONE), dict(shapes))


def test_names_of_one_tensor() -> None:
    layer = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    other.weight.data = layer.weight.data  # shared without being the same parameter
    named = [("a", layer.weight), ("b", layer.weight), ("c", other.weight), ("d", other.bias)]
    assert ties_of(named) == {"a": "a", "b": "a", "c": "a", "d": "d"}
    assert ties_of([("x", layer.weight), ("y", layer.weight.T), ("n", 3)]) == {"x": "x", "y": "y"}
    empty = [torch.empty(0), torch.empty(0)]
    assert ties_of([("p", empty[0]), ("q", empty[1]), ("r", empty[0])]) == {
        "p": "p",
        "q": "q",
        "r": "p",
    }
    meta = torch.empty(2, device="meta")
    assert ties_of([("m", meta), ("n", meta.clone())]) == {"m": "m", "n": "n"}


TIED = {"embed": "embed", "head": "embed"}
APART = {"embed": "embed", "head": "head"}


def test_a_head_that_the_source_leaves_out_arrives_where_it_is_kept_apart() -> None:
    found = plan(
        {"embed": TWO}, {"embed": TWO, "head": TWO}, source_ties=TIED, destination_ties=APART
    )
    assert dict(found.origins) == {"embed": "embed", "head": "embed"}
    found = plan(
        {"head": TWO}, {"embed": TWO, "head": TWO}, source_ties=TIED, destination_ties=APART
    )
    assert dict(found.origins) == {"embed": "head", "head": "head"}
    cause = refused({"embed": TWO}, {"embed": TWO, "head": TWO}, source_ties=APART)
    assert "head is missing in the source" in cause
    cause = refused({"embed": TWO}, {"embed": TWO, "head": THREE}, source_ties=TIED)
    assert "head (there: embed) is [2] in the source, [3] in the destination" in cause


def test_a_head_that_the_destination_leaves_out_is_not_missing() -> None:
    both: dict[str, object] = {"embed": TWO, "head": TWO.clone()}
    found = plan(both, {"embed": TWO}, destination_ties=TIED)
    assert dict(found.origins) == {"embed": "embed"}
    both["head"] = TWO + 1
    cause = refused(both, {"embed": TWO}, destination_ties=TIED)
    assert "head and embed are one tensor in the destination, and differ in the source" in cause
    assert "head is missing in the destination" in refused(both, {"embed": TWO})


def test_what_the_destination_ties_must_be_equal_in_the_source() -> None:
    held = torch.zeros(2)
    tied: dict[str, object] = {"embed": held, "head": held}
    assert plan({"embed": TWO, "head": TWO.clone()}, tied).origins
    cause = refused({"embed": TWO, "head": TWO * 2}, tied)
    assert "head and embed are one tensor in the destination, and differ in the source" in cause
    assert plan({"embed": TWO.to("meta"), "head": TWO.to("meta")}, tied).origins, "not known yet"


def test_what_the_destination_ties_must_stay_equal_in_the_source() -> None:
    held = torch.zeros(2)
    tied: dict[str, object] = {"embed": held, "head": held}
    both: dict[str, object] = {"embed": TWO, "head": TWO.clone()}
    with pytest.raises(SyncError, match="two in the source, which training makes differ") as caught:
        plan_sync(both, tied, pair="x -> y", trained=["head"])
    assert "tie_word_embeddings" in caught.value.fix
    assert plan_sync(both, tied, pair="x -> y", trained=["other"]).origins, "frozen, so they stay"
    assert plan_sync({"embed": TWO, "head": TWO}, tied, pair="x -> y", trained=["embed"]).origins


def test_nan_in_what_is_tied_is_no_difference() -> None:
    nan: Tensor = torch.full((2,), torch.nan)
    assert plan({"embed": nan, "head": nan}, {"embed": held, "head": held}).origins


held = torch.zeros(2)


class Counting(str):
    """A name that counts how often it is compared with another one."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Counting.compared += 1
        return super().__eq__(other)

    __hash__ = str.__hash__


def test_names_are_compared_in_proportion_to_their_number() -> None:
    def names() -> dict[str, object]:
        return {Counting(f"layer.{i}.weight"): torch.zeros(1) for i in range(300)}

    source, destination = names(), names()
    Counting.compared = 0
    plan(source, destination)
    assert Counting.compared < 20 * 300
    heads = {**names(), "head": torch.zeros(1)}
    ties = dict.fromkeys(heads, "one")
    Counting.compared = 0
    plan(heads, {"head": ONE}, source_ties=ties, destination_ties=ties)
    assert Counting.compared < 20 * 300
