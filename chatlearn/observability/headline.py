# SPDX-License-Identifier: Apache-2.0
"""Find in a flat dict of metrics the few numbers that a person looks at first.

Metrics are named `<module>/<name>`; these last parts have a meaning here, whatever the module:
`rewards`, `loss`, `accuracy`, `generated_tokens`, `trained_tokens`, and `time/<phase>` for the
seconds of an episode's phases. Where several modules report one of them, tokens are summed, speeds
are all their tokens over all their seconds, and rewards and losses carry the names of their modules.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
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
TIME: Final = "time/"
PER_S: Final = "_per_s"
OF_TRAINING: Final = frozenset(
    (*REWARD, *LOSS, *GENERATED, *TRAINED, GENERATED[0] + PER_S, TRAINED[0] + PER_S)
)
EVAL: Final = "eval/"
MOST_DATASETS: Final = 6
"""Datasets whose numbers stand on an evaluation's line."""

OUTCOMES: Final = "outcomes/"
"""Before counts of samples: `outcomes/<module>/failed`, `outcomes/dropped_groups`."""

Labelled = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Headline:
    """What the progress line and the top of the report show; None where nothing reports it."""

    rewards: Labelled = ()
    """Called `reward`; of several modules, each by its module's name."""
    losses: Labelled = ()
    accuracy: float | None = None
    generated_per_s: float | None = None
    trained_per_s: float | None = None

    @property
    def reward(self) -> float | None:
        """The reward of the first module that reports one."""
        return self.rewards[0][1] if self.rewards else None

    @property
    def loss(self) -> float | None:
        """The loss of the first module that reports one."""
        return self.losses[0][1] if self.losses else None


def headline(metrics: Mapping[str, float]) -> Headline:
    """Pick the headline numbers of an episode; `eval/...` metrics give the accuracy only.

    Example:
        >>> headline({"policy/generated_tokens": 500.0, "time/env_flow": 0.5}).generated_per_s
        1000.0
    """
    trained = {
        name: value
        for name, value in metrics.items()
        if _last_part(name) in OF_TRAINING and not name.startswith(EVAL)
    }
    seconds = {name: value for name, value in metrics.items() if name.startswith(TIME)}
    return Headline(
        rewards=tuple(labelled(trained, REWARD, "reward").items()),
        losses=tuple(labelled(trained, LOSS, "loss").items()),
        accuracy=find(metrics, ACCURACY),
        generated_per_s=_speed(trained, GENERATED, seconds, GENERATION_PHASES),
        trained_per_s=_speed(trained, TRAINED, seconds, TRAINING_PHASES),
    )


def labelled(metrics: Mapping[str, float], names: tuple[str, ...], what: str) -> dict[str, float]:
    """Return the values of the first of `names` that is reported: as `what`, or each by its module's name.

    Example:
        >>> labelled({"a_reward/rewards": 0.5, "judge/rewards": 0.7}, REWARD, "reward")
        {'a_reward': 0.5, 'judge reward': 0.7}
    """
    labels = labels_of(find_keys(metrics, names), what)
    return {label: metrics[key] for key, label in labels.items()}


def labels_of(keys: Sequence[str], what: str) -> dict[str, str]:
    """Return what to call the one metric of these keys, or each of several modules' metrics."""
    if len(keys) == 1:
        return {keys[0]: what}
    owners = {key: key.rpartition("/")[0] for key in keys}
    return {key: o if what in o else f"{o} {what}" for key, o in owners.items()}


def total(metrics: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    """Return the sum over modules of the first of `names` that is reported."""
    keys = find_keys(metrics, names)
    return sum(metrics[key] for key in keys) if keys else None


def _speed(
    metrics: Mapping[str, float],
    names: tuple[str, ...],
    times: Mapping[str, float],
    phases: tuple[str, ...],
) -> float | None:
    """Return the tokens per second of all modules together.

    Modules work one after another, so that their seconds add up. A module's seconds are its tokens over its speed;
    where they cannot be known so, those of the phase are taken.
    """
    reported = find_keys(metrics, (names[0] + PER_S,))
    if len(reported) == 1:
        return metrics[reported[0]]
    tokens = {key: metrics[key] for key in find_keys(metrics, names)}
    if reported and (seconds := _seconds(tokens, {key: metrics[key] for key in reported})):
        return sum(tokens.values()) / seconds
    seconds = next((times[TIME + p] for p in phases if TIME + p in times), 0.0)
    return sum(tokens.values()) / seconds if tokens and seconds > 0 else None


def _seconds(tokens: Mapping[str, float], speeds: Mapping[str, float]) -> float | None:
    """Return the seconds of all modules together; None if one that had tokens tells no speed."""
    counts = dict.fromkeys((_module(key) for key in speeds), 0.0)
    for key, count in tokens.items():
        if _module(key) not in counts:
            return None
        counts[_module(key)] += count
    found = {_module(key): speed for key, speed in speeds.items()}
    if any(count and not found[module] for module, count in counts.items()):
        return None
    return sum(count / found[module] for module, count in counts.items() if count)


def _module(key: str) -> str:
    """Return the module of `<module>/<name>` or `<module>.<method>/<name>`."""
    return key.rpartition("/")[0].split(".", 1)[0]


def find(metrics: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    """Return the first metric whose last part is one of `names`, earlier names preferred."""
    key = find_key(metrics, names)
    return None if key is None else metrics[key]


def find_key(metrics: Iterable[str], names: tuple[str, ...]) -> str | None:
    """Return the full name of the metric that `find` returns."""
    parts = _by_last_part(metrics)
    return next((parts[name] for name in names if name in parts), None)


def find_keys(metrics: Iterable[str], names: tuple[str, ...]) -> list[str]:
    """Return the full names of the first of `names` that is reported, one for each module that reports it."""
    keys = list(metrics)
    first = find_key(keys, names)
    if first is None:
        return []
    last, depth = _last_part(first), first.count("/")
    return [key for key in keys if key.count("/") == depth and _last_part(key) == last]


def measure_label(key: str, metrics: Iterable[str] = ()) -> str:
    """Return what to call the number that an evaluation is for: `accuracy`, `pass@1` or `eval reward`.

    Where several modules of `metrics` report it, the module is named: `accuracy of solver`.
    """
    last = _last_part(key)
    label = "accuracy" if last in ACCURACY else "eval reward"
    label = last if last.startswith(PASS) else label
    owner = key.removeprefix(EVAL).rpartition("/")[0]
    return f"{label} of {owner}" if len(find_keys(metrics, (last,))) > 1 else label


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
    others = [
        n
        for n in overall
        if "@" not in _last_part(n) and not n.endswith("_tokens") and not n.startswith(OUTCOMES)
    ]
    rivals = find_keys(
        overall, (_last_part(key or ""),)
    )  # of other modules, what the evaluation is for
    others.sort(
        key=lambda name: ("/" in name, name not in rivals)
    )  # a post-process function's own first
    ordered = dict.fromkeys(n for n in (key, largest, reward, *others) if n is not None)
    shown = [(_short(name, overall), metrics[name]) for name in list(ordered)[:most]]
    return Highlights(shown, list(of_datasets.items())[:MOST_DATASETS])


def _short(name: str, names: Iterable[str]) -> str:
    """Return the last part of a name; all of it, if another of `names` that is not a dataset's ends alike."""
    last, depth = _last_part(name), name.count("/")
    alike = sum(_last_part(other) == last and other.count("/") <= depth for other in names)
    return last if alike == 1 else name


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
