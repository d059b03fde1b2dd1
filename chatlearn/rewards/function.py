# SPDX-License-Identifier: Apache-2.0
"""Calls a user's plain Python function on columns, and turns what it returns into numbers or a
named error.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from chatlearn import columns
from chatlearn.errors import ChatLearnError, ConfigError, RewardError

E = TypeVar("E", bound=ChatLearnError)

ScoreFunction = Callable[..., Any]
"""Takes batched columns by parameter name, returns one number per sample."""

UNSCORED: Final = (
    "for samples that cannot be scored set models.<name>.on_failure to retry, mask or drop_group "
    "(after retry, after_retries decides)"
)
"""What to do about samples that have no reward; a number in its place would be trained on."""

PARAMETERS = {"completions": columns.COMPLETION, "prompts": columns.PROMPT}
"""Parameter names that stand for a column of another name."""
_PLURAL = {column: parameter for parameter, column in PARAMETERS.items()}


def parameter_names(column: str) -> list[str]:
    """Return the names of parameters that ask for a column.

    Example:
        >>> parameter_names("completion"), parameter_names("solver/completion")
        (['completion', 'completions'], ['solver_completion', 'solver_completions'])
    """
    if column.isidentifier():
        return [column, _PLURAL[column]] if column in _PLURAL else [column]
    start, slash, last = column.rpartition("/")
    spelled = [column, f"{start}{slash}{_PLURAL[last]}"] if last in _PLURAL else [column]
    return [re.sub(r"\W+", "_", name.replace("../", "outer_")) for name in spelled]


def function_name(function: ScoreFunction) -> str:
    """Return what a function is called in metrics: its own name, or its class's; partials are
    looked through.
    """
    inner = function
    while hasattr(inner, "func"):
        inner = cast("Any", inner).func
    return getattr(inner, "__name__", type(inner).__name__)


@dataclass(frozen=True)
class Asked:
    """One parameter of a reward function: the column that it asks for."""

    parameter: str
    is_optional: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that go before all others: of the parameter's own name, or that it stands for."""
        alias = PARAMETERS.get(self.parameter, self.parameter)
        return tuple(dict.fromkeys((self.parameter, alias)))

    def fits(self, column: str) -> bool:
        """Tell whether a column is asked for."""
        return self.parameter in parameter_names(column)


