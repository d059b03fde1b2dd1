# SPDX-License-Identifier: Apache-2.0

"""One train step on a global batch of ragged samples: log-probs, loss, gradient, update, report.

    samples --> lengths --> micro-batches within the token budget
                               |  for each: lay out, log-probs of trained tokens, loss, backward
                               v
               gradients add up --> clip --> AdamW --> numbers, read from the device once

Denominators are counted over the whole global batch first, so any split gives the same loss and
gradient. Tokens that are not trained on get no logits at all, hence no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from chatlearn.algorithms.aggregation import (
    Aggregation,
    Denominators,
    aggregate,
    count_denominators,
    sample_weights,
)
from chatlearn.algorithms.grpo import PolicyLoss, grpo_loss
from chatlearn.algorithms.kl import KlType, kl_penalty
from chatlearn.training.logprobs import Layout, divisors, lay_out, token_logprobs
from chatlearn.training.optimiser import Optimiser
from chatlearn.training.packing import Rows, micro_batches
from chatlearn.training.samples import TrainSamples
from chatlearn.training.token_log import TokenLog


@dataclass(frozen=True)
class StepSettings:
    """Choose the loss and how its work is cut; the fields are those of `PolicyTrainer.Config`."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_type: KlType = "k3"
    entropy_coef: float = 0.0
    aggregation: Aggregation = "token-mean"
    norm_length: float | None = None
    max_tokens: int = 8192
    packing: bool = False
    autocast: torch.dtype | None = None


def train_step(
    model: Any,
    optimiser: Optimiser,
    samples: TrainSamples,
    settings: StepSettings,
    log: TokenLog | None = None,
) -> dict[str, float]:
    """Update `model` once on a global batch and return what happened.

    The loss is `sum over trained tokens of weight * (policy loss + kl_coef * KL - entropy_coef *
    entropy)`. A batch without any trained token changes nothing and reports `trained_tokens` 0.
    `log` takes the numbers of every token down.

    Returns:
        `loss`, `pg_loss`, `grad_norm` (before clipping), `lr`, `trained_tokens`; means over trained
        tokens: `entropy` (nats), `ratio`, `clip_low`, `clip_high` (fractions), `approx_kl` (old to
        current, nats) and, where there are such columns, `kl` (to the reference, nats) and
        `mismatch`, `mismatch_max` (mean and largest difference to the rollout log-probs, nats: of
        the trainer's `old_logprobs` where it made any, else of the current log-probs, before the
        update; a caller who knows that the weights have moved since leaves `rollout_logprobs` out).

    Raises:
        NonFiniteError: the loss or the gradient norm is not finite (unless the optimiser skips such
            updates).
    """
    report = accumulate(model, optimiser, samples, settings, log)
    report["lr"] = optimiser.lr
    report["grad_norm"] = 0.0
    if report["trained_tokens"] == 0:
        return report
    if not math.isfinite(report["loss"]):
        optimiser.refuse("the loss", report["loss"])
        return report
    report["grad_norm"] = optimiser.step()
    return report


def accumulate(
    model: Any,
    optimiser: Optimiser,
    samples: TrainSamples,
    settings: StepSettings,
    log: TokenLog | None = None,
) -> dict[str, float]:
    """Leave the gradient of the global batch's loss in the parameters, and return the means of
    `train_step`.
    """
    trained_tokens = samples.trained_tokens()
    tokens_B = torch.tensor(trained_tokens)
    denominators = count_denominators(tokens_B)
    weights_B = sample_weights(
        settings.aggregation, tokens_B, denominators, norm_length=settings.norm_length,
        dtype=torch.float64,
    )  # fmt: skip
    if log is not None:
        log.weigh(weights_B)
    temperature_B = divisors(samples.temperature, len(tokens_B))
    trained = [sample for sample, tokens in enumerate(trained_tokens) if tokens]
    lengths = [
        len(samples.prompt_ids[sample]) + len(samples.response_ids[sample]) - 1
        for sample in trained
    ]
    optimiser.zero_grad()
    meter = _Meter()
    for bucket in micro_batches(lengths, settings.max_tokens, packing=settings.packing):
        rows = [[trained[place] for place in row] for row in bucket]
        policy = _backward(model, rows, samples, settings, weights_B, temperature_B, meter)
        if log is not None:
            log.add(rows, policy)
    return meter.report(denominators)


