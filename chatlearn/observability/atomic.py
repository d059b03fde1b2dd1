# SPDX-License-Identifier: Apache-2.0
"""Give a file its content so that a reader, or a crash, sees the old one or the new one whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from chatlearn.errors import OutputError, write_failure


def write_atomically(target: Path, text: str, *, within: Path | None = None) -> None:
    """Write text to a temporary file beside `target`, have it on disk, then put it in its place.

    Args:
        target: the file.
        text: its new content.
        within: below this folder, which must be there, the target's own folder is made; None makes none.

    Raises:
        OutputError: it cannot be written; what was there is untouched.
    """
    try:
        if within is not None and target.parent != within:
            target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("x", encoding="utf-8", errors="replace", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        cause, fix = write_failure(error)
        raise OutputError(f"cannot write: {cause}", place=str(target), fix=fix) from error