class Scorer:
    """One reward function together with its name; calling it gives one float per sample.

    The function's parameters choose what it gets: `completions` and `prompts` are the columns
    `completion` and `prompt`; any other parameter is the column of that name, where `solver_rewards`
    asks for `solver/rewards` and `solver_completions` for `solver/completion`; `**columns` takes
    all columns, under their own names. A parameter with a default may lack its column.

    Example:
        >>> scorer = Scorer("exact", lambda completions, answer: [c == a for c, a in zip(completions, answer)])
        >>> scorer({"completion": ["4", "5"], "answer": ["4", "4"]})
        [1.0, 0.0]
    """

    def __init__(self, name: str, function: ScoreFunction) -> None:
        self.name = name
        self.function = function

    @property
    def described(self) -> str:
        """The function, and where it stands."""
        return f"reward function {self.name!r} ({self._place()})"

    @property
    def takes_all(self) -> bool:
        """Whether the function gets every column."""
        kinds = [parameter.kind for parameter in self._signature().parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def asks_for(self) -> list[Asked]:
        """Return the columns that the function's parameters ask for.

        Raises:
            RewardError: its parameters cannot be read.
        """
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return [
            Asked(parameter.name, parameter.default is not parameter.empty)
            for parameter in self._signature().parameters.values()
            if parameter.kind not in variadic
        ]

    def __call__(
        self, data: Mapping[str, Any], failed: dict[int, RewardError] | None = None
    ) -> list[float]:
        """Score a batch of columns.

        Args:
            data: the columns.
            failed: takes, by its place in the batch, every sample that the function gave no finite
                number for; its score is NaN. None makes the first such sample an error.

        Raises:
            RewardError: a parameter without column, an exception in the function (its cause), an
                `async def`, or a result that is not one finite number per sample.
        """
        args, kwargs = self._arguments(data)
        try:
            result = self.function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            raise RewardError(
                f"reward function {self.name!r} raised {type(error).__name__}: {error}",
                place=self._place(),
                fix=f"the traceback above shows where; {UNSCORED}",
            ) from error
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that it was never awaited
            raise self._not_awaited(RewardError)
        return self._numbers(result, data, failed)

    def check(self) -> ConfigError | None:
        """Return what is wrong with the function as far as can be seen without calling it."""
        inner = self.function
        while hasattr(inner, "func"):  # partials
            inner = cast("Any", inner).func
        call = inner if inspect.isroutine(inner) else type(inner).__call__
        return self._not_awaited(ConfigError) if inspect.iscoroutinefunction(call) else None

    def _not_awaited(self, kind: type[E]) -> E:
        return kind(
            f"reward function {self.name!r} is an `async def`, which is not awaited here",
            place=self._place(),
            fix="make it a plain `def`, or write a BaseModule whose `forward_step` is async",
        )

    def _arguments(self, data: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments by the function's signature."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        everything = False
        for parameter in self._signature().parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                everything = True
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                continue
            column = self._column(parameter.name, data)
            if column is None:
                if parameter.default is not parameter.empty:
                    continue
                raise self._unknown_parameter(parameter.name, data)
            value = _own(data[column])
            if parameter.kind is parameter.POSITIONAL_ONLY:
                args.append(value)
            else:
                kwargs[parameter.name] = value
        if everything:
            kwargs = {name: _own(value) for name, value in data.items()} | kwargs
        return args, kwargs

    def _column(self, parameter: str, data: Mapping[str, Any]) -> str | None:
        """Return the column that a parameter asks for; None if there is none."""
        asked = Asked(parameter, is_optional=False)
        if found := next((name for name in asked.columns if name in data), None):
            return found
        spelled = [name for name in data if asked.fits(name)]
        if len(spelled) > 1:
            raise RewardError(
                f"reward function {self.name!r} asks for {parameter!r}, which may be any of {spelled}",
                place=self._place(),
                fix="take `**columns` and choose by name, or name the columns apart",
            )
        return spelled[0] if spelled else None

    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self.function)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"the parameters of reward function {self.name!r} cannot be read: {error}",
                place=repr(self.function),
                fix="wrap it: def score(completions, answer): return ...",
            ) from None

    def _unknown_parameter(self, parameter: str, data: Mapping[str, Any]) -> RewardError:
        names = {spelled for name in data for spelled in parameter_names(name)}
        available = sorted(name for name in names if name.isidentifier())
        return RewardError(
            f"reward function {self.name!r} asks for {parameter!r}, which is no column",
            place=self._place(),
            fix=f"use one of {available}, give the parameter a default, or add the column to the dataset",
        )

    def _numbers(
        self, result: Any, data: Mapping[str, Any], failed: dict[int, RewardError] | None
    ) -> list[float]:
        """Turn a list, tensor or array into floats; refuse all but one finite number each."""
        if hasattr(result, "tolist"):
            result = result.tolist()  # tensors and arrays
        count = _samples(data)
        if not isinstance(result, Sequence) or isinstance(result, str | bytes):
            raise RewardError(
                f"reward function {self.name!r} returned {_short(result)}, no list",
                place=self._place(),
                fix=f"return a list of {count} numbers; it is called once with the whole batch",
            )
        values = cast("Sequence[Any]", result)
        if len(values) != count:
            raise RewardError(
                f"reward function {self.name!r} returned {len(values)} rewards for {count} samples",
                place=self._place(),
                fix="return exactly one number per completion, in their order",
            )
        scores: list[float] = []
        for index, value in enumerate(values):
            try:
                scores.append(self._number(value, index, data))
            except RewardError as error:
                if failed is None:
                    raise
                failed.setdefault(index, error)
                scores.append(math.nan)
        return scores

    def _number(self, value: Any, index: int, data: Mapping[str, Any]) -> float:
        if hasattr(value, "item") and getattr(value, "size", 1) != 0:
            # several numbers for one sample stay as they are and are refused below
            with contextlib.suppress(ValueError, RuntimeError):
                value = value.item()  # numbers of torch and numpy
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        uid: Any = data[columns.UID][index] if columns.UID in data else index
        uid = uid.item() if hasattr(uid, "item") else uid
        completion = ""
        if columns.COMPLETION in data:
            completion = f", completion {_short(data[columns.COMPLETION][index])}"
        raise RewardError(
            f"reward function {self.name!r} returned {_short(value)} for one sample",
            place=f"{self._place()}, sample uid {uid}{completion}",
            fix=f"nothing is taken for zero: {UNSCORED}",
        )

    def _place(self) -> str:
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        if code is None:
            return repr(self.function)
        return f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"


def _samples(data: Mapping[str, Any]) -> int:
    for name in (columns.COMPLETION, columns.UID):
        if name in data:
            return len(data[name])
    return len(next(iter(data.values()), ()))


def _own(column: Any) -> list[Any]:
    """Return a column as a list of the function's own, of Python numbers instead of tensors of one number."""
    if hasattr(column, "tolist") and getattr(column, "ndim", 0) == 1:
        return cast("list[Any]", column.tolist())
    return list(cast("Sequence[Any]", column))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"
