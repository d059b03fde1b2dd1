# SPDX-License-Identifier: Apache-2.0
"""The program on docs/checkpoints.md, as it is printed, started twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")


def test_it_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for more in ("4", "6"):
        changed = program.replace('"num_episode": 4', f'"num_episode": {more}')
        exec(compile(changed, "checkpoints.md", "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    assert "resumed from run/checkpoints/episode-000004: 4 episodes done" in out
    assert "runtime.num_episode: 4 -> 6" in out
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [*range(7)]
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("episode-*"))
    assert saved[-2:] == ["episode-000005", "episode-000006"]
    assert "episode-000004" in saved  # which the second run began with
    assert 3 <= len(saved) <= 4  # the best one may be one of them


def test_every_field_of_checkpoints_is_told() -> None:
    for field in ("save_episode_interval", "keep_last", "keep_best", "best_metric"):
        assert f"`{field}: " in PAGE
