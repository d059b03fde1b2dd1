# SPDX-License-Identifier: Apache-2.0
"""The base model: a character tokenizer, a Qwen3 made from a config, a supervised warm start.

The teacher's completions are all correct. For most of the warm start the teacher shows the working;
then it gets hasty, and the model takes the habit over: it still knows how to work a sum out, but
mostly blurts out a number, which is mostly wrong. GRPO has to find out what pays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from tasks import Problem, teach
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

STEPS, BATCH, LR = 1800, 16, 1.5e-3
HASTY_FROM, WORKED_SHARE = 0.9, 0.3


def make_tokenizer() -> Any:
    """Make a tokenizer with one token per character, and `<pad>`, `<eos>`, `<unk>`."""
    names = [*"0123456789+-=>", "<pad>", "<eos>", "<unk>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(tokenizer: Any, seed: int) -> Any:
    """Make a Qwen3 of 1.1 M parameters with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def warm_start(problems: Sequence[Problem], seed: int, steps: int = STEPS) -> tuple[Any, Any]:
    """Train a new model on the teacher's completions; return it with its tokenizer."""
    tokenizer = make_tokenizer()
    model, rng = make_model(tokenizer, seed), random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), fused=True)
    for step in track(range(steps), "warm start"):
        done = step / steps
        for group in optimiser.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 30, 1.0 - 0.95 * (done - 0.4) / 0.6)
        worked_share = 1.0 if done < HASTY_FROM else WORKED_SHARE
        chosen = rng.sample(problems, BATCH)
        texts = [(p["prompt"], teach(p, worked_share, rng)) for p in chosen]
        ids, labels = _padded(tokenizer, texts)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return model, tokenizer


def _padded(tokenizer: Any, texts: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts with their completions; only completions are labels."""
    rows = []
    for prompt, completion in texts:
        asked = tokenizer(prompt).input_ids
        answered = [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
        rows.append((asked + answered, [-100] * len(asked) + answered))
    width = max(len(ids) for ids, _ in rows)
    ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in rows]
    labels = [row + [-100] * (width - len(row)) for _, row in rows]
    return torch.tensor(ids), torch.tensor(labels)
