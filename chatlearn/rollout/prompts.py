# SPDX-License-Identifier: Apache-2.0
"""Turns prompts (text or chat messages) into token ids, once per distinct prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from chatlearn.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Encodes prompts with a Hugging Face tokenizer.

    Example:
        >>> from chatlearn.testing import tiny_tokenizer
        >>> PromptEncoder(tokenizer=tiny_tokenizer()).encode(["1+1="], uids=[0])
        [tensor([ 5, 76,  5, 84])]
    """

    tokenizer: Any
    chat_template: bool | None = None
    """None: for chat messages; True: for plain text too, as one user message; False: never."""
    add_bos: bool | None = None
    """Whether plain text starts with a BOS token; None does what the tokenizer does by itself."""
    max_tokens: int | None = None
    """Longest prompt allowed."""

    def encode(
        self, prompts: Sequence[Any], *, uids: Sequence[int], noun: str = "sample"
    ) -> list[Tensor]:
        """Encode prompts.

        Args:
            prompts: `[B]`, each a string or a list of messages `{"role": ..., "content": ...}`.
            uids: `[B]` numbers of the samples, for error messages.
            noun: What the numbers are of: "sample", or "row" of a dataset.

        Returns:
            `[B]` int64 tensors `[P_i]`; equal prompts share one tensor.

        Raises:
            DataError: A prompt is neither text nor messages, has no template, or is too long.
        """
        known: dict[str, Tensor] = {}
        encoded: list[Tensor] = []
        for prompt, uid in zip(prompts, uids, strict=True):
            key = prompt if isinstance(prompt, str) else repr(prompt)
            if key not in known:
                known[key] = torch.tensor(
                    self._one(prompt, f"{noun} {uid}", _place(noun, uid)), dtype=torch.int64
                )
            encoded.append(known[key])
        self.check(encoded, uids=uids, noun=noun)
        return encoded

    def check(
        self, prompt_ids: Sequence[Tensor], *, uids: Sequence[int], noun: str = "sample"
    ) -> None:
        """Raise `DataError` for the first prompt that is longer than `max_tokens`."""
        for ids, uid in zip(prompt_ids, uids, strict=True):
            if self.max_tokens is not None and len(ids) > self.max_tokens:
                raise DataError(
                    f"the prompt of {noun} {uid} has {len(ids)} tokens; "
                    f"max_prompt_tokens is {self.max_tokens}",
                    place=_place(noun, uid),
                    fix="raise max_prompt_tokens, or leave such prompts out of the dataset",
                )

    def _one(self, prompt: Any, whose: str, place: str) -> list[int]:
        if isinstance(prompt, str):
            if not self.chat_template:
                return self._text(prompt)
            prompt = [{"role": "user", "content": prompt}]
        if not _is_messages(prompt):
            raise DataError(
                f"the prompt of {whose} is a {type(prompt).__name__}, not text or messages",
                place=place,
                fix='give a string, or a list of {"role": ..., "content": ...}',
            )
        if self.chat_template is False or not self.tokenizer.chat_template:
            why = (
                "chat_template is false"
                if self.chat_template is False
                else "the tokenizer has none"
            )
            raise DataError(
                f"the prompt of {whose} needs a chat template, but {why}",
                place=place,
                fix="use a tokenizer with a chat template, or give prompts as plain text",
            )
        text = self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
        # The template writes the special tokens itself.
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _text(self, text: str) -> list[int]:
        tokenizer = self.tokenizer
        if self.add_bos is None:
            ids: list[int] = tokenizer(text).input_ids
            # Some tokenizers close every text with EOS; after it there is nothing to continue.
            return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if not self.add_bos:
            return ids
        if tokenizer.bos_token_id is None:
            raise DataError(
                "add_bos is true, but the tokenizer has no BOS token",
                place="add_bos",
                fix="set add_bos: false",
            )
        return [tokenizer.bos_token_id, *ids]


def _is_messages(prompt: Any) -> bool:
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    messages = cast("Sequence[Any]", prompt)
    return all(isinstance(message, Mapping) and "role" in message for message in messages)


def _place(noun: str, number: int) -> str:
    return f"uid {number}" if noun == "sample" else f"{noun} {number}"
