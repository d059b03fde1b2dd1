# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and dtypes of a model's weights, without weights: from its configuration, on the device `meta`."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatlearn.training.loading import DType, as_config, resolve_dtype

if TYPE_CHECKING:
    from torch import Tensor


def described(
    source: Any, dtype: DType, trust_remote_code: bool = False
) -> Mapping[str, Tensor] | None:
    """Describe the weights that a model's source leads to.

    Args:
        source: what `loading.py` takes.
        dtype: precision of the weights.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        The tensors on `meta`, by name: made when they are first looked at, for that imports transformers. Two
        descriptions of one source are equal, whatever their dtypes, and comparing them makes nothing. None for a
        callable, which is not called, and for weights that are stored quantised.
    """
    key = _key(source)
    return None if key is None else _Description((key, trust_remote_code), source, dtype)


class _Description(Mapping[str, "Tensor"]):
    """The weights of one source, made when they are needed; empty where they cannot be made."""

    def __init__(self, key: tuple[str, bool], source: Any, dtype: DType) -> None:
        self._key, self._source = key, source
        self._dtype: DType = dtype
        self._tensors: dict[str, Tensor] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Description) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    @property
    def _made(self) -> dict[str, Tensor]:
        if self._tensors is None:
            try:
                self._tensors = _make(self._source, self._dtype, trust_remote_code=self._key[1])
            except Exception:  # noqa: BLE001 - what is wrong with the source, setup() says better
                self._tensors = {}
        return self._tensors


def _key(source: Any) -> str | None:
    """Name a source so that equal names mean equal weights' names and shapes."""
    if isinstance(source, str | os.PathLike):
        folder = Path(os.fspath(cast("os.PathLike[str]", source))).expanduser()
        return str(folder.resolve()) if folder.is_dir() else f"hub {source}"
    if isinstance(source, Mapping):
        return json.dumps(cast("Any", source), sort_keys=True, default=repr)
    if hasattr(source, "to_json_string"):  # a config of transformers
        return f"{type(source).__name__} {source.to_json_string(use_diff=False)}"
    return None


def _make(source: Any, dtype: DType, *, trust_remote_code: bool) -> dict[str, Tensor]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    if isinstance(source, str | os.PathLike):
        name = os.path.expanduser(cast("os.PathLike[str]", source))
        config: Any = cast("Any", AutoConfig).from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=True
        )
    else:
        config = copy.deepcopy(as_config(source))
    if getattr(config, "quantization_config", None) is not None:
        return {}
    with torch.device("meta"), torch.random.fork_rng():
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    # The parameters themselves, by which tied names and what is trained are known.
    return dict(model.to(resolve_dtype(dtype)).state_dict(keep_vars=True))
