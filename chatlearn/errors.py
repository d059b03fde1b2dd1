# SPDX-License-Identifier: Apache-2.0
"""The one exception tree: every error names its cause, its place and the way out.

Example:
    >>> raise ConfigError("unknown key 'runtime.sed'", place="grpo.yaml", fix="did you mean 'seed'?")
    Traceback (most recent call last):
    ...
    chatlearn.errors.ConfigError: unknown key 'runtime.sed'
      at: grpo.yaml
      fix: did you mean 'seed'?
"""

from __future__ import annotations

import errno
import inspect
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

_ERRNO = re.compile(r"os error (\d+)")


class ChatLearnError(Exception):
    """Report what went wrong (`cause`), where (`place`) and what to do about it (`fix`)."""

    def __init__(self, cause: str, *, place: str = "", fix: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.place = place
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.cause]
        if self.place:
            lines.append(f"  at: {self.place}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self):  # keyword arguments do not survive the default reduction
        return _rebuild, (type(self), self.cause, self.place, self.fix)


def _rebuild(cls: type[ChatLearnError], cause: str, place: str, fix: str) -> ChatLearnError:
    return cls(cause, place=place, fix=fix)


class ConfigError(ChatLearnError):
    """A configuration value is unknown, mistyped or contradicts another one."""


class FlowError(ChatLearnError):
    """A flow function cannot be turned into a graph of nodes."""


class SymbolError(FlowError, AttributeError):
    """A symbolic value was asked for an attribute (an AttributeError too, so `hasattr` is false)."""


class DataError(ChatLearnError):
    """A dataset, a row of it or a prompt cannot be used."""


class BatchError(ChatLearnError):
    """A batch that a module received or returned breaks the rules of batches."""


class RewardError(ChatLearnError):
    """A reward function gave no usable reward."""


class NonFiniteError(ChatLearnError):
    """A loss or a gradient is NaN or infinite."""


class SyncError(ChatLearnError):
    """Parameters did not, or could not, travel from a trainer to an inference module."""


class CheckpointError(ChatLearnError):
    """A checkpoint cannot be written, is damaged or belongs to another run."""


class RecordError(ChatLearnError):
    """What a run recorded is missing, damaged, or does not have what is asked of it."""


class OutputError(ChatLearnError):
    """The output folder cannot be used."""


class EngineError(ChatLearnError):
    """The engine was asked for something its state does not allow."""


class ModuleError(ChatLearnError):
    """A module's method raised; the original exception is this error's `__cause__`."""


class DeadlineError(ModuleError):
    """A module's step took longer than `models.<name>.timeout_s`."""


class HookError(ModuleError):
    """A function that the user set on an engine or evaluator raised; the original exception is the `__cause__`."""


def describe_function(function: Callable[..., Any]) -> str:
    """Name a user's function for an error: `newest (train.py:12)`; partials and callable objects are looked into."""
    inner: Any = function
    while isinstance(inner, partial):
        inner = cast("Any", inner).func
    if not hasattr(inner, "__qualname__"):
        inner = type(inner).__call__
    code = getattr(inspect.unwrap(inner), "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"{inner.__qualname__}{place}"


def write_failure(error: OSError) -> tuple[str, str]:
    """Say why something could not be written, and what to do about it: the cause and the fix of an error.

    Example:
        >>> write_failure(OSError(errno.ENOSPC, "No space left on device"))[0]
        'No space left on device'
    """
    elsewhere = "choose another runtime.output_dir"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = f"free space there, or {elsewhere}"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        fix = f"make the folder writable for this user, or {elsewhere}"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        fix = f"leave the run's folder in place while it runs, or {elsewhere}"
    else:
        fix = f"see whether that disk works, or {elsewhere}"
    return error.strerror or str(error), fix


def os_error_behind(error: BaseException | None) -> OSError | None:
    """Return the operating system's error that another one hides, as libraries that write files do, if there is one.

    A library written in Rust, as safetensors is, leaves no more of it than its number, in the text.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error
        if found := _ERRNO.search(str(error)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        error = error.__cause__ or error.__context__
    return None
