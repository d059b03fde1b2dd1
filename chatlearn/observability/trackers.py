# SPDX-License-Identifier: Apache-2.0
"""Where metrics go besides the run folder's own file: the port, and TensorBoard's event files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from chatlearn.errors import OutputError


class Tracker(Protocol):
    """Receives the metrics of every episode."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of episode `step`."""
        ...

    def close(self) -> None:
        """Write out what is left; nothing follows."""
        ...


class TensorBoardTracker:
    """Writes TensorBoard event files through its light writer, without torch or TensorFlow.

    With `first_step` given (a resumed run), TensorBoard forgets what it has from that step on.

    Example:
        >>> tracker = TensorBoardTracker(folder / "tensorboard")
        >>> tracker.log(1, {"policy_trainer/loss": 0.1})
    """

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        events, summaries = cast("Any", event_pb2), cast("Any", summary_pb2)  # made at import
        self._event, self._summary = events.Event, summaries.Summary
        self._folder = folder
        try:
            self._writer: Any = EventFileWriter(str(folder), max_queue_size=20, flush_secs=10)
        except OSError as error:
            raise OutputError(
                f"cannot write TensorBoard events: {error.strerror}", place=str(folder)
            ) from error
        if first_step is not None:
            start = events.SessionLog(status=events.SessionLog.START)
            self._add(events.Event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one event with a scalar per metric; TensorBoard shows non-finite ones as such."""
        values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in metrics.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._add(event)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _add(self, event: Any) -> None:
        try:
            self._writer.add_event(event)
        except OSError as error:  # of the writer's thread, raised at the next event
            raise OutputError(
                f"cannot write TensorBoard events: {error.strerror}",
                place=str(self._folder),
                fix="free space on that disk or choose another runtime.output_dir",
            ) from error
