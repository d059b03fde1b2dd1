# SPDX-License-Identifier: Apache-2.0
"""One number per tensor, of its bytes, computed where the tensor lies: what a parameter sync is proved by.

A tensor's elements are taken as integers of at most 32 bits (wider ones as several), each is multiplied by an odd
64-bit number that depends on its position alone, and the products are summed modulo 2^64. Integer sums do not depend
on their order, so the CPU and every GPU give the same number; and they add up, so the parts of a tensor that is spread
over several processes are digested where they lie, each with its place in the whole (`whole`, `at`).

What a digest tells. One word that changed, by a bit or by all of them, changes it for certain: the difference is below
2^32 and its factor is odd, so the product is not 0 modulo 2^64. Any other difference (a permutation, a transposition,
rounding, another tensor) goes unseen with a probability that the random factors bound: position `p` has the factor
`column[p % 4096] * row[p // 4096]`, odd numbers drawn by SHAKE-128. If the lowest bit that differs anywhere is bit `v`
of its word, the sums agree with probability at most (65 - v) * 2^(v - 62): 2^-55 for a change of low bits, 2^-25 in the
worst case, where nothing but sign bits of 32-bit words changed. Factors are the same in every run, so digests of
two runs can be compared; they are public, so a digest is no defence against somebody who means to deceive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar, cast

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)

_COLUMNS = 4096
"""Words of a row."""
_CPU_ROWS, _GPU_ROWS = 16, 4096
"""Rows of one step: products that stay in a core's cache, or that keep a GPU busy (512 KiB, 128 MiB)."""
_WORD = 2**64
_INTEGERS = {1: torch.int8, 2: torch.int16}
"""Integers of the width of an element; wider elements are several of 32 bits."""


@torch.no_grad()
def tensor_digest(
    tensor: Tensor, *, whole: Sequence[int] | None = None, at: Sequence[int] | None = None
) -> Tensor:
    """Return the digest of a tensor's bytes, in row-major order, without moving them.

    Two tensors of one shape and dtype have equal digests if all their bytes are equal (NaN payloads and the sign of
    zero included); see the module for the reverse. Shapes and dtypes are not part of it.

    Args:
        tensor: any strides, any dtype of whole bytes, any device; a sparse one stands for its dense values.
        whole: shape of the tensor that `tensor` is a part of; None if it is no part. The digests of parts that cover a
            tensor once add up, modulo 2^64, to the digest of the whole.
        at: index in the whole of the part's first element, one number per dimension.

    Returns:
        int64 scalar on the tensor's device.

    Example:
        >>> int(tensor_digest(torch.tensor([0.0]))) == int(tensor_digest(torch.tensor([-0.0])))
        False
    """
    words = _words(tensor)
    if whole is None:
        return _sum_of_whole(words)
    positions = _positions(tensor.shape, whole, at or [0] * len(whole), tensor.device)
    per_element = words.numel() // max(tensor.numel(), 1)
    positions = positions[:, None] * per_element + torch.arange(per_element, device=tensor.device)
    return _sum_of_part(words, positions.flatten())


def digests(tensors: Iterable[tuple[Name, Tensor]]) -> dict[Name, int]:
    """Return the digest of each tensor as a number in [0, 2^64), asking every device once.

    Args:
        tensors: names and tensors; taken one after the other, so that a generator may make them.
    """
    by_device: dict[torch.device, dict[Name, Tensor]] = {}
    order: list[Name] = []
    for name, tensor in tensors:
        by_device.setdefault(tensor.device, {})[name] = tensor_digest(tensor)
        order.append(name)
    found: dict[Name, int] = {}
    for scalars in by_device.values():
        numbers = cast("list[int]", torch.stack(list(scalars.values())).tolist())
        found |= {name: number % _WORD for name, number in zip(scalars, numbers, strict=True)}
    return {name: found[name] for name in order}


def total_digest(tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> str:
    """Return 16 hexadecimal digits that stand for named tensors: names, shapes, dtypes and digests, in any order.

    Args:
        tensors: by name.
        numbers: their digests.
    """
    lines = sorted(
        f"{name} {tensor.dtype} {list(tensor.shape)} {numbers[name]}"
        for name, tensor in tensors.items()
    )
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _words(tensor: Tensor) -> Tensor:
    """Return the integers `[N]` that a tensor's bytes are, in row-major order."""
    dense = tensor.detach()
    if dense.layout is not torch.strided:
        dense = dense.to_dense()
    flat = dense.resolve_conj().resolve_neg().contiguous().view(-1)
    return flat.view(_INTEGERS.get(flat.element_size(), torch.int32))


def _sum_of_whole(words: Tensor) -> Tensor:
    """Sum words times their factors, row by row; one multiplication per row for the row's factor."""
    count, device = words.numel(), words.device
    column, rows = _factors("column", _COLUMNS, device), count // _COLUMNS
    body = words[: rows * _COLUMNS].view(rows, _COLUMNS)
    sums = torch.empty(rows + 1, dtype=torch.int64, device=device)
    size = min(rows, _CPU_ROWS if device.type == "cpu" else _GPU_ROWS)
    products = torch.empty((size, _COLUMNS), dtype=torch.int64, device=device)
    for first in range(0, rows, max(size, 1)):
        end = min(first + size, rows)
        part = products[: end - first].copy_(body[first:end]).mul_(column)
        torch.sum(part, dim=1, out=sums[first:end])
    rest = words[rows * _COLUMNS :]
    sums[rows] = (rest * column[: rest.numel()]).sum()
    return sums.mul_(_factors("row", rows + 1, device)).sum()


def _sum_of_part(words: Tensor, positions: Tensor) -> Tensor:
    """Sum words times the factors of any positions `[N]`."""
    if not words.numel():
        return torch.zeros((), dtype=torch.int64, device=words.device)
    column, row = positions % _COLUMNS, positions // _COLUMNS
    device = words.device
    factors = _factors("column", _COLUMNS, device)[column]
    return (words * factors * _factors("row", int(row.max()) + 1, device)[row]).sum()


def _positions(
    shape: Sequence[int], whole: Sequence[int], at: Sequence[int], device: torch.device
) -> Tensor:
    """Return where `[numel]` the elements of a part stand in the whole, row-major."""
    positions = torch.zeros(1, dtype=torch.int64, device=device)
    for size, length, start in zip(shape, whole, at, strict=True):
        along = torch.arange(start, start + size, device=device)
        positions = (positions[:, None] * length + along).flatten()
    return positions


def _factors(what: str, count: int, device: torch.device) -> Tensor:
    """Return odd 64-bit factors `[count]`; more of them begin with the same ones."""
    return _drawn(what, 1 << (count - 1).bit_length(), device)[:count]


@lru_cache(maxsize=64)
def _drawn(what: str, count: int, device: torch.device) -> Tensor:
    drawn = bytearray(hashlib.shake_128(f"chatlearn digest {what}".encode()).digest(8 * count))
    return (torch.frombuffer(drawn, dtype=torch.int64) | 1).to(device)
