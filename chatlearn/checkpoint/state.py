# SPDX-License-Identifier: Apache-2.0
"""What a run must remember to go on with the next sample: `checkpoint.json` in every checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from chatlearn.errors import CheckpointError

FORMAT = 1


@dataclass
class RunState:
    """Counters of a run; everything else that resumes (weights, optimiser, RNG) lies beside it.

    Example:
        `{"episode": 12, "train_iteration": 48, "prompts_drawn": 768, "iterations": {"policy.forward_step": 96}, ...}`
    """

    episode: int = 0
    """Episodes done."""
    train_iteration: int = 0
    """Train steps done."""
    prompts_drawn: int = 0
    """Prompts taken from the datasets; the sampler's whole state."""
    dataset_sizes: list[int] = field(default_factory=list[int])
    """Rows of each dataset as the run samples from it, to notice that one changed."""
    iterations: dict[str, int] = field(default_factory=dict[str, int])
    """Calls so far of each `module.method`."""
    policy_versions: dict[str, int] = field(default_factory=dict[str, int])
    """Parameter syncs received, per module."""
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])
    """Configuration that a resumed run must share: it numbers samples and seeds them."""
    config_digest: str = ""
    """SHA-256 of the resolved configuration."""
    datasets: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Of each dataset as it was given: its `rows`, and the `sha256` of them ("" where it makes them when asked)."""
    replay: dict[str, int] = field(default_factory=dict[str, int])
    """Which episodes were kept for replay: `max_replay_episode`, `replay_episode_offset`; empty without replay."""
    after_episode_due: list[str] = field(default_factory=list[str])
    """Modules whose `after_episode` of the last episode is still to be called: all of them in a checkpoint between
    episodes, none in one at the end of a run. Empty in checkpoints of versions that never called it on resume."""
    files: dict[str, int] = field(default_factory=dict[str, int])
    """The checkpoint's other files and their bytes, to notice that one is missing or cut off."""

    def counts(self) -> Counter[tuple[str, str]]:
        """Return `iterations` as the scheduler keeps them."""
        split = {tuple(key.rsplit(".", 1)): count for key, count in self.iterations.items()}
        return Counter({(key[0], key[1]): count for key, count in split.items()})

    def to_json(self) -> str:
        """Return the content of `checkpoint.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read `checkpoint.json` of a checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged or of another format.
        """
        path = folder / "checkpoint.json"
        try:
            content: object = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                "no checkpoint here",
                place=str(folder),
                fix="name a folder that holds checkpoint.json",
            ) from None
        except (OSError, ValueError) as error:
            raise _damaged(error, path) from error
        if not isinstance(content, dict):
            raise _damaged("it holds no JSON object", path)
        values = cast("dict[str, Any]", content)
        if values.pop("format", None) != FORMAT:
            raise CheckpointError(
                "the checkpoint has another format",
                place=str(path),
                fix="resume with the version that wrote it, or start anew with runtime.resume=never",
            )
        try:
            state = cls(**values)
        except TypeError as error:
            raise _damaged(error, path) from error
        for name, default in vars(cls()).items():
            if not isinstance(getattr(state, name), type(default)):
                raise _damaged(f"{name!r} is no {type(default).__name__}", path)
        return state


def _damaged(what: object, path: Path) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint is damaged: {what}",
        place=str(path),
        fix="resume from an older one beside it: runtime.resume=<folder>",
    )
