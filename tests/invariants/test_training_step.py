# SPDX-License-Identifier: Apache-2.0
"""A train step gives the same loss and gradient however its batch is cut, padded or packed."""

import math
from dataclasses import replace

import pytest
import torch

from chatlearn.errors import NonFiniteError
from chatlearn.testing import tiny_model
from chatlearn.training.optimiser import Optimiser
from chatlearn.training.samples import TrainSamples
from chatlearn.training.step import StepSettings, accumulate, train_step

KINDS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
PROMPTS = [3, 9, 5, 4, 7, 2, 6]
RESPONSES = [4, 0, 8, 1, 2, 6, 5]
FULL = StepSettings(
    kl_coef=0.1, kl_type="k3", entropy_coef=0.01, norm_length=8.0, clip_high=0.28, max_tokens=10_000
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def ragged(generator, dtype):
    return [-2 * torch.rand(n, generator=generator, dtype=dtype) for n in RESPONSES]


def make_samples(dtype=torch.float64, masked=True):
    generator = torch.Generator().manual_seed(0)
    ids = [
        [torch.randint(0, 99, (n,), generator=generator) for n in sizes]
        for sizes in (PROMPTS, RESPONSES)
    ]
    mask = None
    if masked:
        mask = [torch.rand(n, generator=generator) < 0.7 for n in RESPONSES]
        mask[3][:] = False  # a sample without any trained token
    samples = TrainSamples(
        uids=list(range(len(PROMPTS))),
        prompt_ids=ids[0],
        response_ids=ids[1],
        old_logprobs=ragged(generator, dtype),
        advantages=[torch.randn(1, generator=generator, dtype=dtype) for _ in PROMPTS],
        rollout_logprobs=ragged(generator, dtype),
        ref_logprobs=ragged(generator, dtype),
        loss_mask=mask,
        temperature=torch.tensor([1.0, 1.0, 0.7, 2.0, 0.0, 1.0, 0.5]),
    )
    # old log-probs near the model's own, so that some ratios are inside the clip
    model = tiny_model().to(dtype)
    own = logprobs_one_by_one(model, samples)
    shift = [0.4 * torch.rand(n, generator=generator, dtype=dtype) - 0.2 for n in RESPONSES]
    return replace(samples, old_logprobs=[o + s for o, s in zip(own, shift, strict=True)])


@torch.no_grad()
def logprobs_one_by_one(model, samples):
    result = []
    temperatures = samples.temperature.to(torch.float64)
    for number, response in enumerate(samples.response_ids):
        prompt = samples.prompt_ids[number]
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logits = logits / (float(temperatures[number]) or 1.0)
        result.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0])
    return result


def gradient(samples, settings, dtype=torch.float64):
    model = tiny_model().to(dtype)
    report = accumulate(model, Optimiser(model, lr=1e-3), samples, settings)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), report


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [{"max_tokens": 1}, {"max_tokens": 23}, {"packing": True},
                                 {"packing": True, "max_tokens": 23}])  # fmt: skip
def test_any_cut_gives_the_same_loss_and_gradient(kind, cut):
    samples, settings = make_samples(), replace(FULL, aggregation=kind)
    whole, report = gradient(samples, settings)
    other, other_report = gradient(samples, replace(settings, **cut))
    assert (whole - other).abs().max() < 1e-12
    for name, value in report.items():
        assert abs(value - other_report[name]) < 1e-12, name


def test_packed_equals_padded_in_float32():
    samples = make_samples(torch.float32)
    whole, report = gradient(samples, FULL, torch.float32)
    other, other_report = gradient(samples, replace(FULL, packing=True), torch.float32)
    assert (whole - other).abs().max() < 1e-5
    assert abs(report["loss"] - other_report["loss"]) < 1e-5


