# SPDX-License-Identifier: Apache-2.0
"""Replay: the samples of the last episodes, and what a user's sampler function takes of them to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EpisodeBuffer:
    """One kept episode, as a replay sampler sees it."""

    episode_id: int
    """Number of the episode, from 0."""
    samples: list[dict[str, Any]]
    """One dict of columns per sample, in the episode's order."""


ReplaySampler = Callable[[Sequence[EpisodeBuffer]], Iterable[dict[str, Any]]]
