# SPDX-License-Identifier: Apache-2.0
"""Where the players come from: a Qwen3 made from a config, and a few seconds of supervised warm start for each."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from game import ALL, EASY, PROBLEMS, START, answer, parse
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

STEPS, BATCH, LR = 300, 64, 2e-3
Example = tuple[str, str]


@functools.cache
def proposer(seed: int) -> tuple[Any, Any]:
    """Make a player that writes easy problems, garbles some, and looks beyond digit 4 one time in ten."""
    return _taught(_proposals, seed)


@functools.cache
def solver(seed: int) -> tuple[Any, Any]:
    """Make a player that answers easy problems and says any digit to the others."""
    return _taught(_answers, seed + 1)


def _proposals(rng: random.Random) -> Example:
    digits = ALL if rng.random() < 0.1 else EASY
    text = [str(rng.choice(digits)), "+", str(rng.choice(digits))]
    if rng.random() < 0.25:
        text[rng.randrange(3)] = rng.choice("0123456789+=?")
    return START, "".join(text)


def _answers(rng: random.Random) -> Example:
    problem = rng.choice(PROBLEMS)
    a, b = parse(problem) or (0, 0)
    known = a in EASY and b in EASY
    return f"{problem}=", answer(problem) if known else str(rng.choice(ALL))


def _taught(teach: Callable[[random.Random], Example], seed: int) -> tuple[Any, Any]:
    tokenizer, rng = make_tokenizer(), random.Random(seed)
    model = make_model(tokenizer, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        ids, labels = _padded(tokenizer, [teach(rng) for _ in range(BATCH)])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model, tokenizer


def make_tokenizer() -> Any:
    """Make a tokenizer with one token per character, and `<pad>`, `<eos>`, `<unk>`."""
    names = [*"0123456789+=?", "<pad>", "<eos>", "<unk>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(tokenizer: Any, seed: int) -> Any:
    """Make a Qwen3 of 0.1 M parameters with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def _padded(tokenizer: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts with their completions; only completions are labels."""
    rows = []
    for prompt, completion in examples:
        asked = tokenizer(prompt).input_ids
        answered = [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
        rows.append((asked + answered, [-100] * len(asked) + answered))
    width = max(len(ids) for ids, _ in rows)
    ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in rows]
    labels = [row + [-100] * (width - len(row)) for _, row in rows]
    return torch.tensor(ids), torch.tensor(labels)
