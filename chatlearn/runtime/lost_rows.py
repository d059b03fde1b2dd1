# SPDX-License-Identifier: Apache-2.0
"""Samples that stay in a batch although they were lost: what is known of them, and nothing that looks like a value.

Numbers are NaN (a column of whole numbers or flags becomes one of floats for it), ragged columns are empty. What stays
is what a reader needs to find the sample: its uids, its texts, the tokens of its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from chatlearn.columns import (
    FAILED,
    LOSS_MASK,
    OK,
    OUTCOME,
    PROMPT,
    PROMPT_IDS,
    PROMPT_UID,
    RESPONSE_IDS,
    TIMED_OUT,
    UID,
)
from chatlearn.flow.batch import Batch, Column, size, take
from chatlearn.flow.batching import is_number
from chatlearn.runtime.protocol import Deliver

LOST_OUTCOMES = (FAILED, TIMED_OUT)


@dataclass(frozen=True)
class LostSample:
    """One sample that was given up."""

    uid: int
    prompt_uid: int
    outcome: str
    """`failed` or `timed_out`."""
    known: Mapping[str, Any]
    """Its columns as the step got them that failed."""


class Outlet:
    """Puts lost samples back where they belong among those that leave a flow.

    Args:
        lost: the samples that were given up, by uid; it may grow.
    """

    def __init__(self, lost: Mapping[int, LostSample]) -> None:
        self._lost = lost
        self._like: Batch = {}
        self.masked = 0
        """Lost samples that have been delivered."""

    def completed(self, live: Batch, command: Deliver) -> Batch:
        """Return the samples that are delivered for training; `live` has those that are not lost.

        The first ones delivered have to hold one that is not: it tells what columns there are.
        """
        self._like = self._like or take(live, 0, 1)
        if not self._like:  # of a flow that returns no columns
            return live
        lost = {at: self._lost[command.uids[at]] for at in command.lost}
        self.masked += len(lost)
        return add_loss_masks(insert_lost(live, lost, self._like))

    def results(self, parts: Sequence[tuple[Deliver, Batch]]) -> list[Batch]:
        """Return the batches of an evaluation, in order, each with the lost samples among its own."""
        filled = [batch for _, batch in parts if batch]
        like = take(filled[0], 0, 1) if filled else {}
        return [
            insert_lost(batch, {at: self._lost[part.uids[at]] for at in part.lost}, like)
            for part, batch in parts
        ]


def insert_lost(live: Batch, lost: Mapping[int, LostSample], like: Batch) -> Batch:
    """Return a batch with lost samples at the given positions, and an `outcome` for every sample.

    Args:
        live: the other samples, in order; `{}` if there are none.
        lost: the lost ones, by where they stand in the result.
        like: a batch with the same columns and at least one sample, for when `live` has none.

    Example:
        >>> lost = {1: LostSample(8, 4, "failed", {"completion": "?"})}
        >>> insert_lost({"uid": [7], "completion": ["4"], "rewards": [1.0]}, lost, {})
        {'uid': [7, 8], 'completion': ['4', '?'], 'rewards': [1.0, nan], 'outcome': ['ok', 'failed']}
    """
    columns = live or {name: column[:0] for name, column in like.items()}
    samples = size(columns) + len(lost)
    places = [at for at in range(samples) if at not in lost]
    batch = {
        name: _filled(name, column, like.get(name, column), places, lost)
        for name, column in columns.items()
    }
    if OUTCOME not in batch:
        batch[OUTCOME] = [lost[at].outcome if at in lost else OK for at in range(samples)]
    return batch


def add_loss_masks(batch: Batch) -> Batch:
    """Return `batch` with a `loss_mask` beside every `response_ids` that has none: no token of a lost sample."""
    made: Batch = {}
    for name, column in batch.items():
        space, slash, last = name.rpartition("/")
        mask, outcomes = f"{space}{slash}{LOSS_MASK}", batch[OUTCOME]
        if last != RESPONSE_IDS or mask in batch:
            continue
        rows = [
            torch.full_like(torch.as_tensor(row), outcome not in LOST_OUTCOMES, dtype=torch.bool)
            for row, outcome in zip(column, outcomes, strict=True)
        ]
        made[mask] = torch.stack(rows) if isinstance(column, Tensor) else cast("Column", rows)
    return {**batch, **made}


def _filled(
    name: str,
    column: Column,
    like: Column,
    places: Sequence[int],
    lost: Mapping[int, LostSample],
) -> Column:
    if not lost:
        return column
    count = len(places) + len(lost)
    if isinstance(column, Tensor):
        return _filled_tensor(name, column, count, places, lost)
    example = next((value for value in (*column, *like) if value is not None), None)
    filled: list[Any] = [None] * count
    for at, value in zip(places, column, strict=True):
        filled[at] = value
    for at, sample in lost.items():
        filled[at] = _value(name, sample, example)
    return filled


def _filled_tensor(
    name: str, column: Tensor, count: int, places: Sequence[int], lost: Mapping[int, LostSample]
) -> Tensor:
    shape = (count, *column.shape[1:])
    numbers_samples = name in (UID, PROMPT_UID)
    if column.is_floating_point() or column.is_complex():
        filled = column.new_full(shape, math.nan)
    elif column.dim() > 1 or numbers_samples:
        filled = column.new_zeros(shape)
    else:
        filled = torch.full(shape, math.nan, dtype=torch.float64, device=column.device)
    if places:
        filled[list(places)] = column.detach().to(filled.dtype)
    for at, sample in lost.items() if numbers_samples else ():
        filled[at] = sample.uid if name == UID else sample.prompt_uid
    return filled


def _value(name: str, sample: LostSample, example: Any) -> Any:
    """Return what stands for a lost sample in a list whose other values are like `example`."""
    last = name.rpartition("/")[2]
    if last == OUTCOME:
        return sample.outcome
    if name in (UID, PROMPT_UID):
        return sample.uid if name == UID else sample.prompt_uid
    known = sample.known.get(name)
    stays = isinstance(example, str) or last in (PROMPT, PROMPT_IDS)
    if stays and isinstance(known, type(example)):
        return known
    if isinstance(example, Tensor):
        if example.dim() == 0:
            return torch.tensor(math.nan)
        return example.new_empty((0, *example.shape[1:]))
    if is_number(example):
        return math.nan
    if isinstance(example, list):
        return []
    return "" if isinstance(example, str) else None
