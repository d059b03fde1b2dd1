# SPDX-License-Identifier: Apache-2.0
"""The game: one player writes a problem, `7+5`, the other answers with the last digit of the sum, `2`.

There are 100 problems. Both players leave school with the 25 whose digits go up to 4: the solver was never told the
answer to another one, and the proposer has hardly ever written one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from chatlearn import BaseModule
from chatlearn.models import FunctionReward

START = "?"
"""What the proposer is asked with."""
EASY, ALL = range(5), range(10)
PROBLEMS = [f"{a}+{b}" for a in ALL for b in ALL]
UNREADABLE = "="
"""What the solver is asked where the proposer wrote no problem; nothing it says is right then."""


def parse(text: str) -> tuple[int, int] | None:
    """Return the two digits of a well-formed problem."""
    found = re.fullmatch(r"(\d)\+(\d)", text)
    return (int(found[1]), int(found[2])) if found else None


def answer(text: str) -> str:
    """Return the right answer to a problem; "" to what is none."""
    digits = parse(text)
    return str(sum(digits) % 10) if digits else ""


class Referee(BaseModule):
    """Hands what the proposer wrote to the solver: a plain module between two namespaces."""

    def forward_step(self, data):
        problems = data["proposer/completion"]
        data["answer"] = [answer(text) for text in problems]
        data["solver/prompt"] = [f"{text}=" if parse(text) else UNREADABLE for text in problems]
        return data


def right(completions: Sequence[str], answer: Sequence[str]) -> list[bool]:
    """Reward of the solver: 1 for the right answer."""
    return [bool(a) and text == a for text, a in zip(completions, answer, strict=True)]


def hard(
    completions: Sequence[str], solver_rewards: Sequence[float], prompt_uid: Sequence[int]
) -> list[float]:
    """Reward of the proposer: 1 for a problem that the solver does not solve, half for one that it does.

    What is no problem earns nothing; who write the same problem in one group share its pay.
    """
    proposals = list(zip(prompt_uid, completions, strict=True))
    times = Counter(proposals)
    return [
        (0.5 if solved else 1.0) / times[proposal] if parse(proposal[1]) else 0.0
        for proposal, solved in zip(proposals, solver_rewards, strict=True)
    ]


class GroupReward(FunctionReward):
    """A reward whose function needs whole groups: the engine cuts no group in two."""

    batch_by = "group"
