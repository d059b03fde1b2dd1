# SPDX-License-Identifier: Apache-2.0
"""How a column of a batch is stored in Arrow and made again, exactly.

A *cell* is one sample's entry of a column: a tensor without the batch's dimension, a text, a list of chat messages.
Common cells have a plain Arrow type, so that any reader of Parquet can use them; the rest is JSON with tags.

    float32 [B]                     float           list of str       string
    list of int64 [T_i]             list<int64>     list of int       int64   (None is null)
    list of bfloat16 [T_i]          list<float>     list of list[int] list<int64>
    list of float32 [T_i, H]        struct<shape: list<int64>, values: list<float>>
    chat messages, tuples, arrays   string: JSON, with {"!tuple": [...]} and the like for what JSON has no word for
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import numpy as np
import pyarrow as _pyarrow  # noqa: ICN001
import torch
from torch import Tensor

from chatlearn.flow.batch import Column

pa: Any = _pyarrow  # comes without types

KindName = Literal["tensor", "int", "float", "bool", "str", "ints", "floats", "strs", "json"]

_WIDENED: Final = {
    name: torch.float32
    for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name)
}
"""Floats that Parquet's readers do not know; float32 holds each of their values."""
_PARTS: Final = {"complex64": torch.float32, "complex128": torch.float64}
_PLAIN: Final = frozenset(
    {
        "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32",
        "float64",
    }
)  # fmt: skip
_SCALARS: Final[dict[type, KindName]] = {int: "int", float: "float", bool: "bool", str: "str"}
_LISTS: Final[dict[type, KindName]] = {int: "ints", float: "floats", str: "strs"}
_ARROW: Final[dict[KindName, Any]] = {
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "str": pa.large_string(),
    "ints": pa.large_list(pa.int64()),
    "floats": pa.large_list(pa.float64()),
    "strs": pa.large_list(pa.large_string()),
    "json": pa.large_string(),
}


class UnkeepableError(Exception):
    """A cell holds something that no record can keep; the message names its type."""


@dataclass(frozen=True)
class Kind:
    """What the cells of a stored column are.

    Example:
        >>> encode([torch.tensor([1, 2]), torch.tensor([3])])[0]
        Kind(name='tensor', dtype='int64', ndim=1)
    """

    name: KindName
    dtype: str = ""
    """Of tensors."""
    ndim: int = 0
    """Of tensors: dimensions of a cell."""

    @property
    def arrow(self) -> Any:
        """The Arrow type of the stored column."""
        if self.name != "tensor":
            return _ARROW[self.name]
        values = pa.from_numpy_dtype(_numpy_dtype(_stored(self.dtype)))
        if self.has_shape:
            shape = pa.list_(pa.int64())
            return pa.struct([("shape", shape), ("values", pa.large_list(values))])
        return pa.large_list(values) if self.ndim else values

    @property
    def has_shape(self) -> bool:
        """Whether a cell's shape stands beside its values."""
        return self.ndim > 1 or self.dtype in _PARTS


def encode(column: Column) -> tuple[Kind, Any]:
    """Return the kind of a column's cells and an Arrow array of them.

    Raises:
        UnkeepableError: a cell holds an object that could not be made again.
    """
    if isinstance(column, Tensor):
        kind = _tensor_kind(column, column.dim() - 1)
        return kind, _tensor_array(kind, list(column.shape[1:]), column)
    kinds: set[type] = {type(cell) for cell in column}
    if kinds and kinds <= {Tensor, torch.nn.Parameter}:
        cells = cast("list[Tensor]", column)
        if len({cell.device for cell in cells}) > 1:
            cells = [cell.cpu() for cell in cells]
        if len({(cell.dtype, cell.dim(), cell.layout) for cell in cells}) == 1:
            kind = _tensor_kind(cells[0], cells[0].dim())
            return kind, _tensor_array(kind, None, cells)
    return _encode_plain(column, kinds - {type(None)})


