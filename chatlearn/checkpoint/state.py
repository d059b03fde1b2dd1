# SPDX-License-Identifier: Apache-2.0
"""What a run must remember to go on with the next sample: `checkpoint.json` in every checkpoint."""

from __future__ import annotations

import functools
import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from chatlearn.errors import CheckpointError

FORMAT = 2
"""Format 1 had no digests, no metrics and no configuration; it is still read."""
LIBRARIES = ("chatlearn", "torch", "transformers", "numpy", "safetensors")

Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class GivenData:
    """A dataset as it was given to the run."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    rows: Count
    sha256: str
    """Of the rows; "" where it makes them when asked."""


@dataclass
class RunState:
    """Counters of a run; everything else that resumes (weights, optimiser, RNG, metrics) lies beside it.

    Example:
        `{"episode": 12, "train_iteration": 48, "prompts_drawn": 768, "iterations": {"policy.forward_step": 96}, ...}`
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    episode: Count = 0
    """Episodes done."""
    train_iteration: Count = 0
    """Train steps done."""
    prompts_drawn: Count = 0
    """Prompts taken from the datasets; the sampler's whole state."""
    dataset_sizes: list[Count] = field(default_factory=list[int])
    """Rows of each dataset as the run samples from it, to notice that one changed."""
    iterations: dict[str, Count] = field(default_factory=dict[str, int])
    """Calls so far of each `module.method`."""
    policy_versions: dict[str, Count] = field(default_factory=dict[str, int])
    """Parameter syncs received, per module."""
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])
    """Configuration that a resumed run must share: it numbers samples and seeds them."""
    config_digest: str = ""
    """SHA-256 of the resolved configuration."""
    datasets: list[GivenData] = field(default_factory=list[GivenData])
    """Each dataset as it was given."""
    replay: dict[str, int] = field(default_factory=dict[str, int])
    """Which episodes were kept for replay: `max_replay_episode`, `replay_episode_offset`; empty without replay."""
    after_episode_due: list[str] = field(default_factory=list[str])
    """Modules whose `after_episode` of the last episode is still to be called: all of them in a checkpoint between
    episodes, none in one at the end of a run. Empty in checkpoints of versions that never called it on resume."""
    evaluation_due: bool = False
    """Whether the evaluation of the last episode is still to be made: it was interrupted, or it failed."""
    files: dict[str, Count] = field(default_factory=dict[str, int])
    """The checkpoint's other files and their bytes, to notice that one is missing or cut off."""
    sequence: Count = 0
    """Which one it is of the checkpoints in its folder, as they were written: after going back to an older one, the
    newest is not the one of the most episodes. 0 in checkpoints of versions that did not count them."""
    digests: dict[str, str] = field(default_factory=dict[str, str])
    """XXH3 (128 bits) of each of `files`, to notice that a byte changed."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """The resolved configuration, to say what changed."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    """Python and libraries that the run was saved with."""
    architectures: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Of each module with a model: its `class` and, if it has one, its `config`."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """The finite metrics of the last episode, by which checkpoints are ranked."""
    transcripts: Count = 0
    """Samples written to `transcripts.jsonl` so far."""

    def counts(self) -> Counter[tuple[str, str]]:
        """Return `iterations` as the scheduler keeps them."""
        split = {tuple(key.rsplit(".", 1)): count for key, count in self.iterations.items()}
        return Counter({(key[0], key[1]): count for key, count in split.items()})

    def to_json(self) -> str:
        """Return the content of `checkpoint.json`; its last value is a digest of all others."""
        values = {"format": FORMAT, **asdict(self)}
        return json.dumps({**values, "digest": _digest(values)}, indent=2)

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read `checkpoint.json` of a checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged or of a newer format.
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
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(error, path) from error
        if not isinstance(content, dict):
            raise _damaged("it holds no JSON object", path)
        return cls._of(cast("dict[str, Any]", content), path)

    @classmethod
    def _of(cls, values: dict[str, Any], path: Path) -> RunState:
        written = values.pop("digest", None)
        found: object = values.get("format")
        if type(found) is not int or not 1 <= found <= FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {str(found)[:40]}, and this version of chatlearn reads 1 to {FORMAT}",
                place=str(path),
                fix="resume with the version that wrote it",
            )
        if found > 1 and written != _digest(values):
            raise _damaged("its content does not fit its digest", path)
        del values["format"]
        try:
            state = _STATE.validate_json(json.dumps(values))
        except (ValidationError, RecursionError) as error:
            raise _damaged(_first_line(error), path) from error
        for name in state.iterations:
            if "." not in name:
                raise _damaged(f"iterations: {name!r} names no module and method", path)
        return state


_STATE = TypeAdapter(RunState)


@functools.cache
def versions() -> dict[str, str]:
    """Return what a run's numbers depend on besides its code: the versions of Python and of libraries."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _digest(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _first_line(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _damaged(what: object, path: Path) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint is damaged: {path.name}: {what}",
        place=str(path),
        fix="resume from an older one beside it: runtime.resume=<folder>",
    )
