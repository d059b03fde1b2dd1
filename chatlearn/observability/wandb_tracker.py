# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases as a tracker: the only file that imports `wandb`, and only when asked to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatlearn.errors import ConfigError


class WandbTracker:
    """Sends every episode's metrics to a W&B run (offline with `WANDB_MODE=offline`).

    Example:
        >>> tracker = WandbTracker("my-project", folder.path, config={"runtime": {"seed": 0}})
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                "W&B is not installed", fix="pip install 'chatlearn[wandb]', or do not ask for it"
            ) from None
        init: Any = wandb.init  # pyright: ignore[reportUnknownVariableType]
        self._run: Any = init(project=project, dir=str(folder), config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of episode `step`."""
        self._run.log(dict(metrics), step=step)

    def go_on(self, first_step: int) -> None:
        """Forget nothing: every process has a W&B run of its own."""

    def flush(self) -> None:
        """Leave it to W&B, which keeps what it was told in a process of its own."""

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()
