# SPDX-License-Identifier: Apache-2.0
"""Run a user's script, as `python script.py` would, or up to where its engine is about to run."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatlearn.errors import ConfigError
from chatlearn.inspection import Inspection, inspecting


def execute(script: Path, arguments: Sequence[str]) -> None:
    """Run the script as `python script.py arguments` would.

    Raises:
        ConfigError: there is no such file.
    """
    if not script.is_file():
        raise ConfigError(
            f"there is no script {script}",
            place=str(Path.cwd()),
            fix="give the path of a Python script, or of a recipe (.yaml) with a `script` key",
        )
    argv, path = sys.argv, sys.path
    sys.argv = [str(script), *arguments]
    sys.path = [str(script.resolve().parent), *sys.path]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path


def inspect(script: Path, arguments: Sequence[str], action: Callable[[Any], Any]) -> Any:
    """Run the script up to its first `learn()` or `eval()` and return what `action` makes of that engine.

    Raises:
        ConfigError: the script ends without calling either.
    """
    try:
        with inspecting(action):
            execute(script, arguments)
    except Inspection as stopped:
        if stopped.error is not None:
            raise stopped.error from stopped.error.__cause__
        return stopped.result
    except SystemExit as stopped:
        if stopped.code:
            raise
    raise ConfigError(
        "the script ended without calling learn() or eval()",
        place=str(script),
        fix="call engine.learn(); code under `if __name__ == '__main__':` runs here too",
    )
