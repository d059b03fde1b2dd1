# SPDX-License-Identifier: Apache-2.0
"""Where metrics go besides the run folder's own file: the port, and TensorBoard's event files."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from chatlearn.errors import OutputError, write_failure


class Tracker(Protocol):
    """Receives the metrics of every episode."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of episode `step`."""
        ...

    def go_on(self, first_step: int) -> None:
        """Forget what an earlier process has logged from episode `first_step` on; it is done again."""
        ...

    def flush(self) -> None:
        """Write out what was logged: a checkpoint counts on it."""
        ...

    def close(self) -> None:
        """Write out what is left; nothing follows."""
        ...


class TensorBoardTracker:
    """Writes TensorBoard event files through its light writer, without torch or TensorFlow.

    Example:
        >>> tracker = TensorBoardTracker(folder / "tensorboard")
        >>> tracker.log(1, {"policy_trainer/loss": 0.1})
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        events, summaries = cast("Any", event_pb2), cast("Any", summary_pb2)  # made at import
        self._event, self._summary = events.Event, summaries.Summary
        self._session = events.SessionLog
        self._folder = folder
        with self._naming_errors():
            self._writer: Any = EventFileWriter(str(folder), max_queue_size=20, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one event with a scalar per metric; TensorBoard shows non-finite ones as such."""
        values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in metrics.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._add(event)

    def go_on(self, first_step: int) -> None:
        """Have TensorBoard forget what it has from `first_step` on."""
        start = self._session(status=self._session.START)
        self._add(self._event(wall_time=time.time(), step=first_step, session_log=start))

    def flush(self) -> None:
        """Have the events in the file."""
        with self._naming_errors():
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        with self._naming_errors():
            self._writer.close()

    def _add(self, event: Any) -> None:
        with self._naming_errors():  # of the writer's thread, raised at the next event
            self._writer.add_event(event)

    @contextmanager
    def _naming_errors(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            cause, fix = write_failure(error)
            raise OutputError(
                f"cannot write TensorBoard events: {cause}", place=str(self._folder), fix=fix
            ) from error