def decode(kind: Kind, array: Any) -> list[Any]:
    """Return the cells of an Arrow array; what is null is None."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # of no chunk, or of more than fits into one
            parts: list[Any] = array.chunks
            return [cell for part in parts for cell in decode(kind, part)]
    if kind.name == "tensor":
        return _tensor_cells(kind, array)
    if kind.name == "json":
        return [None if text is None else from_json(json.loads(text)) for text in array.to_pylist()]
    return array.to_pylist()


# ---- tensors ------------------------------------------------------------------------------------------------------


def dtype_name(tensor: Tensor) -> str:
    """Return `float32` for `torch.float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def _tensor_kind(tensor: Tensor, ndim: int) -> Kind:
    name = dtype_name(tensor)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise UnkeepableError("tensor that is sparse, quantised or without data")
    if name not in _PLAIN and name not in _WIDENED and name not in _PARTS:
        raise UnkeepableError(f"tensor of {name}")
    return Kind("tensor", name, ndim)


def _stored(name: str) -> torch.dtype:
    """Return the dtype that tensors of dtype `name` are stored in."""
    return _WIDENED.get(name) or _PARTS.get(name) or getattr(torch, name)


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype


def _flat(kind: Kind, tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor as they are stored: `[N]`, on the CPU."""
    tensor = tensor.detach().cpu()
    if kind.dtype in _PARTS:
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1).to(_stored(kind.dtype))


def _tensor_array(kind: Kind, shape: Sequence[int] | None, column: Tensor | list[Tensor]) -> Any:
    """Make the array of a stacked column (with its cells' `shape`), or of a list of tensors."""
    if isinstance(column, Tensor):
        values, count = _flat(kind, column), len(column)
        shapes = [list(shape or ())] * count
        sizes = [values.numel() // count if count else 0] * count
    else:
        values = _flat(kind, torch.cat([cell.reshape(-1) for cell in column]))
        shapes = [list(cell.shape) for cell in column]
        numbers = 2 if kind.dtype in _PARTS else 1
        sizes = [numbers * cell.numel() for cell in column]
    flat: Any = pa.array(values.numpy())
    if not kind.ndim and not kind.has_shape:
        return flat
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
    lists: Any = pa.LargeListArray.from_arrays(pa.array(offsets), flat)
    if not kind.has_shape:
        return lists
    given = pa.array(shapes, pa.list_(pa.int64()))
    return pa.StructArray.from_arrays([given, lists], names=["shape", "values"])


def _tensor_cells(kind: Kind, array: Any) -> list[Any]:
    valid: list[bool] = array.is_valid().to_pylist()
    dense = array.drop_null()
    shapes: list[list[int]] | None = None
    if kind.has_shape:
        shapes, dense = dense.field("shape").to_pylist(), dense.field("values")
    is_list = kind.ndim > 0 or kind.has_shape
    if is_list:
        sizes: list[int] = dense.value_lengths().to_pylist()
        flat = dense.flatten()
    else:
        sizes, flat = [], dense
    values = torch.from_numpy(flat.to_numpy(zero_copy_only=False).copy())
    if kind.dtype in _PARTS:
        values = torch.view_as_complex(values.reshape(-1, 2))
        sizes = [size // 2 for size in sizes]
    values = values.to(getattr(torch, kind.dtype))
    # A cell has storage of its own, so that what one reader changes in place no other sees.
    parts = cast("Sequence[Tensor]", values.split(sizes) if is_list else values.unbind())
    cells = [part.clone() for part in parts]
    if shapes is not None:
        cells = [cell.reshape(shape) for cell, shape in zip(cells, shapes, strict=True)]
    following = iter(cells)
    return [next(following) if there else None for there in valid]


# ---- everything else ----------------------------------------------------------------------------------------------


def _encode_plain(column: list[Any], kinds: set[type]) -> tuple[Kind, Any]:
    kind = Kind("json")
    if len(kinds) <= 1:
        only = next(iter(kinds), bool)
        if only in _SCALARS:
            kind = Kind(_SCALARS[only])
        elif only is list:
            inner: set[type] = {type(x) for cell in column if cell is not None for x in cell}
            if len(inner) == 1 and (name := _LISTS.get(next(iter(inner)))):
                kind = Kind(name)
    if kind.name != "json":
        try:
            return kind, pa.array(column, kind.arrow)
        except (
            OverflowError,
            pa.ArrowInvalid,
            UnicodeEncodeError,
        ):  # too large, or half a character
            kind = Kind("json")
    texts = [None if cell is None else json.dumps(to_json(cell)) for cell in column]
    return kind, pa.array(texts, kind.arrow)


def to_json(value: Any) -> Any:
    """Return a value as JSON with tags.

    Raises:
        UnkeepableError: it holds an object that could not be made again.

    Example:
        >>> to_json({"role": "user", "at": (1, 2)})
        {'role': 'user', 'at': {'!tuple': [1, 2]}}
    """
    kind = cast("type[Any]", type(value))
    if kind in (str, int, float, bool, type(None)):
        return value
    if kind is list:
        return [to_json(part) for part in value]
    if kind is dict:
        given = cast("dict[Any, Any]", value)
        if all(type(key) is str and not key.startswith("!") for key in given):
            return {key: to_json(part) for key, part in given.items()}
        return {"!dict": [[to_json(key), to_json(part)] for key, part in given.items()]}
    if kind in (tuple, set, frozenset):
        return {f"!{kind.__name__}": [to_json(part) for part in value]}
    if kind in (bytes, bytearray):
        return {f"!{kind.__name__}": _text(value)}
    if kind is complex:
        return {"!complex": [value.real, value.imag]}
    if isinstance(value, Tensor):
        return {"!tensor": _tensor_to_json(value)}
    if isinstance(value, np.ndarray | np.generic):
        return _array_to_json(cast("Any", value))
    raise UnkeepableError(kind.__name__)


def from_json(value: Any) -> Any:
    """Return the value that `to_json` was given."""
    if isinstance(value, list):
        return [from_json(part) for part in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    given = cast("dict[str, Any]", value)
    tag = next(iter(given), "")
    if tag.startswith("!"):
        return _MAKERS[tag](given[tag])
    return {key: from_json(part) for key, part in given.items()}


def _text(content: bytes | bytearray) -> str:
    return base64.b64encode(content).decode("ascii")


def _tensor_to_json(tensor: Tensor) -> list[Any]:
    kind = _tensor_kind(tensor, tensor.dim())
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return [kind.dtype, list(tensor.shape), _text(plain.view(torch.uint8).numpy().tobytes())]


def _tensor_from_json(stored: list[Any]) -> Tensor:
    name, shape, text = stored
    content = bytearray(base64.b64decode(text))
    raw = (
        torch.frombuffer(content, dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8)
    )
    return raw.view(getattr(torch, name)).reshape(shape)


def _array_to_json(array: Any) -> Any:
    tag = "!scalar" if isinstance(array, np.generic) else "!array"
    if array.dtype.kind == "O":
        return {"!objects": [list(array.shape), [to_json(part) for part in array.ravel()]]}
    if array.dtype.kind not in "biufcSUmM":
        raise UnkeepableError(f"array of {array.dtype}")
    return {tag: [array.dtype.str, list(array.shape), _text(array.tobytes())]}


def _array_from_json(stored: list[Any]) -> Any:
    dtype, shape, text = stored
    return np.frombuffer(base64.b64decode(text), dtype=dtype).reshape(shape).copy()


def _objects_from_json(stored: list[Any]) -> Any:
    shape, parts = stored
    array: Any = np.empty(len(parts), dtype=object)
    for index, part in enumerate(parts):
        array[index] = from_json(part)
    return array.reshape(shape)


_MAKERS: Final[dict[str, Callable[[Any], Any]]] = {
    "!dict": lambda pairs: {from_json(key): from_json(value) for key, value in pairs},
    "!tuple": lambda parts: tuple(from_json(parts)),
    "!set": lambda parts: set(from_json(parts)),
    "!frozenset": lambda parts: frozenset(from_json(parts)),
    "!bytes": base64.b64decode,
    "!bytearray": lambda text: bytearray(base64.b64decode(text)),
    "!complex": lambda parts: complex(*parts),
    "!tensor": _tensor_from_json,
    "!array": _array_from_json,
    "!objects": _objects_from_json,
    "!scalar": lambda stored: _array_from_json(stored)[()],
}
