# SPDX-License-Identifier: Apache-2.0
"""What of a run goes into its record, and when: the engine's side of `record/`."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from chatlearn import __version__
from chatlearn.checkpoint.rng import rng_states
from chatlearn.config import given_on_command_line
from chatlearn.observability.numbers import quantity
from chatlearn.observability.recorder import Recorder
from chatlearn.program import Program
from chatlearn.record.recording import Recording, recorded_episodes, rewind, tidy, tokenizer_of
from chatlearn.stage import Stage

TRAINER: Final = "trainer_flow"


class RecordKeeping:
    """Record a run if `runtime.record` says so; else leave alone what runs, and tidy what lies there.

    Args:
        program: of the run.
        stage: its modules.
        recorder: of the run; told of sizes and of what cannot be kept.
        done: episodes done when the run was started; later ones in the record belong to what is run again.
    """

    def __init__(self, program: Program, stage: Stage, recorder: Recorder, done: int) -> None:
        self._stage = stage
        self._recorder = recorder
        self.tap: Recording | None = None
        """What the runtime shows every call to."""
        self._bytes = 0
        self._seconds = 0.0
        self._root = recorder.folder.path / "record"
        rewind(self._root, done)
        if recorder.folder.moved_to is not None:
            tidy(recorder.folder.moved_to / "record")
        runtime = program.config.runtime
        if runtime.record:
            self.tap = Recording(
                self._root,
                start=_describe_start(program),
                done=done,
                last=runtime.record_last,
                states=rng_states,
                note=recorder.note,
            )
            self._keep_tokenizers(program)

    def _keep_tokenizers(self, program: Program) -> None:
        """Keep what turns token ids into text, of every module that samples; without it a record is one in ids."""
        modules = {
            m.name: m for name, g in program.graphs.items() if name != TRAINER for m in g.modules
        }
        for name, module in modules.items():
            save: Any = getattr(getattr(module, "tokenizer", None), "save_pretrained", None)
            if not callable(save):
                continue
            try:
                save(tokenizer_of(self._root, name))
            except Exception as error:  # noqa: BLE001 - no run fails for want of its text
                self._recorder.note(
                    f"not recorded: the tokenizer of {name}: {type(error).__name__}: {error}"
                )

    @contextmanager
    def episode(self, number: int, train_iteration: int) -> Generator[None]:
        """Gather what an episode (from 1) runs; `keep` writes it."""
        self._bytes, self._seconds = 0, 0.0
        if self.tap is None:
            yield
            return
        counts = {f"{m}.{s}": n for (m, s), n in self._stage.iterations.items()}
        with self.tap.episode(number, {"iterations": counts, "train_iteration": train_iteration}):
            yield

    def keep(self) -> None:
        """Write the episode that was gathered.

        Raises:
            OutputError: it cannot be written.
        """
        if self.tap is not None:
            with self._recorder.phase("record"):
                self.tap.keep()
            self._count(self.tap)

    @contextmanager
    def evaluation(self, episodes: int) -> Generator[None]:
        """Gather an evaluation after `episodes` episodes, and write it when it is done.

        Raises:
            OutputError: it cannot be written.
        """
        if self.tap is None:
            yield
            return
        with self.tap.episode(episodes, {"iterations": {}, "train_iteration": 0}):
            yield
        with self._recorder.phase("record"):
            self.tap.keep_evaluation()
        self._count(self.tap)

    def note_size(self) -> None:
        """Say how large the record is."""
        if self.tap is None:
            return
        episodes = recorded_episodes(self._root)
        total = sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file())
        trained = sum(1 for number in episodes if number)
        of = f" of {trained} episode{'s' * (trained != 1)}" if trained else ""
        self._recorder.note(f"record: {quantity(total)}B{of} in {self._root}")

    def _count(self, tap: Recording) -> None:
        self._bytes += tap.bytes
        self._seconds += tap.seconds
        self._recorder.recorded(self._bytes, self._seconds)


def _describe_start(program: Program) -> dict[str, Any]:
    """Return what is needed to run the same script in the same way again."""
    recipe, overrides = given_on_command_line()
    script, *arguments = sys.argv or [""]
    path = Path(script)
    return {
        "script": str(path.resolve()) if path.is_file() else "",
        "arguments": arguments,
        "recipe": str(recipe.resolve()) if recipe is not None else "",
        "overrides": list(overrides),
        "folder": str(Path.cwd()),
        "config": program.config.to_dict(program.module_configs),
        "chatlearn": __version__,
    }
