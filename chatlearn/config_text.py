# SPDX-License-Identifier: Apache-2.0
"""Write configuration values down: as what JSON holds, and as YAML that `chatlearn.init` reads."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel


def plain(value: Any) -> Any:
    """Reduce a value to what JSON and YAML hold: paths as text, callables as their names."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast(Sequence[Any], value)]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in cast(Collection[Any], value)), key=repr)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, functools.partial):
        return plain(cast(Any, value).func)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    kind = cast(Any, type(value))
    if kind.__repr__ is object.__repr__ or callable(value):
        return f"{kind.__module__}.{kind.__qualname__}"
    return str(value)[:200]


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write nested `values` as YAML; those that only code can hold stand in comments at the end.

    Example:
        >>> print(to_yaml({"models": {"policy": {"model": make_model, "top_k": 0}}}), end="")
        models:
          policy:
            top_k: 0
        # Set in code, which this file cannot hold:
        # models.policy.model: __main__.make_model
    """
    left_out: dict[str, Any] = {}
    kept = _kept(values, "", left_out)
    text = yaml.dump(kept, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if left_out:
        text += "# Set in code, which this file cannot hold:\n"
    for key, value in left_out.items():
        text += f"# {key}: {' '.join(str(plain(value)).split())}\n"
    return text


def _kept(values: Mapping[Any, Any], above: str, left_out: dict[str, Any]) -> dict[str, Any]:
    """Return what YAML can hold of `values`; add the rest to `left_out` by its dotted key."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, BaseModel):
            value = value.model_dump()
        if isinstance(value, Mapping):
            inner = cast("Mapping[Any, Any]", value)
            kept[str(key)] = _kept(inner, f"{above}{key}.", left_out)
        elif _is_plain(value):
            kept[str(key)] = _escaped(plain(value))
        else:
            left_out[f"{above}{key}"] = value
    return kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return all(map(_is_plain, cast("Mapping[Any, Any]", value).values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, cast("Collection[Any]", value)))
    return value is None or isinstance(value, bool | int | float | str | Enum | Path)


def _escaped(value: Any) -> Any:
    """Keep `${` in texts from being interpolated when the file is read."""
    if isinstance(value, dict):
        return {k: _escaped(v) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_escaped(item) for item in cast("list[Any]", value)]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader could take for a number: `1e5` is one to `init` only."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = "'" if _reads_as_number(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", str(text), style=style)

    def represent_number(self, number: float) -> yaml.Node:
        exact = int(number) if isinstance(number, int) else float(number)
        return super().represent_data(exact)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_multi_representer(str, _Dumper.represent_text)
_Dumper.add_multi_representer(int, _Dumper.represent_number)  # kinds of our own, and numpy's
_Dumper.add_multi_representer(float, _Dumper.represent_number)


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
