# SPDX-License-Identifier: Apache-2.0
"""The samples of one pass: rows repeated into groups, numbered, and collated for whatever range a node asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch

from chatlearn.columns import PROMPT_UID, UID
from chatlearn.data.sampler import Draw
from chatlearn.errors import DataError
from chatlearn.flow.batching import Batch, collate, isolate, normalise


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
        draws = [self._draws[i // self._group_size] for i in range(start, stop)]
        rows = [self._row(i // self._group_size) for i in range(start, stop)]
        collate_fn = getattr(self._datasets[draws[0].dataset], "collate_fn", None)
        made = collate(rows) if collate_fn is None else collate_fn(rows)
        batch = isolate(normalise(made, "collate_fn of the dataset"))
        if any(len(column) != stop - start for column in batch.values()):
            raise DataError(
                f"collate_fn made {len(next(iter(batch.values())))} samples of {stop - start} rows",
                place=f"{type(self._datasets[draws[0].dataset]).__name__}.collate_fn",
                fix="return one entry per row in every column",
            )
        batch[UID] = torch.tensor(self.uids[start:stop], dtype=torch.long)
        batch[PROMPT_UID] = torch.tensor(self.groups[start:stop], dtype=torch.long)
        return batch

    def _row(self, prompt: int) -> Any:
        if prompt not in self._rows:
            draw = self._draws[prompt]
            row = self._datasets[draw.dataset][draw.row]
            self._rows[prompt] = cast("Any", row)
        return self._rows[prompt]
