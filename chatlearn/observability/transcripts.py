# SPDX-License-Identifier: Apache-2.0
"""Keep some samples of every episode as a person would read them: prompt, completion, rewards."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast

from chatlearn import columns
from chatlearn.observability.jsonl import JsonlFile, Row, json_safe

NAMESPACE: Final = "namespace"
"""In a row: which policy of several the sample is of."""
KEPT: Final = (
    columns.UID,
    columns.PROMPT_UID,
    columns.PROMPT,
    columns.COMPLETION,
    columns.REWARDS,
    columns.ADVANTAGES,
    columns.FINISH_REASON,
    columns.OUTCOME,
    columns.POLICY_VERSION,
)
PART: Final = columns.REWARDS + "/"
"""Columns of single reward functions are `rewards/<name>`."""

Batch = Mapping[str, Any]
Phase = Literal["train", "eval"]
_Key = tuple[int, float, str]


class TranscriptLog:
    """Writes up to `per_episode` samples of every episode and evaluation to `transcripts.jsonl`.

    The samples are those with the lowest `(prompt_uid, uid)`, so whole groups as far as they fit;
    of an evaluation one per prompt first, and in every evaluation the same.

    Example:
        >>> log = TranscriptLog(folder / "transcripts.jsonl", per_episode=8)
        >>> log.record([batch], episode=1, phase="train")
        8
    """

    def __init__(self, path: Path, per_episode: int = 8) -> None:
        self._file = JsonlFile(path)
        self._limit = per_episode
        self.count = 0
        """Samples written, those of a resumed part of the run included."""

    def record(self, batches: Batch | Iterable[Batch], *, episode: int, phase: Phase) -> int:
        """Write the chosen samples of the batches and return how many there were."""
        rows = sample_rows(batches, self._limit, spread=phase == "eval")
        if rows:
            self._file.append(*({"episode": episode, "phase": phase, **row} for row in rows))
        self.count += len(rows)
        return len(rows)

    def rewind(self, episode: int) -> int:
        """Drop the samples of later episodes; return how many stay. Damage stops no run: the file is for readers."""
        self.count = len(self._file.rewind(episode, passes_damage=True))
        return self.count

    def sync(self) -> None:
        """Have on disk what was written."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def sample_rows(batches: Batch | Iterable[Batch], limit: int, *, spread: bool = False) -> list[Row]:
    """Return up to `limit` samples as rows of plain values; none without prompt and completion.

    Whole groups come first or, with `spread`, the first sample of every prompt, then the second of every prompt.
    """
    every = [cast("Batch", batches)] if isinstance(batches, Mapping) else list(batches)
    order: list[tuple[tuple[int, _Key, _Key], int, tuple[str, Batch, int]]] = []
    siblings: Counter[tuple[_Key, str]] = Counter()
    seen = 0
    for namespace, batch in (view for whole in every for view in _views(whole)):
        text = batch.get(columns.COMPLETION, batch.get(columns.PROMPT))
        count = 0 if text is None else len(text)
        uids = _keys(batch.get(columns.UID, range(seen, seen + count)))
        groups = _keys(batch[columns.PROMPT_UID]) if columns.PROMPT_UID in batch else uids
        for index, group, uid in zip(range(count), groups, uids, strict=False):
            nth = siblings[group, namespace] if spread else 0
            order.append(((nth, group, uid), seen, (namespace, batch, index)))
            siblings[group, namespace] += 1
            seen += 1
    chosen = heapq.nsmallest(limit, order, key=lambda entry: entry[:2])
    return [_row(*where) for _, _, where in chosen]


def _views(batch: Batch) -> list[tuple[str, Batch]]:
    """Return the batch as each of its namespaces sees it (`solver/completion` is `completion`), or as it is."""
    end = f"/{columns.COMPLETION}"
    spaces = [name.removesuffix(end) for name in batch if name.endswith(end)]
    views = [("", batch)] if columns.COMPLETION in batch or not spaces else []
    for space in spaces:
        start = f"{space}/"
        own = {n.removeprefix(start): column for n, column in batch.items() if n.startswith(start)}
        views.append((space, {**batch, **own}))
    return views


def _keys(uids: Any) -> list[_Key]:
    """Return the keys of a column of uids; a tensor is read as a whole, for there may be thousands."""
    values = cast("list[Any]", uids.tolist() if hasattr(uids, "tolist") else uids)
    return [(0, value, "") if type(value) is int else _key(value) for value in values]


def _key(uid: Any) -> _Key:
    """Return what uids of any kind are ordered by: numbers first, then all else as text."""
    plain = json_safe(uid)
    return (0, plain, "") if isinstance(plain, int | float) else (1, 0, str(plain))


def _row(namespace: str, batch: Batch, index: int) -> Row:
    names = [name for name in KEPT if name in batch]
    parts = [name for name in batch if name.startswith(PART)]
    row = {name: _rounded(json_safe(batch[name][index])) for name in (*names, *parts)}
    return {NAMESPACE: namespace, **row} if namespace else row


def _rounded(value: Any) -> Any:
    """Round floats to what a reader needs: per-token lists would fill the file with digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(item) for item in cast("list[Any]", value)]
    return value
