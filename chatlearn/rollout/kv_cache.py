# SPDX-License-Identifier: Apache-2.0
"""Key/value caches whose rows are samples, spread to siblings and closed up as rows finish.

transformers' own `DynamicCache` concatenates the whole cache for every token. `InPlaceCache` writes
each token into a buffer with room to spare instead, and drops finished rows by moving the last live
rows into their places, which copies as many rows as have finished and no more. Models with another
kind of layer (sliding windows, states of linear attention) get `GrowingCache`, transformers' cache
with the same two operations.

Legend: `B` rows, `H` key/value heads, `S` tokens, `D` head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

_FIRST_ROOM = 256
"""Free token slots at first; longer responses double the buffer, so that none is larger than twice
its content."""


class RowCache(Protocol):
    """What the decoding loop does to a cache, besides handing it to the model."""

    def spread(self, rows: Tensor, room: int) -> None:
        """Make row `i` a copy of the former row `rows[i]`, expecting `room` more tokens."""
        ...

    def keep(self, holes: Tensor, movers: Tensor, order: Tensor) -> None:
        """Drop finished rows: row `movers[i]` moves to `holes[i]`, so that `order` lists the former
        rows in place.
        """
        ...


class _InPlaceLayer(CacheLayerMixin):
    """One layer's keys and values `[B, H, S, D]`, a view of the filled part of a larger buffer."""

    is_sliding = False
    keys: Any  # Tensor, once initialised
    values: Any

    def __init__(self, room: int) -> None:
        super().__init__()
        self.rows = 0
        self.length = 0
        self.room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make buffers for the rows of the first call."""
        self.rows = key_states.shape[0]
        self.keys = self._buffer(key_states, self.rows, self.room)
        self.values = self._buffer(value_states, self.rows, self.room)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the old ones and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        if end > self.room:
            self.room = max(end, 2 * self.room)
            self.keys = self._moved(self.keys, None)
            self.values = self._moved(self.values, None)
        self.keys[: self.rows, :, start:end] = key_states
        self.values[: self.rows, :, start:end] = value_states
        self.length = end
        return self.keys[: self.rows, :, :end], self.values[: self.rows, :, :end]

    def spread(self, rows: Tensor, room: int) -> None:
        self.room = self.length + room
        self.keys = self._moved(self.keys, rows)
        self.values = self._moved(self.values, rows)
        self.rows = len(rows)

    def keep(self, holes: Tensor, movers: Tensor, live: int) -> None:
        if len(holes):
            for buffer in (self.keys, self.values):
                filled = buffer[:, :, : self.length]
                filled[holes] = filled[movers]
        self.rows = live

    def _buffer(self, like: Tensor, rows: int, room: int) -> Tensor:
        return like.new_empty((rows, like.shape[1], room, like.shape[3]))

    def _moved(self, old: Tensor, rows: Tensor | None) -> Tensor:
        """Return a buffer of `self.room` tokens with `old`'s tokens, of some rows or of all."""
        filled = old[: self.rows, :, : self.length]
        new = self._buffer(old, self.rows if rows is None else len(rows), self.room)
        new[:, :, : self.length] = filled if rows is None else filled[rows]
        return new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset that a mask for the next `query_length` tokens needs."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: the buffers grow."""
        return -1


class InPlaceCache(Cache):
    """A cache of full-attention layers that is written in place."""

    def __init__(self, num_layers: int, room: int) -> None:
        self._own = [_InPlaceLayer(room) for _ in range(num_layers)]
        super().__init__(layers=list(self._own))

    @classmethod
    def joined(cls, parts: Sequence[InPlaceCache]) -> InPlaceCache:
        """Return one cache with the rows of all parts, which hold the same number of tokens."""
        whole = cls(len(parts[0]._own), parts[0]._own[0].length)
        for index, layer in enumerate(whole._own):
            keys = torch.cat([part._own[index].keys for part in parts])
            layer.update(keys, torch.cat([part._own[index].values for part in parts]))
        return whole

    def spread(self, rows: Tensor, room: int) -> None:
        """Make row `i` a copy of the former row `rows[i]`, expecting `room` more tokens."""
        for layer in self._own:
            layer.spread(rows, min(room, _FIRST_ROOM))

    def keep(self, holes: Tensor, movers: Tensor, order: Tensor) -> None:
        """Drop finished rows by moving the last live rows into their places."""
        for layer in self._own:
            layer.keep(holes, movers, len(order))


class GrowingCache(DynamicCache):
    """transformers' own cache, for models whose layers are not all of full attention."""

    def spread(self, rows: Tensor, room: int) -> None:
        """Make row `i` a copy of the former row `rows[i]`."""
        self._select(rows)

    def keep(self, holes: Tensor, movers: Tensor, order: Tensor) -> None:
        """Drop finished rows."""
        self._select(order)

    def _select(self, rows: Tensor) -> None:
        self.reorder_cache(rows)  # pyright: ignore[reportArgumentType]


def make_cache(config: Any, prompt_tokens: int) -> InPlaceCache | GrowingCache:
    """Return the cache that suits a model's layers.

    Args:
        config: The model's transformers config.
        prompt_tokens: Tokens of the (padded) prompts, which the cache gets in one call.
    """
    growing = GrowingCache(config=config)
    if growing.layers and all(type(layer) is DynamicLayer for layer in growing.layers):
        return InPlaceCache(len(growing.layers), prompt_tokens)
    return growing


def closing_moves(finished: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plan how the last live rows move into the places of finished ones.

    Args:
        finished: bool `[B]`, on the CPU.

    Returns:
        int64 `holes` and `movers` `[n]`, and `order` `[live]`: the former row that each row holds
        afterwards.

    Example:
        >>> holes, movers, order = closing_moves(torch.tensor([True, False, False, True, False]))
        >>> holes.tolist(), movers.tolist(), order.tolist()
        ([0], [4], [4, 1, 2])
    """
    live = int((~finished).sum())
    holes = finished[:live].nonzero().squeeze(-1)
    movers = (~finished[live:]).nonzero().squeeze(-1) + live
    order = torch.arange(live)
    order[holes] = movers
    return holes, movers, order
