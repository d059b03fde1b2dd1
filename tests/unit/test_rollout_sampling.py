# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers, and tokens drawn with them."""

import math

import numpy as np
import pytest
import torch

from chatlearn.rollout.sampling import derive_seed, sample_keys, sample_tokens, uniforms


def draw(seed: int, samples: int, positions: int) -> torch.Tensor:
    return uniforms(sample_keys(seed, range(samples), [0] * samples), 0, positions)


def test_uniforms_are_24_bit_numbers_in_the_half_open_interval() -> None:
    numbers = draw(0, 1000, 100)
    assert numbers.dtype == torch.float32
    assert numbers.shape == (100, 1000)
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    scaled = numbers.double() * 2**24
    assert bool((scaled == scaled.round()).all())


@pytest.mark.parametrize("axis", ["uid", "turn", "seed", "position"])
def test_uniforms_fill_every_bin_equally_along_every_part_of_the_key(axis: str) -> None:
    count, bins = 65536, 256
    if axis == "uid":
        numbers = uniforms(sample_keys(3, range(count), [0] * count), 0, 1)
    elif axis == "turn":
        numbers = uniforms(sample_keys(3, [5] * count, range(count)), 0, 1)
    elif axis == "seed":
        keys = np.concatenate([sample_keys(seed, [5], [0]) for seed in range(count)])
        numbers = uniforms(keys, 0, 1)
    else:
        numbers = uniforms(sample_keys(3, [5], [0]), 0, count)
    seen = torch.histc(numbers, bins=bins, min=0, max=1)
    expected = count / bins
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    # 255 degrees of freedom: mean 255, standard deviation 22.6; five of them either way.
    assert 142 < chi_square < 368
    ordered = numbers.flatten().sort().values.double()
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert float((ordered - steps).abs().max()) < 2.0 / math.sqrt(count)  # Kolmogorov-Smirnov


def test_neighbouring_keys_and_positions_are_uncorrelated() -> None:
    numbers = draw(0, 20000, 3).double()
    samples = torch.cat([numbers, numbers.roll(1, dims=1), draw(1, 20000, 1).double()])
    correlations = torch.corrcoef(samples) - torch.eye(7, dtype=torch.float64)
    assert float(correlations.abs().max()) < 5 / math.sqrt(20000)


def test_a_number_depends_on_its_own_key_and_position_alone() -> None:
    whole = uniforms(sample_keys(9, [4, 8, 15], [0, 1, 0]), 0, 10)
    alone = uniforms(sample_keys(9, [8], [1]), 7, 2)
    assert torch.equal(whole[7:9, 1], alone[:, 0])


def test_keys_take_any_integer() -> None:
    keys = sample_keys(-1, [-5, 2**63, 2**64 + 7, 7], [0, 0, 0, 0])
    assert keys[2] == keys[3]  # taken modulo 2^64
    assert len(set(keys.tolist())) == 3


def test_derived_streams_differ_from_the_seed_and_from_each_other() -> None:
    seeds = {0, derive_seed(0, "eval"), derive_seed(0, "train"), derive_seed(1, "eval")}
    assert len(seeds) == 4
    assert derive_seed(0, "eval") == derive_seed(0, "eval")


def test_the_whole_name_of_a_stream_counts() -> None:
    names = [f"{name}/{phase}" for name in ("policy_a", "policy_b") for phase in ("train", "eval")]
    names += ["policy_a", "policy_a\0", "", "\0"]
    assert len({derive_seed(0, name) for name in names}) == len(names)
    assert derive_seed(-1, "x") == derive_seed(2**64 - 1, "x")  # taken modulo 2^64


def test_frequencies_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 3.0, 0.5]])
    count = 40000
    uniform = draw(1, count, 1)[0]
    tokens, probs = sample_tokens(logits.expand(count, -1), uniform, temperature=2.0)
    expected = (logits[0] / 2.0).softmax(-1)
    seen = torch.bincount(tokens, minlength=5) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert bool(((seen - expected).abs() < 5 * error).all())
    torch.testing.assert_close(probs, expected[tokens])


def test_temperature_zero_takes_the_argmax_and_reports_temperature_one() -> None:
    logits = torch.randn(16, 9, generator=torch.Generator().manual_seed(0))
    tokens, probs = sample_tokens(logits, torch.zeros(16), temperature=0.0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(probs, logits.softmax(-1).max(-1).values)


def kept(probs: list[float], top_p: float, top_k: int) -> set[int]:
    """Say slowly which tokens survive top-k, then top-p on what is left, renormalised."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    if top_k:
        order = order[:top_k]
    total, mass, result = sum(probs[token] for token in order), 0.0, set[int]()
    for token in order:
        result.add(token)
        mass += probs[token] / total
        if mass >= top_p - 1e-7:
            break
    return result


@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_top_k_and_top_p_keep_what_the_slow_definition_keeps(top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(top_k)
    for _ in range(5):
        logits = 2 * torch.randn(1, 7, generator=generator)
        probs = logits.softmax(-1)[0]
        count = 20000
        uniform = draw(2, count, 1)[0]
        tokens, reported = sample_tokens(
            logits.expand(count, -1), uniform, temperature=1.0, top_p=top_p, top_k=top_k
        )
        allowed = kept(probs.tolist(), top_p, top_k)
        seen = torch.bincount(tokens, minlength=7) / count
        assert set(tokens.tolist()) <= allowed
        mass = sum(float(probs[token]) for token in allowed)
        for token in allowed:
            expected = float(probs[token]) / mass
            assert abs(float(seen[token]) - expected) < 5 * math.sqrt(0.25 / count)
        # What is reported is the probability before anything was cut.
        torch.testing.assert_close(reported, probs[tokens])


def test_impossible_tokens_are_never_drawn_even_at_the_ends_of_the_interval() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    ends = torch.tensor([0.0, 1 - 2.0**-24, 2.0**-24, 0.5])
    for top_p, top_k in ((1.0, 0), (0.999, 0), (1.0, 4)):
        tokens, _ = sample_tokens(
            logits.expand(4, -1), ends, temperature=1.0, top_p=top_p, top_k=top_k
        )
        assert set(tokens.tolist()) <= {1, 3}


def test_a_rows_token_does_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(4))
    uniform = draw(7, 32, 1)[0]
    for top_p, top_k in ((1.0, 0), (0.8, 10)):
        whole, _ = sample_tokens(logits, uniform, temperature=0.7, top_p=top_p, top_k=top_k)
        for row in range(32):
            alone, _ = sample_tokens(
                logits[row : row + 1],
                uniform[row : row + 1],
                temperature=0.7,
                top_p=top_p,
                top_k=top_k,
            )
            assert alone[0] == whole[row]


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(5)).bfloat16()
    tokens, probs = sample_tokens(logits, torch.full((8,), 0.5), temperature=1.0)
    assert probs.dtype == torch.float32
    expected = logits.float().softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(probs, expected)


def test_nan_logits_give_nan_probabilities_and_a_valid_token() -> None:
    logits = torch.full((2, 5), torch.nan)
    for top_p in (1.0, 0.5):
        tokens, probs = sample_tokens(logits, torch.zeros(2), temperature=1.0, top_p=top_p)
        assert bool(torch.isnan(probs).all())
        assert bool(((tokens >= 0) & (tokens < 5)).all())
