# SPDX-License-Identifier: Apache-2.0
"""How the scheduler will cut a flow's samples into calls, asked of `FlowRun` itself before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chatlearn.flow.graph import FEED
from chatlearn.runtime.flow_run import FlowRun
from chatlearn.runtime.protocol import NodeSpec


@dataclass(frozen=True)
class PlannedCalls:
    """The calls of one node.

    Example:
        A reward with batches of 32 in an episode of 80 samples: `PlannedCalls(spec, (32, 32, 16), is_exact=True)`.
    """

    spec: NodeSpec
    sizes: tuple[int, ...]
    """Samples of each call, in order."""
    is_exact: bool
    """False behind a filter, which may keep fewer samples: there will be so many calls at most."""


def planned_calls(specs: Sequence[NodeSpec], groups: Sequence[int]) -> list[PlannedCalls]:
    """Plan the calls of every node for samples of these groups, as if filters kept all.

    A node behind a filter gets as many calls at most: what `FlowRun` cuts holds as much as a call may, so fewer
    samples, or smaller groups, never need more.
    """
    run = FlowRun([replace(spec, filters=False) for spec in specs], (), range(len(groups)), groups)
    for _ in run.start():
        pass  # all samples are there, so all calls are cut at once
    behind: set[int] = set()
    for spec in specs:
        sources = (source for source in spec.inputs if source != FEED)
        if any(source in behind or specs[source].filters for source in sources):
            behind.add(spec.index)
    return [
        PlannedCalls(
            spec, tuple(task.stop - task.start for task in node.tasks), spec.index not in behind
        )
        for spec, node in zip(specs, run.nodes, strict=True)
    ]
