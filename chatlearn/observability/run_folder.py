# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its files by name, atomic writes, one run at a time, earlier runs kept."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from chatlearn.errors import ChatLearnError, OutputError
from chatlearn.observability.atomic import write_atomically

NAMES: Final = (
    "metrics.jsonl",
    "transcripts.jsonl",
    "transcripts.damaged.jsonl",
    "config.yaml",
    "config_origins.json",
    "summary.json",
    "report.html",
    "flows",
    "record",
    "checkpoints",
    "model",
    "tensorboard",
)
"""All that a run writes; nothing else in the folder is ever touched."""
LOCK: Final = ".lock"
"""Locked while a run lives; that the file exists tells a run's folder from any other."""


class RunFolder:
    """Owns the output folder of one run until `close()`.

    A folder in which an earlier run lies is taken over: where this run does not resume it, the
    earlier files move to `earlier/<NNNN>/` and `moved_to` says so.

    Example:
        >>> with RunFolder("runs/grpo") as folder:
        ...     folder.write_text("config.yaml", text)
    """

    def __init__(self, path: str | Path, *, resume: bool | Callable[[Path], bool] = False) -> None:
        """Create and lock the folder.

        Args:
            path: of the folder.
            resume: whether the run goes on from what lies there; a function is asked once nobody else writes there.

        Raises:
            OutputError: The folder cannot be made or written, or another run is using it, or it
                holds files of the names we would write that no run has written.
        """
        self.path = Path(path)
        self.moved_to: Path | None = None
        self._descriptor: int | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            was_ours = (self.path / LOCK).exists()
            self._lock()
            if not (resume(self.path) if callable(resume) else resume):
                self._move_aside(was_ours)
        except ChatLearnError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise OutputError(
                f"the output folder cannot be used: {error.strerror or error}",
                place=str(error.filename or self.path),
                fix="choose another folder with runtime.output_dir=...",
            ) from error

    @property
    def metrics(self) -> Path:
        """One row per episode."""
        return self.path / "metrics.jsonl"

    @property
    def transcripts(self) -> Path:
        """Sampled prompts and completions."""
        return self.path / "transcripts.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def origins(self) -> Path:
        """Who set each configuration value: `{"runtime.seed": "grpo.yaml:3", ...}`."""
        return self.path / "config_origins.json"

    @property
    def summary(self) -> Path:
        """The run's headline numbers."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.path / "report.html"

    @property
    def flows(self) -> Path:
        """Drawings of the flows."""
        return self.path / "flows"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, `latest` naming the newest whole one."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model in Hugging Face format."""
        return self.path / "model"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    def write_text(self, name: str, text: str) -> Path:
        """Write a file so that a reader, or a crash, sees the old one or the new one whole."""
        target = self.path / name
        write_atomically(target, text, within=self.path)
        return target

    def close(self) -> None:
        """Let go of the folder; safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)  # which releases the lock
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        import fcntl

        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._descriptor = descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip() or "unknown"
            raise OutputError(
                f"another run, process {owner}, is writing to the output folder",
                place=str(self.path),
                fix="wait for it, or choose another folder with runtime.output_dir=...",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # A file system without locks: the run goes on, unguarded.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _move_aside(self, was_ours: bool) -> None:
        found = [self.path / name for name in NAMES if (self.path / name).exists()]
        if not found:
            return
        if not was_ours:
            (self.path / LOCK).unlink(missing_ok=True)  # the next try must not take it for ours
            raise OutputError(
                f"the output folder holds {found[0].name!r}, which no run has written",
                place=str(self.path),
                fix="choose an empty or new folder with runtime.output_dir=...",
            )
        earlier = self.path / "earlier"
        earlier.mkdir(exist_ok=True)
        taken = [int(entry.name) for entry in earlier.iterdir() if entry.name.isdigit()]
        self.moved_to = earlier / f"{max(taken, default=0) + 1:04d}"
        self.moved_to.mkdir()
        # Checkpoints go first: a crash on the way must not leave them to a run that resumes without the rest.
        for entry in sorted(found, key=lambda path: path != self.checkpoints):
            entry.rename(self.moved_to / entry.name)


def open_folder(path: Path | None, goes_on: Callable[[Path], bool]) -> RunFolder:
    """Open the folder that was asked for, or `runs/<script>`, or the first free one numbered after it."""
    if path is not None:
        return RunFolder(path, resume=goes_on)
    called = sys.argv[0]
    script = Path("session" if called in ("", "-c", "-m") else called)
    name = script.parent.name if script.stem == "__main__" else script.stem
    default = Path("runs") / (name or "session")
    for number in range(1, 100):
        candidate = default if number == 1 else default.with_name(f"{default.name}-{number}")
        try:
            return RunFolder(candidate, resume=goes_on)
        except OutputError as error:
            if "another run" not in error.cause:
                raise
    raise OutputError("a hundred runs are writing already", place=str(default))
