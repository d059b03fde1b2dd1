# SPDX-License-Identifier: Apache-2.0
"""What a dataset holds, as one hash that another process finds again: how a resumed run notices other data.

The rows are hashed, not the file they came from: what counts is what a run samples from. A value counts by its
content and never by its address; objects that say nothing stable of themselves count by their type alone, since a
false alarm would keep a run from going on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from chatlearn.data.prompts import Rows, Source

_AT_ONCE = 1000
_UNSTABLE = re.compile(r"\bat 0x|[{]")
"""What makes a `repr` differ between processes: an address, or the order of a set."""


def name_of(source: Source, number: int) -> str:
    """Name a dataset for people: its file, or which one it is."""
    if isinstance(source, str | Path):
        path = Path(source)
        return f"the dataset file {path.name}" if path.is_file() else f"the dataset {source}"
    return "the dataset" if number == 0 else f"dataset {number + 1}"


def fingerprint(rows: Rows) -> str:
    """Return the SHA-256 of all rows; "" for datasets that make their rows when asked, which are not asked here.

    Example:
        >>> fingerprint(["1+1="]) == fingerprint(["1+1="]) != fingerprint(["1+2="])
        True
    """
    if isinstance(rows, list | tuple):
        return _hash(cast("Iterable[Any]", rows))
    datasets = sys.modules.get("datasets")  # who has such a dataset has imported it
    if datasets is not None and isinstance(rows, datasets.Dataset):
        return _hash(_stored_rows(rows))
    return ""


def _stored_rows(dataset: Any) -> Iterator[Any]:
    """Yield a Hugging Face dataset's rows as they are stored: no image is decoded, no transform of the user's runs."""
    for table in dataset.with_format("arrow").iter(_AT_ONCE):
        yield from table.to_pylist()


def _hash(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_canonical(row).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _canonical(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_stable)
    except (TypeError, ValueError, RecursionError):  # keys that cannot be sorted, or a circle
        pass
    try:
        return json.dumps(_plain(value), ensure_ascii=False)
    except RecursionError:
        return type(value).__qualname__


def _plain(value: Any) -> Any:
    """Return `value` as JSON lists and scalars, whatever its keys are."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in cast("Iterable[Any]", value)]
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return sorted([_canonical(key), json.dumps(_plain(part))] for key, part in pairs)
    return _plain(_stable(value))


def _stable(value: Any) -> Any:
    """Return something JSON can write that is the same in another process."""
    kind = type(cast("object", value))
    if isinstance(value, Tensor):
        return [kind.__qualname__, str(value.dtype), list(value.shape), _hash_tensor(value)]
    if kind.__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
        content = hashlib.sha256(value.tobytes()).hexdigest()
        return ["numpy", str(value.dtype), list(value.shape), content]
    if isinstance(value, bytes | bytearray):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, set | frozenset):
        return ["set", sorted(map(_canonical, cast("Iterable[Any]", value)))]
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return [kind.__qualname__, fields]
    if isinstance(value, Mapping):
        return _plain(value)
    if kind.__repr__ is object.__repr__:
        return [kind.__qualname__]
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a value that cannot be printed counts by its type
        text = "{"
    return [kind.__qualname__] if _UNSTABLE.search(text) else [kind.__qualname__, text]


def _hash_tensor(tensor: Tensor) -> str:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return ""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest() if len(flat) else ""
