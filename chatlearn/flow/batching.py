# SPDX-License-Identifier: Apache-2.0
"""Make, select, merge, pad and copy columns of batches (see `batch.py`). Pure functions; samples keep their order."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from chatlearn.errors import BatchError
from chatlearn.flow.batch import Batch, Column

Padding = Mapping[str, tuple[float, Literal["left", "right"]]]


def normalise(output: object, place: str) -> Batch:
    """Return what a step method returned as a batch: tuples become lists, numeric arrays tensors.

    Raises:
        BatchError: it is no dict of columns, or its columns disagree in their number of samples.
    """
    if not isinstance(output, Mapping):
        raise BatchError(
            f"a step must return a dict of columns or nothing, not {type(output).__name__}",
            place=place,
            fix='return e.g. {"rewards": rewards}, one entry per sample in every column',
        )
    batch: Batch = {}
    for key, value in cast("Mapping[Any, Any]", output).items():
        if not isinstance(key, str):
            raise BatchError(
                f"column names are strings, not {key!r}",
                place=place,
                fix='return e.g. {"rewards": rewards}',
            )
        batch[key] = _column(key, value, place)
    sizes = {key: len(column) for key, column in batch.items()}
    if len(set(sizes.values())) > 1:
        raise BatchError(
            f"columns disagree in their number of samples: {sizes}",
            place=place,
            fix="every column holds one entry per sample, batch first",
        )
    return batch


def _column(key: str, value: Any, place: str) -> Column:
    if isinstance(value, Tensor) and value.dim() > 0:
        return value
    if isinstance(value, list):
        return cast("list[Any]", value)
    if isinstance(value, tuple):
        return list(cast("tuple[Any, ...]", value))
    if isinstance(value, np.ndarray) and value.ndim > 0:
        array = cast("np.ndarray[Any, np.dtype[Any]]", value)
        return torch.as_tensor(array) if array.dtype.kind in "biuf" else list(array)
    raise BatchError(
        f"column {key!r} is a {type(cast('object', value)).__name__}, which is no column",
        place=place,
        fix="a column is a tensor with the batch as its first dimension, or a list; "
        "share single values with module.put(key, value)",
    )


def select(batch: Batch, indices: Sequence[int]) -> Batch:
    """Return the samples at `indices`, in that order."""
    where = torch.tensor(indices, dtype=torch.long)
    return {
        key: column[where] if isinstance(column, Tensor) else [column[i] for i in indices]
        for key, column in batch.items()
    }


def merge(batches: Sequence[Batch], place: str = "") -> Batch:
    """Append batches in order. Tensors of unequal shape become a list of one tensor per sample.

    Raises:
        BatchError: the batches have different columns.
    """
    if len(batches) == 1:
        return dict(batches[0])
    if not batches:
        return {}
    keys = batches[0].keys()
    for other in batches[1:]:
        if other.keys() != keys:
            raise BatchError(
                f"columns differ between calls of one node: {sorted(keys ^ other.keys())}",
                place=place,
                fix="return the same columns from every call",
            )
    return {key: _append([batch[key] for batch in batches]) for key in keys}


def _append(columns: list[Column]) -> Column:
    tensors = [column for column in columns if isinstance(column, Tensor)]
    if len(tensors) == len(columns) and len({t.shape[1:] for t in tensors}) == 1:
        return torch.cat(tensors)
    return [sample for column in columns for sample in column]


def collate(rows: Sequence[Any], place: str = "") -> Batch:
    """Make a batch of samples that are dicts: numbers and equal-shaped tensors are stacked, the rest stays a list.

    Args:
        rows: the samples.
        place: whose they are, for errors.

    Raises:
        BatchError: a sample is no dict, or the samples have different columns.
    """
    if not rows:
        return {}
    first = rows[0]
    for row in rows:
        if not isinstance(row, dict):
            raise BatchError(
                f"a dataset's sample must be a dict, not {type(row).__name__}",
                place=place,
                fix="return a dict from __getitem__, or give the dataset a collate_fn",
            )
        columns = cast("dict[str, Any]", row)
        if columns.keys() != first.keys():
            raise BatchError(
                f"samples have different columns: {sorted(first)} and {sorted(columns)}",
                place=place,
                fix="give every row of the dataset the same keys",
            )
    return {key: stack([row[key] for row in rows]) for key in first}


def is_number(value: Any) -> bool:
    """Tell whether a value is one number: of Python, of numpy, or a tensor with a single element."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    if type(value).__module__ == "numpy":
        return value.size == 1 and value.dtype.kind in "biuf"
    return isinstance(value, bool | int | float)


