# SPDX-License-Identifier: Apache-2.0
"""Scripts that train, run as a user runs them."""

from __future__ import annotations

import os
from pathlib import Path

from chatlearn import config
from chatlearn.script import execute


def train(folder: Path, script: str, *arguments: str) -> Path:
    """Write `script` to `folder/train.py` and run it there; return the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.py"
    path.write_text(script)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with config.command_line():
            execute(path, arguments)
    finally:
        os.chdir(before)
    return folder / "run"
