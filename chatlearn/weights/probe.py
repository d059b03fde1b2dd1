# SPDX-License-Identifier: Apache-2.0
"""The second proof of a parameter sync: both ends give the same log-probs to the same tokens.

Digests tell that every tensor arrived. They cannot tell that a policy samples with a copy that it made before, that its
head is not among what it calls its state, or that its positions are computed otherwise. Log-probs can, whatever the
cause, as long as the difference is larger than what the precision of the two computations allows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from chatlearn.errors import SyncError
from chatlearn.module import BaseModule, call_hook, resolved_config
from chatlearn.weights.proof import named_tensors

_TOKENS = 13
"""Tokens of the prompt: enough that each layer attends to several, few enough that it costs a dozen tokens' work."""
_SHOWN = 4
BOUNDS = {"fp32": 1e-4, "tf32": 0.02, "bf16": 0.1}
"""Largest difference allowed, in nats, per nat of 1 + |log-prob|, by the coarser precision of the two ends. Measured
between training's forward pass and cached decoding, on ten models of up to 24 layers and 32,000 tokens, freshly made
and trained: at most 1.5e-6 in fp32, 0.02 where one end or both compute in bf16."""


@dataclass(frozen=True)
class ProbeReport:
    """How far the log-probs of both ends are apart after a sync.

    Example:
        `ProbeReport(tokens=12, difference=1.4e-06, precision="fp32", seconds=0.021)`
    """

    tokens: int
    difference: float
    """Largest difference of any token and replica, nats."""
    precision: str
    """The coarser of the two ends': a key of `BOUNDS`."""
    seconds: float


def probe(
    source: BaseModule, destinations: Sequence[BaseModule], *, pair: str
) -> ProbeReport | None:
    """Ask both ends for the log-probs of the same tokens, and compare them.

    Args:
        source: the module that teaches.
        destinations: the replicas of the module that receives.
        pair: `source -> destination`, for errors.

    Returns:
        What was measured; None where one end cannot tell (its `probe_logprobs` returns None).

    Raises:
        SyncError: a difference is larger than `BOUNDS` allows, or a log-prob is not finite.
    """
    start = time.perf_counter()
    ids = probe_ids([source, destinations[0]])
    sent = _ask(source, ids)
    if sent is None:
        return None
    precision = _coarser([source, *destinations])
    largest = 0.0
    for number, destination in enumerate(destinations):
        found = _ask(destination, ids)
        if found is None:
            return None
        where = f"{pair}, replica {number}" if len(destinations) > 1 else pair
        if found.shape != sent.shape:
            raise SyncError(
                f"probe_logprobs() of {destination.name} returned {list(found.shape)} log-probs, that of "
                f"{source.name} {list(sent.shape)}, for {len(ids)} tokens",
                place=where,
                fix="return one log-prob for each token behind the first",
            )
        apart = (found - sent).abs()
        allowed = BOUNDS[precision] * (1 + sent.abs())
        if not bool((apart <= allowed).all()):  # NaN included
            raise _mismatch(source, destination, sent, found, precision, where)
        largest = max(largest, float(apart.max()))
    return ProbeReport(len(sent), largest, precision, time.perf_counter() - start)


def probe_ids(modules: Sequence[BaseModule]) -> Tensor:
    """Return the prompt, the same for the same modules: tokens that all their vocabularies and positions have.

    Returns:
        int64 `[T]`, T at most 13.
    """
    sizes = [size for module in modules if (size := _vocabulary(module.model)) is not None]
    most = [
        int(limit)
        for module in modules
        if (limit := getattr(getattr(module.model, "config", None), "max_position_embeddings", 0))
    ]
    tokens = max(min([_TOKENS, *most]), 2)
    # Multiples of the golden ratio: spread over the vocabulary, whatever its size.
    return (torch.arange(1, tokens + 1) * 0.6180339887).frac().mul(min(sizes, default=2)).long()


def _vocabulary(model: Any) -> int | None:
    """Return how many tokens a model knows, if it tells in one of the usual ways."""
    if not isinstance(model, nn.Module):
        return None
    try:
        return int(cast("Any", model).get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError):
        tables = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
        return min(tables, default=None)


def _ask(module: BaseModule, ids: Tensor) -> Tensor | None:
    """Return the module's log-probs, float64 on the CPU."""
    answer: Tensor | None = call_hook(module, "probe_logprobs", ids.clone())
    return None if answer is None else answer.detach().double().cpu()


def _coarser(modules: Iterable[BaseModule]) -> str:
    """Return the coarsest precision that any of the modules computes in: of its weights, or by its configuration."""
    coarse, on_gpu = False, False
    for module in modules:
        for _, tensor in named_tensors(module):
            coarse |= tensor.is_floating_point() and tensor.element_size() < 4
            on_gpu |= tensor.is_cuda
        coarse |= "16" in str(getattr(resolved_config(module), "dtype", ""))  # autocast
    if coarse:
        return "bf16"
    return "tf32" if on_gpu and torch.get_float32_matmul_precision() != "highest" else "fp32"


def _mismatch(
    source: BaseModule,
    destination: BaseModule,
    sent: Tensor,
    found: Tensor,
    precision: str,
    where: str,
) -> SyncError:
    if not bool(torch.isfinite(sent).all() & torch.isfinite(found).all()):
        cause = "are not all finite"
    else:
        token = int(((found - sent).abs() / (1 + sent.abs())).argmax())
        cause = (
            f"differ: token {token + 1} has {float(sent[token]):.6g} from {source.name} and "
            f"{float(found[token]):.6g} from {destination.name}, more than {precision} explains"
        )
    causes = list(_causes(source, destination))
    return SyncError(
        f"every tensor arrived, but the log-probs of a fixed prompt {cause}\n"
        + "\n".join(f"  {line}" for line in causes),
        place=where,
        fix="give both modules the same model and configuration; a destination that keeps weights elsewhere (a copy "
        "made in setup(), a compiled or quantised model) has to take them over in load_state_dict()",
    )


def _causes(source: BaseModule, destination: BaseModule) -> Iterable[str]:
    """Say what is known to differ between two models whose states are equal."""
    ours, theirs = (_settings(module.model) for module in (source, destination))
    settings = [
        f"{key} ({ours.get(key)!r}, {theirs.get(key)!r})"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
    if settings and ours and theirs:
        yield f"their model configurations differ: {', '.join(settings)}"
    state: Mapping[str, Any] = call_hook(destination, "state_dict")
    carried = {_key(tensor) for tensor in state.values() if isinstance(tensor, Tensor)}
    own = dict(named_tensors(source))
    left_out = {
        name: tensor
        for name, tensor in named_tensors(destination)
        if name not in state and _key(tensor) not in carried
    }
    different = [n for n, tensor in left_out.items() if n in own and not _equal(own[n], tensor)]
    if different:
        yield f"tensors outside the state differ: {_cut(different)}"
    unknown = [name for name in left_out if name not in own]
    if unknown:
        yield f"tensors of {destination.name} that its state does not carry: {_cut(unknown)}"


def _settings(model: Any) -> dict[str, Any]:
    """Return the fields of a model's configuration that its log-probs may depend on."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    settings: dict[str, Any] = {} if to_dict is None else dict(to_dict())
    for key in (
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "transformers_version",
        "use_cache",
        "architectures",
    ):
        settings.pop(key, None)
    return settings


def _key(tensor: Tensor) -> object:
    return tensor.data_ptr(), tensor.shape


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one.to(two), two)


def _cut(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
