# SPDX-License-Identifier: Apache-2.0
"""The program on docs/outcomes.md, as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "outcomes.md").read_text(encoding="utf-8")


def test_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(program, "outcomes.md", "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert "ZeroDivisionError" in shown
    assert "1 failed, 1 group dropped" in shown
