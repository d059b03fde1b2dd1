# SPDX-License-Identifier: Apache-2.0
"""The program on docs/time_travel.md and its commands, on a model that takes no time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatlearn import config
from chatlearn.cli import main
from chatlearn.testing import save_tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "time_travel.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen3-0.6B"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def command(line: str) -> None:
    with config.command_line(), pytest.raises(SystemExit) as done:
        main(line.split()[1:])
    assert done.value.code == 0


def test_its_program_and_commands_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, ask, read = blocks("python")
    assert train.count(MODEL) == 2
    Path("train.py").write_text(train.replace(MODEL, str(save_tiny_model(tmp_path / "tiny"))))
    (recipe,) = blocks("yaml")
    Path("record.yaml").write_text(recipe)
    command("chatlearn run record.yaml")
    commands = re.findall(r"^\$ (chatlearn .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 5
    capsys.readouterr()
    for line in commands:
        command(line)
    shown = capsys.readouterr().out
    assert "changed since the run: models.advantage.normalise_std: True then, False now" in shown
    assert "episode 2: equal to the record, bit for bit" in shown
    assert "changed since the run: models.advantage.eps: 1e-06 then, 0.5 now" in shown
    assert shown.count("sample uid 29") == 2
    scope: dict[str, object] = {}
    exec(compile("import chatlearn\n" + ask + read, "time_travel.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert printed.startswith("True [Difference(column=")
    assert "[16, 17, 18, 19, 20" in printed
