# SPDX-License-Identifier: Apache-2.0
"""`chatlearn.replay`: go back to a recorded episode and run parts of it again with the present code."""

from __future__ import annotations

import os
import shlex
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from chatlearn.checkpoint.rng import restore_rng, rng_states
from chatlearn.columns import UID
from chatlearn.config import command_line
from chatlearn.errors import ConfigError, DataError, OutputError, RecordError
from chatlearn.flow.batch import Batch
from chatlearn.program import Program, raise_problems
from chatlearn.record.reading import EpisodeRecord, RunRecord
from chatlearn.record.table import write_batches
from chatlearn.rerun.again import Rerun
from chatlearn.rerun.comparison import NodeComparison, compare
from chatlearn.rerun.selection import select_episode, select_node
from chatlearn.script import inspect

_OWN = ("output_dir", "resume", "trackers", "record", "record_last", "keep_last", "keep_best")
"""Settings of `runtime` that change nothing of what modules compute."""


@dataclass
class Replay:
    """What running recorded nodes again gave.

    Example:
        >>> replayed = chatlearn.replay("runs/grpo", episode=7, node="advantage")
        >>> replayed.is_equal, replayed.nodes[0].columns
        (True, [Difference(column='advantages', samples=64, ...)])
    """

    episode: int
    nodes: list[NodeComparison]
    """The nodes that ran, in order, compared with the record."""
    outputs: dict[str, list[Batch]] = field(default_factory=dict[str, list[Batch]], repr=False)
    """What each of them returned: a batch per call, or per micro-batch of a train step."""
    uids: dict[str, list[list[int]]] = field(default_factory=dict[str, list[list[int]]], repr=False)
    """Uids of the samples in each of these batches."""
    changes: list[str] = field(default_factory=list[str])
    """The script, its arguments and settings, where they are not as they were in the run."""
    notes: list[str] = field(default_factory=list[str])
    """What is not exact, and what was taken from the record."""
    left_out: list[str] = field(default_factory=list[str])
    """Nodes that belong to the episode, but could not run: nothing is known of them."""

    @property
    def is_equal(self) -> bool:
        """Whether everything that ran is as it was, bit for bit; what is `left_out` did not."""
        return all(node.is_equal for node in self.nodes)


def replay(
    run: str | Path,
    *,
    episode: int | None = None,
    node: str | None = None,
    keep: Sequence[str] = (),
    samples: Sequence[int] | None = None,
    evaluation: bool = False,
    script: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
) -> Replay:
    """Run a recorded node again, or all that follows an episode's rollouts, and compare with the record.

    The script runs up to `learn()`, in this process: set a breakpoint in a reward and it stops there. Only the
    modules that run are set up, and nothing in the run's folder changes.

    Args:
        run: the run's folder.
        episode: number from 1; None takes the newest that is recorded.
        node: as `chatlearn graph` names it, or a module's name; None runs everything but the rollouts.
        keep: without `node`: further nodes to take from the record.
        samples: uids to run `node` for, with the rest of their groups; None takes all.
        evaluation: whether `node` is one of the evaluation after the episode.
        script: where the run's script is now, if it was moved.
        arguments: of the script; None takes those of the run.
        overrides: settings to change, such as `"models.advantage.normalise_std=false"`.
        out: a Parquet file to write what `node` returned to.

    Raises:
        RecordError: it was not recorded, or not as it would have to be.
        CheckpointError: weights are needed that no checkpoint holds.
        ChatLearnError: the script cannot run, or a module failed.
    """
    record = RunRecord(run)
    episodes = [number for number in record.episodes if number or evaluation]
    chosen = record.episode(max(episodes, default=0) if episode is None else episode)
    target = _checked_out(out, node, record)
    if samples is not None and node is None:
        raise ConfigError(
            "samples are chosen for one node; an episode's train steps take all of theirs",
            fix="name a node, too",
        )

    def act(subject: Any) -> Replay:
        return _run_again(subject, chosen, node, keep, samples, evaluation)

    states = rng_states()
    try:
        replayed = _in_script(chosen.start, script, arguments, overrides, act)
    finally:
        restore_rng(states)
    replayed.changes[:0] = _changed_start(chosen.start, script, arguments)
    if target is not None:
        write_outputs(replayed, target)
    return replayed


def _in_script(
    start: Mapping[str, Any],
    script: str | Path | None,
    arguments: Sequence[str] | None,
    overrides: Sequence[str],
    act: Any,
) -> Replay:
    """Run the script as it was run, up to its engine, and `act` on that."""
    path = _existing_script(start, script)
    recipe = Path(start["recipe"]) if start["recipe"] else None
    given = start["arguments"] if arguments is None else arguments
    settings = [*start["overrides"], *overrides, "runtime.resume=never"]
    with command_line(settings, recipe), _working_in(Path(start["folder"])):
        return cast("Replay", inspect(path, given, act))


