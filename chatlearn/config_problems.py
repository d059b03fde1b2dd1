# SPDX-License-Identifier: Apache-2.0
"""Turn what pydantic found wrong into errors that name key, place and way out, all at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from chatlearn.config_sources import KeyPath
from chatlearn.errors import ConfigError

PlaceOf = Callable[[KeyPath], str]
_SIMPLE: tuple[Any, ...] = (int, float, str, bool, dict, list, Path)
_KINDS = {
    "bool": "true or false",
    "dict": "keys and values",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "keys and values",
    "path": "a path",
    "set": "a list",
    "string": "text",
    "tuple": "a list",
}
"""What to write where pydantic reports `<kind>_type` or `<kind>_parsing`."""
_EXAMPLES: dict[Any, str] = {
    bool: "true",
    float: "0.5",
    int: "8",
    str: "text",
    Path: "folder/name",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration, in the words of `ChatLearnError`."""

    cause: str
    place: str
    fix: str


def contradiction(field: str, cause: str, fix: str) -> PydanticCustomError:
    """Build what a `model_validator` raises when `field` contradicts another one.

    Example:
        >>> raise contradiction("top_k", "top_k=0 selects nothing", "give 1 or more")
    """
    return PydanticCustomError(
        "contradiction", "{cause}; {fix}", {"field": field, "cause": cause, "fix": fix}
    )


def raise_all(problems: Sequence[Problem]) -> None:
    """Raise one `ConfigError` that tells of every problem; do nothing if there is none."""
    if len(problems) == 1:
        raise ConfigError(problems[0].cause, place=problems[0].place, fix=problems[0].fix)
    if problems:
        texts = [str(ConfigError(p.cause, place=p.place, fix=p.fix)) for p in problems]
        listed = "\n".join(f"- {text}" for text in texts).replace("\n  ", "\n    ")
        raise ConfigError(f"{len(problems)} problems in the configuration:\n{listed}")


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that `word` most likely meant."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown_key(path: KeyPath, valid: Iterable[str], place_of: PlaceOf) -> Problem:
    """Report a key that does not exist, with the closest one that does."""
    valid = list(valid)
    match = closest(path[-1], valid)
    fix = f"did you mean {match!r}?" if match else f"valid keys: {', '.join(sorted(valid))}"
    return Problem(f"unknown key {'.'.join(path)!r}", place_of(path), fix)


def validation_problems(
    error: ValidationError, model: type[BaseModel], above: KeyPath, place_of: PlaceOf
) -> list[Problem]:
    """Convert a pydantic error about the section `above` into problems, one per key."""
    problems: dict[KeyPath, Problem] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "contradiction":
            context: Mapping[str, Any] = detail.get("ctx", {})
            path = (*above, *_inner_path(detail, model), str(context["field"]))
            problem = Problem(str(context["cause"]), place_of(path), str(context["fix"]))
        else:
            path = (*above, *_inner_path(detail, model))
            problem = _field_problem(detail, model, path, above, place_of)
        problems.setdefault(path, problem)
    return list(problems.values())


def _field_problem(
    detail: ErrorDetails,
    model: type[BaseModel],
    path: KeyPath,
    above: KeyPath,
    place_of: PlaceOf,
) -> Problem:
    inner = path[len(above) :]
    if detail["type"] == "extra_forbidden":
        owner = _owner(model, inner)
        return unknown_key(path, owner.model_fields if owner else (), place_of)
    dotted = ".".join(path)
    if detail["type"] == "missing":
        return Problem(f"{dotted} must be set", place_of(path), _give(model, inner))
    got: Any = detail["input"]
    if not inner:
        return _section_problem(detail, model, path, place_of)
    field = _field(model, inner)
    match = None
    if detail["type"] == "literal_error" and isinstance(got, str) and field is not None:
        match = closest(got, [v for v in _literals(field.annotation) if isinstance(v, str)])
    expected = _expected(model, inner)
    if detail["type"] == "literal_error":
        expected = expected.replace("a list of", "one of", 1)
    position = "".join(f"[{step}]" for step in detail["loc"] if isinstance(step, int))
    return Problem(
        f"{dotted}{position} is {got!r} ({type(got).__name__}), expected {expected}",
        place_of(path),
        f"did you mean {match!r}?" if match else _hint(detail, inner[-1], field),
    )


