# SPDX-License-Identifier: Apache-2.0
"""The maths of sampling: counter-based uniform numbers, tokens by inverting a distribution.

Randomness is a pure function of (seed, uid, turn, position): one uniform number per token, from the
splitmix64 mixer (Steele, Lea, Flood 2014) used as a counter-based generator. Nothing is drawn from
a global generator, so a sample's tokens do not depend on what else is in its batch.

Legend: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_GOLDEN: Final = 0x9E3779B97F4A7C15
_WORD: Final = 0xFFFFFFFFFFFFFFFF
_UNIFORM_BITS: Final = 24
"""A float32 holds 24 bits exactly; and `fl(total * u) < total` for every u of 24 bits, which
`_invert` relies on."""


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words by splitmix64's finaliser, a bijection."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def sample_keys(seed: int, uids: Sequence[int], turns: Sequence[int]) -> NDArray[np.uint64]:
    """Return one 64-bit key `[B]` per sample, a hash of (seed, uid, turn).

    Args:
        seed: Any integer; taken modulo 2^64.
        uids: `[B]` numbers of the samples.
        turns: `[B]` numbers of the response among those of its sample.

    Example:
        >>> keys = sample_keys(0, [7, 7, 8], [0, 1, 0])
        >>> len(set(keys.tolist()))
        3
    """
    key = np.full(len(uids), seed & _WORD, dtype=np.uint64)
    for part in (uids, turns):
        # The added constant keeps zeros from passing through the mixer unchanged.
        words = np.array([value & _WORD for value in part], dtype=np.uint64)
        key = _mix(_mix(key + np.uint64(_GOLDEN)) ^ words)
    return key


def derive_seed(seed: int, stream: str) -> int:
    """Return the seed of a stream of random numbers of its own: a hash of the seed and the name.

    Args:
        seed: Any integer; taken modulo 2^64.
        stream: Name of the stream, such as "policy/train"; all of it counts.

    Example:
        >>> derive_seed(0, "policy/eval") == derive_seed(0, "policy/train")
        False
    """
    key = (seed & _WORD).to_bytes(8, "little")
    name = stream.encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, key=key, digest_size=8).digest(), "little")


def uniforms(keys: NDArray[np.uint64], start: int, count: int) -> Tensor:
    """Return the uniform numbers of `count` token positions.

    Args:
        keys: `[B]` of `sample_keys`.
        start: Position, within the response, of the first token.
        count: Number of positions.

    Returns:
        float32 `[count, B]` on the CPU, multiples of 2^-24 in [0, 1).
    """
    counters = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    words = _mix(keys[None, :] + counters[:, None])
    top = (words >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float32)
    return torch.from_numpy(top * np.float32(2.0**-_UNIFORM_BITS))


def sample_tokens(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Choose one token per row by inversion of its cumulative distribution.

    Top-k is applied first, then top-p to what top-k left, renormalised.

    Args:
        logits: `[B, V]`, any floating dtype; computed in float32.
        uniform: float32 `[B]` in [0, 1), multiples of 2^-24.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keep the smallest set of most likely tokens with at least this probability.
        top_k: Keep this many most likely tokens; 0 keeps all.

    Returns:
        int64 `[B]` tokens and their float32 `[B]` probabilities at this temperature *before* top-k
        and top-p (at temperature 1 if `temperature` is 0). NaN where the logits are not finite.

    Example:
        >>> sample_tokens(torch.tensor([[0.0, 9.0]]), torch.tensor([0.5]), temperature=1.0)[0]
        tensor([1])
    """
    logits = logits.float()
    if temperature == 0.0:
        token = logits.argmax(-1, keepdim=True)
        return token.squeeze(-1), logits.softmax(-1).gather(-1, token).squeeze(-1)
    probs = (logits if temperature == 1.0 else logits / temperature).softmax(-1)
    vocab = probs.shape[-1]
    if top_p >= 1.0 and not 0 < top_k < vocab:
        token = _invert(probs.cumsum(-1), uniform.unsqueeze(-1), vocab)
    else:
        token = _truncated(probs, uniform.unsqueeze(-1), top_p, top_k)
    return token.squeeze(-1), probs.gather(-1, token).squeeze(-1)


def _invert(cumulative: Tensor, uniform: Tensor, count: Tensor | int) -> Tensor:
    """Return the first index `[B, 1]` whose cumulative weight exceeds `uniform` times the total.

    On the CPU `cumulative` never decreases (it is summed in order), so the index found has positive
    weight. A parallel sum may wobble in its last bit, and NaNs find nothing: hence the bound.
    """
    total = cumulative[:, -1:]
    if not isinstance(count, int):
        total = cumulative.gather(-1, count - 1)
    index = torch.searchsorted(cumulative, uniform * total, right=True)
    return index.clamp_(max=count - 1) if isinstance(count, int) else index.minimum(count - 1)


def _truncated(probs: Tensor, uniform: Tensor, top_p: float, top_k: int) -> Tensor:
    """Return tokens `[B, 1]` drawn from the most likely ones."""
    if 0 < top_k < probs.shape[-1]:
        ordered, tokens = probs.topk(top_k, dim=-1)
    else:
        ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(-1)
    # A token is kept while the mass *before* it is short of top_p, so that the one which crosses is
    # kept too.
    before = cumulative - ordered
    count = (before < top_p * cumulative[:, -1:]).sum(-1, keepdim=True).clamp_(min=1)
    return tokens.gather(-1, _invert(cumulative, uniform, count))
