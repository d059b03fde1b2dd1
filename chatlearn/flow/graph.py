# SPDX-License-Identifier: Apache-2.0
"""The graph of a flow: nodes in the order they were called, and what each waits for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from chatlearn.module import BaseModule

FEED: Final = -1
"""Stands for the flow's own batch where a node's input is named by its number."""


@dataclass(frozen=True)
class Node:
    """One call of a module's method in a flow.

    Example:
        `ref_out = reference.forward_step(policy_out)` is
        `Node(index=1, name="reference.forward_step", module=reference, method="forward_step", inputs=(0,), ...)`.
    """

    index: int
    name: str
    """`<module>.<method>`, with `#2`, `#3` for later calls of the same method in the flow."""
    module: BaseModule
    method: str
    inputs: tuple[int, ...]
    """Nodes (or `FEED`) whose outputs are merged, in argument order, into the call's `data`."""
    after: tuple[int, ...]
    """Control dependencies: nodes that must have finished a batch before this node runs it."""
    constants: dict[str, Any] = field(default_factory=dict[str, Any])
    """Arguments that are plain Python values, passed by keyword."""
    turn: int = 0
    """How often this method of this module was called before in the flow."""
    place: str = ""
    """`file:line` of the call in the user's code."""


@dataclass(frozen=True)
class FlowGraph:
    """What a flow function does: its nodes in topological (call) order and the nodes it returns."""

    name: str
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    @property
    def modules(self) -> list[BaseModule]:
        """The distinct modules, in order of their first call."""
        seen: dict[int, BaseModule] = {}
        for node in self.nodes:
            seen.setdefault(id(node.module), node.module)
        return list(seen.values())

    def edges(self) -> Iterator[tuple[int, int, bool]]:
        """Yield `(source, target, is_control)` for every dependency; `source` may be `FEED`."""
        for node in self.nodes:
            for source in node.inputs:
                yield source, node.index, False
            for source in node.after:
                yield source, node.index, True
