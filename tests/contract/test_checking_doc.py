# SPDX-License-Identifier: Apache-2.0
"""The program on docs/checking.md, and that it is told what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from chatlearn.program import Program
from chatlearn.testing import save_tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "checking.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen3-0.6B"


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language; those of none are output."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def test_it_is_told_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    program = "\n".join(blocks("python"))
    assert program.count(MODEL) == 1
    program = program.replace(MODEL, str(save_tiny_model(tmp_path / "tiny")))
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(program, "train.py", "exec"), scope)
    dry_run = capsys.readouterr().out
    checked: Program = scope["engine"].check()
    told = [f"error: {problem}" for problem in checked.problems]
    told += [f"warning: {warning}" for warning in checked.warnings]
    assert blocks("") == ["\n".join(told) + "\n", dry_run]


def test_what_it_declares_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    scope: dict[str, Any] = {"__name__": "__main__"}
    program = "\n".join(blocks("python")).replace('data["completions"]', 'data["completion"]')
    exec(compile(program, "train.py", "exec"), scope)
    assert scope["program"].problems == []
    batch = {"completion": ["one two", "three"]}
    for name in ("Undeclared", "Length", "Shorter", "Critic"):
        batch = scope[name](name).forward_step(batch)
    assert batch["words"] == [2, 1]
    assert batch["rewards"] == [7.0, 5.0]
