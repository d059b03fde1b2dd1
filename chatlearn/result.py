# SPDX-License-Identifier: Apache-2.0
"""What `learn()` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class RunResult:
    """What `learn()` returns: how far the run came, and where its things lie."""

    episodes: int
    train_iteration: int
    seconds: float
    folder: Path
    metrics: dict[str, float] = field(default_factory=dict[str, float], repr=False)
    """Of the last episode."""
    evaluations: list[tuple[int, dict[str, float]]] = field(
        default_factory=list[tuple[int, dict[str, float]]], repr=False
    )
    """Episodes done and the metrics, of every evaluation of the run, resumed parts included."""
