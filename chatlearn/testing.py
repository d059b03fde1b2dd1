# SPDX-License-Identifier: Apache-2.0
"""Public fakes: a tiny model and tokenizer for tests, made in milliseconds, nothing downloaded.

Example:
    >>> model, tokenizer = tiny_model(), tiny_tokenizer()
    >>> tokenizer.decode(tokenizer("1+1=").input_ids)
    '1+1='
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n\t"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<bos>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)


def tiny_model(
    vocab_size: int = VOCAB_SIZE,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    max_positions: int = 512,
) -> Any:
    """Make a Qwen3-architecture causal LM in eval mode, with about 20 thousand random weights.

    Args:
        vocab_size: Number of tokens; the default fits `tiny_tokenizer()`.
        hidden: Width; four heads share it, two of them for keys and values.
        layers: Number of decoder layers.
        seed: Seed of the weights; the global random state is left untouched.
        max_positions: Longest sequence, in tokens.

    Example:
        >>> tiny_model().config.model_type
        'qwen3'
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=max(hidden // 4, 2),
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        initializer_range=0.2,  # wide enough that the distribution is far from uniform
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def tiny_tokenizer(
    characters: str = CHARACTERS,
    *,
    eos: bool = True,
    pad: bool = True,
    chat_template: str | None = None,
) -> Any:
    """Make a `PreTrainedTokenizerFast` of four special tokens and one token per character.

    Args:
        characters: The vocabulary.
        eos: Whether the tokenizer names an EOS token (tests of bad input switch it off).
        pad: Whether it names a pad token.
        chat_template: Jinja template for chat messages; None for a tokenizer without one.

    Example:
        >>> tiny_tokenizer("ab")("ba").input_ids
        [5, 4]
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    names = {"unk_token": "<unk>", "bos_token": "<bos>"}
    if eos:
        names["eos_token"] = "<eos>"
    if pad:
        names["pad_token"] = "<pad>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **names
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def tiny_pair(seed: int = 0) -> tuple[Any, Any]:
    """Return `(tiny_model(seed=seed), tiny_tokenizer())`; a module takes the function itself: `model=tiny_pair`."""
    return tiny_model(seed=seed), tiny_tokenizer()


def save_tiny_model(folder: str | Path, seed: int = 0) -> Path:
    """Write a tiny model and its tokenizer to `folder` in Hugging Face format; return the folder.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> AutoModelForCausalLM.from_pretrained(save_tiny_model("/tmp/tiny"))  # doctest: +SKIP
    """
    path = Path(folder)
    model, tokenizer = tiny_pair(seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
