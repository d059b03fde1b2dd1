# SPDX-License-Identifier: Apache-2.0
"""The single files of a checkpoint: tensors in safetensors, plain values beside them, a digest of each.

Nothing is ever unpickled: whatever is no safetensors file is loaded with `weights_only=True`. A file is told from a
damaged one by its XXH3 (128 bits), which reads 30 GB/s where SHA-256 reads 2: it finds every accident, and is no
protection against somebody who writes the digest, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chatlearn.errors import CheckpointError, os_error_behind, write_failure

OLDER = "resume from an older one with runtime.resume=<path>"
_ALIASES = "aliases"
"""In a safetensors file's metadata: names of tensors that are another one of the file, as tied weights are."""
_LOADABLE = {
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
}
"""With tensors and containers of them, what `weights_only=True` reads; subclasses of these it does not."""

Shapes = dict[str, tuple[int, ...]]


@contextmanager
def writing(what: str, root: Path) -> Generator[None]:
    """Give an error of the file system, or of a library that met one, its cause, place and fix.

    Raises:
        CheckpointError: the block could not write `what` below `root`.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        behind = os_error_behind(error)
        cause, fix = write_failure(behind) if behind else (str(error), "see the error above it")
        raise CheckpointError(f"{what}: {cause}", place=str(root), fix=fix) from error


def digest(path: Path) -> str:
    """Return the XXH3 of a file's content, 32 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- tensors ------------------------------------------------------------------------------------------------------


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors; one that has several names (tied embeddings) is written once."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    tensors, aliases = _own_storage(state)
    path.touch()
    mode = path.stat().st_mode  # save_file puts one in its place that nobody else may read
    save_file(tensors, path, {_ALIASES: json.dumps(aliases)} if aliases else None)
    path.chmod(mode)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return what `write_weights` has written, under every name."""
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    tensors: dict[str, Tensor] = cast("Callable[[Path], Any]", load_file)(path)
    with _opened(path) as opened:
        aliases = _aliases(opened.metadata())
    return {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}


def weight_shapes(path: Path) -> Shapes:
    """Return names and shapes of a file's tensors, without reading them."""
    with _opened(path) as opened:
        names: list[str] = list(opened.keys())
        shapes = {name: tuple(map(int, opened.get_slice(name).get_shape())) for name in names}
        aliases = _aliases(opened.metadata())
    return {**shapes, **{alias: shapes[name] for alias, name in aliases.items()}}


def _opened(path: Path) -> Any:
    """Open a safetensors file, of which only the header is read; the library has no types."""
    return cast("Any", safe_open)(path, "pt")


def _aliases(metadata: Mapping[str, str] | None) -> dict[str, str]:
    return json.loads((metadata or {}).get(_ALIASES, "{}"))


def _own_storage(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give every tensor storage of its own, as safetensors wants it, and name those that are another one."""
    seen: dict[int, dict[Any, str]] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            tensors[name] = tensor.contiguous()
            continue
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        views = seen.setdefault(tensor.untyped_storage().data_ptr(), {})
        if view in views:
            aliases[name] = views[view]
            continue
        tensors[name] = tensor.clone().contiguous() if views else tensor.contiguous()
        views[view] = name
    return tensors, aliases


# ---- plain values -------------------------------------------------------------------------------------------------


def write_values(path: Path, value: Any) -> None:
    """Write tensors and plain values. The CRC of every tensor, which takes two fifths of the time, is left out: a
    digest of the whole file stands in `checkpoint.json`.
    """
    crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with path.open(
            "wb"
        ) as stream:  # of Python, whose errors name their cause; torch's own do not
            torch.save(value, stream)
    finally:
        torch.serialization.set_crc32_options(crc)


def read_values(path: Path, *, where: str | None = "cpu", skim: bool = False) -> Any:
    """Return what `write_values` has written: on the device `where`, None for the one it was on.

    `skim` leaves tensors on disk until somebody looks at them.
    """
    return torch.load(path, weights_only=True, map_location=where, mmap=skim)


def read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """Read a file of a checkpoint.

    Raises:
        CheckpointError: it cannot be read; what it would unpickle or run has not been.
    """
    try:
        return reader(path)
    except Exception as error:
        text = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"the checkpoint is damaged: {path.name} cannot be read: {type(error).__name__}: {text}",
            place=str(path),
            fix=OLDER,
        ) from error


def find_unloadable(value: Any) -> tuple[str, str] | None:
    """Find a value that no checkpoint can keep: only tensors and plain values are loaded, nothing is unpickled.

    Returns:
        Its path within `value` and the name of its type, or None.

    Example:
        >>> find_unloadable({"rows": [1, object()]})
        ("['rows'][...]", 'object')
    """
    kind = type(cast("object", value))
    if kind in _LOADABLE or isinstance(value, Tensor):
        return None
    if kind in (dict, OrderedDict, Counter):
        entries = cast("dict[Any, Any]", value).items()
        found = ((f"[{key!r}]", find_unloadable(key) or find_unloadable(v)) for key, v in entries)
    elif kind in (list, tuple, set):
        found = (("[...]", find_unloadable(v)) for v in cast("Iterable[Any]", value))
    else:
        return "", kind.__name__
    return next(((f"{step}{inner[0]}", inner[1]) for step, inner in found if inner), None)