def numbers(given: Mapping[Any, Any]) -> dict[str, float]:
    """Return the entries that are one number each, as floats."""
    plain = {
        str(name): value.detach() if isinstance(value, Tensor) else value
        for name, value in given.items()
        if is_number(value)
    }
    return {name: float(value) for name, value in plain.items()}


def stack(values: list[Any]) -> Column:
    """Make a column of one value per sample: a tensor where the values are numbers or equal-shaped tensors."""
    if type(values[0]).__module__ == "numpy":
        values = [_from_numpy(value) for value in values]
    first = values[0]
    if isinstance(first, Tensor):
        tensors = all(isinstance(v, Tensor) and v.shape == first.shape for v in values)
        return torch.stack(values) if tensors else values
    kinds: set[type] = {type(value) for value in values}
    if kinds == {bool}:
        return torch.tensor(values)
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in values):
        return torch.tensor(values)
    if float in kinds and kinds <= {float, int}:
        return torch.tensor(values, dtype=torch.float64)  # as torch's own collation does
    return values


def _from_numpy(value: Any) -> Any:
    """Return a numeric array as a tensor and a numpy scalar as Python's; anything else as it is."""
    if type(value).__module__ != "numpy":
        return value
    if getattr(value, "ndim", 0) == 0:
        return value.item()
    return torch.tensor(value) if value.dtype.kind in "biuf" else value


def pad(batch: Batch, padding: Padding) -> Batch:
    """Pad the ragged columns named in `padding` to the longest sample: `[B, T]` tensors."""
    for key, (value, side) in padding.items():
        column = batch.get(key)
        if isinstance(column, list) and column:
            try:
                rows = [torch.as_tensor(row) for row in column]
                batch[key] = torch.nn.utils.rnn.pad_sequence(
                    rows, batch_first=True, padding_value=value, padding_side=side
                )
            except (TypeError, ValueError, RuntimeError) as error:
                raise BatchError(
                    f"column {key!r} cannot be padded: {error}",
                    place=f"add_padding_config({key!r}, {value!r}, {side!r})",
                    fix="pad columns of tensors (or lists of numbers) that differ in their first dimension only",
                ) from error
    return batch


def isolate(batch: Batch) -> Batch:
    """Return a batch that shares nothing mutable with `batch`, so that a module may change what it gets.

    Tensors, arrays and containers are copied at any depth; other objects are passed on as they are.
    """
    return {
        key: _copy_tensor(column) if isinstance(column, Tensor) else _copy_list(column)
        for key, column in batch.items()
    }


_CONTAINERS = (dict, list, set, tuple)


def _copy_list(values: list[Any]) -> list[Any]:
    return [value if type(value) in (str, int, float) else _copy(value) for value in values]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _copy_tensor(value)
    if type(value) is list:
        return _copy_list(cast("list[Any]", value))
    if type(value) is dict:
        return {key: _copy(part) for key, part in cast("dict[Any, Any]", value).items()}
    if type(value) is tuple:
        return tuple(_copy_list(cast("list[Any]", value)))
    if isinstance(value, _CONTAINERS) or type(value).__module__ == "numpy":
        return copy.deepcopy(cast("Any", value))
    return value


def _copy_tensor(tensor: Tensor) -> Tensor:
    """Copy the data alone: no gradient flows from one module into another."""
    return tensor.detach().clone() if tensor.requires_grad else tensor.clone()
