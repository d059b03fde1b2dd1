# SPDX-License-Identifier: Apache-2.0
"""How sequences become micro-batches under a token budget: pure arithmetic on lengths, without
tensors.

A micro-batch is a list of rows, a row a list of sequences that lie in it one after another. Padded
rows hold one sequence each; packed rows as many as fit. Everything is deterministic: ties keep the
order of the input.

    length-bucketed   [[4], [9], [0]]          rows of one sequence, alike in length, padded to the
    longest packed            [[4, 2], [9], [0, 7, 1]] rows filled up to the longest sequence of all
"""

from __future__ import annotations

from collections.abc import Sequence

from chatlearn.errors import ConfigError

Rows = list[list[int]]
"""Rows of a micro-batch; each holds the indices of its sequences in order."""


def length_buckets(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences of similar length so that `rows * longest` stays within `max_tokens`.

    Args:
        lengths: tokens of each sequence.
        max_tokens: budget of a micro-batch, padding included. A sequence longer than that gets a
            micro-batch of its own: it has to be trained on, and splitting it would change the
            result.

    Returns:
        Lists of indices into `lengths`; every index exactly once, longest first.

    Raises:
        ConfigError: `max_tokens` is not positive.

    Example:
        >>> length_buckets([2, 9, 3, 8], 18)
        [[1, 3], [2, 0]]
    """
    _require_budget(max_tokens)
    buckets: list[list[int]] = []
    longest = 0
    for index in _longest_first(lengths):
        if not buckets or (len(buckets[-1]) + 1) * longest > max_tokens:
            buckets.append([])
            longest = lengths[index]
        buckets[-1].append(index)
    return buckets


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Fill bins of at most `max_tokens` by first-fit decreasing (within 11/9 of the fewest bins
    possible).

    Args:
        lengths: tokens of each sequence.
        max_tokens: capacity of a bin. A sequence longer than that gets a bin of its own.

    Returns:
        Lists of indices into `lengths`; every index exactly once, longest first within a bin.

    Raises:
        ConfigError: `max_tokens` is not positive.

    Example:
        >>> pack([2, 9, 3, 8], 11)
        [[1, 0], [3, 2]]
    """
    _require_budget(max_tokens)
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        size = lengths[index]
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[place].append(index)
        room[place] -= size
    return bins


def micro_batches(lengths: Sequence[int], max_tokens: int, *, packing: bool = False) -> list[Rows]:
    """Lay sequences out in micro-batches of rows, each costing `rows * longest row` <=
    `max_tokens`.

    With `packing`, rows are as long as the longest sequence of all and filled first-fit. Attention
    then costs no more than for padded rows, which a single row as long as the budget would not
    give: its mask grows with the square.

    Args:
        lengths: tokens of each sequence.
        max_tokens: budget of a micro-batch; a longer sequence gets one of its own.
        packing: put several sequences into one row.

    Example:
        >>> micro_batches([2, 9, 3, 8], 18, packing=True)
        [[[1], [3]], [[2, 0]]]
    """
    if not packing:
        return [[[index] for index in bucket] for bucket in length_buckets(lengths, max_tokens)]
    rows = pack(lengths, max(1, max(lengths, default=1)))
    row_lengths = [sum(lengths[index] for index in row) for row in rows]
    return [[rows[r] for r in bucket] for bucket in length_buckets(row_lengths, max_tokens)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def _require_budget(max_tokens: int) -> None:
    if max_tokens < 1:
        raise ConfigError(
            f"a micro-batch needs room for at least one token, not {max_tokens}",
            fix="set max_tokens_per_micro_batch to a positive number",
        )
