# SPDX-License-Identifier: Apache-2.0
"""How a call of a module's method becomes a node while a flow is traced, and stays a plain call otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from chatlearn.module import BaseModule


class Tracer(Protocol):
    """Records calls of modules while a flow function runs on symbolic values."""

    def is_symbolic(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether any argument is, or holds, a symbolic value."""
        ...

    def record(
        self, module: BaseModule, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the call as a node and return its symbolic output."""
        ...


ACTIVE_TRACER: ContextVar[Tracer | None] = ContextVar("chatlearn_active_tracer", default=None)


@functools.lru_cache(maxsize=4096)
def traceable(function: Callable[..., Any], method: str) -> Callable[..., Any]:
    """Wrap a method so that a call with symbolic values is recorded, under its name in the class, while tracing."""

    @functools.wraps(function)
    def call(self: BaseModule, *args: Any, **kwargs: Any) -> Any:
        tracer = ACTIVE_TRACER.get()
        if tracer is None:
            _refuse_leaked(method, args, kwargs)
        elif tracer.is_symbolic(args, kwargs):
            return tracer.record(self, method, args, kwargs)
        return function(self, *args, **kwargs)

    return call


def _refuse_leaked(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Outside a trace a symbolic value means nothing: it was kept from a flow that was traced before."""
    for value in (*args, *kwargs.values()):
        if (refuse := getattr(cast("object", type(value)), "refuse_outside", None)) is not None:
            refuse(value, method)


def traceable_static(function: Callable[..., Any], method: str) -> Callable[..., Any]:
    """Do for a static method what `traceable` does for a bound one."""

    def call(module: BaseModule, *args: Any, **kwargs: Any) -> Any:
        tracer = ACTIVE_TRACER.get()
        if tracer is not None and tracer.is_symbolic(args, kwargs):
            return tracer.record(module, method, args, kwargs)
        return function(*args, **kwargs)

    return call
