# SPDX-License-Identifier: Apache-2.0
"""What ends a response: EOS tokens, special tokens, and texts that are looked for among the last tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a response: the tokenizer's EOS and the model's additions to it.

    The list of a model that does not contain the tokenizer's EOS is a default that belongs to
    another vocabulary.
    """
    own: int = tokenizer.eos_token_id
    found: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = cast("list[int]", found) if isinstance(found, list) else [found]
    return sorted({own, *listed}) if own in listed else [own]


def special_id(tokenizer: Any, text: str) -> int | None:
    """Return the id of the special token with this text; None if there is none."""
    if text in tokenizer.all_special_tokens:
        return tokenizer.convert_tokens_to_ids(text)
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return next((i for i, one in added.items() if one.special and one.content == text), None)


class StopTexts:
    """Looks for stop texts at the end of responses, by decoding their last few tokens."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], requests: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.lengths = torch.full((requests,), torch.iinfo(torch.int64).max)
        """int64 `[requests]`, on the CPU: tokens of the response up to the stop text, or a huge
        number."""
        # A token holds at least one byte of text; the rest is for special tokens and a character
        # cut in two.
        self.window = max((len(text.encode()) for text in stop), default=0) + 8

    def look(self, tokens: Tensor, slots: Tensor, finished: Tensor, step: int) -> Tensor:
        """Return which rows `[B]` have just completed a stop text, and note their lengths.

        Args:
            tokens: int64 `[steps, requests]`, what has been sampled.
            slots: int64 `[B]`, the request that each row answers.
            finished: bool `[B]`, rows that have ended before.
            step: number of the newest token.
        """
        recent = tokens[max(0, step + 1 - self.window) : step + 1, slots]
        tail = cast("list[list[int]]", recent.T.tolist())
        requests = cast("list[int]", slots.tolist())
        ended = cast("list[bool]", finished.tolist())
        found = torch.zeros(len(requests), dtype=torch.bool)
        for row, ids in enumerate(tail):
            if ended[row]:
                continue
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if any(stop in text for stop in self.stop):
                found[row] = True
                self.lengths[requests[row]] = step + 1
        return found.to(finished.device)
