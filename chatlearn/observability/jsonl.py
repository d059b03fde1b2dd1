# SPDX-License-Identifier: Apache-2.0
"""Files of one JSON object per line: append, read what a crash left, and go back to an episode."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, cast

from chatlearn.errors import OutputError, write_failure
from chatlearn.observability.atomic import write_atomically

Row = dict[str, Any]


def json_safe(value: Any) -> Any:
    """Return `value` in JSON's types: tensors and arrays as lists, non-finite numbers as None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(key): json_safe(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in cast("list[Any]", value)]
    if hasattr(value, "tolist"):  # a tensor, an array or one of their scalars
        return json_safe(value.tolist())
    return str(value)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; none if it does not exist; a half-written last line is left out.

    Raises:
        OutputError: A line other than the last is no JSON object.
    """
    return [row for row, _ in _parse(path)]


def _parse(path: Path, *, passes_damage: bool = False) -> Iterator[tuple[Row, str]]:
    """Yield rows with their lines; what is no row is refused, or passed over."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    last = len(lines) - 1  # behind the final newline, or a line that was cut off
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and number < last:
            yield cast("Row", row), line
        elif number < last and not passes_damage:
            raise OutputError(
                "a line is not a JSON object",
                place=f"{path}:{number + 1}",
                fix="repair or delete that line, or move the file away",
            )


def to_line(row: Row) -> str:
    """Return a row as the line that stands for it, newline included; lone surrogates become question marks."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    return text.encode("utf-8", errors="replace").decode("utf-8")


class JsonlFile:
    """A file that grows by one JSON object per line, each with the operating system when it is written.

    Example:
        >>> log = JsonlFile(folder / "metrics.jsonl")
        >>> lines = log.append({"episode": 1, "reward": 0.5})
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: FileIO | None = None

    @property
    def was_removed(self) -> bool:
        """Whether somebody has removed it while it is open; what is appended now would be lost."""
        return self._stream is not None and not os.fstat(self._stream.fileno()).st_nlink

    def append(self, *rows: Row) -> list[str]:
        """Write rows, whole lines at once, and return them; where that fails, the file ends as it did before.

        Raises:
            OutputError: they cannot be written.
        """
        lines = [to_line(row) for row in rows]
        with self._writing():
            if self.was_removed:
                self.close()
            if self._stream is None:
                self._cut_half_line()
                self._stream = FileIO(self.path, "a")
            _write_all(self._stream, "".join(lines).encode("utf-8"))
        return lines

    def rewind(self, episode: int, *, passes_damage: bool = False) -> list[Row]:
        """Drop the rows of later episodes, atomically, and return the rows that stay.

        With `passes_damage` lines that are no rows are dropped, too, and the file is kept as `<name>.damaged.jsonl`.

        Raises:
            OutputError: a line is no row, and `passes_damage` is false.
        """
        try:
            rows = list(_parse(self.path))
        except OutputError:
            if not passes_damage:
                raise
            shutil.copyfile(self.path, self.path.with_suffix(".damaged.jsonl"))
            rows = list(_parse(self.path, passes_damage=True))
        kept = [(row, line) for row, line in rows if row.get("episode", 0) <= episode]
        if self.path.exists():
            self.replace("".join(line + "\n" for _, line in kept))
        return [row for row, _ in kept]

    def replace(self, text: str) -> None:
        """Give the file another content, atomically: whole lines, or nothing.

        Raises:
            OutputError: it cannot be written; the file is as it was.
        """
        self.close()
        write_atomically(self.path, text)

    def sync(self) -> None:
        """Have on disk what was appended.

        Raises:
            OutputError: the disk does not take it.
        """
        if self._stream is not None:
            with self._writing():
                os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            cause, fix = write_failure(error)
            raise OutputError(f"cannot write: {cause}", place=str(self.path), fix=fix) from error

    def _cut_half_line(self) -> None:
        """Remove what a crash left behind the last newline and would spoil the next row."""
        if not self.path.exists() or not self.path.stat().st_size:
            return
        with self.path.open("rb+") as stream:
            end = stream.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                stream.seek(start)
                newline = stream.read(end - start).rfind(b"\n")
                if newline >= 0:
                    stream.truncate(start + newline + 1)
                    return
                end = start
            stream.truncate(0)


def _write_all(stream: FileIO, content: bytes) -> None:
    """Append all of `content` or nothing: a full disk takes a part of it, which would spoil the next line."""
    before = stream.seek(0, os.SEEK_END)
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[stream.write(rest) or 0 :]
    except OSError:
        with suppress(OSError):
            stream.truncate(before)
        raise
