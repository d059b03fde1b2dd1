# SPDX-License-Identifier: Apache-2.0
"""From the columns of a global batch to the samples of a train step, checked once and named when
wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chatlearn import columns
from chatlearn.errors import BatchError

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class TrainSamples:
    """Hold the samples of one global batch; ragged columns are lists of `[T_i]` tensors, one per
    sample.

    Attributes:
        uids: what error messages call the samples.
        prompt_ids: int64 `[P_i]`.
        response_ids: int64 `[T_i]`.
        old_logprobs: `[T_i]` log-probs that the ratio is taken against.
        advantages: `[T_i]` if given per token, else `[1]`, shared by the sample's tokens.
        rollout_logprobs: `[T_i]` the sampler's, for the mismatch; None if unknown. The same list as
            `old_logprobs` where the trainer made none of its own.
        ref_logprobs: `[T_i]` the reference's; None without a KL term.
        loss_mask: bool `[T_i]`; None trains on every response token.
        temperature: `[B]` or one number.
        policy_version: int64 `[B]` of the weights that sampled; None if unknown.
    """

    uids: list[Any]
    prompt_ids: list[Tensor]
    response_ids: list[Tensor]
    old_logprobs: list[Tensor]
    advantages: list[Tensor]
    rollout_logprobs: list[Tensor] | None = None
    ref_logprobs: list[Tensor] | None = None
    loss_mask: list[Tensor] | None = None
    temperature: Tensor | float = 1.0
    policy_version: Tensor | None = None

    @property
    def has_own_logprobs(self) -> bool:
        """Whether `old_logprobs` are the trainer's, not the sampler's."""
        return self.old_logprobs is not self.rollout_logprobs

    def trained_tokens(self) -> list[int]:
        """Return how many tokens of each sample are trained on."""
        if self.loss_mask is None:
            return [len(response) for response in self.response_ids]
        return [int(mask.sum()) for mask in self.loss_mask]


def without_lost(batches: Sequence[Batch]) -> list[Batch]:
    """Return micro-batches without the samples whose `outcome` says that they have no values.

    Example:
        >>> without_lost([{"uid": [7, 8], "outcome": ["cut", "failed"]}])
        [{'uid': [7], 'outcome': ['cut']}]
    """
    return [_living(batch) for batch in batches]


def is_lost(batch: Batch) -> list[bool]:
    """Tell of each sample whether its `outcome` says that it has no values."""
    count = len(batch.get(columns.RESPONSE_IDS, ()))
    outcomes = list(batch.get(columns.OUTCOME, (columns.OK,) * count))
    return [outcome in (columns.FAILED, columns.TIMED_OUT) for outcome in outcomes]


def _living(batch: Batch) -> Batch:
    lost = is_lost(batch)
    if not any(lost):
        return batch
    kept = [row for row, gone in enumerate(lost) if not gone]
    return {
        name: column[kept] if isinstance(column, Tensor) else [column[row] for row in kept]
        for name, column in batch.items()
    }


def merge_samples(
    batches: Sequence[Batch], *, module: str, needs_ref: bool = False
) -> TrainSamples:
    """Merge the micro-batches of one global batch and check what a train step relies on.

    Args:
        batches: dicts of columns as `columns.py` describes them; other columns are ignored.
        module: name of the trainer, for messages.
        needs_ref: whether `ref_logprobs` are needed.

    Raises:
        BatchError: no samples, a missing column, a column that only some micro-batches have or that
            has the wrong length, a number that is not finite.
    """
    batches = [batch for batch in batches if batch and len(batch.get(columns.RESPONSE_IDS, "?"))]
    if not batches:
        raise BatchError(
            "a train step got no samples",
            place=f"module {module!r}",
            fix="make sure that the flow returns samples to the trainer and filters do not drop all",
        )
    source = _Columns(batches, module)
    response_ids = source.ragged(columns.RESPONSE_IDS)
    has_rollout = source.has(columns.ROLLOUT_LOGPROBS)
    rollout = source.response(columns.ROLLOUT_LOGPROBS) if has_rollout else None
    if source.has(columns.OLD_LOGPROBS):
        old = source.response(columns.OLD_LOGPROBS)
    else:
        old = rollout if rollout is not None else source.response(columns.ROLLOUT_LOGPROBS)
    reference = source.response(columns.REF_LOGPROBS) if needs_ref else None
    mask = None
    if source.has(columns.LOSS_MASK):
        mask = [part.bool() for part in source.response(columns.LOSS_MASK)]
    temperature: Tensor | float = 1.0
    if source.has(columns.TEMPERATURE):
        temperature = torch.stack([t.float().reshape(()) for t in source.each(columns.TEMPERATURE)])
    version = None
    if source.has(columns.POLICY_VERSION):
        # A column that lost samples stood in is one of floats, for their NaN.
        version = torch.stack([v.reshape(()).long() for v in source.each(columns.POLICY_VERSION)])
    advantages = source.advantages()
    samples = TrainSamples(
        source.uids,
        source.ragged(columns.PROMPT_IDS),
        response_ids,
        old,
        advantages,
        rollout,
        reference,
        mask,
        temperature,
        version,
    )
    source.require_finite(columns.ADVANTAGES, advantages, mask)
    source.require_finite(columns.OLD_LOGPROBS, old, mask)
    if rollout is not None and rollout is not old:
        source.require_finite(columns.ROLLOUT_LOGPROBS, rollout, mask)
    if reference is not None:
        source.require_finite(columns.REF_LOGPROBS, reference, mask)
    return samples


class _Columns:
    """Reads columns over several micro-batches and says which one is wrong."""

    def __init__(self, batches: Sequence[Batch], module: str) -> None:
        self._batches = batches
        self._module = module
        self._lengths = [len(response) for response in self.ragged(columns.RESPONSE_IDS)]
        self.uids: list[Any] = list(range(len(self._lengths)))
        if self.has(columns.UID):
            self.uids = [
                int(uid) if isinstance(uid, Tensor) else uid
                for batch in batches
                for uid in batch[columns.UID]
            ]

    def has(self, name: str) -> bool:
        """Tell whether the batches have a column; refuse one that only some of them have."""
        without = [batch for batch in self._batches if name not in batch]
        if not without or len(without) == len(self._batches):
            return not without
        raise BatchError(
            f"column {name!r} is missing in {len(without)} of {len(self._batches)} micro-batches; "
            f"there are {sorted(without[0])}",
            place=f"module {self._module!r}",
            fix=f"have every sample that reaches the trainer bring {name!r}, or none",
        )

    def each(self, name: str) -> list[Tensor]:
        """Return one tensor per sample, of whatever shape the column has."""
        values: list[Tensor] = []
        for batch in self._batches:
            if name not in batch:
                raise self._missing(name, batch)
            column = batch[name]
            if columns.RESPONSE_IDS in batch:
                self._require_count(name, len(column), len(batch[columns.RESPONSE_IDS]))
            values += (
                column.unbind() if isinstance(column, Tensor) else map(torch.as_tensor, column)
            )
        return values

    def ragged(self, name: str) -> list[Tensor]:
        values = self.each(name)
        if any(value.ndim != 1 for value in values):
            raise BatchError(
                f"column {name!r} does not hold one 1-D tensor per sample",
                place=f"module {self._module!r}",
                fix="make it a list of 1-D tensors, one per sample",
            )
        return values

    def response(self, name: str) -> list[Tensor]:
        """Return a ragged column with as many entries per sample as there are response tokens."""
        values = self.ragged(name)
        self._require_lengths(name, values)
        return values

    def advantages(self) -> list[Tensor]:
        values = self.each(columns.ADVANTAGES)
        if all(value.ndim == 0 for value in values):
            return [value.reshape(1) for value in values]
        self._require_lengths(columns.ADVANTAGES, values)
        return values

    def require_finite(
        self, name: str, values: Sequence[Tensor], mask: Sequence[Tensor] | None
    ) -> None:
        """Refuse NaN and infinities, except on response tokens that are not trained on."""
        if bool(torch.cat(list(values)).isfinite().all()):
            return
        bad: list[Any] = []
        for number, value in enumerate(values):
            wrong = ~value.isfinite()
            if mask is not None and len(value) == len(mask[number]):
                wrong &= mask[number]
            if bool(wrong.any()):
                bad.append(self.uids[number])
        if bad:
            raise BatchError(
                f"column {name!r} holds numbers that are not finite, in {len(bad)} samples",
                place=f"module {self._module!r}, sample uids {bad[:8]}",
                fix="look at the rewards and log-probs of these samples",
            )

    def _require_lengths(self, name: str, values: Sequence[Tensor]) -> None:
        for uid, value, length in zip(self.uids, values, self._lengths, strict=True):
            if value.shape != (length,):
                raise BatchError(
                    f"column {name!r} has shape {list(value.shape)} for a response of {length} tokens",
                    place=f"module {self._module!r}, sample uid {uid}",
                    fix=f"give one entry of {name!r} per response token",
                )

    def _require_count(self, name: str, samples: int, expected: int) -> None:
        if samples != expected:
            raise BatchError(
                f"column {name!r} holds {samples} samples, {columns.RESPONSE_IDS!r} holds {expected}",
                place=f"module {self._module!r}",
                fix="give every column one entry per sample",
            )

    def _missing(self, name: str, batch: Batch) -> BatchError:
        maker = columns.MAKERS.get(name, "another module")
        reason = " (needed because kl_coef > 0)" if name == columns.REF_LOGPROBS else ""
        return BatchError(
            f"column {name!r} is missing{reason}; there are {sorted(batch)}",
            place=f"module {self._module!r}",
            fix=f"{maker} usually makes it: call it in the flow and return its output"
            + (", or set kl_coef to 0" if reason else ""),
        )
