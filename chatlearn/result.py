# SPDX-License-Identifier: Apache-2.0
"""What `learn()` returns, and what is known of an evaluation besides its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlearn.flow.batch import Batch


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


class EvalInfo(dict[str, int]):
    """What a post-process function learns besides the results; keys are attributes too.

    `episode_iteration` counts episodes from 0 (-1: before the first); `train_iteration` counts train steps done.
    """

    datasets: dict[str, dict[str, list[Batch]]]
    """The results again, per dataset: the same batches under the dataset's name."""

    @classmethod
    def of(cls, episode_iteration: int, train_iteration: int) -> EvalInfo:
        """Make the info of one evaluation."""
        info = cls(episode_iteration=episode_iteration, train_iteration=train_iteration)
        info.datasets = {}
        return info

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None
