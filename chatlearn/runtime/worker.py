# SPDX-License-Identifier: Apache-2.0
"""One replica of a module where it lives: calls its methods and tells precisely what failed."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from chatlearn.errors import ChatLearnError, DeadlineError, ModuleError
from chatlearn.flow.batch import Batch
from chatlearn.flow.batching import pad
from chatlearn.flow.namespace import own_columns
from chatlearn.flow.passage import enter, leave_all
from chatlearn.module import BaseModule, resolved_config, state_of, written_columns
from chatlearn.runtime.deadline import Deadline, DeadlinePassed, cancelled

_SHOWN_UIDS = 16

Leaving = Callable[[object], Any]
"""Gives the columns of what a step returned the names that they have outside its module's namespace."""


@dataclass(frozen=True)
class Where:
    """The context of a call, for errors and for the keys of random numbers."""

    episode: int = 0
    """Number of the episode from 1; 0 before the first and outside runs."""
    uids: Sequence[int] = ()
    turn: int = 0
    """Which call of its method in the flow this is."""


@dataclass
class Result:
    """What a call gave: the method's return value, the numbers it logged, and how long it took."""

    value: Any
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0


class EventLoop:
    """Run `async def` steps on one loop for a runtime's whole life, so that clients made in one call serve the next."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def wait_for(self, awaitable: Awaitable[Any], deadline: Deadline | None = None) -> Any:
        """Run an awaitable to its end, inside a notebook's running loop too; past the deadline it is cancelled."""
        if self._runner is None or self._runner.get_loop().is_running():  # in a thread given up
            self._runner = asyncio.Runner()
        work = _result_of(awaitable, deadline)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            try:
                return self._runner.run(work)
            finally:
                if inspect.getcoroutinestate(work) == inspect.CORO_SUSPENDED:
                    # It would not be cancelled, and must not go on beside the next call.
                    self._runner.get_loop().close()
                    self._runner = None
        with ThreadPoolExecutor(1) as beside:
            return beside.submit(self._runner.run, work).result()

    def close(self) -> None:
        """Close the loop, if there was need of one."""
        if self._runner is not None and not self._runner.get_loop().is_running():
            self._runner.close()
        self._runner = None

    def __del__(self) -> None:
        if (
            self._runner is not None and not self._runner.get_loop().is_running()
        ):  # of an engine that was never stopped; another loop may be running
            self._runner.get_loop().close()


async def _result_of(awaitable: Awaitable[Any], deadline: Deadline | None) -> Any:
    if deadline is None:
        return await awaitable
    timer = asyncio.timeout(deadline.leave_to_loop())
    try:
        async with timer:
            value = await awaitable
    except (KeyboardInterrupt, GeneratorExit, DeadlinePassed):
        raise
    except BaseException as error:
        if timer.expired():
            raise cancelled(deadline, awaitable, error) from error
        raise  # the step's own
    if timer.expired():
        raise cancelled(deadline, awaitable, None)
    return value


