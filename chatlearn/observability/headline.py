# SPDX-License-Identifier: Apache-2.0
"""Find in a flat dict of metrics the few numbers that a person looks at first.

Metrics are named `<module>/<name>`; these last parts have a meaning here, whatever the module:
`rewards`, `loss`, `accuracy`, `generated_tokens`, `trained_tokens`, and `time/<phase>` for the
seconds of an episode's phases.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

REWARD: Final = ("reward", "rewards", "reward_mean", "rewards_mean")
LOSS: Final = ("loss", "policy_loss")
PASS: Final = "pass@"
ACCURACY: Final = ("accuracy", "exact_match", "pass_rate", "correct", PASS + "1")
GENERATED: Final = ("generated_tokens", "response_tokens", "sampled_tokens")
TRAINED: Final = ("trained_tokens", "train_tokens")
GENERATION_PHASES: Final = ("generating", "generate", "generation", "env_flow")
TRAINING_PHASES: Final = ("training", "train", "trainer_flow")
EVAL: Final = "eval/"
MOST_DATASETS: Final = 6
"""Datasets whose numbers stand on an evaluation's line."""


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
    parts = _by_last_part(name for name in metrics if not name.startswith(EVAL))

    def value(*names: str) -> float | None:
        return next((metrics[parts[name]] for name in names if name in parts), None)

    def speed(given: str, tokens: float | None, phases: tuple[str, ...]) -> float | None:
        seconds = next((metrics[f"time/{p}"] for p in phases if f"time/{p}" in metrics), 0.0)
        computed = tokens / seconds if tokens is not None and seconds and seconds > 0 else None
        reported = value(given)
        return computed if reported is None else reported

    return Headline(
        reward=value(*REWARD),
        loss=value(*LOSS),
        accuracy=find(metrics, ACCURACY),
        generated_per_s=speed("generated_tokens_per_s", value(*GENERATED), GENERATION_PHASES),
        trained_per_s=speed("trained_tokens_per_s", value(*TRAINED), TRAINING_PHASES),
    )


def find(metrics: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    """Return the first metric whose last part is one of `names`, earlier names preferred."""
    key = find_key(metrics, names)
    return None if key is None else metrics[key]


def find_key(metrics: Iterable[str], names: tuple[str, ...]) -> str | None:
    """Return the full name of the metric that `find` returns."""
    parts = _by_last_part(metrics)
    return next((parts[name] for name in names if name in parts), None)


def measure_label(key: str) -> str:
    """Return what to call the number that an evaluation is for: `accuracy`, `pass@1` or `eval reward`."""
    last = _last_part(key)
    if last.startswith(PASS):
        return last
    return "accuracy" if last in ACCURACY else "eval reward"


@dataclass(frozen=True)
class Highlights:
    """The few numbers of an evaluation that fit on a line, with short labels."""

    numbers: list[tuple[str, float]]
    """What the evaluation is for, `pass@k` of the largest k, the reward, a post-process function's own, then others."""
    of_datasets: list[tuple[str, float]]
    """The first of these numbers for each of several datasets."""


def evaluation_highlights(metrics: Mapping[str, float], most: int = 4) -> Highlights:
    """Choose what of an evaluation to show on a line.

    Example:
        >>> evaluation_highlights({"r/pass@1": 0.4, "r/pass@8": 0.7, "math/r/pass@1": 0.5, "code/r/pass@1": 0.3})
        Highlights(numbers=[('pass@1', 0.4), ('pass@8', 0.7)], of_datasets=[('math', 0.5), ('code', 0.3)])
    """
    key = find_key(metrics, ACCURACY) or find_key(metrics, REWARD)
    of_datasets = {
        name.removesuffix(f"/{key}"): value
        for name, value in metrics.items()
        if key is not None and name.endswith(f"/{key}")
    }
    overall = [n for n in metrics if not n.startswith(tuple(f"{d}/" for d in of_datasets))]
    passes = [name for name in overall if pass_k(name) is not None]
    largest = max(passes, key=lambda name: pass_k(name) or 0, default=None)
    reward = find_key(overall, REWARD)
    others = [n for n in overall if "@" not in _last_part(n) and not n.endswith("_tokens")]
    others.sort(key=lambda name: "/" in name)  # first what a post-process function measured itself
    ordered = dict.fromkeys(n for n in (key, largest, reward, *others) if n is not None)
    shown = [(_last_part(name), metrics[name]) for name in list(ordered)[:most]]
    return Highlights(shown, list(of_datasets.items())[:MOST_DATASETS])


def pass_k(name: str) -> int | None:
    """Return the k of a metric `.../pass@<k>`."""
    last = _last_part(name)
    number = last.removeprefix(PASS)
    return int(number) if last.startswith(PASS) and number.isdigit() else None


def _by_last_part(names: Iterable[str]) -> dict[str, str]:
    """Map last parts to names; of several, the one with the fewest parts (those of all datasets), then the first."""
    parts: dict[str, str] = {}
    for name in names:
        last = _last_part(name)
        if last not in parts or name.count("/") < parts[last].count("/"):
            parts[last] = name
    return parts


@functools.lru_cache(maxsize=4096)
def _last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1]
