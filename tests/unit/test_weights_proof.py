# SPDX-License-Identifier: Apache-2.0
"""Every sync proves, tensor by tensor, that what was sent is what arrived; and moves no frozen tensor twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chatlearn
from chatlearn import BaseModule
from chatlearn.errors import SyncError
from chatlearn.testing import tiny_model
from chatlearn.weights.local import ParameterSync


@pytest.fixture(autouse=True)
def _configured() -> None:
    chatlearn.init()


class Holder(BaseModule):
    """Holds a model, and counts the tensors that are loaded into it."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__(name)
        self.model = model
        self.loaded: list[set[str]] = []
        model.register_load_state_dict_pre_hook(
            lambda _, state, *__: self.loaded.append(set(state))
        )


def square(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "two")})


def pair(
    replicas: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Holder, list[Holder], ParameterSync]:
    source = Holder("source", square(1))
    destinations = [Holder("destination", square(2 + i).to(dtype)) for i in range(replicas)]
    return source, destinations, ParameterSync(source, destinations, share=False)


# ---- what a load_state_dict does wrong ---------------------------------------------------------------------------


def forget(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "two.bias"}


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.bfloat16().float() for name, value in state.items()}


def transposed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "two.weight": state["two.weight"].T}


def swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "one.weight": state["two.weight"], "two.weight": state["one.weight"]}


def resized(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "one.bias": state["one.bias"][:3]}


WRONG: dict[Callable[..., Any], tuple[str, str]] = {
    forget: ("two.bias", "by up to"),
    rounded: ("one.weight", "by up to"),
    transposed: ("two.weight", "it is transposed"),
    swapped: ("one.weight", "it is what the source calls 'two.weight'"),
    resized: ("one.bias", "it is [3] now, not [4]"),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_what_did_not_arrive_is_named(wrong: Callable[..., Any]) -> None:
    class Wrong(Holder):
        def state_dict(self) -> Mapping[str, Any]:
            return getattr(self, "kept", None) or self.model.state_dict()

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.kept = {**self.model.state_dict(), **wrong(dict(state))}

    name, why = WRONG[wrong]
    sync = ParameterSync(Holder("a", square(1)), [Wrong("b", square(2))], share=False)
    with pytest.raises(SyncError) as caught:
        sync.run()
    assert caught.value.cause.startswith(f"tensor {name!r} differs after the sync: ")
    assert why in caught.value.cause
    assert caught.value.place == "a -> b"


def test_integers_that_differ_are_counted() -> None:
    class Counting(BaseModule):
        steps: Tensor

        def state_dict(self) -> dict[str, Tensor]:
            return {"steps": self.steps}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            pass

    source, destination = Counting("a"), Counting("b")
    source.steps, destination.steps = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 6])
    with pytest.raises(SyncError, match="2 of 3 elements are others"):
        ParameterSync(source, [destination], share=False).run()


def test_the_replica_that_is_wrong_is_named() -> None:
    class Second(Holder):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.model.load_state_dict(state)
            if self.replica_id == 1:
                self.model["two"].weight.data[0, 0] += 1e-6

    replicas = [Second("b", square(2)) for _ in range(3)]
    for number, replica in enumerate(replicas):
        replica.replica_id = number
    with pytest.raises(SyncError, match=r"'two\.weight' differs") as caught:
        ParameterSync(Holder("a", square(1)), replicas, share=False).run()
    assert caught.value.place == "a -> b, replica 1"


def test_names_shapes_and_dtypes_are_compared_before_anything_moves() -> None:
    source, (destination,), _ = pair()
    destination.model["three"] = nn.Linear(4, 4)
    destination.model["two"] = nn.Linear(4, 3)
    source.model["four"] = nn.Linear(2, 2)
    before = {n: t.clone() for n, t in destination.model.state_dict().items()}
    with pytest.raises(SyncError) as caught:
        ParameterSync(source, [destination], share=True, place="train.py:3").run()
    for part in (
        "three.weight is missing in the source",
        "four.bias is missing in the destination",
    ):
        assert part in caught.value.cause
    assert "two.weight is [4, 4] in the source, [3, 4] in the destination" in caught.value.cause
    assert caught.value.place == "train.py:3"
    for name, tensor in destination.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("share", [True, False])
