# SPDX-License-Identifier: Apache-2.0
"""The program on docs/evaluation.md, as it is printed, on a model that takes no time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatlearn.config import command_line
from chatlearn.testing import save_tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen3-0.6B"
SMALL = [
    "runtime.num_episode=2",
    "runtime.num_inference_per_prompt=2",
    "runtime.output_dir=out",
    "models.policy.max_new_tokens=4",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train", 3), ("val", 5), ("hard", 2)):
        text = "".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(rows))
        (tmp_path / f"{name}.jsonl").write_text(text)
    (configuration,) = blocks("yaml")
    (tmp_path / "eval.yaml").write_text(configuration)
    program = "\n".join(blocks("python"))
    assert program.count(MODEL) == 2
    program = program.replace(MODEL, str(save_tiny_model(tmp_path / "tiny")))
    scope: dict[str, object] = {"__name__": "__main__"}
    with command_line(SMALL):
        exec(compile(program, "evaluation.md", "exec"), scope)
    assert len(scope["rewards"]) == 5  # pyright: ignore[reportArgumentType]
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text()
    for name in ("reward/pass@8", "hard/reward/pass@1", "hard/longest", "val/reward/avg@8"):
        assert f'"eval/{name}":' in metrics
    assert "pass@2" not in metrics
