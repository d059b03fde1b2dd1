# SPDX-License-Identifier: Apache-2.0
"""What a causal LM's architecture allows, found out by trying it once on a handful of tokens.

Reading a config tells what somebody thought of; running the model tells what is true. Answers are
remembered per model.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from chatlearn.errors import ConfigError

_plain_heads: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_packing_problems: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def has_plain_head(model: Any) -> bool:
    """Tell whether the model's logits are its head applied to its decoder's last hidden states, bit
    for bit.

    Gemma caps its logits and Granite and Cohere scale them after the head; those answer no.
    """
    answer = _plain_heads.get(model)
    if answer is None:
        ids = _some_ids(model)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            head = model.get_output_embeddings()
            answer = torch.equal(
                head(model.get_decoder()(input_ids=ids, use_cache=False)[0]), logits
            )
        _plain_heads[model] = answer
    return answer


def require_packing(model: Any) -> None:
    """Make sure that the model keeps sequences in one row apart when `position_ids` restart.

    Raises:
        ConfigError: it does not; names `packing` and what was observed.
    """
    problem = _packing_problems.get(model)
    if problem is None:
        with torch.no_grad():
            problem = _packing_problem(model)
        _packing_problems[model] = problem
    if problem:
        raise ConfigError(
            f"{type(model).__name__} cannot take several sequences in one row: {problem}",
            place="packing",
            fix="set packing to false (rows are then padded), or load it with another attention",
        )


def _packing_problem(model: Any) -> str:
    """Return what is wrong with packing, or an empty string."""
    decoder = model.get_decoder()
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return "its forward takes no position_ids"
    ids = _some_ids(model)
    first, second = ids[:, :3], ids[:, 3:]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=ids.device)

    def packed_second(before: Tensor) -> Tensor:
        row = torch.cat([before, second], dim=1)
        return decoder(input_ids=row, position_ids=positions, use_cache=False)[0][:, 3:]

    packed = packed_second(first)
    other = (first + 1) % int(model.get_input_embeddings().weight.shape[0])
    if not torch.equal(packed, packed_second(other)):
        return "a sequence saw the one before it"
    alone = decoder(input_ids=second, use_cache=False)[0]
    error = (packed.double() - alone.double()).abs().max() / alone.double().abs().max()
    bound = 0.05 if packed.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return "" if float(error) < bound else f"a sequence changed by {float(error):.2g} when packed"


def _some_ids(model: Any) -> Tensor:
    """Return `[1, 7]` token ids within the vocabulary."""
    embedding = model.get_input_embeddings().weight
    return torch.arange(1, 8, device=embedding.device).unsqueeze(0) % int(embedding.shape[0])
