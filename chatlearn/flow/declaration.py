# SPDX-License-Identifier: Apache-2.0
"""What a step says of the columns that it reads and writes, for the flow checker.

There are three ways to say it: the class attributes `reads` and `writes` for all steps of a class, `@declares` for one
method, and the hook `describe_columns` where it depends on the configuration. The nearest one counts, as long as no
subclass overrides what it speaks of: a declaration is never stretched over code that its author has not seen.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

from chatlearn.columns import KINDS
from chatlearn.errors import FlowError
from chatlearn.flow.symbol import user_place
from chatlearn.module import BaseModule, call_hook

Kinds = frozenset[str]
"""Which of `columns.KINDS` a column may be; none of them stands for anything at all."""
Named = Collection[str] | Mapping[str, str]
"""Names of columns, or a mapping from the name to its kind, e.g. `{"advantages": "number | floats", "uid": "any"}`."""
Function = TypeVar("Function", bound=Callable[..., Any])

ANYTHING: Final[Kinds] = frozenset()
_ATTRIBUTE = "_chatlearn_columns"


@dataclass(frozen=True)
class Need:
    """Something that a step cannot do without: any one of some columns.

    Example:
        A policy takes `prompt_ids` or `prompt`: `Need.of({"prompt_ids": "tokens", "prompt": "text | messages"})`.
    """

    columns: Mapping[str, Kinds]
    """Any one of these will do, if it is of the kind."""
    others: Callable[[str], bool] | None = None
    """Tells of any other name whether that column will do, whatever its kind."""
    reader: str = ""
    """Who reads it, if not the step itself: `reward function 'score' (train.py:12)`."""
    because: str = ""
    """Why it is needed, if that depends on something: `kl_coef > 0`."""
    instead: str = ""
    """What to do to need it no longer: `set kl_coef to 0`."""
    spelled: Callable[[str], Sequence[str]] | None = None
    """How the reader would ask for a column, if not by its name."""

    @classmethod
    def of(
        cls,
        columns: Named,
        *,
        others: Callable[[str], bool] | None = None,
        reader: str = "",
        because: str = "",
        instead: str = "",
        spelled: Callable[[str], Sequence[str]] | None = None,
    ) -> Need:
        """Make a need of any of `columns`."""
        return cls(_kinds_by_name(columns), others, reader, because, instead, spelled)

    def spellings(self, names: Iterable[str]) -> list[str]:
        """Return how the reader would ask for columns of these names, sorted."""
        if self.spelled is None:
            return sorted(names)
        return sorted({spelled for name in names for spelled in self.spelled(name)})

    def is_met_by(self, name: str) -> bool:
        """Tell whether a column of that name will do."""
        return name in self.columns or (self.others is not None and self.others(name))


@dataclass(frozen=True)
class Declaration:
    """What one step method reads and writes.

    Example:
        >>> Declaration.of(reads={"rewards": "number"}, writes={"advantages": "number"}).writes
        {'advantages': frozenset({'number'})}
    """

    needs: tuple[Need, ...] | None = None
    """What it cannot do without; None: nobody has said."""
    optional: Mapping[str, Kinds] = field(default_factory=dict[str, Kinds])
    """What it reads if it is there."""
    reads_all: bool = False
    """Whether it looks at every column that there is."""
    writes: Mapping[str, Kinds] | None = None
    """What it adds or replaces, always, and nothing else; None: nobody has said."""
    passes_on: bool | None = None
    """Whether it returns the columns that it got, too; None: nobody has said."""
    drops: frozenset[str] = frozenset()
    """Columns that it leaves out of what it passes on."""
    cost: str = ""
    """What its columns cost, if making them is all that it does: `a forward pass`."""
    would_read: Mapping[str, str] = field(default_factory=dict[str, str])
    """Columns that it reads under other settings only, and under which: `{"ref_logprobs": "kl_coef above 0"}`."""
    trains: bool = False
    """Whether it is an update on a global batch, given as a list of micro-batches: only a trainer flow gives that."""
    is_of_method: bool = True
    """Whether this was said of the method, not of all steps of a class."""
    is_learned: bool = False
    """Whether nobody said it, but a dry run showed it."""

    @classmethod
    def of(
        cls,
        *,
        reads: Named | None = None,
        needs: Collection[Need] = (),
        optional: Named = (),
        reads_all: bool = False,
        writes: Named | None = None,
        passes_on: bool | None = None,
        cost: str = "",
        would_read: Mapping[str, str] | None = None,
        trains: bool = False,
    ) -> Declaration:
        """Make a declaration of names, or of names and kinds (see `columns.KINDS`).

        Args:
            reads: columns that the step cannot do without; None says nothing about them.
            needs: further things that it cannot do without, where any one of several columns will do.
            optional: columns that it uses if they are there.
            reads_all: whether it looks at every column.
            writes: columns that it adds or replaces; a name stands for its parts, too. None says nothing.
            passes_on: whether it returns the columns that it got, too; None says nothing.
            cost: what making its columns costs, if it does nothing else; the checker warns if nobody reads them.
            would_read: columns that it reads under other settings only, and under which.
            trains: whether it is an update on a global batch, so that its calls belong in the trainer flow.

        Raises:
            FlowError: a name is no text, or a kind is none.
        """
        single = [Need({name: kinds}) for name, kinds in _kinds_by_name(reads or ()).items()]
        return cls(
            needs=None if reads is None and not needs else (*single, *needs),
            optional=_kinds_by_name(optional),
            reads_all=reads_all,
            writes=None if writes is None else _kinds_by_name(writes),
            passes_on=passes_on,
            cost=cost,
            would_read=would_read or {},
            trains=trains,
        )


def declares(
    *,
    reads: Named | None = None,
    writes: Named | None = None,
    optional: Named = (),
    passes_on: bool | None = None,
    cost: str = "",
) -> Callable[[Function], Function]:
    """Declare what one step method reads and writes, for the flow checker; nothing else changes.

    Args:
        reads: columns that the step cannot do without: names, or a mapping from names to kinds.
        writes: columns that it adds or replaces, and no others; a name stands for its parts, too.
        optional: columns that it uses if they are there.
        passes_on: whether it returns the columns that it got, too.
        cost: what making its columns costs, if it does nothing else; the checker warns if nobody reads them.

    Raises:
        FlowError: a name is no text, or a kind is neither "any" nor one of `chatlearn.columns.KINDS`.

    Example:
        >>> class Length(BaseModule):
        ...     @declares(reads={"completion": "text"}, writes={"length": "number"}, passes_on=True)
        ...     def forward_step(self, data):
        ...         return {**data, "length": [len(text) for text in data["completion"]]}
    """
    said = Declaration.of(
        reads=reads, writes=writes, optional=optional, passes_on=passes_on, cost=cost
    )

    def mark(function: Function) -> Function:
        setattr(function, _ATTRIBUTE, said)
        return function

    return mark


def declaration_of(module: BaseModule, method: str) -> Declaration:
    """Return what is known of a step before it has run; of an undeclared one nothing.

    Raises:
        FlowError: the class attributes are no columns, or the hook gave no declaration.
        ModuleError: the module's own `describe_columns` raised.
    """
    kind = type(module)
    home = _home(kind, method)
    if home is None or method in vars(module):  # a function that was put there: nobody spoke of it
        return Declaration()
    said = decorated(module, method)
    if said is not None:
        return said
    speaker = _home(kind, "describe_columns")
    if speaker is not BaseModule and speaker is not None and _holds(module, speaker, home):
        described = call_hook(module, "describe_columns", method)
        if described is not None and not isinstance(described, Declaration):
            raise FlowError(
                f"describe_columns({method!r}) of {module!r} returned {described!r}, no declaration",
                place=_place_of(speaker),
                fix="return Declaration.of(reads=..., writes=...), or None where the class attributes hold",
            )
        if described is not None:
            return described
    reads, writes = (_of_class(module, name, home) for name in ("reads", "writes"))
    return Declaration(
        needs=None if reads is None else tuple(Need({name: k}) for name, k in reads.items()),
        writes=writes,
        is_of_method=False,
    )


def decorated(module: BaseModule, method: str) -> Declaration | None:
    """Return what `@declares` says of a step; nothing of one that a subclass has changed, None of one without it."""
    home = _home(type(module), method)
    if home is None or method in vars(module):
        return None
    said = getattr(_function(vars(home)[method]), _ATTRIBUTE, None)
    if not isinstance(said, Declaration):
        return None
    return said if _holds(module, home, home) else Declaration()


def _of_class(module: BaseModule, attribute: str, home: type) -> dict[str, Kinds] | None:
    """Return a class attribute as far as it speaks of a method that is defined in `home`."""
    speaker = _home(type(module), attribute)
    given: Any = None if speaker is None else vars(speaker)[attribute]
    # What is no collection at all, such as a counter of the user's own, declares nothing.
    if speaker is None or not isinstance(given, Collection) or not _holds(module, speaker, home):
        return None
    try:
        return _kinds_by_name(cast("Named", given))
    except FlowError as error:
        raise FlowError(
            f"{speaker.__name__}.{attribute}: {error.cause}",
            place=_place_of(speaker),
            fix=error.fix,
        ) from None


_FREE: Final = frozenset(name for name, value in vars(BaseModule).items() if callable(value))
"""Hooks, services and dunder methods: what a subclass makes of them says nothing about columns."""


def _holds(module: BaseModule, speaker: type, home: type) -> bool:
    """Tell whether what class `speaker` says holds for a method of `home`: nothing that it knew is overridden since."""
    order = type(module).__mro__
    border = order.index(speaker)
    if order.index(home) < border:
        return False
    own = [name for name, value in vars(module).items() if callable(value)]
    later = [name for base in order[:border] for name, v in vars(base).items() if _is_code(v)]
    known = {name for base in order[border:] for name, v in vars(base).items() if _is_code(v)}
    return not any(
        name in known and name not in _FREE and not name.startswith("__") for name in (*own, *later)
    )


def _is_code(value: Any) -> bool:
    if isinstance(value, staticmethod | classmethod | property):
        return True
    return callable(value) and not isinstance(value, type)


def _home(kind: type, name: str) -> type | None:
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def _function(value: Any) -> Any:
    return getattr(value, "__func__", value)  # of a static method


def _place_of(kind: type) -> str:
    """Return the file and the class, for a line of it would have to be searched in the source."""
    functions = (_function(value) for value in vars(kind).values())
    codes = (getattr(function, "__code__", None) for function in functions)
    file = next((code.co_filename for code in codes if code is not None), kind.__module__)
    return f"{file}, class {kind.__name__}"


def _kinds_by_name(given: Any) -> dict[str, Kinds]:
    names = cast("Collection[Any]", given)
    if isinstance(given, str | bytes) or not all(isinstance(name, str) for name in names):
        raise FlowError(
            f"{given!r} is no set of column names",
            place=user_place(),
            fix='give e.g. frozenset({"rewards"}), or {"rewards": "number"}; frozenset() if there are none',
        )
    if not isinstance(given, Mapping):
        return dict.fromkeys(sorted(names), ANYTHING)
    kinds = cast("Mapping[str, Any]", given)
    return {name: _parsed(name, kind) for name, kind in kinds.items()}


def _parsed(name: str, given: Any) -> Kinds:
    if given == "any":
        return ANYTHING
    parts = [part.strip() for part in given.split("|")] if isinstance(given, str) else [repr(given)]
    for part in parts:
        if part not in KINDS:
            meant = difflib.get_close_matches(part, KINDS, 1)
            raise FlowError(
                f"{part!r} is no kind of column, but what is declared of {name!r}",
                place=user_place(),
                fix=(f"did you mean {meant[0]!r}? " if meant else "")
                + f"the kinds are {', '.join(KINDS)} and any; several are written as 'number | floats'",
            )
    return frozenset(parts)
