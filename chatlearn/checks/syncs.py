# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with the parameter syncs of a program; all of it known before setup, without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

from chatlearn.errors import ChatLearnError, FlowError
from chatlearn.module import BaseModule, call_hook, may_have_weights, resolved_config, state_of
from chatlearn.program import Program, SyncPair

if TYPE_CHECKING:
    from torch import Tensor


def check_syncs(program: Program) -> None:
    """Refuse pairs of strangers, and pairs that undo each other; carry a pair that is given twice once."""
    for pair in program.sync_pairs:
        source, destination = pair
        for module in (source, destination):
            if program.graphs and module not in program.modules:
                raise FlowError(
                    f"set_parameter_sync names {module!r}, which stands in no flow",
                    place=pair.said_at,
                    fix="call it in a flow, or take the pair away",
                )
        if source is destination:
            raise FlowError(
                f"set_parameter_sync pairs {source!r} with itself",
                place=pair.said_at,
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
                    place=into[-1].said_at,
                    fix="leave one pair, or override load_state_dict() to give each source its place",
                )
            )
    if circle:
        names = " -> ".join(module.name for module in [*circle, circle[0]])
        program.problems.append(
            FlowError(
                f"parameter syncs go in a circle, so modules overwrite what they learned: {names}",
                place=pairs[-1].said_at,
                fix="take one of the pairs away: weights travel from who learns to who samples",
            )
        )


def check_sync_parameters(program: Program) -> None:
    """Compare names, shapes and dtypes of both ends of each pair, as far as they are known before `setup()`.

    What is not known (models that a callable or `setup()` makes, adapters, a `state_dict` or `load_state_dict` of the
    user's own) is compared by the first sync.
    """
    graph = program.graphs.get("trainer_flow")
    learners = graph.modules if graph else []
    for pair in program.sync_pairs:
        try:
            compared = _compare(pair, source_trains=pair.source in learners)
        except ChatLearnError as error:
            program.problems.append(error)
        else:
            has_any = any(map(may_have_weights, pair))
            if has_any and not compared and not _have_one_callable(pair):
                program.notes.append(
                    f"{pair.arrow}: names, shapes and dtypes are compared at the first sync; what both ends hold is "
                    "not known before setup()"
                )


def _compare(pair: SyncPair, *, source_trains: bool) -> bool:
    """Compare both ends of a pair; tell whether enough is known of them."""
    source, destination = pair
    if type(destination).load_state_dict is not BaseModule.load_state_dict:
        return False
    ours = _known_parameters(source)
    theirs = None if ours is None else _known_parameters(destination)
    if ours is None or theirs is None:
        return False
    if _are_one(ours, theirs):
        return True
    if not (ours and theirs):
        return False
    from chatlearn.weights.plan import plan_sync  # where both ends are tensors, not before

    trained = [name for name, t in ours.items() if source_trains and t.requires_grad]
    plan_sync(ours, theirs, pair=pair.arrow, place=pair.said_at, trained=trained)
    return True


def _have_one_callable(pair: SyncPair) -> bool:
    """Tell whether the same function makes the models of both ends, which then can hardly differ."""
    makers = [getattr(resolved_config(module), "model", None) for module in pair]
    plain = all(type(m).describe_parameters is not BaseModule.describe_parameters for m in pair)
    return plain and callable(makers[0]) and makers[0] is makers[1]


def _are_one(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Tell whether two descriptions stand for one model; plain dicts would compare their tensors."""
    return type(ours) is type(theirs) and not isinstance(ours, dict) and ours == theirs


def _known_parameters(module: BaseModule) -> Mapping[str, Tensor] | None:
    """Return the tensors of a module's state without data, or None if they are not known before `setup()`.

    A description holds for the class that gives it; a subclass with a `setup` or `state_dict` of its own may have
    others. A model from the constructor is the one that is synced, unless an earlier run's `setup()` left it there.
    """
    kind, is_plain = type(module), type(module).state_dict is BaseModule.state_dict
    given = _depth(kind, "describe_parameters")
    if kind.describe_parameters is not BaseModule.describe_parameters:
        if given > min(_depth(kind, "setup"), _depth(kind, "state_dict")):
            return None
        return call_hook(module, "describe_parameters")
    made_by_setup = state_of(module).was_ever_set_up and kind.setup is not BaseModule.setup
    if module.model is None or not is_plain or made_by_setup:
        return None
    from chatlearn.weights.adapters import plain_state  # a model that is there has loaded torch

    return plain_state(module.model)


def _depth(kind: type[BaseModule], name: str) -> int:
    """Tell how far up a class's ancestors the attribute comes from; 0 is the class itself."""
    return next(i for i, ancestor in enumerate(kind.__mro__) if name in vars(ancestor))


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