def test_nan_is_refused_before_anything_moves(share: bool) -> None:
    class Sharing(Holder):
        shares_weights = True

    source, destination = Sharing("a", square(1)), Sharing("b", square(2))
    sync = ParameterSync(source, [destination], share=share)
    assert sync.run().shared == share
    source.model["two"].weight.data[1, 2] = torch.nan
    before = destination.model["one"].weight.clone()
    source.model["one"].weight.data += 0 if share else 1
    with pytest.raises(SyncError, match=r"tensor 'two\.weight' of the source holds NaN"):
        sync.run()
    assert torch.equal(destination.model["one"].weight, before)


def test_a_model_that_loads_in_a_way_of_its_own_is_called_so() -> None:
    source, (destination,), sync = pair()
    load, given = destination.model.load_state_dict, []
    destination.model.load_state_dict = lambda state: (given.append(set(state)), load(state))[1]
    sync.run()
    assert given == [set(source.model.state_dict())]
    destination.model.load_state_dict = lambda state: None
    source.model["one"].weight.data += 1
    with pytest.raises(SyncError, match=r"'one\.weight' differs after the sync"):
        sync.run()


# ---- what is moved -------------------------------------------------------------------------------------------------


def test_frozen_tensors_are_moved_once_and_whenever_they_change() -> None:
    source, (destination,), sync = pair()
    names = set(source.model.state_dict())
    source.model["one"].requires_grad_(False)
    frozen = {"one.weight", "one.bias"}
    assert sync.run().skipped == 0
    report = sync.run()
    assert (report.skipped, report.bytes) == (2, 4 * (16 + 4))
    source.model["one"].weight.data += 1  # by somebody who freezes it nevertheless
    assert sync.run().skipped == 1
    source.model["one"].requires_grad_(True)
    assert sync.run().skipped == 0
    source.model["one"].requires_grad_(False)
    assert sync.run().skipped == 2
    assert destination.loaded == [
        names,
        names - frozen,
        names - {"one.bias"},
        names,
        names - frozen,
    ]
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, destination.model.state_dict()[name])


def test_a_frozen_tensor_that_the_destination_changed_is_moved_again() -> None:
    source, (destination,), sync = pair()
    source.model.requires_grad_(False)
    sync.run()
    destination.model["one"].weight.data += 1
    report = sync.run()
    assert (report.skipped, report.bytes) == (3, 4 * 16)
    assert torch.equal(source.model["one"].weight, destination.model["one"].weight)


def test_replicas_are_skipped_each_for_itself() -> None:
    source, replicas, sync = pair(replicas=2)
    source.model.requires_grad_(False)
    assert sync.run().bytes == 2 * 4 * 40
    replicas[1].model["two"].bias.data += 1
    report = sync.run()
    assert (report.skipped, report.bytes) == (3, 4 * 4)


def test_buffers_and_non_tensor_state_arrive() -> None:
    class Stateful(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), value))
            self.register_buffer("seen", torch.full((2,), int(value)))
            self.register_buffer("scratch", torch.full((2,), value), persistent=False)
            self.note = {"made": value}

        def get_extra_state(self) -> dict[str, float]:
            return self.note

        def set_extra_state(self, state: dict[str, float]) -> None:
            self.note = dict(state)

    source, destination = Holder("a", Stateful(1.0)), Holder("b", Stateful(2.0))
    sync = ParameterSync(source, [destination], share=True)
    sync.run()
    assert sync.run().skipped == 1, "the buffer takes no gradient"
    assert destination.model.seen.tolist() == [1, 1]
    assert destination.model.note == {"made": 1.0}
    assert destination.model.scratch.tolist() == [2.0, 2.0], "no part of the state"


