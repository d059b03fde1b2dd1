# SPDX-License-Identifier: Apache-2.0
"""Write a model so that transformers loads it, and its adapters so that peft does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from chatlearn.errors import SyncError
from chatlearn.weights.adapters import has_adapters, merged_state

ADAPTER: Final = "adapter"
"""The folder inside an exported model's that holds its adapters alone."""


def export(model: Any, folder: Path) -> None:
    """Write a model of transformers: weights (safetensors) and configuration.

    Of one with adapters, the weights are merged, and the adapters stand in `folder/adapter` besides. Adapters that no
    weights can take (those of a quantised base, or of a kind that peft does not merge) are written alone.

    Args:
        model: of transformers, or of peft around one.
        folder: is made.

    Example:
        >>> export(get_peft_model(base, LoraConfig()), Path("model"))
        >>> AutoModelForCausalLM.from_pretrained("model")
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would run through the engine's own display
    if has_adapters(model):
        model.save_pretrained(folder / ADAPTER)
        plain = _merged(model)
    else:
        plain = model
    if plain is not None:
        plain.save_pretrained(folder)
    _follow_umask(folder)


def _merged(model: Any) -> Any:
    """Return a plain model that holds the merged weights; None if they cannot be merged."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "hf_quantizer", None) is not None:
        return None
    try:
        state = merged_state(model)
    except SyncError:
        return None
    plain = _with_state(base, state, copy.deepcopy(base.config))
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    if plain.config.tie_word_embeddings and head is not None and not tied:
        untied = copy.deepcopy(base.config)  # an adapter of one of the two has parted them
        untied.tie_word_embeddings = False
        plain = _with_state(base, state, untied)
    plain.generation_config = base.generation_config
    return plain


def _with_state(base: Any, state: dict[str, Tensor], config: Any) -> Any:
    """Return a model of the class of `base` that holds the given tensors themselves."""
    with torch.device("meta"):
        plain = type(base)(config)
    plain.load_state_dict(state, assign=True)
    return plain


def _follow_umask(folder: Path) -> None:
    """Let weights be read by whom other new files there are: safetensors leaves them to their owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)
