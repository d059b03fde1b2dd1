# SPDX-License-Identifier: Apache-2.0

"""Log-probs of responses under a causal LM, with logits made for response tokens only.

Sequences lie in rows, padded on the right (see `packing.py`). Attention is causal, so no token ever
sees the padding behind it and no attention mask is needed, which keeps the fast attention kernels.
The last token of a sequence predicts nothing and is not fed. Rows that hold several sequences carry
`position_ids` that restart; transformers derives the block-diagonal mask from them.

Legend: `R` rows, `L` tokens of the longest row, `N` selected response tokens of all sequences,
    concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from chatlearn.errors import BatchError
from chatlearn.training.architecture import has_plain_head, require_packing
from chatlearn.training.packing import Rows, micro_batches

EntropyMode = Literal["off", "report", "train"]
"""Leave the entropy out, compute it without a gradient, or with one."""

CHUNK_BYTES = 128 * 2**20
"""Most memory for the float32 logits of one chunk of tokens."""


class Layout(NamedTuple):
    """Hold one micro-batch as the model takes it, on the model's device.

    Attributes:
        input_ids_RL: `[R, L]` int64, right-padded with 0.
        position_ids_RL: `[R, L]` int64, restarting with every sequence; None if rows hold one
            sequence each.
        place_N: `[N]` int64, where in the flattened `R * L` the token is predicted (the place
            before its own).
        target_N: `[N]` int64, the selected response tokens, sequence after sequence.
        sample_N: `[N]` int64, the sample that a token belongs to, as numbered in the caller's
            lists.
    """

    input_ids_RL: Tensor
    position_ids_RL: Tensor | None
    place_N: Tensor
    target_N: Tensor
    sample_N: Tensor


def lay_out(
    rows: Rows,
    prompt_ids: Sequence[Tensor],
    response_ids: Sequence[Tensor],
    *,
    keep: Sequence[Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Layout:
    """Arrange the sequences of one micro-batch in rows and find the places that predict response
    tokens.

    Args:
        rows: which sequences lie in which row; indices into the lists below.
        prompt_ids: int64 `[P_i]` of every sample, at least one token each where there is a
            response.
        response_ids: int64 `[T_i]` of every sample.
        keep: bool `[T_i]` of every sample; which response tokens to select. None selects all.
        device: where the result lives.

    Raises:
        BatchError: a response follows an empty prompt, so nothing predicts its first token.

    Example:
        >>> lay_out([[0]], [torch.tensor([5, 6])], [torch.tensor([7, 8])]).input_ids_RL
        tensor([[5, 6, 7]])
    """
    order = [sample for row in rows for sample in row]
    prompts = [len(prompt_ids[sample]) for sample in order]
    totals = [
        len(response_ids[sample]) + prompt for sample, prompt in zip(order, prompts, strict=True)
    ]
    _require_prompts(order, prompts)
    inputs = dict(zip(order, (total - 1 for total in totals), strict=True))
    row_lengths = [sum(inputs[sample] for sample in row) for row in rows]
    longest = max(row_lengths)
    starts: list[int] = []  # of each sequence in the flattened rows
    for number, row in enumerate(rows):
        start = number * longest
        for sample in row:
            starts.append(start)
            start += inputs[sample]

    ids = torch.cat([ids.cpu() for s in order for ids in (prompt_ids[s], response_ids[s])])
    total_S = torch.tensor(totals)
    sequence = torch.repeat_interleave(total_S, output_size=ids.numel())
    offset = torch.arange(ids.numel()) - (total_S.cumsum(0) - total_S)[sequence]
    place = torch.tensor(starts)[sequence] + offset

    fed = offset < (total_S - 1)[sequence]
    input_ids = torch.zeros(len(rows) * longest, dtype=torch.int64)
    input_ids[place[fed]] = ids[fed]
    position_ids = None
    if len(order) > len(rows):
        position_ids = torch.zeros_like(input_ids)
        position_ids[place[fed]] = offset[fed]
        position_ids = position_ids.view(len(rows), longest).to(device)

    selected = offset >= torch.tensor(prompts)[sequence]
    if keep is not None:
        selected[selected.clone()] = torch.cat([keep[s].cpu() for s in order]).bool()
    return Layout(
        input_ids.view(len(rows), longest).to(device),
        position_ids,
        (place[selected] - 1).to(device),
        ids[selected].to(device),
        torch.tensor(order)[sequence[selected]].to(device),
    )


def token_logprobs(
    model: Any,
    layout: Layout,
    temperature_N: Tensor | None = None,
    *,
    entropy: EntropyMode = "off",
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """Compute the log-probs (nats) of a layout's target tokens, and the entropy of their
    distributions.

    The softmax runs in float32 (float64 for a float64 model) whatever the precision of the model.
    Logits of more than `chunk_bytes` are made chunk by chunk and again in the backward pass, so
    that a large vocabulary costs no memory.

    Args:
        model: a transformers causal LM.
        layout: what `lay_out` made.
        temperature_N: `[N]` positive; logits are divided by it. None stands for 1.
        entropy: whether to compute the entropy too, and whether with a gradient.
        chunk_bytes: bound on the float32 logits held at a time.

    Returns:
        `[N]` log-probs with gradient, `[N]` entropies in nats or None.
    """
    arguments: dict[str, Any] = {"input_ids": layout.input_ids_RL, "use_cache": False}
    if layout.position_ids_RL is not None:
        require_packing(model)
        arguments["position_ids"] = layout.position_ids_RL
    head = model.get_output_embeddings()
    if not has_plain_head(model):
        logits = _logits_through_model(model, head, arguments, layout.place_N)
        return _select(logits, layout.target_N, temperature_N, entropy)

    hidden = model.get_decoder()(**arguments)[0]
    hidden_NH = hidden.reshape(-1, hidden.shape[-1]).index_select(0, layout.place_N)

    def score(
        hidden_CH: Tensor, target_C: Tensor, temperature_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return _select(head(hidden_CH), target_C, temperature_C, entropy)

    vocabulary = int(head.weight.shape[0])
    chunk = max(1, chunk_bytes // (4 * vocabulary))
    if hidden_NH.shape[0] <= chunk:
        return score(hidden_NH, layout.target_N, temperature_N)
    return _score_in_chunks(score, hidden_NH, layout.target_N, temperature_N, chunk)


@torch.no_grad()
def response_logprobs(
    model: Any,
    prompt_ids: Sequence[Tensor],
    response_ids: Sequence[Tensor],
    temperature: Tensor | float = 1.0,
    *,
    max_tokens: int,
    packing: bool = False,
) -> list[Tensor]:
    """Compute the log-probs of whole responses, without gradient.

    Args:
        model: a transformers causal LM, in eval mode.
        prompt_ids: int64 `[P_i]` per sample.
        response_ids: int64 `[T_i]` per sample; may be empty.
        temperature: `[B]` or one number, that the responses were sampled with; 0 (greedy) counts as
            1.
        max_tokens: budget of a micro-batch, padding included.
        packing: several sequences per row instead of one padded row each.

    Returns:
        float32 `[T_i]` per sample in the order given, on the CPU, nats.

    Raises:
        BatchError: a response follows an empty prompt.
        ConfigError: `packing` is asked of a model that cannot keep packed sequences apart.
    """
    results = [torch.empty(0) for _ in response_ids]
    scored = [sample for sample, response in enumerate(response_ids) if len(response)]
    lengths = [len(prompt_ids[sample]) + len(response_ids[sample]) - 1 for sample in scored]
    temperature_B = divisors(temperature, len(response_ids))
    for bucket in micro_batches(lengths, max_tokens, packing=packing):
        rows = [[scored[place] for place in row] for row in bucket]
        layout = lay_out(rows, prompt_ids, response_ids, device=model.device)
        temperature_N = None
        if temperature_B is not None:
            temperature_N = temperature_B.to(model.device)[layout.sample_N]
        logprobs, _ = token_logprobs(model, layout, temperature_N)
        order = [sample for row in rows for sample in row]
        parts: Sequence[Tensor] = torch.split(
            logprobs.float().cpu(), [len(response_ids[sample]) for sample in order]
        )
        for sample, part in zip(order, parts, strict=True):
            results[sample] = part.clone()  # a view would keep the whole micro-batch alive
    return results


def sequence_logprobs(model: Any, token_ids: Tensor) -> Tensor:
    """Return what `response_logprobs` gives for everything behind the first of some tokens.

    Args:
        model: a transformers causal LM, in eval mode.
        token_ids: int64 `[T]`, T of 2 or more.

    Returns:
        float32 `[T - 1]`, on the CPU, nats.
    """
    parts = [token_ids[:1]], [token_ids[1:]]
    return response_logprobs(model, *parts, max_tokens=len(token_ids))[0]


def divisors(temperature: Tensor | float, samples: int) -> Tensor | None:
    """Return `[B]` what logits are divided by: the temperature, or 1 where it is 0; None if 1
    throughout.
    """
    temperature_B = torch.as_tensor(temperature, dtype=torch.float32).cpu().expand(samples)
    temperature_B = torch.where(temperature_B == 0, 1.0, temperature_B)
    return None if bool((temperature_B == 1).all()) else temperature_B


def _require_prompts(order: Sequence[int], prompts: Sequence[int]) -> None:
    empty = [sample for sample, prompt in zip(order, prompts, strict=True) if prompt == 0]
    if empty:
        raise BatchError(
            "a response after an empty prompt has no log-prob: nothing predicts its first token",
            place=f"prompt_ids of samples {empty[:8]} of the batch",
            fix="start every prompt with at least one token, such as the tokenizer's BOS",
        )


def _select(
    logits_NV: Tensor, target_N: Tensor, temperature_N: Tensor | None, entropy: EntropyMode
) -> tuple[Tensor, Tensor | None]:
    """Turn logits into log-probs of the targets, and entropies."""
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    if temperature_N is not None:
        logits_NV = logits_NV / temperature_N.to(logits_NV.dtype).unsqueeze(1)
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    logprobs_N = logprobs_NV.gather(1, target_N.unsqueeze(1)).squeeze(1)
    if entropy == "off":
        return logprobs_N, None
    everything = logprobs_NV if entropy == "train" else logprobs_NV.detach()
    return logprobs_N, -(everything.exp() * everything).sum(-1)


def _score_in_chunks(
    score: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    hidden_NH: Tensor,
    target_N: Tensor,
    temperature_N: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor | None]:
    """Score `chunk` tokens at a time, keeping no logits: the backward pass makes them again."""
    from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for start in range(0, hidden_NH.shape[0], chunk):
        part = slice(start, start + chunk)
        temperature_C = None if temperature_N is None else temperature_N[part]
        arguments = (hidden_NH[part], target_N[part], temperature_C)
        if torch.is_grad_enabled():
            result = cast("Any", checkpoint(score, *arguments, use_reentrant=False))
            values, entropy = cast("tuple[Tensor, Tensor | None]", result)
        else:
            values, entropy = score(*arguments)
        logprobs.append(values)
        if entropy is not None:
            entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies) if entropies else None


def _logits_through_model(
    model: Any, head: Any, arguments: dict[str, Any], place_N: Tensor
) -> Tensor:
    """Return `[N, V]` logits of a model that transforms them after its head (soft caps, scales).

    The whole model runs, but its head gets the selected places only.
    """

    def select(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, place_N)
        return (picked.unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        return model(**arguments).logits.squeeze(0)
    finally:
        handle.remove()