def test_a_model_with_a_load_state_dict_of_its_own_gets_everything() -> None:
    class Own(nn.Linear):
        def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
            super().load_state_dict(state)

    source, destination = Holder("a", nn.Linear(2, 2)), Holder("b", Own(2, 2))
    source.model.requires_grad_(False)
    sync = ParameterSync(source, [destination], share=False)
    sync.run()
    destination.model.bias.data += 1
    sync.run()
    assert torch.equal(source.model.bias, destination.model.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_digest_is_of_the_converted_source(dtype: torch.dtype) -> None:
    source, (destination,), sync = pair(dtype=dtype)
    report = sync.run()
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor.to(dtype), destination.model.state_dict()[name])
    assert report.digest == pair(dtype=dtype)[2].run().digest
    source.model["one"].weight.data[0, 0] += 1
    assert sync.run().digest != report.digest


def test_sharing_has_the_digest_of_copying() -> None:
    class Sharing(Holder):
        shares_weights = True

    def report(share: bool) -> Any:
        return ParameterSync(Sharing("a", square(1)), [Sharing("b", square(2))], share=share).run()

    shared, copied = report(True), report(False)
    assert (shared.shared, copied.shared) == (True, False)
    assert shared.digest == copied.digest
    assert (shared.bytes, copied.bytes) == (0, 4 * 40)


# ---- load_state_dict that maps names -------------------------------------------------------------------------------


class Renaming(Holder):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict({f"inner.{name}": value for name, value in state.items()})


def test_renamed_tensors_are_proved_by_their_digests() -> None:
    destination = Renaming("b", nn.ModuleDict({"inner": square(2)}))
    report = ParameterSync(Holder("a", square(1)), [destination], share=False).run()
    assert report.unproven == ()


def test_what_is_made_of_several_tensors_is_called_unproven() -> None:
    class Merging(Holder):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            merged = torch.cat([state["one.weight"], state["two.weight"]])
            bias = torch.cat([state["one.bias"], state["two.bias"]])
            self.model.load_state_dict({"weight": merged, "bias": bias})

    report = ParameterSync(
        Holder("a", square(1)), [Merging("b", nn.Linear(4, 8))], share=False
    ).run()
    assert report.unproven == ("weight", "bias")


def test_a_state_dict_that_maps_names_needs_a_way_back() -> None:
    class OneWay(Holder):
        def state_dict(self) -> Mapping[str, Any]:
            return {f"own.{name}": tensor for name, tensor in self.model.state_dict().items()}

    destination = OneWay("b", nn.Linear(2, 2))
    source = Holder("a", nn.ModuleDict({"own": nn.Linear(2, 2)}))
    with pytest.raises(
        SyncError, match=r"has no own\.weight, own\.bias, which its state_dict\(\) names"
    ):
        ParameterSync(source, [destination], share=False).run()


# ---- tied weights of real models -----------------------------------------------------------------------------------


def untied(model: Any) -> Any:
    """Give a tiny model a head of its own."""
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    return model


class Deduplicated(Holder):
    """Shows each of its tensors once, as `named_parameters()` does."""

    def state_dict(self) -> Mapping[str, Any]:
        return dict(self.model.named_parameters())


@pytest.mark.parametrize("kind", [Holder, Deduplicated])
@pytest.mark.parametrize("share", [True, False])
def test_a_tied_head_arrives_where_it_is_kept_apart(kind: type[Holder], share: bool) -> None:
    source, destination = kind("a", tiny_model(seed=1)), Holder("b", untied(tiny_model(seed=2)))
    sync = ParameterSync(source, [destination], share=share)
    ids = torch.arange(4, 20)[None]
    for _ in range(2):
        sync.run()
        assert torch.equal(source.model(ids).logits, destination.model(ids).logits)
        source.model.lm_head.weight.data += 0.1


def test_a_destination_that_ties_what_differs_is_refused() -> None:
    source, destination = Holder("a", untied(tiny_model(seed=1))), Holder("b", tiny_model(seed=2))
    with pytest.raises(
        SyncError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one tensor"
    ):
        ParameterSync(source, [destination], share=True).run()
    source.model.lm_head.weight.data.copy_(source.model.model.embed_tokens.weight)
    ParameterSync(source, [destination], share=True).run()
