# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint `runtime.resume=auto` goes on from: the newest that is whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from chatlearn.checkpoint.folder import LATEST, check, set_aside, verify
from chatlearn.checkpoint.state import RunState
from chatlearn.errors import CheckpointError

_NAME = re.compile(r"episode-(\d+)")
_SHOWN = 5


def newest(root: Path, *, verified: bool = False) -> tuple[Path | None, list[str]]:
    """Find the newest whole checkpoint below `root`: what `latest` names, else the one that was written last.

    Nothing is changed, so another run may be writing there.

    Args:
        root: the folder of all checkpoints.
        verified: whether to read the files of the chosen one, too, and not only their sizes.

    Returns:
        The checkpoint, None if there is none, and a line for each damaged one that it was preferred to.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for path in _candidates(root):
        try:
            verify(path) if verified else check(path)
        except CheckpointError as error:
            damaged.append(f"{path.name}: {error.cause}")
        else:
            return path, [f"not resumed from {line}" for line in damaged]
    if damaged:
        more = f"\n  and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        raise CheckpointError(
            "there is no whole checkpoint to resume from\n  "
            + "\n  ".join(damaged[:_SHOWN])
            + more,
            place=str(root),
            fix="bring the files back, or start anew with runtime.resume=never, which moves them to earlier/",
        )
    return None, []


def whole(root: Path) -> dict[Path, RunState]:
    """Return the whole checkpoints below `root`, by their files' sizes, the newest first, and what they counted."""
    found: dict[Path, RunState] = {}
    for path in _candidates(root):
        try:
            found[path] = check(path)
        except CheckpointError:
            continue
    return found


def named(root: Path) -> str | None:
    """Return what `latest` names; it only helps, so whatever else lies there names nothing."""
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def _candidates(root: Path) -> list[Path]:
    """Return what may be a checkpoint, the best choice first.

    Behind what `latest` names, the one that was written last is the best: those of more episodes may belong to a
    branch of the run that somebody went back from.
    """
    if not root.is_dir():
        return []
    found = {
        path: int(match[1])
        for path in root.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    for path, target in set_aside(root).items():
        found[path] = int(target.name.removeprefix("episode-"))
    latest, written = named(root), _sequences(sorted(found, key=found.__getitem__))

    def rank(path: Path) -> tuple[bool, int, int]:
        return path.name == latest, written[path], found[path]

    return sorted(found, key=rank, reverse=True)


def _sequences(paths: Sequence[Path]) -> dict[Path, int]:
    """Return which checkpoint of its folder each path is; one that cannot be told stands behind that before it."""
    found: dict[Path, int] = {}
    last = 0
    for path in paths:
        with suppress(CheckpointError):
            last = RunState.read(path).sequence
        found[path] = last
    return found
