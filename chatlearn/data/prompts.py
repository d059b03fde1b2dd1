# SPDX-License-Identifier: Apache-2.0
"""Prompt datasets from a list, a JSONL or Parquet file, or a Hugging Face dataset path.

A row is a dict with the column `prompt` (text, or chat messages: dicts with `role` and `content`) and whatever
further columns a reward needs; a plain string stands for `{"prompt": string}`. Rows of files are validated when
they are read, so that a malformed one is refused with file and line before anything expensive starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from chatlearn.columns import PROMPT, PROMPT_UID, UID
from chatlearn.errors import DataError


class Rows(Protocol):
    """Anything with a length and rows by index: a list, a torch dataset, a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Source = Rows | Sequence[Any] | str | Path


def load_prompts(source: Source, *, split: str = "train", what: str = "the dataset") -> Rows:
    """Return the rows of `source`.

    Args:
        source: rows already in memory, or the path of a `.jsonl`, `.parquet` file or of a dataset directory, or the
            name of a dataset on the Hugging Face hub.
        split: which split of a Hugging Face dataset.
        what: what the rows are for, named in errors.

    Raises:
        DataError: there are no rows, a path leads nowhere, or a row is malformed (with file and line).
    """
    if isinstance(source, str | Path):
        rows = _load_path(Path(source), str(source), split)
    elif isinstance(source, Mapping):
        keys = sorted(map(str, cast("Mapping[Any, Any]", source)))
        kind = type(cast("object", source)).__name__
        raise DataError(
            f"{what} is a {kind} with the keys {keys}, not rows",
            fix='give one of its parts, e.g. dataset["train"], or a list of dicts',
        )
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        rows = cast("Rows", source)
    else:
        raise DataError(
            f"{what} must be a list, a dataset or a path, not {type(source).__name__}",
            fix="pass a list of prompts, e.g. .set_dataset(list(prompts))",
        )
    if len(rows) == 0:
        raise DataError(
            f"{what} is empty",
            place=str(source) if isinstance(source, str | Path) else "",
            fix="give it rows",
        )
    return rows


def _load_path(path: Path, name: str, split: str) -> Rows:
    if path.suffix in (".jsonl", ".ndjson"):
        return list(_read_jsonl(_existing(path)))
    if path.suffix == ".parquet":
        return list(_read_parquet(_existing(path)))
    if path.is_file():
        raise DataError(
            f"prompts cannot be read from a {path.suffix or 'nameless'} file",
            place=name,
            fix="use .jsonl or .parquet, or a Hugging Face dataset path",
        )
    return _load_hugging_face(path, name, split)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError("the dataset file does not exist", place=str(path), fix="correct the path")
    return path


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    columns: set[str] | None = None
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"line is no JSON: {error.msg} at column {error.colno}",
                    place=f"{path}:{number}",
                    fix="write one JSON object per line",
                ) from None
            columns = _check_row(row, columns, f"{path}:{number}")
            yield row


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet

    try:
        table = cast("Any", parquet).read_table(path)
        rows: list[dict[str, Any]] = table.to_pylist()
    except Exception as error:
        raise DataError(f"no readable Parquet file: {error}", place=str(path)) from error
    for number, row in enumerate(rows):
        _check_row(row, None, f"{path}, row {number}")
        yield row


def _check_row(row: Any, columns: set[str] | None, place: str) -> set[str]:
    if not isinstance(row, dict):
        raise DataError(
            f"a row must be an object with named columns, not {type(row).__name__}",
            place=place,
            fix='write {"prompt": "...", ...}',
        )
    names = set(cast("dict[str, Any]", row))
    if columns is not None and names != columns:
        raise DataError(
            f"columns differ from the first row's: {sorted(names ^ columns)}",
            place=place,
            fix="give every row the same columns; write null where there is no value",
        )
    if PROMPT in names:
        check_prompt(row[PROMPT], place)
    return names


def check_prompt(prompt: Any, place: str) -> None:
    """Refuse a prompt that is neither text nor chat messages.

    Raises:
        DataError: naming what is wrong with it.
    """
    if isinstance(prompt, str):
        if prompt:
            return
        problem = "is empty text"
    elif isinstance(prompt, list):
        messages = cast("list[Any]", prompt)
        if messages and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m
            for m in messages
        ):
            return
        problem = "is a list, but not of chat messages"
    else:
        problem = f"is a {type(prompt).__name__}"
    raise DataError(
        f"the prompt {problem}",
        place=place,
        fix='give text, or chat messages [{"role": "user", "content": "..."}]',
    )


def _load_hugging_face(path: Path, name: str, split: str) -> Rows:
    import datasets

    try:
        if path.is_dir() and any(path.glob("**/state.json")):
            loaded: Any = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise DataError(
            f"no dataset could be loaded: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            place=name,
            fix="give the path of a .jsonl or .parquet file, of a saved dataset, or a name on the hub",
        ) from error
    if isinstance(loaded, dict):
        splits = cast("dict[str, Any]", loaded)
        if split not in splits:
            raise DataError(f"no split {split!r}, only {sorted(splits)}", place=name)
        loaded = splits[split]
    return loaded


class PromptDataset:
    """The default dataset over prompts: dict rows are their columns, anything else becomes the column `prompt`."""

    def __init__(self, prompts: Rows) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._prompts[index]
        if not isinstance(row, dict):
            return {PROMPT: row}
        columns = cast("dict[str, Any]", row)
        taken = columns.keys() & {UID, PROMPT_UID}
        if taken:
            raise DataError(
                f"the dataset has columns {sorted(taken)}, which the engine numbers samples with",
                place=f"row {index}",
                fix="rename them",
            )
        return columns