class Worker:
    """Call one replica's methods in this process."""

    def __init__(self, module: BaseModule, loop: EventLoop) -> None:
        self.module = module
        self._loop = loop
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
        state, config = state_of(self.module), resolved_config(self.module)
        state.turn, padding = where.turn, state.padding
        leaving = None
        if (namespace := config.namespace) is not None:
            data, leaving = self._enter(data, namespace)
        try:
            for batch in data if isinstance(data, list) else [data]:
                pad(batch, padding)
        except ChatLearnError as error:
            raise self._error(method, error, where) from error
        if method not in self._takes_iteration:
            parameters = inspect.signature(getattr(self.module, method)).parameters
            self._takes_iteration[method] = "iteration" in parameters
        keywords = dict(constants)
        if self._takes_iteration[method]:
            keywords["iteration"] = iteration
        deadline = None
        if config.timeout_s is not None:
            what = f"{self.module.name}.{method}, replica {self.module.replica_id}"
            deadline = Deadline(config.timeout_s, f"{what}, {describe_uids(where.uids)}")
        function = getattr(self.module, method)
        return self._call(method, function, where, (data,), keywords, leaving, deadline)

    def _enter(
        self, data: Batch | list[Batch], namespace: str
    ) -> tuple[Batch | list[Batch], Leaving]:
        """Return `data` as a module with a namespace sees it, and how what it returns leaves."""
        writes, state = written_columns(self.module), state_of(self.module)
        if isinstance(data, list):
            names = [tuple(batch) for batch in data]
            return (
                [enter(batch, namespace, writes) for batch in data],
                lambda value: leave_all(value, names, namespace, writes),
            )
        entered = tuple(data)
        state.own_columns = own_columns(entered, namespace)
        return (
            enter(data, namespace, writes),
            lambda value: leave_all(value, entered, namespace, writes),
        )

    def set_up(self, *, anew: bool = False) -> None:
        """Run `setup()`; if not `anew`, only if it has not run since the module was last released."""
        state = state_of(self.module)
        if anew:
            self.release()
            state.has_lost_weights = False  # on purpose
        if not state.is_set_up:
            self.hook("setup")
            state.is_set_up = state.was_ever_set_up = True

    def release(self) -> None:
        """Have the next engine set the module up anew."""
        state = state_of(self.module)
        state.has_lost_weights |= state.is_set_up and self.module.policy_version > 0
        state.is_set_up = False
        self.module.policy_version = 0

    def hook(self, name: str, *args: Any, where: Where | None = None, **kwargs: Any) -> Any:
        """Call a hook of the module (`setup`, `before_episode`, ...) and return its value."""
        return self._call(name, getattr(self.module, name), where or Where(), args, kwargs).value

    def _call(
        self,
        method: str,
        function: Callable[..., Any],
        where: Where,
        args: Sequence[Any],
        keywords: Mapping[str, Any],
        leaving: Leaving | None = None,
        deadline: Deadline | None = None,
    ) -> Result:
        def bounded() -> Any:
            value = function(*args, **keywords)
            return self._loop.wait_for(value, deadline) if inspect.isawaitable(value) else value

        start = time.perf_counter()
        try:
            if deadline is not None:
                value = deadline.run(bounded)
            else:
                value = function(*args, **keywords)
                if inspect.isawaitable(value):
                    value = self._loop.wait_for(value)
            if leaving is not None:
                value = leaving(value)
        except DeadlinePassed as passed:
            if passed.deadline is not deadline:
                raise
            state_of(self.module).metrics.clear()
            raise self._too_late(method, passed, where) from passed
        except KeyboardInterrupt:
            raise
        except (
            BaseException
        ) as error:  # a `sys.exit()` in a step must not pass for the end of the script
            state_of(self.module).metrics.clear()
            raise self._error(method, error, where) from error
        logged = state_of(self.module).metrics
        metrics = reduce_metrics(logged) if logged else {}
        logged.clear()
        return Result(value, metrics, time.perf_counter() - start)

    def _error(self, method: str, error: BaseException, where: Where) -> ModuleError:
        text = str(error) if isinstance(error, ChatLearnError) else _describe(error)
        return ModuleError(f"{text}\n{self.describe_call(method, where)}")

    def _too_late(self, method: str, passed: DeadlinePassed, where: Where) -> DeadlineError:
        key = f"models.{self.module.name}.timeout_s"
        caught = ""
        if passed.was_caught:
            caught = "  it caught what was to end it, so what it did then is not used: write `except Exception:`\n"
        return DeadlineError(
            f"{self.module.name}.{method} took longer than {key}={passed.deadline.seconds:g} seconds\n"
            f"  it was at: {passed.place}\n{caught}{self.describe_call(method, where)}"
        )

    def describe_call(self, method: str, where: Where) -> str:
        """Name the module, the method, the replica, the episode and the samples of a call, a line each."""
        lines = [
            f"  module: {self.module.name} ({type(self.module).__name__})",
            f"  method: {method}",
            f"  replica: {self.module.replica_id}",
            f"  episode: {where.episode or 'none yet'}",
        ]
        if where.uids:
            lines.append(f"  samples: {describe_uids(where.uids)}")
        return "\n".join(lines)


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - an exception that cannot be printed must not hide where it came from
        return f"{type(error).__name__} (its message cannot be printed)"


def describe_uids(uids: Sequence[int]) -> str:
    """Return sample uids for people, e.g. `uid 3, 4, 5` (long lists are cut in the middle)."""
    shown = [str(uid) for uid in uids[:_SHOWN_UIDS]]
    if not shown:
        return "no samples"
    if len(uids) > _SHOWN_UIDS:
        shown += ["...", str(uids[-1])]
    return f"uid {', '.join(shown)} ({len(uids)} in all)" if len(uids) > 1 else f"uid {uids[0]}"


def reduce_metrics(logged: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Make one number of what a call logged several times: `_tokens` summed, `_max`/`_min` extreme, else the mean."""
    if len(logged) == 1:
        return dict(logged[0])
    series: dict[str, list[float]] = {}
    for entry in logged:
        for name, number in entry.items():
            series.setdefault(name, []).append(number)
    return {name: _reduced(name, numbers) for name, numbers in series.items()}


def _reduced(name: str, numbers: Sequence[float]) -> float:
    if name.endswith("_tokens"):
        return sum(numbers)
    if name.endswith("_max"):
        return max(numbers)
    return min(numbers) if name.endswith("_min") else sum(numbers) / len(numbers)
