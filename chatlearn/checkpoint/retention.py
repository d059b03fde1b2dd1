# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay: the newest, and those of the best evaluations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from chatlearn.checkpoint.folder import remove
from chatlearn.checkpoint.newest import named, whole


@dataclass(frozen=True)
class Retention:
    """Remove checkpoints beyond the last and the best ones.

    The ranking stands in the checkpoints (`RunState.metrics`), so that it survives whatever the run does not. Damaged
    checkpoints neither count nor go: somebody may want to look at them.

    Example:
        >>> Retention(last=2, best=1, score=lambda metrics: metrics.get("eval/a")).apply(folder, keep=[resumed_from])
        []
    """

    last: int | None
    """Newest checkpoints that stay; None keeps all."""
    best: int = 0
    """Checkpoints that stay besides, those with the highest score."""
    score: Callable[[Mapping[str, float]], float | None] = lambda _: None
    """Of the metrics of a checkpoint's episode; None where that episode did not measure it."""

    def apply(self, root: Path, keep: Collection[Path]) -> list[str]:
        """Remove what need not stay below `root`; call it after a checkpoint was written whole.

        What `latest` names and what `keep` names always stay.

        Returns:
            A line for each checkpoint that could not be removed; the next call tries again.
        """
        if self.last is None:
            return []
        found = whole(root)
        newest = list(found)
        scores = {path: self.score(state.metrics) for path, state in found.items()}
        known = {path: score for path, score in scores.items() if score is not None}
        ranked = sorted(known, key=known.__getitem__, reverse=True)  # of equals the newer first
        stay = {*newest[: self.last], *ranked[: self.best], root / (named(root) or "")}
        resolved = {path.resolve() for path in keep}
        problems: list[str] = []
        for path in newest:
            if path in stay or path.resolve() in resolved:
                continue
            try:
                remove(path)
            except OSError as error:
                problems.append(f"{path.name} should go (runtime.keep_last), but: {error}")
        return problems
