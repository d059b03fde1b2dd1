# SPDX-License-Identifier: Apache-2.0
"""Find in a flat dict of metrics the few numbers that a person looks at first.

Metrics are named `<module>/<name>`; these last parts have a meaning here, whatever the module:
`rewards`, `loss`, `accuracy`, `generated_tokens`, `trained_tokens`, and `time/<phase>` for the
seconds of an episode's phases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

REWARD: Final = ("reward", "rewards", "reward_mean", "rewards_mean")
LOSS: Final = ("loss", "policy_loss")
ACCURACY: Final = ("accuracy", "exact_match", "pass_rate", "correct")
GENERATED: Final = ("generated_tokens", "response_tokens", "sampled_tokens")
TRAINED: Final = ("trained_tokens", "train_tokens")
GENERATION_PHASES: Final = ("generating", "generate", "generation", "env_flow")
TRAINING_PHASES: Final = ("training", "train", "trainer_flow")
EVAL: Final = "eval/"


@dataclass(frozen=True)
class Headline:
    """What the progress line and the top of the report show; None where nothing reports it."""

    reward: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    generated_per_s: float | None = None
    trained_per_s: float | None = None


def headline(metrics: Mapping[str, float]) -> Headline:
    """Pick the headline numbers of an episode; `eval/...` metrics give the accuracy only.

    Example:
        >>> headline({"policy/generated_tokens": 500.0, "time/env_flow": 0.5}).generated_per_s
        1000.0
    """
    training = {name: value for name, value in metrics.items() if not name.startswith(EVAL)}
    return Headline(
        reward=find(training, REWARD),
        loss=find(training, LOSS),
        accuracy=find(metrics, ACCURACY),
        generated_per_s=_speed(training, GENERATED, GENERATION_PHASES, "generated_tokens_per_s"),
        trained_per_s=_speed(training, TRAINED, TRAINING_PHASES, "trained_tokens_per_s"),
    )


def find(metrics: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    """Return the first metric whose last part is one of `names`, earlier names preferred."""
    key = find_key(metrics, names)
    return None if key is None else metrics[key]


def find_key(metrics: Mapping[str, float], names: tuple[str, ...]) -> str | None:
    """Return the full name of the metric that `find` returns."""
    by_part: dict[str, str] = {}
    for key in metrics:
        by_part.setdefault(key.rsplit("/", 1)[-1], key)
    return next((by_part[name] for name in names if name in by_part), None)


def _speed(
    metrics: Mapping[str, float], names: tuple[str, ...], phases: tuple[str, ...], given: str
) -> float | None:
    """Return the speed that is reported, else tokens by the seconds of their phase."""
    speed = find(metrics, (given,))
    if speed is not None:
        return speed
    tokens = find(metrics, names)
    seconds = next((metrics[f"time/{p}"] for p in phases if f"time/{p}" in metrics), 0.0)
    return tokens / seconds if tokens is not None and seconds and seconds > 0 else None
