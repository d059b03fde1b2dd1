# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint `runtime.resume=auto` goes on from: the newest that is whole."""

from __future__ import annotations

import re
from pathlib import Path

from chatlearn.checkpoint.folder import LATEST, check, set_aside
from chatlearn.errors import CheckpointError

_NAME = re.compile(r"episode-(\d+)")
_SHOWN = 5


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """Find the newest whole checkpoint below `root`: what `latest` names, else the one of the most episodes.

    Nothing is changed and no large file is read, so another run may be writing there.

    Returns:
        The checkpoint, None if there is none, and a line for each damaged one that it was preferred to.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for path in _candidates(root):
        try:
            check(path)
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


def _candidates(root: Path) -> list[Path]:
    """Return what may be a checkpoint, the best choice first."""
    if not root.is_dir():
        return []
    found = {
        path: int(match[1])
        for path in root.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    for path, target in set_aside(root).items():
        found[path] = int(target.name.removeprefix("episode-"))
    named = _named(root)
    return sorted(found, key=lambda path: (path.name == named, found[path]), reverse=True)


def _named(root: Path) -> str | None:
    """Return what `latest` names; it only helps, so whatever else lies there names nothing."""
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
