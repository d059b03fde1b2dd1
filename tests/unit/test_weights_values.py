# SPDX-License-Identifier: Apache-2.0
"""What a sync refuses to send, and plain values of a state: compared by what they hold."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

import chatlearn
from chatlearn import BaseModule
from chatlearn.errors import SyncError
from chatlearn.weights.local import ParameterSync


@pytest.fixture(autouse=True)
def _configured() -> None:
    chatlearn.init()


class Holder(BaseModule):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "two")})


def pair() -> tuple[Holder, list[Holder], ParameterSync]:
    source, destination = Holder("source"), Holder("destination")
    return source, [destination], ParameterSync(source, [destination], share=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [[torch.inf], [-torch.inf, torch.inf]])
def test_infinite_parameters_are_refused(values: list[float], dtype: torch.dtype) -> None:
    source, _, sync = pair()
    source.model.to(dtype)
    source.model["one"].weight.data[0, : len(values)] = torch.tensor(values)
    with pytest.raises(SyncError, match=r"'one\.weight' of the source holds an infinity"):
        sync.run()


def test_infinite_buffers_and_huge_parameters_are_sent() -> None:
    source, (destination,), sync = pair()
    for module in (source, destination):
        module.model.register_buffer("mask", torch.zeros(2))
    source.model.mask.copy_(torch.tensor([torch.inf, -torch.inf]))
    source.model["one"].weight.data.fill_(3e38)  # their sum is not finite
    sync.run()
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, destination.model.state_dict()[name])


def test_complex_nan_is_refused() -> None:
    source, _, sync = pair()
    number = complex(0, float("nan"))
    source.model.phase = nn.Parameter(torch.full((2,), number, dtype=torch.complex64))
    with pytest.raises(SyncError, match="'phase' of the source holds NaN"):
        sync.run()


# ---- plain values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "arrived"),
    [
        ([1, 2, 3], [9]),
        ((1, "a"), (1, "b")),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({1, 2}, {1}),
        (b"ab", b"ac"),
        ({"a": [torch.ones(2)]}, {"a": [torch.zeros(2)]}),
        ([torch.ones(2)], [torch.ones(3)]),
        ([1], (1,)),
        ([True], [1]),
        (2.0, 3.0),
    ],
)
def test_plain_values_are_compared_by_what_they_hold(sent: object, arrived: object) -> None:
    class Values(BaseModule):
        value: object

        def state_dict(self) -> dict[str, object]:
            return {"value": self.value}

        def load_state_dict(self, state: Mapping[str, object]) -> None:
            self.value = arrived

    source, destination = Values("a"), Values("b")
    source.value = destination.value = arrived
    ParameterSync(source, [destination], share=False).run()
    source.value = sent
    with pytest.raises(SyncError, match=r"'value' is .* after the sync, not "):
        ParameterSync(source, [destination], share=False).run()


def test_plain_values_that_are_not_a_number_equal_themselves() -> None:
    class Values(BaseModule):
        value = float("nan")

        def state_dict(self) -> dict[str, object]:
            return {"value": self.value, "more": [{"half": torch.ones(1).half(), "x": self.value}]}

        def load_state_dict(self, state: Mapping[str, object]) -> None:
            self.value = float("nan")

    ParameterSync(Values("a"), [Values("b")], share=False).run()
