# SPDX-License-Identifier: Apache-2.0
"""What a symbolic value refuses, with the user's line and the way out; and the little it allows."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chatlearn.errors import FlowError, SymbolError
from chatlearn.flow.symbol import Symbol


def symbol() -> Symbol:
    return Symbol(SimpleNamespace(refused=None), 0, "output of policy.forward_step")


REFUSED: dict[str, list[Callable[[Any], Any]]] = {
    "branch on or compare": [
        lambda s: 1 if s else 0,
        lambda s: not s,
        lambda s: s == 1,
        lambda s: s is not None and s != None,  # noqa: E711
        lambda s: s > 1,
        lambda s: max(s, 1),
        lambda s: "prompt" in s,
        lambda s: s in [1],
        lambda s: s and 1,
    ],
    "iterate over": [
        lambda s: list(s),
        lambda s: [x for x in s],  # noqa: C416
        lambda s: print(*s),
        lambda s: len(s),
        lambda s: dict(zip("ab", s, strict=False)),
        lambda s: reversed(s),
    ],
    "unpack": [lambda s: {**s}, lambda s: dict(**s), lambda s: dict(s)],
    "index": [lambda s: s["x"], lambda s: s[0], lambda s: s.__setitem__("x", 1)],
    "convert": [
        lambda s: int(s),
        lambda s: float(s),
        lambda s: round(s),
        lambda s: range(s),
        lambda s: math.floor(s),
        lambda s: np.asarray(s),
        lambda s: bytes(s),
    ],
    "calculate with": [
        lambda s: s + 1,
        lambda s: 1 + s,
        lambda s: s * s,
        lambda s: -s,
        lambda s: divmod(s, 2),
        lambda s: s | {"x": 1},
    ],
    "call": [lambda s: s()],
    "enter": [lambda s: s.__enter__()],
    "await": [lambda s: s.__await__()],
    "format": [lambda s: f"{s:.2f}"],
    "set an attribute of": [lambda s: setattr(s, "x", 1)],
}


@pytest.mark.parametrize(
    ("verb", "use"), [(verb, use) for verb, uses in REFUSED.items() for use in uses]
)
def test_what_needs_data_is_refused_with_place_and_way_out(verb: str, use: Any) -> None:
    with pytest.raises(FlowError) as raised:
        use(symbol())
    assert raised.value.cause.startswith(f"cannot {verb} <symbolic output of policy.forward_step>")
    line = inspect.getsourcelines(use)[1]
    assert raised.value.place.startswith(f"{__file__}:{line}")
    assert raised.value.fix


def test_attributes_are_refused_but_hasattr_works() -> None:
    with pytest.raises(SymbolError, match="no attribute 'shape'"):
        symbol().shape  # noqa: B018
    assert not hasattr(symbol(), "items")
    assert getattr(symbol(), "x", 3) == 3


def test_what_is_allowed() -> None:
    one, other = symbol(), symbol()
    assert str(one) == repr(one) == f"{one}" == "<symbolic output of policy.forward_step>"
    assert {one: 1, other: 2}[one] == 1
    assert copy.copy(one) is one
    assert copy.deepcopy([one])[0] is one
    assert one is not None
    assert one in [one]
    assert not isinstance(one, dict | torch.Tensor)


def test_files_beside_the_package_are_the_users() -> None:
    from chatlearn.flow import symbol as module

    assert module._is_ours(module._PACKAGE + "flow/trace.py")
    assert not module._is_ours(module._PACKAGE.rstrip("/") + "_experiments/flow.py")
