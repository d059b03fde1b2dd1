# SPDX-License-Identifier: Apache-2.0
"""Syncs to destinations with a load_state_dict of their own: renamed tensors are proved, and lost ones named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chatlearn
from chatlearn import BaseModule
from chatlearn.errors import SyncError
from chatlearn.weights.local import ParameterSync, SyncReport

State = Mapping[str, Any]
NAMES = {"a.weight": "first", "b.weight": "second", "c.weight": "third"}
"""New names that no rule gives."""


@pytest.fixture(autouse=True)
def _configured() -> None:
    chatlearn.init()


def square(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in "abc"})


class Source(BaseModule):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__("source")
        self.model = model or square(1)

    def train(self) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(self.model.parameters()):
                parameter += 0.1 * (number + 1)


class Renamed(BaseModule):
    """Holds tensors under names of its own; `change` says what goes wrong with the state, and may be replaced."""

    def __init__(
        self, change: Callable[[State], State] = dict, names: Mapping[str, str] = NAMES
    ) -> None:
        super().__init__("destination")
        self.change, self.names = change, names
        self.net = square(2)

    def state_dict(self) -> State:
        return {self.names.get(name, name): t for name, t in self.net.state_dict().items()}

    def load_state_dict(self, state: State) -> None:
        self.net.load_state_dict({**self.net.state_dict(), **self.change(state)})


def unchanged(state: State) -> State:
    return {}


def swapped(state: State) -> State:
    return {**state, "a.weight": state["b.weight"], "b.weight": state["a.weight"]}


def one_twice(state: State) -> State:
    return {**state, "a.weight": state["b.weight"]}


def sync_of(destination: BaseModule, source: Source | None = None) -> ParameterSync:
    return ParameterSync(source or Source(), [destination], share=False)


def run(destination: BaseModule, source: Source | None = None) -> SyncReport:
    return sync_of(destination, source).run()


def refused(sync: ParameterSync) -> str:
    with pytest.raises(SyncError) as caught:
        sync.run()
    assert caught.value.place == "source -> destination"
    return caught.value.cause


# ---- what is found under other names -------------------------------------------------------------------------------


def test_renamed_tensors_count_and_their_digest_moves() -> None:
    source, destination = Source(), Renamed()
    sync = sync_of(destination, source)
    first = sync.run()
    assert (first.proved, first.bytes, first.unproven, first.lost) == (3, 3 * 64, (), ())
    assert sync.run().digest == first.digest
    source.train()
    assert sync.run().digest != first.digest


def test_what_is_merged_moves_the_digest_too() -> None:
    class Merging(BaseModule):
        merged = torch.zeros(12, 4)

        def state_dict(self) -> State:
            return {"abc": self.merged}

        def load_state_dict(self, state: State) -> None:
            self.merged = torch.cat(list(state.values()))

    source = Source()
    sync = sync_of(Merging("destination"), source)
    first = sync.run()
    assert (first.unproven, first.proved) == (("abc",), 0)
    assert first.lost == tuple(NAMES)
    source.train()
    assert sync.run().digest != first.digest


def test_what_a_state_leaves_out_is_looked_for_in_the_models() -> None:
    class Silent(Renamed):
        def state_dict(self) -> State:
            return {}

    report = run(Silent())
    assert (report.proved, report.bytes, report.lost) == (3, 3 * 64, ())


# ---- what did not arrive -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shows", [True, False])
def test_a_load_that_does_nothing_is_refused(shows: bool) -> None:
    class Idle(Renamed):
        def state_dict(self) -> State:
            return super().state_dict() if shows else {}

    cause = refused(sync_of(Idle(unchanged)))
    assert cause.startswith(
        "nothing arrived: load_state_dict() of Idle('destination') changed none"
    )
    assert "a.weight, b.weight, c.weight" in cause


@pytest.mark.parametrize("renamed", [True, False])
def test_a_load_that_does_nothing_is_refused_whatever_equals_by_chance(renamed: bool) -> None:
    def model(seed: int) -> nn.Module:
        net = square(seed)
        net["norm"] = nn.LayerNorm(4)  # ones and zeros in both ends
        return net

    more = {"norm.weight": "scale", "norm.bias": "shift"} if renamed else {}
    destination = Renamed(unchanged, {**NAMES, **more})
    destination.net = model(2)
    assert "nothing arrived" in refused(sync_of(destination, Source(model(1))))


def test_nothing_to_compare_is_said() -> None:
    class Remote(BaseModule):
        def state_dict(self) -> State:
            return {}

        def load_state_dict(self, state: State) -> None:
            pass

    report = run(Remote("destination"))
    assert (report.proved, report.lost) == (0, tuple(NAMES))


def test_a_tensor_that_is_left_out_is_lost() -> None:
    class Forgetful(BaseModule):
        def state_dict(self) -> State:
            return {n: t for n, t in self.model.state_dict().items() if n != "a.weight"}

        def load_state_dict(self, state: State) -> None:
            kept = {n: t for n, t in state.items() if n != "a.weight"}
            self.model.load_state_dict(kept, strict=False)

    destination = Forgetful("destination")
    destination.model = square(2)
    report = run(destination)
    assert (report.proved, report.lost) == (2, ("a.weight",))


def test_a_tensor_whose_place_another_took_is_lost() -> None:
    report = run(Renamed(one_twice))
    assert (report.lost, report.unproven) == (("a.weight",), ())


# ---- names that trade places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [swapped, one_twice])
@pytest.mark.parametrize("prefix", ["inner.", ""])
def test_names_that_differ_by_a_prefix_are_names_kept(
    change: Callable[[State], State], prefix: str
) -> None:
    class Shorter(Source):
        def state_dict(self) -> State:
            return {f"model.{name}": t for name, t in self.model.state_dict().items()}

    class Loading(Renamed):
        def load_state_dict(self, state: State) -> None:
            super().load_state_dict({n.removeprefix("model."): t for n, t in state.items()})

    names = {name: prefix + name for name in NAMES}
    source = Source() if prefix else Shorter()
    assert run(Loading(names=names), source).proved == 3
    cause = refused(sync_of(Loading(change, names), source))
    taken = "b.weight" if prefix else "model.b.weight"
    expected = (
        f"tensor '{prefix}a.weight' differs after the sync: it is what the source calls '{taken}'"
    )
    assert cause == expected


def test_names_that_trade_places_later_are_named() -> None:
    source, destination = Source(), Renamed()
    sync = sync_of(destination, source)
    sync.run()
    source.train()
    sync.run()
    destination.change = swapped
    cause = refused(sync)
    assert "'first' holds what the source calls 'b.weight', not 'a.weight'" in cause
    assert "'second' holds what the source calls 'a.weight', not 'b.weight'" in cause
    assert "third" not in cause


@pytest.mark.parametrize(
    "stale", [lambda s: {n: s[n] for n in ("b.weight", "c.weight")}, unchanged]
)
def test_a_tensor_that_stays_behind_later_is_named(stale: Callable[[State], State]) -> None:
    source, destination = Source(), Renamed()
    sync = sync_of(destination, source)
    sync.run()
    destination.change = stale
    assert sync.run().lost == (), "nothing had changed"
    source.train()
    cause = refused(sync)
    assert "'first' is as it was before, and 'a.weight' of the source is not" in cause
    assert ("third" in cause) == (stale is unchanged)


# ---- what equals by chance -----------------------------------------------------------------------------------------


def fresh() -> nn.Module:
    """Return layers whose biases are zeros and whose norms are ones, as they all are before training."""
    net = square(1)
    for name in ("one", "two"):
        net[name] = nn.LayerNorm(4)
    return net


def test_fresh_biases_and_norms_decide_nothing() -> None:
    names = {**NAMES, "one.weight": "p", "two.weight": "q", "one.bias": "r", "two.bias": "s"}
    source, destination = Source(fresh()), Renamed(names=names)
    destination.net = fresh()
    sync = sync_of(destination, source)
    for _ in range(3):
        report = sync.run()
        assert (report.proved, report.lost, report.unproven) == (7, (), ())
        source.train()


def test_a_tensor_of_the_destination_s_own_may_equal_one_that_trains() -> None:
    class Extra(Renamed):
        offset: Tensor = torch.zeros(4)

        def state_dict(self) -> State:
            return {**super().state_dict(), "offset": self.offset}

    net = square(1)
    net["bias"] = nn.LayerNorm(4)
    source, destination = Source(net), Extra(names={**NAMES, "bias.weight": "w", "bias.bias": "v"})
    destination.net = nn.ModuleDict(dict(square(2).items()) | {"bias": nn.LayerNorm(4)})
    sync = sync_of(destination, source)
    sync.run()
    source.train()
    assert sync.run().unproven == ("offset",)


def test_what_is_made_of_an_unchanged_tensor_and_a_changing_one_is_no_error() -> None:
    class Adding(Renamed):
        """Adds `b`, zero at first, to `a`: as adapters are merged."""

        def load_state_dict(self, state: State) -> None:
            merged = state["a.weight"] + state["b.weight"]
            super().load_state_dict({**state, "a.weight": merged})

    source = Source()
    source.model["b"].weight.data.zero_()
    sync = sync_of(Adding(), source)
    assert sync.run().lost == ()
    source.model["b"].weight.data += torch.arange(4.0)
    report = sync.run()
    assert (report.unproven, report.lost) == (("first",), ("a.weight",))


def test_two_sources_that_are_alike_at_first_may_share_a_destination() -> None:
    class Two(BaseModule):
        def __init__(self) -> None:
            super().__init__("destination")
            self.kept: dict[str, Tensor] = {}
            self.slot = "x"

        def state_dict(self) -> State:
            return self.kept

        def load_state_dict(self, state: State) -> None:
            self.kept |= {f"{self.slot}.{name}": t for name, t in state.items()}

    sources, destination = {"x": Source(), "y": Source()}, Two()
    syncs = {slot: sync_of(destination, source) for slot, source in sources.items()}
    for _ in range(2):
        for slot, sync in syncs.items():
            destination.slot = slot
            assert sync.run().lost == ()
        sources["y"].train()
