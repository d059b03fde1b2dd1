# SPDX-License-Identifier: Apache-2.0
"""Bring modules to where they stood before a recorded episode."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from chatlearn.checkpoint import folder as checkpoints
from chatlearn.errors import CheckpointError
from chatlearn.module import BaseModule
from chatlearn.program import Program
from chatlearn.record.reading import EpisodeRecord
from chatlearn.record.stand_in import StandIn
from chatlearn.saved_weights import bring_back
from chatlearn.stage import Stage
from chatlearn.weights.local import ParameterSync


def with_sources(modules: Sequence[BaseModule], program: Program) -> list[BaseModule]:
    """Return modules with those that a parameter sync brings their weights from."""
    found = {id(module): module for module in modules}
    for pair in reversed(program.sync_pairs):
        if id(pair.destination) in found:
            found.setdefault(id(pair.source), pair.source)
    return list(found.values())


def checkpoint_of(episode: EpisodeRecord, done: int) -> Path:
    """Return where the run's checkpoint after `done` episodes lies, if there is one."""
    return checkpoints.path_of(episode.path.parent.parent / "checkpoints", done)


def resumed_from(episode: EpisodeRecord, done: int) -> str:
    """Say where the run's checkpoint after `done` episodes is, if one in another folder began the run there."""
    begun = str(episode.start["config"]["runtime"]["resume"])
    path, own = Path(episode.start["folder"], begun), checkpoint_of(episode, done)
    if begun in ("auto", "never") or path.name != own.name or path.parent == own.parent:
        return ""
    said = f"the run was resumed from {path}"
    return f"{said}; copy it to {own}" if path.is_dir() else f"{said}, which is gone"


def bring_weights(
    stage: Stage,
    program: Program,
    episode: EpisodeRecord,
    modules: Sequence[BaseModule],
    *,
    after: bool,
) -> list[str]:
    """Load the checkpoint before an episode (`after`: the one behind it) into modules that `setup()` has made.

    Before the first episode nothing has been learned, so `setup()` and the first parameter sync are enough.

    Args:
        stage: holds the modules, and the sources of their parameter syncs.
        program: knows the syncs.
        episode: the record.
        modules: those that run again.
        after: whether they stood behind the episode, as an evaluation finds them.

    Returns:
        What of it is not exact.

    Raises:
        CheckpointError: weights that change are needed, and no checkpoint has them.
    """
    done = episode.number if after else episode.number - 1
    path = checkpoint_of(episode, done)
    moved = [module.name for module in modules if _moves(module, program)]
    notes: list[str] = []
    settled: set[str] = set()
    resumed = path.is_dir()
    real = [module for module in stage.modules if not isinstance(module, StandIn)]
    workers = [worker for module in real for worker in stage.runtime.workers[module.name]]
    if resumed:
        replicas = [worker.module for worker in workers]
        state, settled, more = bring_back(path, replicas, program)
        notes += more
        for replica in replicas:
            replica.policy_version = state.policy_versions.get(replica.name, 0)
        stage.runtime.hook("load_checkpoint", state.train_iteration, episode=done)
        for worker in workers:
            if worker.module.name in state.after_episode_due and not after:
                worker.hook("after_episode")
    elif done and moved:
        raise _no_weights(path, episode, moved, done, after)
    elif done and (keepers := [m.name for m in modules if _keeps_state(m)]):
        notes.append(
            f"{', '.join(keepers)}: runs with the state that setup() makes; there is no checkpoint of episode {done}"
        )
    _sync(stage, program, settled)
    _set_versions(stage, episode, ("eval_flow",) if after else ("env_flow", "trainer_flow"))
    if not after:
        for worker in workers:
            worker.hook("before_episode")
    return notes


def _moves(module: BaseModule, program: Program) -> bool:
    """Tell whether a module's weights change in a run: it is trained, or a sync brings them."""
    trainer = program.graphs.get("trainer_flow")
    is_trained = trainer is not None and module in trainer.modules
    return is_trained or any(pair.destination is module for pair in program.sync_pairs)


def _keeps_state(module: BaseModule) -> bool:
    return type(module).training_state is not BaseModule.training_state


def _sync(stage: Stage, program: Program, settled: Collection[str]) -> None:
    there = {id(module) for module in stage.modules}
    for pair in program.sync_pairs:
        due = (
            pair.destination.name not in settled
        )  # those were saved with the weights that they had
        if id(pair.destination) in there and id(pair.source) in there and due:
            replicas = [w.module for w in stage.runtime.workers[pair.destination.name]]
            sync = ParameterSync(pair.source, replicas, share=False)
            if not sync.moves_nothing:
                sync.run()


def _set_versions(stage: Stage, episode: EpisodeRecord, flows: Sequence[str]) -> None:
    """Give every module the version that it had in the record."""
    versions = {
        node.module: node.calls[0].entry.policy_version
        for name in flows
        if name in episode.flows
        for node in episode.flow(name).nodes
        if node.calls
    }
    for workers in stage.runtime.workers.values():
        for worker in workers:
            known = versions.get(worker.module.name)
            if known is not None:
                worker.module.policy_version = known


def _no_weights(
    path: Path, episode: EpisodeRecord, names: Sequence[str], done: int, after: bool
) -> CheckpointError:
    found = sorted(int(p.name[8:]) for p in path.parent.glob("episode-*") if p.name[8:].isdigit())
    nearest = min(found, key=lambda number: (abs(number - done), number), default=None)
    recorded = [n if after else n + 1 for n in found]
    possible = [n for n in recorded if (episode.path.parent / f"episode-{n:06d}").is_dir()]
    fix = f"choose episode {' or '.join(map(str, possible[-3:]))}, or " if possible else ""
    there = f"the nearest is that of episode {nearest}" if nearest is not None else "there is none"
    return CheckpointError(
        f"{', '.join(names)} cannot run as in episode {episode.number}: the checkpoint of episode {done} is not "
        f"there; {resumed_from(episode, done) or there}",
        place=str(path.parent),
        fix=f"{fix}run with runtime.save_episode_interval=1 and a runtime.keep_last that is large enough; "
        "--keep NODE takes a node of the environment from the record",
    )
