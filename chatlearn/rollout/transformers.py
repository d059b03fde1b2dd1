# SPDX-License-Identifier: Apache-2.0
"""Sampling with a Hugging Face causal LM in this process, through its public forward call alone.

    distinct prompts --prefill once each--> cache --spread to siblings--> decode, a token per row
                                              ^                             |
                                              +---- finished rows leave <---+

Prompts of unequal lengths are padded on the left, here and nowhere else; masks are explicit, so the
filling token is never looked at. A batch of equal lengths runs without any mask.

Legend: `U` distinct prompts, `B` rows (samples), `P` padded prompt length, `N` new tokens,
`V` vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from chatlearn.errors import ChatLearnError, DataError
from chatlearn.rollout.attention import decode_attention
from chatlearn.rollout.base import Completion, Progress, PromptRequest, SamplingParams
from chatlearn.rollout.kv_cache import InPlaceCache, RowCache, closing_moves, make_cache
from chatlearn.rollout.sampling import sample_keys, sample_tokens, uniforms
from chatlearn.rollout.stopping import StopTexts, eos_ids, special_id

_PREFILL_TOKENS = 16384
"""Padded prompt tokens of one forward call; more are split, so that memory does not grow with the
batch."""
_STRETCH = 4
"""Tokens that `score` decodes behind one prompt."""
_UNIFORM_STEPS = 64
"""Steps whose random numbers are made at once."""
_LEAVE_FRACTION = 1 / 32
"""Finished rows leave when they are at least this part of the rows; moving them costs about one
small layer call."""
_CHECK_EVERY_CUDA = 8
"""Steps between two looks at which rows have finished, where looking means waiting for the
device."""


class TransformersEngine:
    """A `RolloutEngine` around a `transformers` causal LM.

    Example:
        >>> from chatlearn.testing import tiny_model, tiny_tokenizer
        >>> engine = TransformersEngine(tiny_model(), tiny_tokenizer())
        >>> request = PromptRequest(uid=0, prompt_ids=torch.tensor([5, 76, 5, 84]))
        >>> done = engine.generate([request], SamplingParams(max_new_tokens=3), seed=0)
        >>> len(done[0].response_ids)
        3
    """

    def __init__(self, model: Any, tokenizer: Any, *, compact: bool = True) -> None:
        """Sample from `model`, decoding with `tokenizer`.

        Args:
            model: The causal LM, on its device.
            tokenizer: Names the EOS token, and decodes where stop texts are looked for.
            compact: Whether finished rows leave the batch; results are the same either way.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.compact = compact
        self.eos_ids = eos_ids(model, tokenizer)
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        # Older architectures compute the logits of every position; the last one is taken either
        # way.
        takes = inspect.signature(model.forward).parameters
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def generate(
        self,
        requests: Sequence[PromptRequest],
        params: SamplingParams,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Sample one response per request; see `RolloutEngine.generate`."""
        if not requests:
            return []
        limits = [self._limit(request, params) for request in requests]
        decoding = _Decoding(self, requests, params, seed, limits)
        with torch.inference_mode(), decode_attention(self.model) as additive:
            decoding.run(additive, progress)
        return decoding.completions()

    def score(self, token_ids: Tensor) -> Tensor:
        """Return the log-probs of given tokens, by the computation that `generate` samples from.

        The tokens are cut into stretches; each is decoded behind a prompt of all tokens before it, in one batch of
        padded prompts. So every log-prob comes from a prefill, or from decoding behind one.

        Args:
            token_ids: int64 `[T]`, T of 2 or more.

        Returns:
            float32 `[T - 1]`, on the CPU: nats of `token_ids[1:]`, at temperature 1.
        """
        ids = token_ids.cpu()
        starts = range(1, len(ids), _STRETCH)
        requests = [PromptRequest(uid=start, prompt_ids=ids[:start]) for start in starts]
        limits = [min(_STRETCH, len(ids) - start) for start in starts]
        decoding = _Decoding(self, requests, SamplingParams(), 0, limits)
        stretches = [ids[start : start + _STRETCH] for start in starts]
        decoding.force(torch.nn.utils.rnn.pad_sequence(stretches))
        with torch.inference_mode(), decode_attention(self.model) as additive:
            decoding.run(additive, progress=None)
        logprobs = decoding.scores.T.cpu()
        return torch.cat([row[:limit] for row, limit in zip(logprobs, limits, strict=True)]).clone()

    def forward(self, tokens: Tensor, cache: Any, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """Feed tokens `[B, Q]` at positions `at`; return the last position's logits `[B, V]`.

        With `at` None the tokens stand behind those of the cache.
        """
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
            **self._keep_last,
        )
        return output.logits[:, -1]

    def _limit(self, request: PromptRequest, params: SamplingParams) -> int:
        """Return how many tokens the response may have."""
        length = len(request.prompt_ids)
        if length == 0:
            raise DataError(
                f"the prompt of sample {request.uid} has no tokens",
                place=f"uid {request.uid}",
                fix="leave empty prompts out, or set add_bos: true",
            )
        if self.max_positions is None:
            return params.max_new_tokens
        room = self.max_positions - length
        if room < 1:
            raise DataError(
                f"the prompt of sample {request.uid} has {length} tokens; the model has "
                f"{self.max_positions} positions, so none is left for a response",
                place=f"uid {request.uid}",
                fix="shorten or drop the prompt (max_prompt_tokens says which are too long)",
            )
        return min(params.max_new_tokens, room)


@dataclass
class _Rows:
    """What each live row needs, in the order of the cache's rows; tensors on the device."""

    slots: Tensor
    """int64 `[B]`: the request that the row answers."""
    limits: Tensor
    """int64 `[B]`: tokens that the response may have."""
    finished: Tensor
    """bool `[B]`: whether the response has ended."""
    starts: Tensor | None = None
    """int64 `[B]`: tokens of the prompt; None where no row is padded."""
    mask: Tensor | None = None
    """For all steps, additive `[B, 1, 1, P + N]` or boolean `[B, P + N]`; None where no row is
    padded."""

    def select(self, order: Tensor) -> _Rows:
        """Return the rows that `order` lists."""
        return _Rows(
            self.slots[order],
            self.limits[order],
            self.finished[order],
            None if self.starts is None else self.starts[order],
            None if self.mask is None else self.mask[order],
        )


class _Decoding:
    """One call of `generate`: its cache, its live rows and what has been sampled so far."""

    def __init__(
        self,
        engine: TransformersEngine,
        requests: Sequence[PromptRequest],
        params: SamplingParams,
        seed: int,
        limits: list[int],
    ) -> None:
        self.engine = engine
        self.requests = requests
        self.params = params
        self.limits = limits
        self.device = engine.model.device
        self.steps = max(limits)
        self.width = max(len(request.prompt_ids) for request in requests)
        self.keys = sample_keys(seed, [r.uid for r in requests], [r.turn for r in requests])
        # Decoding leaves special tokens out, so that no text of theirs is ever found.
        special = {text: special_id(engine.tokenizer, text) for text in params.stop}
        ends = [token for token in special.values() if token is not None]
        self.eos = torch.tensor(sorted({*engine.eos_ids, *ends}), device=self.device)
        size = (self.steps, len(requests))
        self.tokens = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.probs = torch.zeros(size, dtype=torch.float32, device=self.device)
        texts = tuple(text for text, token in special.items() if token is None)
        self.stops = StopTexts(engine.tokenizer, texts, len(requests))
        self.forced: Tensor | None = None

    def force(self, tokens: Tensor) -> None:
        """Have every response consist of given tokens, int64 `[steps, requests]`, up to its limit."""
        self.forced, self.eos = tokens.to(self.device), self.eos[:0]
        self.scores = torch.zeros_like(self.probs)

    def run(self, additive: bool, progress: Progress | None) -> None:
        """Prefill, then sample and decode until every response has ended.

        Args:
            additive: Whether the model's attention takes an additive mask as it is.
            progress: Called after each step.
        """
        cache, logits, rows = self._prefill(additive)
        on_cpu = self.device.type == "cpu"
        for step in range(self.steps):
            tokens = self._sample(logits, rows, step, progress)
            if step + 1 == self.steps:
                return
            if on_cpu or (step + 1) % _CHECK_EVERY_CUDA == 0:
                finished = int(rows.finished.sum())
                if finished == len(rows.slots):
                    return
                if self.engine.compact and finished >= _LEAVE_FRACTION * len(rows.slots):
                    holes, movers, order = (
                        part.to(self.device) for part in closing_moves(rows.finished.cpu())
                    )
                    cache.keep(holes, movers, order)
                    rows, tokens = rows.select(order), tokens[order]
            mask = None if rows.mask is None else rows.mask[..., : self.width + step + 1]
            logits = self.engine.forward(tokens.unsqueeze(-1), cache, mask, self._at(rows, step))

    def _at(self, rows: _Rows, step: int) -> Tensor | None:
        """Return where `[B, 1]` the tokens sampled at `step` stand; None lets the model count."""
        if rows.starts is None:
            return None
        at = rows.starts.unsqueeze(-1) + step
        most = self.engine.max_positions
        # A finished row that has not left yet may have run out of positions; what it computes is
        # thrown away.
        return at if most is None else at.clamp_(max=most - 1)

    def _sample(self, logits: Tensor, rows: _Rows, step: int, progress: Progress | None) -> Tensor:
        """Choose the next token `[B]` of every row and note which responses it ends."""
        chunk = step % _UNIFORM_STEPS
        if chunk == 0:
            count = min(_UNIFORM_STEPS, self.steps - step)
            self.uniform = uniforms(self.keys, step, count).to(self.device)
        params = self.params
        if self.forced is not None:
            tokens = self.forced[step, rows.slots]
            # Not the logarithm of a probability, which may be too small for a float.
            logprobs = logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            self.scores[step, rows.slots], probs = logprobs, logprobs.exp()
        else:
            tokens, probs = sample_tokens(
                logits,
                self.uniform[chunk][rows.slots],
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
            )
        self.tokens[step, rows.slots] = tokens
        self.probs[step, rows.slots] = probs
        if progress is not None:
            progress(int((~rows.finished).sum()))
        rows.finished = rows.finished | torch.isin(tokens, self.eos) | (rows.limits <= step + 1)
        if self.stops.stop:
            rows.finished = rows.finished | self.stops.look(
                self.tokens, rows.slots, rows.finished, step
            )
        return tokens

    def _prefill(self, additive: bool) -> tuple[RowCache, Tensor, _Rows]:
        """Run each distinct prompt once; return the cache, logits `[B, V]` and rows of samples."""
        prompts, owners = _distinct([request.prompt_ids for request in self.requests])
        padded = any(len(prompt) != self.width for prompt in prompts)
        config = self.engine.model.config
        cache = make_cache(config, self.width)
        size = len(prompts)
        if isinstance(cache, InPlaceCache):
            size = max(1, _PREFILL_TOKENS // self.width)
        parts: list[Any] = []
        logits: list[Tensor] = []
        for start in range(0, len(prompts), size):
            ids, mask = _left_padded(prompts[start : start + size], self.width)
            ids, mask = ids.to(self.device), mask.to(self.device)
            part = cache if size >= len(prompts) else make_cache(config, self.width)
            at = (mask.cumsum(-1) - 1).clamp_(min=0) if padded else None
            logits.append(self.engine.forward(ids, part, mask if padded else None, at))
            parts.append(part)
        if len(parts) > 1:
            cache = InPlaceCache.joined(parts)
        row_of = torch.tensor(owners, device=self.device)
        cache.spread(row_of, self.steps)
        rows = _Rows(
            slots=torch.arange(len(owners), device=self.device),
            limits=torch.tensor(self.limits, device=self.device),
            finished=torch.zeros(len(owners), dtype=torch.bool, device=self.device),
        )
        if padded:
            lengths = torch.tensor([len(prompts[owner]) for owner in owners], device=self.device)
            seen = torch.arange(self.width + self.steps, device=self.device)
            seen = seen >= (self.width - lengths).unsqueeze(-1)
            if additive and isinstance(cache, InPlaceCache):
                zeros = torch.zeros(seen.shape, dtype=self.engine.model.dtype, device=self.device)
                seen = zeros.masked_fill_(~seen, -torch.inf)[:, None, None]
            rows.starts, rows.mask = lengths, seen
        return cache, torch.cat(logits)[row_of], rows

    def completions(self) -> list[Completion]:
        """Return what was sampled, in the order of the requests."""
        tokens, logprobs = self.tokens.T.cpu(), self.probs.T.cpu().log()
        ends = torch.isin(tokens, self.eos.cpu())
        first = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, self.steps + 1)
        first = first.minimum(self.stops.lengths)
        limits = torch.tensor(self.limits)
        done: list[Completion] = []
        lengths = cast("list[int]", first.minimum(limits).tolist())
        ended = cast("list[bool]", (first <= limits).tolist())
        for slot, length in enumerate(lengths):
            uid, own = self.requests[slot].uid, logprobs[slot, :length].clone()
            if not bool(torch.isfinite(own).all()):
                raise ChatLearnError(
                    f"the model's logits for sample {uid} are not finite",
                    place=f"uid {uid}",
                    fix="the weights have diverged: look at the last updates' loss and grad_norm",
                )
            reason = "stop" if ended[slot] else "length"
            done.append(Completion(uid, tokens[slot, :length].clone(), own, reason))
        return done


def _distinct(prompts: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return the distinct prompts, in order of appearance, and which of them each prompt is."""
    index: dict[bytes, int] = {}
    distinct: list[Tensor] = []
    owners: list[int] = []
    for prompt in prompts:
        owner = index.setdefault(prompt.numpy().tobytes(), len(distinct))
        if owner == len(distinct):
            distinct.append(prompt)
        owners.append(owner)
    return distinct, owners


def _left_padded(prompts: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Return ids `[U, width]`, filled with 0 on the left, and the mask, 1 at prompt tokens."""
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask
