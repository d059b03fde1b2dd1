# SPDX-License-Identifier: Apache-2.0
"""Leave trained models behind in a format that others load."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from chatlearn.checkpoint.files import flush
from chatlearn.errors import ModuleError, OutputError, os_error_behind, write_failure
from chatlearn.module import BaseModule, call_hook
from chatlearn.observability.recorder import Recorder
from chatlearn.program import Program

_PARTIAL: Final = ".exporting"
"""The folder beside `model/` in which it is made; the run's folder is locked, so nobody else has one."""
_OF_THE_DISK: Final = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}


def export_models(program: Program, recorder: Recorder) -> Exception | None:
    """Write what the trainer flow's modules have learned: to `model/`, or `model/<name>/` for several.

    A model that an earlier run left there stays whole until the new one is, and nothing of it remains then.

    Returns:
        What went wrong, if anything did: the run's report comes first.
    """
    graph = program.graphs.get("trainer_flow")
    modules = graph.modules if graph else []
    trainers = [m for m in modules if type(m).export_model is not BaseModule.export_model]
    target = recorder.folder.model
    target = target.resolve() if target.is_symlink() else target
    partial = target.parent / _PARTIAL
    try:
        with recorder.phase("exporting"), _written(target, partial):
            written: list[str] = []
            for module in trainers:
                folder = partial / "model" / (module.name if len(trainers) > 1 else "")
                folder.parent.mkdir(parents=True, exist_ok=True)
                call_hook(module, "export_model", folder)
                if folder.exists():
                    _add_tokenizer(program, module, folder)
                    written.append(module.name)
            if written:
                _put_in_place(partial, target)
    except Exception as error:  # noqa: BLE001 - raised by whom it is returned to, behind the report
        return error
    for name in written:
        folder = target / (name if len(trainers) > 1 else "")
        recorder.note(f"model of {name}: {folder}")
    return None


def _add_tokenizer(program: Program, module: BaseModule, folder: Path) -> None:
    """Beside a model whose module could have a tokenizer and has none, write that of a policy synced from it."""
    if getattr(module, "tokenizer", module) is not None:
        return
    for source, destination in program.sync_pairs:
        save: Any = getattr(getattr(destination, "tokenizer", None), "save_pretrained", None)
        if source is module and callable(save):
            save(folder)
            return


def _put_in_place(partial: Path, target: Path) -> None:
    """Have all files on disk, then put the new model where the old one is."""
    new, old = partial / "model", partial / "old"
    for path in new.rglob("*"):
        flush(path)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    flush(target.parent)


@contextmanager
def _written(target: Path, partial: Path) -> Generator[None]:
    """Leave nothing half-made behind, and turn what the disk says into an error that names the model."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield
    except Exception as error:
        behind = os_error_behind(error)
        if behind is None:
            raise
        if isinstance(error, ModuleError) and behind.errno not in _OF_THE_DISK:
            raise  # of the module's own doing
        _, fix = write_failure(behind)
        cause = os.strerror(behind.errno) if behind.errno else str(behind)
        raise OutputError(
            f"the trained model cannot be exported: {cause}",
            place=str(target),
            fix=f"{fix}; every episode is in a checkpoint, and the same command with runtime.resume=auto exports again",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
