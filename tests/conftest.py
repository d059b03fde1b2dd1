# SPDX-License-Identifier: Apache-2.0
"""Every test starts from the default configuration, in a folder of its own, on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chatlearn import config


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No configuration from an earlier test; a run's default folder `runs/` goes to the test's own folder."""
    monkeypatch.chdir(tmp_path)
    with config.command_line():
        yield
