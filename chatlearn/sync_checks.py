# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with the parameter syncs of a program; all of it known before setup."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import TopologicalSorter

from chatlearn.errors import FlowError
from chatlearn.module import BaseModule
from chatlearn.program import Program, SyncPair


def check_syncs(program: Program) -> None:
    """Refuse pairs of strangers, and pairs that undo each other; carry a pair that is given twice once."""
    for pair in program.sync_pairs:
        source, destination = pair
        for module in (source, destination):
            if program.graphs and module not in program.modules:
                raise FlowError(
                    f"set_parameter_sync names {module!r}, which stands in no flow",
                    place=_place(pair),
                    fix="call it in a flow, or take the pair away",
                )
        if source is destination:
            raise FlowError(
                f"set_parameter_sync pairs {source!r} with itself",
                place=_place(pair),
                fix="take the pair away: a module has its own weights already",
            )
    pairs = list(
        {(id(pair.source), id(pair.destination)): pair for pair in program.sync_pairs}.values()
    )
    program.notes += [
        f"set_parameter_sync({pair.arrow}) is given {times} times and carried once"
        for pair in pairs
        if (times := sum(x is pair.source and y is pair.destination for x, y in program.sync_pairs))
        > 1
    ]
    circle = _circle(pairs)
    program.sync_pairs = pairs if circle else _in_order(pairs)
    for destination in {id(receiver): receiver for _, receiver in pairs}.values():
        into = [pair for pair in pairs if pair.destination is destination]
        # A load_state_dict of the user's own may give each source a place.
        plain = type(destination).load_state_dict is BaseModule.load_state_dict
        if len(into) > 1 and plain:
            program.problems.append(
                FlowError(
                    f"{len(into)} modules sync into {destination.name!r}, which would keep the weights of the last "
                    f"only: {'; '.join(pair.arrow for pair in into)}",
                    place=_place(into[-1]),
                    fix="leave one pair, or override load_state_dict() to give each source its place",
                )
            )
    if circle:
        names = " -> ".join(module.name for module in [*circle, circle[0]])
        program.problems.append(
            FlowError(
                f"parameter syncs go in a circle, so modules overwrite what they learned: {names}",
                place=_place(pairs[-1]),
                fix="take one of the pairs away: weights travel from who learns to who samples",
            )
        )


def _place(pair: SyncPair) -> str:
    return f"set_parameter_sync at {pair.place}"


def _circle(pairs: Sequence[SyncPair]) -> list[BaseModule]:
    """Return the modules of a circle of pairs, in order, or none."""
    ways = [[source] for source, _ in pairs]
    while ways:
        way = ways.pop()
        for source, target in pairs:
            if source is way[-1] and target is way[0]:
                return way
            if source is way[-1] and target not in way:
                ways.append([*way, target])
    return []


def _in_order(pairs: Sequence[SyncPair]) -> list[SyncPair]:
    """Sort pairs so that in a chain (a -> b, b -> c) weights reach the end in one sync, however it was declared."""
    before = TopologicalSorter[int]()
    for source, destination in pairs:
        before.add(id(destination), id(source))
    place = {module: number for number, module in enumerate(before.static_order())}
    chained = {id(destination) for _, destination in pairs} & {id(source) for source, _ in pairs}
    return sorted(pairs, key=lambda pair: place[id(pair.source)]) if chained else list(pairs)
