# SPDX-License-Identifier: Apache-2.0
"""Which columns the rows of a dataset have, and what they hold, as far as the first rows show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from chatlearn.columns import PROMPT
from chatlearn.data.prompts import Rows, is_hugging_face

_FIRST: Final = 8
"""Rows that are looked at."""


def row_columns(rows: Rows) -> dict[str, frozenset[str]] | None:
    """Return the columns of a dataset with their kinds (`columns.KINDS`), or None if its rows are not there yet.

    Rows in memory, of files and of Hugging Face datasets are there; a dataset that makes its items when they are
    asked for is left alone. A column whose first values differ in kind, or are missing, has none.

    Example:
        >>> row_columns([{"prompt": "1+1=", "answer": 2}])
        {'prompt': frozenset({'text'}), 'answer': frozenset({'number'})}
    """
    if not (type(rows) in (list, tuple) or is_hugging_face(rows)):
        return None
    if (
        is_hugging_face(rows) and cast("Any", rows).format["type"] == "custom"
    ):  # made by a transform
        return None
    first = [_columns(rows[index]) for index in range(min(_FIRST, len(rows)))]
    return {name: kinds_shown([row.get(name) for row in first]) for name in first[0]}


def _columns(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        return {PROMPT: row}
    return {str(name): value for name, value in cast("dict[Any, Any]", row).items()}


def kinds_shown(values: Sequence[Any]) -> frozenset[str]:
    """Return the kind that all values of a column have, one per sample; none if they differ or may be several."""
    kinds = {_kind(value) for value in values}
    kind = kinds.pop() if len(kinds) == 1 else None
    return frozenset() if kind is None else frozenset({kind})


def _kind(value: Any) -> str | None:
    """Return what a value of one sample is; None if it may pass for more than one kind."""
    if isinstance(value, str):
        return "text"
    if hasattr(value, "ndim") and hasattr(value, "tolist"):  # of torch or numpy
        value = value.tolist()
    if isinstance(value, bool | int | float):
        return "number"
    if not isinstance(value, list | tuple) or len(parts := cast("Sequence[Any]", value)) < 2:
        return "messages" if _are_messages(value) else None  # one number may pass for a list of one
    types: set[type] = {type(part) for part in parts}
    if types == {bool}:
        return "flags"
    if types == {int}:
        return "tokens"
    if types <= {int, float}:
        return "floats"
    return "messages" if _are_messages(parts) else None


def _are_messages(value: Any) -> bool:
    messages = cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()
    return bool(messages) and all(isinstance(m, Mapping) and "role" in m for m in messages)
