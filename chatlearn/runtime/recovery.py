# SPDX-License-Identifier: Apache-2.0
"""What follows when a step fails on samples. Pure: no I/O, no clock.

::

    a call fails --> the same samples once more, `Recovery.retries` times at most
                       |  fails still, and they may be given up
                       v
                     its halves, their halves, ... --> a sample that fails alone is the culprit: lost

So one bad sample of n costs `1 + retries` calls of n, and at most `2 * ceil(log2(n))` smaller ones; if all are bad,
`2 * n - 2` smaller ones. Where the step names its culprits, they alone are tried again, and no halves are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from chatlearn.runtime.node_run import NodeRun
from chatlearn.runtime.positions import Portion
from chatlearn.runtime.protocol import NodeSpec, Recovery

HOPELESS: Final = 32
"""Samples that a node may lose before the first one that it succeeds on; then it is broken, and the run stops."""


def tries_again(recovery: Recovery, portion: Portion) -> bool:
    """Tell whether the samples of a call that failed are due another try as they are."""
    return portion.attempt < recovery.retries


def halves(spec: NodeSpec, portion: Portion, groups: Sequence[int]) -> list[Portion]:
    """Cut the samples of a call that failed in two, groups whole where the node needs that; none if it cannot be cut.

    A filter, and a node that takes the whole episode, decides on samples together: its calls are not cut.

    Args:
        spec: the node.
        portion: its samples.
        groups: the group of each.
    """
    if spec.filters or spec.batch_by == "episode":
        return []
    borders = [
        at
        for at in range(1, len(groups))
        if spec.batch_by == "sample" or groups[at] != groups[at - 1]
    ]
    if not borders:
        return []
    cut = min(borders, key=lambda at: abs(2 * at - len(groups)))
    parts = portion.positions[:cut], portion.positions[cut:]
    return [replace(portion, positions=part, attempt=portion.attempt + 1) for part in parts]


def is_hopeless(node: NodeRun) -> bool:
    """Tell whether a node has failed on so many samples, and on all it had, that it must be broken."""
    return not node.succeeded and node.gave_up >= HOPELESS