def test_the_order_of_samples_does_not_matter():
    samples = make_samples()
    order = [4, 2, 6, 0, 1, 5, 3]
    columns = {
        name: [column[i] for i in order]
        for name, column in vars(samples).items()
        if isinstance(column, list)
    }
    shuffled = replace(samples, **columns, temperature=samples.temperature[order])
    whole, report = gradient(samples, FULL)
    other, other_report = gradient(shuffled, FULL)
    assert (whole - other).abs().max() < 1e-12
    assert abs(report["loss"] - other_report["loss"]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_plain_computation_with_left_or_right_padding(kind):
    """Against all logits of left- and right-padded matrices with attention masks, and dense masks."""
    samples = make_samples()
    settings = replace(FULL, aggregation=kind, kl_coef=0.0, entropy_coef=0.0)
    mine, report = gradient(samples, settings)
    for side in ("left", "right"):
        theirs, loss = padded_gradient(samples, kind, side)
        assert (mine - theirs).abs().max() < 1e-12
        assert abs(report["loss"] - loss) < 1e-12


def padded_gradient(samples, kind, side, extra=3):
    model = tiny_model().double()
    width = max(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)) + extra
    ids = torch.zeros(len(PROMPTS), width, dtype=torch.int64)
    real = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(
        zip(samples.prompt_ids, samples.response_ids, strict=True)
    ):
        size = len(prompt) + len(response)
        start = width - size if side == "left" else 0
        ids[row, start : start + size] = torch.cat([prompt, response])
        real[row, start : start + size] = 1
    positions = (real.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=real, position_ids=positions).logits
    losses, lengths = [], []
    for row, response in enumerate(samples.response_ids):
        mask = samples.loss_mask[row]
        first = int(real[row].argmax()) + len(samples.prompt_ids[row]) - 1
        temperature = float(samples.temperature[row]) or 1.0
        part = (logits[row, first : first + len(response)] / temperature).log_softmax(-1)
        logprobs = part.gather(1, response[:, None])[:, 0]
        ratio = (logprobs - samples.old_logprobs[row]).exp()
        advantage = samples.advantages[row]
        loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
        losses.append((loss * mask).sum())
        lengths.append(int(mask.sum()))
    sequences = sum(length > 0 for length in lengths)
    if kind == "token-mean":
        total = sum(losses) / sum(lengths)
    elif kind == "seq-mean-token-mean":
        total = sum(x / max(1, n) for x, n in zip(losses, lengths, strict=True)) / sequences
    else:
        total = sum(losses) / sequences / (8.0 if kind.endswith("norm") else 1.0)
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), float(total.detach())


def test_masked_tokens_have_no_influence_but_as_context():
    samples = make_samples()
    whole, report = gradient(samples, FULL)
    poisoned = {
        name: [torch.where(m, v, math.nan) for m, v in zip(samples.loss_mask, column, strict=True)]
        for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")
        for column in [getattr(samples, name)]
    }
    other, other_report = gradient(replace(samples, **poisoned), FULL)
    assert torch.equal(whole, other)
    assert report == other_report


def test_advantages_per_token_equal_those_per_sample():
    samples = make_samples()
    per_token = [a.expand(n) for a, n in zip(samples.advantages, RESPONSES, strict=True)]
    whole, _ = gradient(samples, FULL)
    other, _ = gradient(replace(samples, advantages=per_token), FULL)
    assert torch.equal(whole, other)


def test_on_policy_gradient_is_the_policy_gradient():
    samples = make_samples(masked=False)
    model = tiny_model().double()
    own = logprobs_one_by_one(model, samples)
    samples = replace(samples, old_logprobs=own, rollout_logprobs=own)
    mine, report = gradient(samples, StepSettings())
    assert report["mismatch_max"] < 1e-12
    assert abs(report["ratio"] - 1.0) < 1e-12
    total = 0.0
    for row, response in enumerate(samples.response_ids):
        prompt = samples.prompt_ids[row]
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logits = logits / (float(samples.temperature[row]) or 1.0)
        logprobs = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        total = total - (samples.advantages[row] * logprobs).sum()
    (total / sum(RESPONSES)).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (mine - theirs).abs().max() < 1e-12


def test_nothing_to_train_on_changes_nothing():
    samples = make_samples()
    samples = replace(samples, loss_mask=[torch.zeros(n, dtype=torch.bool) for n in RESPONSES])
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = train_step(model, Optimiser(model, lr=1.0, weight_decay=0.1), samples, FULL)
    assert report["trained_tokens"] == 0
    assert report["loss"] == 0.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_nothing(checkpointing):
    samples = make_samples()
    whole, _ = gradient(samples, FULL)
    model = tiny_model().double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    accumulate(model, Optimiser(model, lr=1e-3), samples, FULL)
    other = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (whole - other).abs().max() < 1e-12


def test_bf16_keeps_master_weights_and_stays_near_fp32():
    samples = make_samples(torch.float32)
    whole, report = gradient(samples, FULL, torch.float32)
    other, low = gradient(samples, replace(FULL, autocast=torch.bfloat16), torch.float32)
    assert other.dtype == torch.float32
    assert torch.cosine_similarity(whole, other, dim=0) > 0.98
    assert abs(report["loss"] - low["loss"]) < 0.1


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_weights():
    samples = make_samples()
    model = tiny_model().double()
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = math.nan
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        train_step(model, Optimiser(model, lr=1e-3), samples, FULL)
    assert torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
