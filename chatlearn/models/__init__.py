# SPDX-License-Identifier: Apache-2.0
"""The ready-made modules; each name loads when it is first used, so this import needs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatlearn.models.advantage import GroupAdvantage
    from chatlearn.models.policy import PolicyInference
    from chatlearn.models.policy_trainer import PolicyTrainer
    from chatlearn.models.reference import PolicyReference
    from chatlearn.models.reward import FunctionReward

__all__ = [
    "FunctionReward",
    "GroupAdvantage",
    "PolicyInference",
    "PolicyReference",
    "PolicyTrainer",
]

_HOME = {
    "FunctionReward": "chatlearn.models.reward",
    "GroupAdvantage": "chatlearn.models.advantage",
    "PolicyInference": "chatlearn.models.policy",
    "PolicyReference": "chatlearn.models.reference",
    "PolicyTrainer": "chatlearn.models.policy_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chatlearn.models' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
