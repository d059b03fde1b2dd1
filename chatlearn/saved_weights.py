# SPDX-License-Identifier: Apache-2.0
"""Whose weights go into a checkpoint, and whose a resumed run has from it rather than from a parameter sync."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from chatlearn.checkpoint import folder as checkpoints
from chatlearn.checkpoint.files import find_unloadable
from chatlearn.checkpoint.state import RunState
from chatlearn.module import BaseModule, call_hook, has_model, resolved_config
from chatlearn.program import Program
from chatlearn.stage import Stage
from chatlearn.weights.digest import digests


class SavedWeights:
    """Choose the modules of one run whose weights are saved.

    Weights that nothing should change (a reference, a reward model) are digested rather than saved, until they differ
    from what `setup()` made: running means and target networks take no gradients and still move.
    """

    def __init__(self, program: Program, stage: Stage) -> None:
        self._program = program
        self._stage = stage
        self._made: dict[str, list[dict[str, int]]] = {}
        """Digests of what `setup()` made, of every replica of the modules that should not change."""
        self._moved: set[str] = set()
        """Of these, the ones that did, or that the checkpoint resumed from holds."""

    def take_down(self) -> None:
        """Remember what `setup()` made; called right behind it."""
        synced = {pair.destination.name for pair in self._program.sync_pairs}
        for module in self._stage.modules:
            name = module.name
            if name in self.needed() or name in synced or _may_change(module):
                continue
            self._made[name] = self._digests(name)

    def go_on_from(self, held: Collection[str]) -> None:
        """Keep on saving what the checkpoint that is resumed from holds."""
        self._moved |= {name for name in self._made if name in held}

    def needed(self) -> set[str]:
        """Return the modules whose weights a resumed run cannot get elsewhere: trained ones, sources, rarely synced."""
        trainer = self._program.graphs.get("trainer_flow")
        needed = {module.name for module in (trainer.modules if trainer else ())}
        for source, destination in self._program.sync_pairs:
            needed.add(source.name)
            if resolved_config(destination).sync_frequency > 1:
                needed.add(destination.name)
        return needed

    def to_save(self) -> set[str]:
        """Return the modules whose weights go into a checkpoint now."""
        for name, made in self._made.items():
            if name not in self._moved and self._digests(name) != made:
                self._moved.add(name)
        synced = {pair.destination.name for pair in self._program.sync_pairs}
        others = {
            module.name
            for module in self._stage.modules
            if module.name not in synced and _may_change(module)
        }
        return self.needed() | mixing(self._program) | others | self._moved

    def _digests(self, name: str) -> list[dict[str, int]]:
        states = (
            call_hook(worker.module, "state_dict") for worker in self._stage.runtime.workers[name]
        )
        return [
            digests((n, t) for n, t in state.items() if isinstance(t, Tensor) and not t.is_meta)
            for state in states
        ]


def mixing(program: Program) -> set[str]:
    """Return the destinations that may make something of their own of what a sync brings, as a moving average does.

    The same sync once more would change them, so that they are saved however often they are synced. A sync proves that
    all others hold what it brought.
    """
    return {
        destination.name
        for _, destination in program.sync_pairs
        if type(destination).load_state_dict is not BaseModule.load_state_dict
    }


def bring_back(
    path: Path, replicas: Sequence[BaseModule], program: Program, *, required: Collection[str] = ()
) -> tuple[RunState, set[str], list[str]]:
    """Bring modules and random generators to the state of a checkpoint.

    Args:
        path: the checkpoint.
        replicas: every replica of the modules.
        program: knows the syncs.
        required: modules whose weights must be there.

    Returns:
        The run's state, the destinations that a first sync must leave as they are, and what of it may surprise.

    Raises:
        CheckpointError: a file is missing or damaged, or a module does not fit.
    """
    rare = {d.name for _, d in program.sync_pairs if resolved_config(d).sync_frequency > 1}
    held = set(checkpoints.saved_shapes(path, checkpoints.check(path)))
    try_first = (mixing(program) & held) - rare
    refused: set[str] = set()
    state = checkpoints.load(
        path, replicas, required=required, mixing=try_first, refused=refused.add
    )
    notes = [
        f"{name}: load_state_dict() does not take back what state_dict() gave; it is synced anew, which is exact only "
        "if nothing of its old weights stays"
        for name in sorted(refused)
    ]
    return state, rare | (try_first - refused), notes


def _may_change(module: BaseModule) -> bool:
    """Tell whether a module outside all syncs holds more than weights that nothing should change."""
    if type(module).state_dict is not BaseModule.state_dict:
        return True
    plain = [v for v in call_hook(module, "state_dict").values() if not isinstance(v, Tensor)]
    if plain and not find_unloadable(plain):
        return True
    return has_model(module) and any(p.requires_grad for p in module.model.parameters())
