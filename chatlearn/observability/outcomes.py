# SPDX-License-Identifier: Apache-2.0
"""Count how samples fared: as metrics, in a few words for the display, and each module's first failure in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, Protocol

from chatlearn.columns import FAILED, OUTCOME, RETRIED, TIMED_OUT
from chatlearn.observability.headline import OUTCOMES

_WORDS: Final = {
    "failed": "failed",
    "timed_out": "timed out",
    "dropped_groups": "dropped",
}


class Call(Protocol):
    """What is known of a finished call, or of samples that were given up."""

    @property
    def module(self) -> str: ...
    @property
    def outcomes(self) -> Mapping[str, int]: ...
    @property
    def cause(self) -> str: ...


class OutcomeCounts:
    """Collects the outcomes of one episode, or of one evaluation.

    Example:
        >>> counts = OutcomeCounts()
        >>> counts.add(report)
        >>> counts.metrics()
        {'outcomes/reward/failed': 2.0, 'outcomes/reward/retried': 0.0}
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, call: Call) -> None:
        """Take the outcomes of a call."""
        for outcome, samples in call.outcomes.items():
            self._counts[f"{call.module}/{outcome}"] += samples

    def add_losses(self, losses: Mapping[str, int]) -> None:
        """Take what became of lost samples: how many were masked, or went with their groups."""
        self._counts.update(losses)

    def metrics(self) -> dict[str, float]:
        """Return the counts under their full names; one that may be above 0 is there at 0, too."""
        return {OUTCOMES + name: float(count) for name, count in self._counts.items()}


class FirstCauses:
    """Tells the first failure of every module, and in the end how many more there were.

    Example:
        >>> print(causes.note_of(report))
        reward gave a sample up, for the first time; further ones are counted in outcomes/reward/...
          ValueError: bad completion
    """

    def __init__(self) -> None:
        self._lost: Counter[str] = Counter()

    def note_of(self, call: Call) -> str | None:
        """Return what to say of a call: of the first one whose samples a module gave up."""
        if not call.cause:
            return None
        samples, is_first = sum(call.outcomes.values()), not self._lost[call.module]
        self._lost[call.module] += samples
        if not is_first:
            return None
        what = "a sample" if samples == 1 else f"{samples} samples"
        cause = call.cause.replace("\n", "\n  ")
        return (
            f"{call.module} gave {what} up, for the first time; further ones are counted in "
            f"{OUTCOMES}{call.module}/...\n  {cause}"
        )

    def summary(self) -> list[str]:
        """Return a line for every module that gave samples up."""
        return [
            f"{module} gave up {samples} sample{'s' * (samples != 1)} in this run; see {OUTCOMES}{module}/..."
            for module, samples in self._lost.items()
        ]


def kept_rows(batch: Mapping[str, Any]) -> list[int] | None:
    """Return which samples of a batch have values: those that were not lost; None if all have."""
    outcomes = list(batch.get(OUTCOME, ()))
    kept = [row for row, outcome in enumerate(outcomes) if outcome not in (FAILED, TIMED_OUT)]
    return None if len(kept) == len(outcomes) else kept


def words(metrics: Mapping[str, float]) -> str:
    """Say what was lost or tried again, of the metrics of an episode or an evaluation; nothing, if nothing was.

    Example:
        >>> words({"outcomes/reward/failed": 2.0, "outcomes/dropped_groups": 1.0, "outcomes/policy/cut": 5.0})
        '2 failed, 1 group dropped'
        >>> words({"outcomes/reward/retried": 6.0})
        'reward: 6 retried'
    """
    found: Counter[str] = Counter()
    retried: list[str] = []
    for name, value in metrics.items():
        last = name.rpartition("/")[2]
        if name.startswith(OUTCOMES) and last in _WORDS:
            found[last] += int(value)
        elif name.startswith(OUTCOMES) and last == RETRIED and value:
            module = name.removeprefix(OUTCOMES).removesuffix(f"/{RETRIED}")
            retried.append(f"{module}: {int(value)} retried")
    parts: list[str] = []
    for name, word in _WORDS.items():
        if count := found[name]:
            unit = f" group{'s' * (count != 1)}" if name == "dropped_groups" else ""
            parts.append(f"{count}{unit} {word}")
    return ", ".join([*parts, *retried])
