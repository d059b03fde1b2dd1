# SPDX-License-Identifier: Apache-2.0
"""Replay: the samples of the last episodes, and what a user's sampler function takes of them to train on.

An episode's samples are kept as they were delivered, a column at a time, so that a column is the same kind of thing
when it is trained on again. A sampler sees them as one dict per sample, copied when it first looks at them: what it
changes, it changes for this episode alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor

from chatlearn.columns import UID
from chatlearn.errors import BatchError, ChatLearnError, ModuleError, describe_function
from chatlearn.flow.batch import Batch, Column, samples, size
from chatlearn.flow.batching import isolate, merge, normalise, stack

Samples = list[dict[str, Any]]


class EpisodeBuffer:
    """One kept episode, as a replay sampler sees it.

    Args:
        episode_id: number of the episode, from 0.
        samples: one dict of columns per sample, or a function that makes them when they are asked for.

    Example:
        >>> buffer = EpisodeBuffer(4, [{"prompt": "1+1=", "rewards": 0.0}, {"prompt": "2+3=", "rewards": 1.0}])
        >>> [sample["prompt"] for sample in buffer.samples if sample["rewards"] > 0]
        ['2+3=']
    """

    def __init__(self, episode_id: int, samples: Samples | Callable[[], Samples]) -> None:
        self.episode_id = episode_id
        """Number of the episode, from 0."""
        self._samples = samples

    @cached_property
    def samples(self) -> Samples:
        """One dict of columns per sample, in the episode's order; changing it changes nothing that is kept."""
        return self._samples() if callable(self._samples) else self._samples

    def __repr__(self) -> str:
        return f"EpisodeBuffer(episode_id={self.episode_id})"


ReplaySampler = Callable[[Sequence[EpisodeBuffer]], Iterable[dict[str, Any]]]
Kept = tuple[int, Batch]
"""An episode's number from 0, and its samples."""