def script_of(run: str | Path, episode: int | None, script: str | Path | None = None) -> Path:
    """Return the script that made a run, or where it is now.

    Raises:
        RecordError: the episode was not recorded.
        ConfigError: the script is gone.
    """
    record = RunRecord(run)
    number = max(record.episodes) if episode is None else episode
    return _existing_script(record.episode(number).start, script)


def _existing_script(start: Mapping[str, Any], script: str | Path | None) -> Path:
    given = start["script"] if script is None else script
    path = Path(given).resolve()
    if given and path.is_file():
        return path
    if script is not None:
        cause = f"there is no script {path}"
    else:
        cause = (
            f"the script of the run, {path}, is gone" if given else "no script has made this run"
        )
    raise ConfigError(cause, fix="name the script that makes the engine with --script")


@contextmanager
def _working_in(folder: Path) -> Generator[None]:
    """Run the script where it ran, if that is still there: it may read files by relative paths."""
    before = Path.cwd()
    if folder.is_dir():
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _run_again(
    subject: Any,
    episode: EpisodeRecord,
    node: str | None,
    keep: Sequence[str],
    samples: Sequence[int] | None,
    evaluation: bool,
) -> Replay:
    program: Program = subject.check()
    # Neither the datasets nor the output folder are used here.
    unused = (DataError, OutputError)
    raise_problems([p for p in program.problems if not isinstance(p, unused)])
    if node is None:
        selection = select_episode(program, episode, keep)
    else:
        selection = select_node(program, episode, node, evaluation=evaluation)
    if samples is not None and selection.trains:
        raise ConfigError(
            "a train step takes whole global batches: samples cannot be chosen for it",
            fix="leave --samples away",
        )
    again = Rerun(program, episode, selection, samples)
    again.run()
    return Replay(
        episode.number,
        compare(episode, again, evaluation=bool(selection.evaluation)),
        {name: [b for call in calls for b in call.output] for name, calls in again.made.items()},
        {name: [u for call in calls for u in call.came_out] for name, calls in again.made.items()},
        changed_settings(episode.start["config"], program),
        again.notes,
        selection.left_out,
    )


def _changed_start(
    start: Mapping[str, Any], script: str | Path | None, arguments: Sequence[str] | None
) -> list[str]:
    """Return what of the command is not as it was: the script's path, its arguments."""
    now = start["script"] if script is None else str(Path(script).resolve())
    given = start["arguments"] if arguments is None else list(arguments)
    pairs = (
        ("script", start["script"] or "none", now),
        ("arguments", shlex.join(start["arguments"]) or "none", shlex.join(given) or "none"),
    )
    return [f"{what}: {then} then, {now} now" for what, then, now in pairs if then != now]


def changed_settings(then: Mapping[str, Any], program: Program) -> list[str]:
    """Return the settings that are not as they were: `models.advantage.eps: 1e-06 then, 0.0 now`."""
    old = dict(_leaves("", then))
    new = dict(_leaves("", program.config.to_dict(program.module_configs)))
    ignored = {f"runtime.{name}" for name in _OWN}
    return [
        f"{key}: {old.get(key, 'nothing')} then, {new.get(key, 'nothing')} now"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not any(key.startswith(name) for name in ignored)
    ]


def _leaves(prefix: str, value: Any) -> Generator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in cast("dict[str, Any]", value).items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value


def _checked_out(out: str | Path | None, node: str | None, record: RunRecord) -> Path | None:
    if out is None:
        return None
    path = Path(out).resolve()
    if node is None:
        raise ConfigError("a file keeps what one node returned", fix="name the node with --node")
    if path.suffix != ".parquet":
        raise OutputError(
            "a replay's outputs are written as Parquet, and this name says otherwise",
            place=str(path),
            fix=f"name it {path.stem}.parquet",
        )
    if path.is_relative_to(record.root.resolve()):
        raise OutputError(
            "a run's record is never changed", place=str(path), fix="write to another folder"
        )
    if not path.parent.is_dir() or path.is_dir():
        raise OutputError("no file can be written there", place=str(path), fix="name a new file")
    return path


def write_outputs(replayed: Replay, path: Path) -> None:
    """Write what the only node of a replay returned as a Parquet file: a row per sample, a column per column.

    Raises:
        OutputError: it cannot be written.
        RecordError: nothing was returned, or something that no file can keep.
    """
    for name, batches in replayed.outputs.items():
        if not any(batches):
            raise RecordError("the node returned nothing that could be written", place=name)
        numbered = zip(replayed.uids[name], batches, strict=True)
        _write(path, [{UID: uids, **batch} for uids, batch in numbered if batch])


def _write(path: Path, batches: Sequence[Batch]) -> None:
    try:
        write_batches(path, batches)
    except OSError as error:
        raise OutputError(f"cannot write: {error}", place=str(path)) from error
