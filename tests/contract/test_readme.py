# SPDX-License-Identifier: Apache-2.0
"""The README's program and its configuration, as they are printed, on a model that takes no time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from chatlearn.config import command_line
from chatlearn.inspection import Inspection, inspecting
from chatlearn.testing import save_tiny_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen3-0.6B"
SMALL = [
    "runtime.num_episode=2",
    "runtime.sample_per_episode=8",
    "runtime.num_inference_per_prompt=4",
    "runtime.train_global_batch_size=4",
    "models.policy.max_new_tokens=4",
]


def block(language: str) -> str:
    """Return the README's only code block of a language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lay out what the README's program reads; return the program, with a tiny model in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN_NAME", raising=False)
    (row,) = re.findall(r"A line of `train.jsonl` is `(.*?)`", README)
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text(f"{row}\n" * 3)
    (tmp_path / "grpo.yaml").write_text(block("yaml"))
    text = block("python")
    assert text.count(MODEL) == 1
    return text.replace(MODEL, str(save_tiny_model(tmp_path / "tiny")))


def test_it_runs(program: str, tmp_path: Path) -> None:
    with command_line(SMALL):
        exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
    for name in ("report.html", "metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "runs" / "grpo" / name).exists()


def test_its_configuration_is_optional(program: str, tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").unlink()
    without = re.sub(r"^chatlearn\.init\(.*\n", "", program, flags=re.MULTILINE)
    assert without != program
    with (
        command_line(),
        inspecting(lambda engine: engine.check()),
        pytest.raises(Inspection) as met,
    ):
        exec(compile(without, "README.md", "exec"), {"__name__": "__main__"})
    assert met.value.error is None


def test_links_and_paths_of_the_documents_lead_somewhere() -> None:
    command = [sys.executable, str(ROOT / "docs" / "check.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
