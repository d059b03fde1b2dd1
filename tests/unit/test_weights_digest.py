# SPDX-License-Identifier: Apache-2.0
"""Digests: equal for equal bytes, others for any other bytes, and sums over the parts of a tensor."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.weights.digest import digests, tensor_digest, total_digest

WORD = 2**64
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (0,), (1,), (3, 0, 2), (7,), (5, 9), (4095,), (4096,), (4097,), (3, 4096), (37, 4111)]


def number(tensor: torch.Tensor, **part: object) -> int:
    return int(tensor_digest(tensor, **part)) % WORD  # type: ignore[arg-type]


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bytes."""
    size = torch.empty(shape, dtype=dtype).nbytes
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        raw %= 2
    return raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_bytes_have_equal_digests(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = made(shape, dtype)
    assert 0 <= number(tensor) < WORD
    assert number(tensor.clone()) == number(tensor)
    if tensor.ndim == 2:
        assert number(tensor.T.contiguous().T) == number(tensor), "strides do not count"
        wide = torch.cat([tensor, made(shape, dtype, 1)], dim=1)[:, : tensor.shape[1]]
        assert not wide.is_contiguous()
        assert number(wide) == number(tensor)
    if tensor.numel() > 1:
        assert number(made(shape, dtype, 1)) != number(tensor)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_single_changed_bit_is_seen(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([d for d in DTYPES if d is not torch.bool]))
    tensor = made((data.draw(st.integers(1, 9000)),), dtype, data.draw(st.integers(0, 99)))
    raw = tensor.clone().view(torch.uint8)
    raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert number(raw.view(dtype)) != number(tensor)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9000), st.data())
def test_an_order_that_changed_is_seen(size: int, data: st.DataObject) -> None:
    tensor = torch.arange(size).to(torch.float32)
    first = data.draw(st.integers(0, size - 2))
    second = data.draw(st.integers(first + 1, size - 1))
    swapped = tensor.clone()
    swapped[[first, second]] = tensor[[second, first]]
    assert number(swapped) != number(tensor)
    assert number(tensor.roll(second)) != number(tensor)
    assert number(tensor.flip(0)) != number(tensor)


def test_transposition_rows_and_rounding_are_seen() -> None:
    square = torch.arange(9.0).view(3, 3)
    whole = torch.randn(64, 4096)
    rows = whole.clone()
    rows[[3, 40]] = whole[[40, 3]]  # same place within a row of factors
    assert number(rows) != number(whole)
    assert number(square.T) != number(square)
    assert number(whole.bfloat16().float()) != number(whole)
    signs = whole.clone()
    signs[5, 7] *= -1
    signs[6, 7] *= -1
    assert number(signs) != number(whole)


def test_nan_payloads_and_the_sign_of_zero_count() -> None:
    one, other = (
        torch.frombuffer(bytearray(struct.pack("<I", bits)), dtype=torch.float32)
        for bits in (0x7FC00000, 0x7FC00001)
    )
    assert one.isnan().all()
    assert other.isnan().all()
    assert number(one) != number(other)
    assert number(torch.tensor([0.0])) != number(torch.tensor([-0.0]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_add_up_to_the_whole(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(10000,), (130, 77), (6, 40, 41), (5000, 2)]))
    tensor = made(shape, data.draw(st.sampled_from(DTYPES)))
    along = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[along] - 1), max_size=3)))
    total = 0
    for start, end in zip([0, *cuts], [*cuts, shape[along]], strict=True):
        at = [start if dim == along else 0 for dim in range(len(shape))]
        total += number(tensor.narrow(along, start, end - start), whole=shape, at=at)
    assert total % WORD == number(tensor)


def test_a_part_counts_where_it_stands() -> None:
    part = torch.ones(4)
    assert number(part, whole=(8,)) == number(part, whole=(8,), at=(0,)) == number(part)
    assert number(part, whole=(8,), at=(4,)) != number(part)
    assert number(torch.empty(0, 3), whole=(8, 3), at=(8, 0)) == 0


def test_a_sparse_tensor_stands_for_its_values() -> None:
    dense = torch.eye(4)
    assert number(dense.to_sparse()) == number(dense)


def test_a_conjugate_is_what_it_stands_for() -> None:
    tensor = made((5,), torch.complex64).conj()
    assert number(tensor) == number(tensor.resolve_conj())


def test_digests_keep_names_and_order() -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.bfloat16)}
    found = digests(tensors.items())
    assert list(found) == ["b", "a"]
    assert found == {name: number(tensor) for name, tensor in tensors.items()}
    assert digests(()) == {}


def test_gradients_and_inference_do_not_matter() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        inside = torch.ones(3)
    assert number(weight) == number(inside) == number(torch.ones(3))


def test_a_total_stands_for_names_shapes_dtypes_and_bytes() -> None:
    def total(**tensors: torch.Tensor) -> str:
        return total_digest(tensors, digests(tensors.items()))

    a, b = torch.arange(6.0), torch.ones(2)
    assert total(a=a, b=b) == total(b=b, a=a)
    others = [
        total(a=a, c=b),
        total(a=a.view(2, 3), b=b),
        total(a=a, b=b + 1),
        total(a=b, b=a),
        total(a=a),
        total(a=torch.zeros(2), b=torch.zeros(2, dtype=torch.int32)),
        total(a=torch.zeros(2), b=torch.zeros(2)),
    ]
    assert len({total(a=a, b=b), *others}) == len(others) + 1
    assert len(total()) == 16


def test_the_numbers_are_the_same_in_every_version() -> None:
    """Digests of two runs are compared; a change of the factors would make all of them differ."""
    assert number(torch.arange(5.0)) == NUMBERS[0]
    assert number(torch.arange(9000.0)) == NUMBERS[1]


NUMBERS = (11534215638939598848, 1261993955039422464)
