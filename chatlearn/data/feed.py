# SPDX-License-Identifier: Apache-2.0
"""The samples of one pass: rows repeated into groups, numbered, and collated for whatever range a node asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch

from chatlearn.columns import PROMPT_UID, UID
from chatlearn.data.sampler import Draw
from chatlearn.errors import ChatLearnError, DataError
from chatlearn.flow.batch import Batch, size
from chatlearn.flow.batching import collate, isolate, merge, normalise


class Dataset(Protocol):
    """A torch-style dataset; `collate_fn(rows)`, if it has one, makes the batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Feed:
    """Give any range of a pass's samples as a batch; each row is fetched once.

    Args:
        datasets: the datasets that `draws` refer to.
        draws: the prompts of this pass, in order.
        group_size: how often each prompt is repeated; siblings are adjacent.
        first_prompt: number of the first prompt, so that uids go on over episodes.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        draws: Sequence[Draw],
        group_size: int,
        first_prompt: int = 0,
    ) -> None:
        self._datasets = datasets
        self._draws = draws
        self._group_size = group_size
        self._rows: dict[int, Any] = {}
        first_uid = first_prompt * group_size
        self.uids = range(first_uid, first_uid + len(draws) * group_size)
        self.groups = [first_prompt + i // group_size for i in range(len(self.uids))]

    def __len__(self) -> int:
        return len(self.uids)

    def batch(self, start: int, stop: int) -> Batch:
        """Return samples `start` to `stop`, with their `uid` and `prompt_uid`."""
        parts: list[Batch] = []
        by_dataset = groupby(
            range(start, stop), lambda i: self._draws[i // self._group_size].dataset
        )
        for number, positions in by_dataset:
            rows = [self._row(i // self._group_size) for i in positions]
            parts.append(self._collated(self._datasets[number], rows))
        batch = merge(parts, "rows of several datasets")
        batch[UID] = torch.tensor(self.uids[start:stop], dtype=torch.long)
        batch[PROMPT_UID] = torch.tensor(self.groups[start:stop], dtype=torch.long)
        return batch

    @staticmethod
    def _collated(dataset: Dataset, rows: list[Any]) -> Batch:
        collate_fn = getattr(dataset, "collate_fn", None)
        place = f"{type(dataset).__name__}.collate_fn"
        made = (
            collate(rows, type(dataset).__name__)
            if collate_fn is None
            else _guarded(place, collate_fn, rows)
        )
        batch = isolate(normalise(made, place))
        if collate_fn is not None and size(batch) != len(rows):
            raise DataError(
                f"collate_fn made {size(batch)} samples of {len(rows)} rows",
                place=place,
                fix="return one entry per row in every column",
            )
        if taken := batch.keys() & {UID, PROMPT_UID}:
            raise DataError(
                f"the dataset has columns {sorted(taken)}, which the engine numbers samples with",
                place=type(dataset).__name__,
                fix="rename them",
            )
        return batch

    def _row(self, prompt: int) -> Any:
        if prompt not in self._rows:
            draw = self._draws[prompt]
            dataset = self._datasets[draw.dataset]
            place = f"{type(dataset).__name__}, row {draw.row}"
            self._rows[prompt] = _guarded(place, dataset.__getitem__, draw.row)
        return self._rows[prompt]


def _guarded(place: str, function: Callable[..., Any], argument: Any) -> Any:
    """Call a dataset's own code and tell where it failed."""
    try:
        return function(argument)
    except ChatLearnError:
        raise
    except Exception as error:
        raise DataError(
            f"the dataset failed: {type(error).__name__}: {error}",
            place=place,
            fix="see the traceback above for the line that raised",
        ) from error