def _section_problem(
    detail: ErrorDetails, model: type[BaseModel], path: KeyPath, place_of: PlaceOf
) -> Problem:
    """Word what a `model_validator` raised as ValueError by the fields that its text names."""
    cause = _message(detail)
    named = [name for name in model.model_fields if re.search(rf"\b{name}\b", cause)]
    given: Any = detail["input"]
    lacking = [name for name in named if isinstance(given, Mapping) and name not in given]
    if lacking and len(lacking) < len(named):
        fix = _give(model, (lacking[-1],))
    elif named:
        fix = f"change {' or '.join(f'`{name}`' for name in named)}"
    else:
        fix = "change the values of this section"
    first = next((name for name in named if name not in lacking), None)
    return Problem(cause, place_of((*path, first) if first else path), fix)


def _give(model: type[BaseModel], path: KeyPath) -> str:
    """Ask for a field by what its documentation says, or else by its type."""
    field = _field(model, path)
    text = " ".join((field.description or "").split()) if field else ""
    return f"give {path[-1]}: {text or _expected(model, path)}"


def _message(detail: ErrorDetails) -> str:
    return re.sub(r"^(Value|Assertion) error, ", "", detail["msg"])


def _hint(detail: ErrorDetails, name: str, field: FieldInfo | None) -> str:
    """Say what to write where the type is wrong; what pydantic says where something else is."""
    kind, _, what = detail["type"].rpartition("_")
    if field is None or what not in ("type", "parsing") or kind not in _KINDS:
        text = _message(detail).replace(" after validation", "")
        hint = re.sub(r"^(Input|List)\b", "the value", text)
        if (
            field is not None
            and field.description
            and detail["type"].startswith(("greater", "less"))
        ):
            hint += f"; {name} is: {' '.join(field.description.split())}"
        return hint
    return f"write {_KINDS[kind]}, for example {name}: {_example_of(field)}"


def _example_of(field: FieldInfo) -> str:
    default = None if field.is_required() or field.default_factory else field.default
    return _example(field.annotation) if default in (None, [], {}, "") else _as_yaml(default)


def _example(annotation: Any) -> str:
    """Write a value of a type in YAML: `[8]` for `list[int]`."""
    arguments = [a for a in get_args(annotation) if a not in (type(None), ...)]
    origin = get_origin(annotation)
    if origin is Literal:
        return _as_yaml(arguments[0])
    if origin in (list, tuple, set, frozenset):
        return f"[{', '.join(map(_example, arguments))}]"
    if origin is dict:
        return f"{{name: {_example(arguments[1])}}}"
    if arguments:  # a union or Annotated
        return _example(arguments[0])
    if inner := _model_in(annotation):
        name, field = next(iter(inner.model_fields.items()))
        return f"{{{name}: {_example_of(field)}}}"
    return _EXAMPLES.get(annotation, "value")


def _as_yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, cast('Sequence[Any]', value)))}]"
    if isinstance(value, BaseModel):
        return _example(type(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _inner_path(detail: ErrorDetails, model: type[BaseModel]) -> KeyPath:
    """Keep the part of pydantic's location that is the user's keys, not branches of a union."""
    path: list[str] = []
    owner: type[BaseModel] | None = model
    for step in detail["loc"]:
        if owner is None or not isinstance(step, str):
            break
        path.append(step)
        field = owner.model_fields.get(step)
        owner = None if field is None else _model_in(field.annotation)
    return tuple(path)


def _owner(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    owner: type[BaseModel] | None = model
    for step in path[:-1]:
        field = None if owner is None else owner.model_fields.get(step)
        owner = None if field is None else _model_in(field.annotation)
    return owner


def _field(model: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    owner = _owner(model, path)
    return None if owner is None or not path else owner.model_fields.get(path[-1])


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for arg in get_args(annotation):
            yield from _literals(arg)


def _expected(model: type[BaseModel], path: KeyPath) -> str:
    field = _field(model, path)
    if field is None:
        return "another value"
    literals = list(_literals(field.annotation))
    if literals:
        words = "a list of" if get_origin(field.annotation) is list else "one of"
        return f"{words} {', '.join(map(repr, literals))}"
    annotation = field.annotation
    name = getattr(annotation, "__name__", "") if annotation in _SIMPLE else str(annotation)
    name = re.sub(r"Annotated\[(\w+), .*?\]", r"\1", re.sub(r"\b(\w+\.)+(?=\w)", "", name))
    bounds = [
        f"{sign} {getattr(rule, attribute)}"
        for rule in field.metadata
        for attribute, sign in _BOUNDS.items()
        if getattr(rule, attribute, None) is not None
    ]
    return " ".join([name, *bounds])
