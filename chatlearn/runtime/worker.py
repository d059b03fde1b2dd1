# SPDX-License-Identifier: Apache-2.0
"""One replica of a module where it lives: calls its methods and tells precisely what failed."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from chatlearn.errors import ChatLearnError, ModuleError
from chatlearn.flow.batching import Batch, Padding, pad
from chatlearn.module import BaseModule

_SHOWN_UIDS = 16


@dataclass(frozen=True)
class Where:
    """The context of a call, for errors."""

    episode: int | None = None
    uids: Sequence[int] = ()


@dataclass
class Result:
    """What a call gave: the method's return value, the numbers it logged, and how long it took."""

    value: Any
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0


class Worker:
    """Call one replica's methods in this process."""

    def __init__(self, module: BaseModule) -> None:
        self.module = module
        self._takes_iteration: dict[str, bool] = {}

    def step(
        self,
        method: str,
        data: Batch | list[Batch],
        iteration: int,
        constants: Mapping[str, Any],
        where: Where,
    ) -> Result:
        """Call a step method with `data` (and `iteration`, if its signature has it)."""
        padding = cast("Padding", self.module.__dict__.get("_padding", {}))
        for batch in data if isinstance(data, list) else [data]:
            pad(batch, padding)
        if method not in self._takes_iteration:
            parameters = inspect.signature(getattr(self.module, method)).parameters
            self._takes_iteration[method] = "iteration" in parameters
        keywords = dict(constants)
        if self._takes_iteration[method]:
            keywords["iteration"] = iteration
        return self._call(method, getattr(self.module, method), where, data, **keywords)

    def hook(self, name: str, *args: Any, where: Where | None = None, **kwargs: Any) -> Any:
        """Call a hook of the module (`setup`, `before_episode`, ...) and return its value."""
        function = getattr(self.module, name)
        shown = "setup" if name == "set_up_once" else name
        return self._call(shown, function, where or Where(), *args, **kwargs).value

    def _call(
        self, method: str, function: Callable[..., Any], where: Where, *args: Any, **kwargs: Any
    ) -> Result:
        start = time.perf_counter()
        try:
            value = function(*args, **kwargs)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
        except Exception as error:
            raise self._error(method, error, where) from error
        logged: list[dict[str, float]] = self.module.__dict__.get("_metrics", [])
        metrics = {name: number for entry in logged for name, number in entry.items()}
        logged.clear()
        return Result(value, metrics, time.perf_counter() - start)

    def _error(self, method: str, error: Exception, where: Where) -> ModuleError:
        module = self.module
        text = (
            str(error) if isinstance(error, ChatLearnError) else f"{type(error).__name__}: {error}"
        )
        lines = [
            text,
            f"  module: {module.name} ({type(module).__name__})",
            f"  method: {method}",
            f"  replica: {module.replica_id}",
        ]
        if where.episode is not None:
            lines.append(f"  episode: {where.episode}")
        if where.uids:
            lines.append(f"  samples: {describe_uids(where.uids)}")
        return ModuleError("\n".join(lines))


def describe_uids(uids: Sequence[int]) -> str:
    """Return sample uids for people, e.g. `uid 3, 4, 5` (long lists are cut in the middle)."""
    shown = [str(uid) for uid in uids[:_SHOWN_UIDS]]
    if len(uids) > _SHOWN_UIDS:
        shown += ["...", str(uids[-1])]
    return f"uid {', '.join(shown)} ({len(uids)} in all)" if len(uids) > 1 else f"uid {uids[0]}"
