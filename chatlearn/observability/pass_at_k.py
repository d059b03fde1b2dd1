# SPDX-License-Identifier: Apache-2.0
"""`pass@k` and `avg@n` of samples that were drawn several times per prompt. Pure: plain numbers in, numbers out.

`pass@k` is the probability that at least one of k samples of a prompt passes. From n >= k samples of which c passed,
the estimator `1 - C(n-c, k) / C(n, k)` has that probability as its mean (Chen et al. 2021, arXiv:2107.03374, eq. 1);
averaging `1 - (1 - c/n)^k` instead would be too low. The mean over prompts is what an evaluation reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k for one prompt.

    The quotient of binomials is taken as a product of factors in [0, 1], so that nothing overflows:
    `C(n-c, k) / C(n, k) = (1 - k/n) (1 - k/(n-1)) ... (1 - k/(n-c+1))`.

    Raises:
        ValueError: `passed` is not between 0 and `samples`, or `k` not between 1 and `samples`.

    Example:
        >>> pass_at_k(samples=4, passed=1, k=2)
        0.5
    """
    if not 0 <= passed <= samples:
        raise ValueError(f"{passed} of {samples} samples cannot have passed")
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples")
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples, samples - passed, -1))


def default_ks(samples: int) -> list[int]:
    """Return the k to report for `samples` samples per prompt: powers of two up to it, and itself.

    Example:
        >>> default_ks(12)
        [1, 2, 4, 8, 12]
    """
    powers = [1 << i for i in range(samples.bit_length())]
    return sorted({*powers, samples})


def measured_ks(samples: int, ks: Sequence[int] | None) -> list[int]:
    """Return the k that an evaluation measures: those given, or else the default ones of several samples per prompt."""
    return sorted(set(default_ks(samples) if ks is None and samples > 1 else ks or ()))


@dataclass
class Tally:
    """What is known of the prompts of an evaluation: how many samples each has, how many passed, all rewards.

    A prompt that a filter left fewer than k samples (or none) cannot tell pass@k: it is left out of that mean, and
    counted.

    Example:
        >>> tally = Tally(prompts=2)
        >>> tally.add(rewards=[1.0, 0.0], passed=[True, False])
        >>> tally.add(rewards=[1.0], passed=[True])
        >>> tally.metrics(samples=2, ks=[1, 2])
        {'avg@2': 0.6666666666666666, 'pass@1': 0.75, 'pass@2': 1.0, 'pass@2_left_out': 1.0}
    """

    prompts: int = 0
    """Prompts that were sampled, those of which a filter left nothing included."""
    counts: list[tuple[int, int | None]] = field(default_factory=list[tuple[int, int | None]])
    """Per prompt its samples, and how many of them passed (None: a reward was NaN)."""
    rewards: list[float] = field(default_factory=list[float])

    def add(self, rewards: Sequence[float], passed: Sequence[bool]) -> None:
        """Take the samples of one prompt."""
        unknown = any(math.isnan(reward) for reward in rewards)
        self.counts.append((len(rewards), None if unknown else sum(map(bool, passed))))
        self.rewards += rewards

    def metrics(self, samples: int, ks: Iterable[int]) -> dict[str, float]:
        """Return `avg@<samples>`, `pass@<k>`, and `pass@<k>_left_out` where prompts were left out."""
        found: dict[str, float] = {}
        if self.rewards:
            found[f"avg@{samples}"] = sum(self.rewards) / len(self.rewards)
        for k in ks:
            estimates = [
                math.nan if c is None else pass_at_k(n, c, k) for n, c in self.counts if n >= k
            ]
            if estimates:
                found[f"pass@{k}"] = sum(estimates) / len(estimates)
            if (left_out := self.prompts - len(estimates)) > 0:
                found[f"pass@{k}_left_out"] = float(left_out)
        return found

    @classmethod
    def together(cls, tallies: Iterable[Tally]) -> Tally:
        """Return the tally of several datasets, every prompt counting alike."""
        whole = cls()
        for tally in tallies:
            whole.prompts += tally.prompts
            whole.counts += tally.counts
            whole.rewards += tally.rewards
        return whole
