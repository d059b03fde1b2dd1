# SPDX-License-Identifier: Apache-2.0
"""Parameter sync: copies that are verified, and shared storage that gives the same, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer
from chatlearn.errors import SyncError
from chatlearn.testing import tiny_model
from chatlearn.weights.local import ParameterSync
from chatlearn.weights.plan import plan_sync
from chatlearn.weights.sharing import may_share


class Sharer(BaseModule):
    shares_weights = True

    def setup(self) -> None:
        self.model = tiny_model(seed=len(self.name))


class Sampler(Sharer):
    """Scores each prompt with its weights; what it saw is kept to compare runs."""

    shares_weights = True

    def setup(self) -> None:
        super().setup()
        self.seen: list[torch.Tensor] = []
        self.shared: set[bool] = set()

    @torch.no_grad()
    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        logits = self.model(data["ids"]).logits
        self.seen.append(logits)
        return {"ids": data["ids"], "target": logits.argmin(-1)}

    def after_episode(self) -> None:
        source = self.get("learner")
        pairs = zip(source.parameters(), self.model.parameters(), strict=True)
        self.shared |= {a.data_ptr() == b.data_ptr() for a, b in pairs}


class Learner(Sharer):
    shares_weights = True

    def setup(self) -> None:
        super().setup()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.put("learner", self.model)

    def train_step(self, data_list: list[dict[str, Any]]) -> None:
        for data in data_list:
            logits = self.model(data["ids"]).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), data["target"].flatten()).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def train(sampler: Sampler, learner: Learner, **runtime: Any) -> tuple[bool, list[torch.Tensor]]:
    chatlearn.init(
        {
            "runtime": {
                "num_episode": 4,
                "generation_batch_size": 2,
                "train_global_batch_size": 4,
                "train_micro_batch_size": 2,
                **runtime,
            }
        }
    )
    rows = [{"ids": torch.arange(i, i + 6)} for i in range(8)]
    env, trainer = (
        Environment(lambda b: sampler.forward_step(b)),
        Trainer(lambda b: learner.train_step(b)),
    )
    Engine(env, trainer).set_parameter_sync(learner, sampler).set_dataset(rows).learn()
    pairs = zip(learner.model.parameters(), sampler.model.parameters(), strict=True)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in pairs), "still shared after the run"
    assert len(sampler.shared) == 1
    return sampler.shared.pop(), [
        *sampler.seen,
        *(p.detach().clone() for p in sampler.model.parameters()),
    ]


class CopyingSampler(Sampler):
    """Declares nothing itself, so it is copied to."""


def test_sharing_equals_copying_bit_for_bit() -> None:
    shared, with_sharing = train(Sampler("sampler"), Learner("learner"))
    copied, with_copies = train(CopyingSampler("sampler"), Learner("learner"))
    assert (shared, copied) == (True, False)
    assert len(with_sharing) == len(with_copies) > 16
    for one, other in zip(with_sharing, with_copies, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(with_sharing[0], with_sharing[4]), "the weights move between episodes"


def test_streaming_is_not_shared() -> None:
    shared, _ = train(Sampler("sampler"), Learner("learner"), stream_data_loader_type="dynamic")
    assert not shared


def test_a_source_that_makes_new_tensors_ends_the_sharing() -> None:
    class Replacing(Learner):
        shares_weights = True

        def train_step(self, data_list: list[dict[str, Any]]) -> None:
            super().train_step(data_list)
            self.average = [p.data for p in self.model.parameters()]
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()

    learner = Replacing("learner")
    shared, swapped = train(Sampler("sampler"), learner)
    copied, expected = train(CopyingSampler("sampler"), Learner("learner"))
    assert (shared, copied) == (False, False)
    for one, other in zip(swapped, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "one",
    [
        {"frequency": 2},
        {"replicas": 2},
        {"streams": True},
        {"destination_trains": True},
        {"destination_syncs": 2},
    ],
)
def test_every_condition_of_sharing_counts(one: dict[str, Any]) -> None:
    fine: dict[str, Any] = {
        "frequency": 1,
        "replicas": 1,
        "streams": False,
        "destination_trains": False,
        "destination_syncs": 1,
    }
    assert may_share(**fine)
    assert not may_share(**{**fine, **one})


class Plain(BaseModule):
    shares_weights = True

    def __init__(self, name: str, model: nn.Module | None) -> None:
        super().__init__(name)
        self.model = model


def linear(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    layer = nn.Linear(2, 2).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


def test_another_dtype_is_converted_not_shared() -> None:
    source, destination = Plain("a", linear(1)), Plain("b", linear(0, torch.bfloat16))
    report = ParameterSync(source, [destination], share=True).run()
    assert not report.shared
    assert destination.model.weight.dtype == torch.bfloat16
    assert float(destination.model.weight.detach().sum()) == 4.0
    assert report.bytes == 6 * 2


def test_weights_tied_on_one_side_only_are_not_shared() -> None:
    class Two(nn.Module):
        def __init__(self, tied: bool, value: float) -> None:
            super().__init__()
            self.a = linear(value)
            self.b = self.a if tied else linear(value)

    source, destination = Plain("a", Two(False, 1)), Plain("b", Two(True, 0))
    report = ParameterSync(source, [destination], share=True).run()
    assert not report.shared
    source.model.a.weight.data.add_(1)
    with pytest.raises(
        SyncError, match=r"b\.weight and a\.weight are one tensor in the destination"
    ):
        ParameterSync(source, [destination], share=True).run()
    assert float(destination.model.a.weight.detach().sum()) == 4.0, "nothing was moved"


def test_every_replica_gets_the_weights_and_a_version() -> None:
    source, replicas = Plain("a", linear(1)), [Plain("b", linear(0)) for _ in range(3)]
    sync = ParameterSync(source, replicas, share=False)
    sync.run()
    source.model.weight.data.add_(1)
    assert sync.run().bytes == 3 * 6 * 4
    assert [float(r.model.weight.detach().sum()) for r in replicas] == [8.0] * 3
    assert [r.policy_version for r in replicas] == [2] * 3


def test_a_load_state_dict_that_keeps_what_it_gets_does_not_alias() -> None:
    class Keeping(Plain):
        kept: dict[str, torch.Tensor]

        def state_dict(self) -> dict[str, torch.Tensor]:
            return getattr(self, "kept", {})

        def load_state_dict(self, state: Any) -> None:
            self.kept = dict(state)

    source, destination = Plain("a", linear(1)), Keeping("b", None)
    ParameterSync(source, [destination], share=True).run()
    source.model.weight.data.add_(1)
    assert float(destination.kept["weight"].sum()) == 4.0


def test_a_sync_that_changes_nothing_is_noticed() -> None:
    class Ignoring(Plain):
        def load_state_dict(self, state: Any) -> None:
            pass

    class Values(BaseModule):
        value: Any = 1

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: Any) -> None:
            pass

    with pytest.raises(SyncError, match="'weight' differs after the sync"):
        ParameterSync(Plain("a", linear(1)), [Ignoring("b", linear(0))], share=False).run()
    source, destination = Values("a"), Values("b")
    source.value = 2
    with pytest.raises(SyncError, match="'value' is 1 after the sync, not 2"):
        ParameterSync(source, [destination], share=False).run()


def test_names_and_shapes_must_match() -> None:
    one, two = torch.ones(1), torch.ones(2)
    with pytest.raises(SyncError, match="b is missing in the source"):
        plan_sync({"a": one}, {"a": one, "b": one}, pair="x -> y")
    with pytest.raises(SyncError, match="b is missing in the destination"):
        plan_sync({"a": one, "b": one}, {"a": one}, pair="x -> y")
    with pytest.raises(SyncError, match=r"a is \[2\] in the source, \[1\] in the destination"):
        plan_sync({"a": two}, {"a": one}, pair="x -> y")
    assert plan_sync({"a": one, "n": 3}, {"a": one, "n": 3}, pair="x -> y").bytes == 4  # type: ignore[dict-item]


def test_nothing_to_sync() -> None:
    sync = ParameterSync(Plain("a", None), [Plain("b", None)], share=True)
    assert sync.moves_nothing
    assert sync.run().tensors == 0
    for pair in (("a", linear(1), None), ("a", None, linear(1))):
        with pytest.raises(SyncError, match="has no parameters"):
            ParameterSync(Plain("a", pair[1]), [Plain("b", pair[2])], share=True).run()


def test_replicas_start_with_the_same_weights() -> None:
    weights: list[torch.Tensor] = []

    class Random(BaseModule):
        def setup(self) -> None:
            weights.append(nn.Linear(2, 2).weight.detach())

        def forward_step(self, data: Any) -> Any:
            return data

    chatlearn.init({"models": {"m": {"num_replica": 2}}})
    module = Random("m")
    Engine(Environment(lambda b: module.forward_step(b))).set_dataset(["p"]).learn()
    assert torch.equal(*weights)


def test_a_class_that_is_a_torch_module_itself_is_synced() -> None:
    class Both(BaseModule, nn.Module):
        def __init__(self, name: str, value: float) -> None:
            nn.Module.__init__(self)
            BaseModule.__init__(self, name)
            self.layer = linear(value)

    source, destination = Both("a", 1), Both("b", 0)
    report = ParameterSync(source, [destination], share=True).run()
    assert (report.tensors, report.shared) == (2, False)
    assert float(destination.layer.weight.detach().sum()) == 4.0


def test_a_weight_that_is_nan_is_called_so() -> None:
    class Breaking(Learner):
        def train_step(self, data_list: list[dict[str, Any]]) -> None:
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)

    with pytest.raises(SyncError, match="holds NaN"):
        train(CopyingSampler("sampler"), Breaking("learner"))
