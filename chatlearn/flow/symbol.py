# SPDX-License-Identifier: Apache-2.0
"""The symbolic value that stands for a batch while a flow is traced, and what it refuses.

A symbol may be passed on, stored, returned and printed. Whatever would need the data it stands for (branching,
iterating, indexing, arithmetic, conversion) raises a `FlowError` that names the user's line and the way out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

from chatlearn.errors import FlowError, SymbolError

_PACKAGE: Final = str(Path(__file__).resolve().parent.parent) + os.sep


_PLACE: ContextVar[str] = ContextVar("chatlearn_place", default="")


@contextmanager
def placed_at(place: str) -> Generator[None]:
    """Have `user_place()` return `place`: for flows that this package wrote and the user's line asked for."""
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def user_place() -> str:
    """Return `file:line` of the innermost frame outside this package."""
    if given := _PLACE.get():
        return given
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def raising_place(error: BaseException) -> str:
    """Return `file:line` of the innermost frame outside this package in the traceback of `error`."""
    place, tb = "", error.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        if not _is_ours(code.co_filename):
            place = f"{code.co_filename}:{tb.tb_lineno} in {code.co_name}"
        tb = tb.tb_next
    return place


def _is_ours(filename: str) -> bool:
    return filename.startswith((_PACKAGE, "<frozen"))


class Trace(Protocol):
    """What a symbol belongs to."""

    refused: FlowError | None


class Symbol:
    """Stand for the output of node `node` of the trace `trace` (or for the flow's own batch)."""

    __slots__ = ("label", "node", "trace")
    trace: Trace
    node: int
    label: str

    def __init__(self, trace: Trace, node: int, label: str) -> None:
        for name, value in (("trace", trace), ("node", node), ("label", label)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"<symbolic {self.label}>"

    def __getattr__(self, name: str) -> NoReturn:
        raise SymbolError(
            f"{self!r} has no attribute {name!r}: it stands for a batch that does not exist yet",
            place=user_place(),
            fix="read columns inside a module's step method, where `data` is a real dict",
        )

    def refuse_outside(self, method: str) -> NoReturn:
        """Refuse to be the argument of a module's method that is called while no flow is traced."""
        raise FlowError(
            f"`{method}` was called with {self!r} outside of a flow",
            place=user_place(),
            fix="call modules inside the flow function; elsewhere give them a real dict of columns",
        )

    def __format__(self, spec: str) -> str:
        return _refuse_format(self) if spec else repr(self)

    def __copy__(self) -> Symbol:
        return self

    def __deepcopy__(self, memo: object) -> Symbol:
        return self

    # Identity only: comparing by value is one of the refusals below.
    __hash__ = object.__hash__


_IN_A_MODULE = "do it inside a module's step method, where `data` is a real dict of columns"
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "divmod", "mod", "pow", "matmul")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")

_REFUSALS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "branch on or compare",
        "decide inside a module's step method, or on a Python value that is known before the flow runs",
        ("__bool__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__"),
    ),
    (
        "iterate over",
        "loop over Python values; splitting a batch into samples is the engine's work",
        ("__iter__", "__next__", "__len__", "__reversed__"),
    ),
    ("unpack", "pass the value itself; the engine merges several inputs into one dict", ("keys",)),
    ("set an attribute of", _IN_A_MODULE, ("__setattr__", "__delattr__")),
    ("index", _IN_A_MODULE, ("__getitem__", "__setitem__", "__delitem__")),
    (
        "convert",
        _IN_A_MODULE,
        ("__int__", "__float__", "__complex__", "__index__", "__bytes__", "__round__", "__array__"),
    ),
    (
        "calculate with",
        _IN_A_MODULE,
        (
            *(f"__{side}{name}__" for name in (*_ARITHMETIC, *_BITWISE) for side in ("", "r", "i")),
            *("__neg__", "__pos__", "__abs__", "__invert__"),
        ),
    ),
    ("call", "pass it to a module's step method", ("__call__",)),
    (
        "await",
        "leave out `await`: step methods may be `async def`, flows are plain",
        ("__await__",),
    ),
    ("enter", "use `with ControlDependencies(value):` to order nodes", ("__enter__", "__exit__")),
)


def _refusal(verb: str, fix: str) -> Callable[..., NoReturn]:
    def refuse(self: Symbol, *_: Any, **__: Any) -> NoReturn:
        error = FlowError(
            f"cannot {verb} {self!r} while a flow is traced", place=user_place(), fix=fix
        )
        self.trace.refused = self.trace.refused or error  # should the user's code swallow it
        raise error

    return refuse


_refuse_format = _refusal("format", _IN_A_MODULE)

for _verb, _fix, _names in _REFUSALS:
    for _name in _names:
        setattr(Symbol, _name, _refusal(_verb, _fix))
