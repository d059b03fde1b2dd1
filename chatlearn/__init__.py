# SPDX-License-Identifier: Apache-2.0
"""Post-train language models by reinforcement learning, written as three plain functions.

The names below load when they are first used, so `import chatlearn` is quick, without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatlearn.config import Config, init
    from chatlearn.engine import Engine
    from chatlearn.errors import ChatLearnError, ConfigError, FlowError, ModuleError
    from chatlearn.executors import Environment, Evaluator, Trainer
    from chatlearn.flow.declaration import declares
    from chatlearn.flow.trace import ControlDependencies
    from chatlearn.module import BaseModule
    from chatlearn.presets import DPOEngine, EvalEngine, GRPOEngine, OnlineDPOEngine, RLHFEngine
    from chatlearn.rerun.replay import replay


__version__ = "0.1.0"

__all__ = [
    "BaseModule",
    "ChatLearnError",
    "Config",
    "ConfigError",
    "ControlDependencies",
    "DPOEngine",
    "Engine",
    "Environment",
    "EvalEngine",
    "Evaluator",
    "FlowError",
    "GRPOEngine",
    "ModuleError",
    "OnlineDPOEngine",
    "RLHFEngine",
    "Trainer",
    "__version__",
    "declares",
    "init",
    "replay",
]

_HOME = {
    "BaseModule": "chatlearn.module",
    "ChatLearnError": "chatlearn.errors",
    "Config": "chatlearn.config",
    "ConfigError": "chatlearn.errors",
    "ControlDependencies": "chatlearn.flow.trace",
    "DPOEngine": "chatlearn.presets",
    "Engine": "chatlearn.engine",
    "Environment": "chatlearn.executors",
    "EvalEngine": "chatlearn.presets",
    "Evaluator": "chatlearn.executors",
    "FlowError": "chatlearn.errors",
    "GRPOEngine": "chatlearn.presets",
    "ModuleError": "chatlearn.errors",
    "OnlineDPOEngine": "chatlearn.presets",
    "RLHFEngine": "chatlearn.presets",
    "Trainer": "chatlearn.executors",
    "declares": "chatlearn.flow.declaration",
    "init": "chatlearn.config",
    "replay": "chatlearn.rerun.replay",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chatlearn' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