class Replay:
    """Keep the last episodes and choose of them what is trained on.

    Args:
        episodes: how many are kept, the current one included; -1 keeps all.
        offset: number of the first episode that is kept.
        sampler: chooses; None takes all samples of all kept episodes, oldest first.

    Example:
        >>> replay = Replay(2)
        >>> for episode, prompts in enumerate((["a"], ["b"], ["c"])):
        ...     window = replay.window(episode, {"prompt": prompts})
        ...     chosen = replay.choose(window)
        ...     replay.kept = window
        >>> chosen
        {'prompt': ['b', 'c']}
    """

    def __init__(
        self, episodes: int, offset: int = 0, sampler: ReplaySampler | None = None
    ) -> None:
        self.episodes = episodes
        self.offset = offset
        self._sampler = sampler
        self.kept: list[Kept] = []
        """Oldest first. Set it to an episode's window when its training is done, and not before."""

    def keeps(self, episode: int) -> bool:
        """Tell whether an episode (from 0) is kept and replayed, or trains as it comes."""
        return episode >= self.offset

    def window(self, episode: int, new: Batch) -> list[Kept]:
        """Return the episodes that `episode` trains on, itself the last."""
        return self._trimmed([*self.kept, (episode, new)])

    def choose(self, window: Sequence[Kept]) -> Batch:
        """Return the samples to train on, as one batch.

        Raises:
            ModuleError: the sampler raised; its exception is the cause.
            BatchError: the sampler returned anything but samples with the same columns.
        """
        filled = [(episode, batch) for episode, batch in window if size(batch)]
        if not filled:  # filters have dropped everything
            return {}
        if self._sampler is None:
            return _everything(filled)
        episode = window[-1][0]
        buffers = [EpisodeBuffer(number, partial(_own_samples, batch)) for number, batch in window]
        return _Choice(self._sampler, episode, filled).of(buffers)

    def state(self) -> list[dict[str, Any]]:
        """Return what a checkpoint keeps: columns per episode."""
        return [{"episode_id": episode, "columns": dict(batch)} for episode, batch in self.kept]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over what `state()` returned, as far as this run would have kept it."""
        kept = [(int(part["episode_id"]), cast("Batch", part["columns"])) for part in state]
        self.kept = self._trimmed([(e, batch) for e, batch in kept if self.keeps(e)])

    def _trimmed(self, kept: list[Kept]) -> list[Kept]:
        return kept if self.episodes < 0 else kept[-self.episodes :]


def _own_samples(batch: Batch) -> Samples:
    return samples(isolate(batch))


def _everything(window: Sequence[Kept]) -> Batch:
    first = window[0]
    for episode, batch in window[1:]:
        if batch.keys() != first[1].keys():
            raise BatchError(
                f"episodes {first[0]} and {episode} cannot be trained on together: only one of them has "
                f"{sorted(batch.keys() ^ first[1].keys())}",
                place="replay",
                fix="have the environment flow return the same columns in every episode, "
                "or choose samples with engine.set_replay_sampler(fn)",
            )
    return merge([batch for _, batch in window], "replay")


class _Choice:
    """What one call of a sampler returned, checked and made a batch again."""

    def __init__(self, sampler: ReplaySampler, episode: int, window: Sequence[Kept]) -> None:
        self._sampler = sampler
        self._name = describe_function(sampler)
        self._episode = episode
        self._window = window

    def of(self, buffers: list[EpisodeBuffer]) -> Batch:
        rows = self._called(buffers)
        if not rows:
            raise self._error(
                "chose no samples", "return the samples to train on, one dict of columns each"
            )
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise self._error(
                    f"chose a {type(row).__name__} (number {number}), which is no sample",
                    "return dicts of columns, such as those in buffer.samples",
                )
            if row.keys() != rows[0].keys():
                raise self._error(
                    f"chose samples with different columns: only one of number 0 and number {number} has "
                    f"{sorted(map(str, row.keys() ^ rows[0].keys()))}",
                    "give every sample the same columns",
                )
        if not rows[0]:
            raise self._error("chose samples without columns", "return samples of the buffers")
        made = {key: self._column(key, [row[key] for row in rows]) for key in rows[0]}
        batch = normalise(made, f"replay sampler {self._name}")
        self._check_uids(batch)
        return batch

    def _called(self, buffers: list[EpisodeBuffer]) -> list[Any]:
        try:
            returned: Any = self._sampler(buffers)
            if inspect.iscoroutine(returned):
                returned.close()  # else Python warns that it was never awaited
            if isinstance(returned, Iterable) and not isinstance(returned, dict | str | bytes):
                return list(cast("Iterable[Any]", returned))
        except Exception as error:
            raise ModuleError(
                f"{_words(error)}\n  function: replay sampler {self._name}\n  episode: {self._episode + 1}"
            ) from error
        kind = "nothing" if returned is None else f"a {type(cast('object', returned)).__name__}"
        raise self._error(
            f"returned {kind}, not samples", "return a list with one dict of columns per sample"
        )

    def _column(self, key: Any, values: list[Any]) -> Column:
        """Make a column of the kind it has in the kept episodes; a new one as datasets are collated."""
        known = [batch[key] for _, batch in self._window if key in batch]
        if not known:
            return stack(values)
        kinds = [column.dtype for column in known if isinstance(column, Tensor)]
        if len(kinds) < len(known):
            return values
        kind = kinds[0]
        for other in kinds[1:]:
            kind = torch.promote_types(kind, other)
        return _as_tensor(values, kind, cast("Tensor", known[-1]).device)

    def _check_uids(self, batch: Batch) -> None:
        uids = batch.get(UID)
        if uids is None:
            return
        try:
            [int(uid) for uid in uids]
        except (TypeError, ValueError):
            raise self._error(
                f"chose samples whose column {UID!r} is no whole number each",
                "leave the column as it is, or take it out of every sample",
            ) from None

    def _error(self, what: str, fix: str) -> BatchError:
        return BatchError(
            f"the replay sampler {what}",
            place=f"{self._name}, episode {self._episode + 1}",
            fix=fix,
        )


def _as_tensor(values: list[Any], kind: torch.dtype, device: torch.device) -> Column:
    """Stack values that stood in a tensor column, in its dtype where that loses nothing; ragged ones stay a list."""
    made = stack([_number_as_tensor(value) for value in values])
    if isinstance(made, Tensor) and torch.can_cast(made.dtype, kind):
        return made.to(device=device, dtype=kind)
    return made


def _number_as_tensor(value: Any) -> Any:
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    made = stack([value])  # Python's and numpy's numbers too, as far as torch has room for them
    return made[0] if isinstance(made, Tensor) else value


def _words(error: Exception) -> str:
    try:
        return (
            str(error) if isinstance(error, ChatLearnError) else f"{type(error).__name__}: {error}"
        )
    except Exception:  # noqa: BLE001 - an exception that cannot be printed must not hide where it came from
        return f"{type(error).__name__} (its message cannot be printed)"