def _backward(
    model: Any,
    rows: Rows,
    samples: TrainSamples,
    settings: StepSettings,
    weights_B: Tensor,
    temperature_B: Tensor | None,
    meter: _Meter,
) -> PolicyLoss:
    """Add one micro-batch's gradient to the parameters, and its numbers to the meter."""
    device = model.device
    layout = lay_out(
        rows, samples.prompt_ids, samples.response_ids, keep=samples.loss_mask, device=device
    )
    gather = _Gather(rows, samples, layout, device)
    temperature_N = None if temperature_B is None else temperature_B.to(device)[layout.sample_N]
    with torch.autocast(device.type, settings.autocast, enabled=settings.autocast is not None):
        logprobs_N, entropy_N = token_logprobs(
            model, layout, temperature_N, entropy="train" if settings.entropy_coef else "report"
        )
    assert entropy_N is not None
    policy = grpo_loss(
        logprobs_N,
        gather.tokens(samples.old_logprobs),
        gather.advantages(),
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
    )
    loss_N = policy.loss_N
    kl_N = None
    if settings.kl_coef and samples.ref_logprobs is not None:
        kl_N = kl_penalty(logprobs_N, gather.tokens(samples.ref_logprobs), settings.kl_type)
        loss_N = loss_N + settings.kl_coef * kl_N
    if settings.entropy_coef:
        loss_N = loss_N - settings.entropy_coef * entropy_N
    weights_B = weights_B.to(device, logprobs_N.dtype)
    loss = aggregate(loss_N, layout.sample_N, weights_B)
    loss.backward()

    difference_N = None
    if samples.rollout_logprobs is not None:
        own_N = logprobs_N.detach()
        if samples.has_own_logprobs:
            own_N = gather.tokens(samples.old_logprobs)
        difference_N = own_N - gather.tokens(samples.rollout_logprobs)
    pg_loss = aggregate(policy.loss_N.detach(), layout.sample_N, weights_B)
    meter.add(loss.detach(), pg_loss, policy, entropy_N.detach(), kl_N, difference_N)
    return policy


class _Gather:
    """Brings the columns of one micro-batch into the order of its layout."""

    def __init__(self, rows: Rows, samples: TrainSamples, layout: Layout, device: Any) -> None:
        self._order = [sample for row in rows for sample in row]
        self._samples = samples
        self._layout = layout
        self._device = device
        self._keep = None
        if samples.loss_mask is not None:
            self._keep = torch.cat([samples.loss_mask[s].cpu() for s in self._order])

    def tokens(self, column: list[Tensor]) -> Tensor:
        """Return `[N]` a ragged column at the trained tokens."""
        flat = torch.cat([column[sample].cpu() for sample in self._order])
        return (flat if self._keep is None else flat[self._keep]).to(self._device)

    def advantages(self) -> Tensor:
        """Return `[N]` the advantage of every trained token, given per sample or per token."""
        column = self._samples.advantages
        if all(len(value) == 1 for value in column):
            return torch.cat(column).to(self._device)[self._layout.sample_N]
        return self.tokens(column)


class _Meter:
    """Adds up numbers on the device over micro-batches; reads them once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._mismatch_max: Tensor | None = None

    def add(
        self,
        loss: Tensor,
        pg_loss: Tensor,
        policy: PolicyLoss,
        entropy_N: Tensor,
        kl_N: Tensor | None,
        difference_N: Tensor | None,
    ) -> None:
        numbers = {
            "loss": loss,
            "pg_loss": pg_loss,
            "entropy": entropy_N.sum(),
            "ratio": policy.ratio_N.sum(),
            "clip_low": policy.clipped_low_N.sum(),
            "clip_high": policy.clipped_high_N.sum(),
            "approx_kl": policy.approx_kl_N.sum(),
        }
        if kl_N is not None:
            numbers["kl"] = kl_N.detach().sum()
        if difference_N is not None:
            numbers["mismatch"] = difference_N.abs().sum()
            largest = difference_N.abs().max()
            before = self._mismatch_max
            self._mismatch_max = largest if before is None else torch.maximum(before, largest)
        for name, number in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + number.double()

    def report(self, denominators: Denominators) -> dict[str, float]:
        """Return losses as they are, everything else as the mean over trained tokens."""
        if not self._sums:
            return {"loss": 0.0, "pg_loss": 0.0, "trained_tokens": 0.0}
        numbers = cast("list[float]", torch.stack(list(self._sums.values())).tolist())
        values = dict(zip(self._sums, numbers, strict=True))
        report = {
            name: value if name in ("loss", "pg_loss") else value / denominators.tokens
            for name, value in values.items()
        }
        if self._mismatch_max is not None:
            report["mismatch_max"] = float(self._mismatch_max)
        report["trained_tokens"] = float(denominators.tokens)
        return report
