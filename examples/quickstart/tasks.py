# SPDX-License-Identifier: Apache-2.0
"""The task: sums of four one-digit terms, from reasoning-gym's `chain_sum`.

A prompt is the generator's expression without its spaces (`7-4+8-2`). A completion ends with `=`
and the answer, either at once (`=9`) or after working, one term folded in at a time
(`>3+8-2>11-2=9`). The reward looks at what stands behind the only `=` and at nothing else: nothing
in it asks for the working, so a policy that shows it has found out by itself that it pays.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import reasoning_gym

LONGEST_COMPLETION = 18
"""Tokens: the 17 characters of `>-9-9-9>-18-9=-27`, and the end."""

Problem = dict[str, str]


class Problems(NamedTuple):
    """Three sets of problems that share no prompt."""

    heldout: list[Problem]
    supervised: list[Problem]
    prompts: list[Problem]


def make_all(seed: int) -> Problems:
    """Make the problems of a run: to measure on, to warm start on, and to train on by GRPO."""
    heldout = make_problems(3 * seed, 512)
    supervised = make_problems(3 * seed + 1, 20_000, {p["prompt"] for p in heldout})
    used = {p["prompt"] for p in heldout + supervised}
    return Problems(heldout, supervised, make_problems(3 * seed + 2, 2_000, used))


def make_problems(seed: int, count: int, exclude: Collection[str] = ()) -> list[Problem]:
    """Make `count` problems with distinct prompts, none of them in `exclude`.

    Columns: `prompt`, the compact expression; `answer`, the generator's own answer.
    """
    # The generator draws problem i of seed s from s + i: without the stride, neighbouring seeds
    # would share nearly all problems.
    dataset = reasoning_gym.create_dataset(
        "chain_sum",
        min_terms=4,
        max_terms=4,
        min_digits=1,
        max_digits=1,
        seed=seed * 1_000_000,
        size=100 * count,
    )
    problems: dict[str, Problem] = {}
    for index in range(len(dataset)):
        entry = dataset[index]
        prompt = entry["metadata"]["expression"].replace(" ", "")
        if prompt not in exclude and prompt not in problems:
            problems[prompt] = {"prompt": prompt, "answer": entry["answer"]}
            if len(problems) == count:
                return list(problems.values())
    raise ValueError(f"only {len(problems)} of {count} distinct problems are left")


def exact(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Give 1 where what stands behind the completion's only `=` is the answer, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(text.count("=") == 1 and text.split("=")[1] == right) for text, right in pairs]


def teach(problem: Problem, worked_share: float, rng: random.Random) -> str:
    """Complete a problem correctly; show the working with probability `worked_share`."""
    if rng.random() < worked_share:
        return worked_example(problem["prompt"])
    return "=" + problem["answer"]


def worked_example(prompt: str) -> str:
    """Complete a prompt and show the working: `7-4+8-2` gives `>3+8-2>11-2=9`."""
    first, *rest = re.findall(r"[+-]?\d", prompt)
    total, steps = int(first), []
    for position, term in enumerate(rest, start=1):
        total += int(term)
        steps.append(str(total) + "".join(rest[position:]))
    return "".join(">" + step for step in steps[:-1]) + "=" + steps[-1]
