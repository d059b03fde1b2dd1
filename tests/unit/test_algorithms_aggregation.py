# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from chatlearn.algorithms.aggregation import aggregate, count_denominators, sample_weights

KINDS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
LOSSES = [[1.0, 2.0], [3.0], [], [4.0, 5.0, 6.0]]


def total(kind, losses, denominators=None):
    tokens = torch.tensor([len(part) for part in losses])
    weights = sample_weights(
        kind,
        tokens,
        denominators or count_denominators(tokens),
        norm_length=10.0,
        dtype=torch.float64,
    )
    flat = torch.tensor([x for part in losses for x in part], dtype=torch.float64)
    return float(aggregate(flat, torch.repeat_interleave(tokens), weights))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token-mean", 21 / 6),
        ("seq-mean-token-mean", (1.5 + 3 + 5) / 3),
        ("seq-mean-token-sum", 21 / 3),
        ("seq-mean-token-sum-norm", 21 / 3 / 10),
    ],
)
def test_values_with_an_empty_sample_left_out(kind, expected):
    assert abs(total(kind, LOSSES) - expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_adds_up_to_the_whole(kind):
    denominators = count_denominators(torch.tensor([2, 1, 0, 3]))
    split = total(kind, LOSSES[:1], denominators) + total(kind, LOSSES[1:], denominators)
    assert abs(split - total(kind, LOSSES)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_train_on_is_finite(kind):
    assert total(kind, [[], []]) == 0.0


def test_denominators_count_tokens_and_samples_that_have_any():
    assert count_denominators(torch.tensor([2, 0, 3])) == (5, 2)


def test_a_missing_norm_length_and_an_unknown_kind_are_refused():
    tokens = torch.tensor([1])
    with pytest.raises(ValueError, match="norm_length"):
        sample_weights("seq-mean-token-sum-norm", tokens, count_denominators(tokens))
    with pytest.raises(ValueError, match="median"):
        sample_weights("median", tokens, count_denominators(tokens))
