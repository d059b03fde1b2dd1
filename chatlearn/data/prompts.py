# SPDX-License-Identifier: Apache-2.0
"""Prompt datasets from a list, a JSONL or Parquet file, or a Hugging Face dataset path.

A row is a dict with the column `prompt` (text, or chat messages: dicts with `role` and `content`) and whatever
further columns a reward needs; a plain string stands for `{"prompt": string}`. Rows of files are validated when
they are read, so that a malformed one is refused with file and line before anything expensive starts. Of rows that
are in memory already only columns and empty prompts are checked: a module may take any object as a prompt.
"""

from __future__ import annotations

import codecs
import difflib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from chatlearn.columns import PROMPT, PROMPT_UID, UID
from chatlearn.errors import DataError


class Rows(Protocol):
    """Anything with a length and rows by index: a list, a torch dataset, a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


FILE_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""How files end that prompts are read from."""
Source = Rows | Sequence[Any] | str | Path


def load_prompts(source: Source, *, split: str = "train", what: str = "the dataset") -> Rows:
    """Return the rows of `source`.

    Args:
        source: rows already in memory, or the path of a `.jsonl`, `.parquet` file or of a dataset directory, or the
            name of a dataset on the Hugging Face hub.
        split: which split of a Hugging Face dataset.
        what: what the rows are for, named in errors.

    Raises:
        DataError: there are no rows, a path leads nowhere, or a row is malformed (with file and line, or with the
            number of the row from 0).
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
    if not isinstance(source, str | Path):
        _check_in_memory(rows, what)
    elif not isinstance(rows, list):
        _check_in_memory(rows, str(source))
    return cast("Rows", rows)


def _load_path(path: Path, name: str, split: str) -> Rows:
    if path.suffix in FILE_SUFFIXES[:2]:
        return list(_read_jsonl(_existing(path)))
    if path.suffix == ".parquet":
        return list(_read_parquet(_existing(path)))
    if path.is_file():
        raise DataError(
            f"prompts cannot be read from a {path.suffix or 'nameless'} file",
            place=name,
            fix="use .jsonl or .parquet, or a Hugging Face dataset path",
        )
    if meant := difflib.get_close_matches(path.suffix.lower(), FILE_SUFFIXES, 1, 0.75):
        raise DataError(
            f"{path.suffix} is no kind of file that prompts are read from",
            place=name,
            fix=f"did you mean {path.with_suffix(meant[0])}?",
        )
    return _load_hugging_face(path, name, split)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError("the dataset file does not exist", place=str(path), fix="correct the path")
    return path


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    columns: set[str] | None = None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            place = f"{path}:{number}"
            text = _decode(line, place).rstrip()
            if not text:
                continue
            row = _parse(text, place)
            columns = _check_row(row, columns, place)
            yield row


def _decode(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"line is no UTF-8 text: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line",
            place=place,
            fix="save the file as UTF-8",
        ) from None


def _parse(text: str, place: str) -> Any:
    """Read one line, which has no line end: with it, errors would be placed on a line of their own."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        raise DataError(
            f"line is no JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            + (f"; the line ends at column {len(text)}" if cut else ""),
            place=place,
            fix="write one whole JSON object per line"
            + ("; is this one cut off, or spread over several lines?" if cut else ""),
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, endless nesting
        raise DataError(f"line cannot be read: {error}", place=place) from None


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
    named = cast("dict[str, Any]", row)
    names = set(named)
    _check_columns(names, columns, place)
    for name, value in named.items():
        if not _is_finite(value):
            raise DataError(
                f"column {name!r} holds a number that is not finite",
                place=place,
                fix="write null where there is no value",
            )
    if PROMPT in names:
        check_prompt(named[PROMPT], place)
    return names


def _check_columns(names: set[str], columns: set[str] | None, place: str) -> None:
    if columns is not None and names != columns:
        raise DataError(
            f"columns differ from the first row's: {sorted(map(str, names ^ columns))}",
            place=place,
            fix="give every row the same columns; write null (None) where there is no value",
        )


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, cast("dict[str, Any]", value).values()))
    return not isinstance(value, list) or all(map(_is_finite, cast("list[Any]", value)))


def _check_in_memory(rows: Rows, what: str) -> None:
    """Refuse what no module could use, without making the items of a dataset that makes them when asked."""
    if isinstance(rows, list | tuple):
        _check_sequence(cast("Sequence[Any]", rows), what)
    elif is_hugging_face(rows):
        for number, prompt in _prompts_missing(rows):
            _refuse_missing(prompt, f"{what}, row {number}")


def _check_sequence(rows: Sequence[Any], what: str) -> None:
    first: set[str] | None = None
    for number, row in enumerate(rows):
        named: dict[str, Any] = (
            cast("dict[str, Any]", row) if isinstance(row, dict) else {PROMPT: row}
        )
        place = f"{what}, row {number}"
        if first is None:
            first = set(named)
        elif named.keys() != first:
            _check_columns(set(named), first, place)
        if PROMPT in named:
            _refuse_missing(named[PROMPT], place)


def _refuse_missing(prompt: Any, place: str) -> None:
    if prompt is None or (isinstance(prompt, str) and not prompt):
        raise _bad_prompt("is None" if prompt is None else "is empty text", place)


def is_hugging_face(rows: Any) -> bool:
    """Tell whether rows are a `datasets.Dataset`, without importing that library."""
    datasets = sys.modules.get("datasets")  # who has such a dataset has imported it
    return datasets is not None and isinstance(rows, datasets.Dataset)


def _prompts_missing(dataset: Any) -> Iterator[tuple[int, Any]]:
    """Yield number and value of prompts that are None or empty, read as Arrow, a thousand at a time."""
    if PROMPT not in dataset.column_names or dataset.format["type"] == "custom":
        return  # a transform of the user's makes the rows when they are asked for
    from pyarrow import compute, types

    stored = dataset.select_columns([PROMPT]).with_format("arrow")
    count = 1000
    for start, table in zip(range(0, len(stored), count), stored.iter(count), strict=True):
        column = table.column(PROMPT)
        missing = cast("Any", compute).is_null(column)
        if types.is_string(column.type) or types.is_large_string(column.type):
            missing = cast("Any", compute).equal(cast("Any", compute).fill_null(column, ""), "")
        for offset in cast("Any", compute).indices_nonzero(missing).to_pylist():
            yield start + offset, column[offset].as_py()


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
        flaw = next(_message_flaws(cast("list[Any]", prompt)), None)
        if flaw is None:
            return
        problem = f"is a list, but not of chat messages: {flaw}"
    else:
        problem = f"is a {type(prompt).__name__}"
    raise _bad_prompt(problem, place)


def _message_flaws(messages: list[Any]) -> Iterator[str]:
    if not messages:
        yield "it is empty"
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            yield f"message {number} is a {type(message).__name__}"
            continue
        parts = cast("dict[str, Any]", message)
        role, content = parts.get("role"), parts.get("content")
        if not isinstance(role, str):
            yield (
                f"message {number} has no role"
                if role is None
                else f"role of message {number} is {role!r}"
            )
        elif content is None and not parts.get("tool_calls"):
            yield f"message {number} has no content"
        elif not isinstance(content, str | list | None):
            yield f"content of message {number} is a {type(content).__name__}"


def _bad_prompt(problem: str, place: str) -> DataError:
    return DataError(
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
