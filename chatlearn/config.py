# SPDX-License-Identifier: Apache-2.0
"""Typed configuration: `chatlearn.init`, YAML, overrides, and who set each value. Imports no torch.

A value is set by, each overruling the one before: the default, the constructor of a module
(`code`), included YAML files, the YAML file (`grpo.yaml:3`) or dict (`code`), the overrides of
`init` (`override`), the `command line`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from chatlearn.config_fields import ModuleConfig, RuntimeConfig
from chatlearn.config_problems import (
    Problem,
    closest,
    contradiction,
    raise_all,
    unknown_key,
    validation_problems,
)
from chatlearn.config_sources import (
    KeyPath,
    Layer,
    code_origins,
    merge,
    nearest,
    overlay,
    read_file,
    read_mapping,
    read_overrides,
    resolve,
)
from chatlearn.config_text import plain, to_yaml
from chatlearn.errors import ConfigError

__all__ = [
    "Config",
    "ModuleConfig",
    "RuntimeConfig",
    "active",
    "command_line",
    "contradiction",
    "init",
    "plain",
]


AnyModuleConfig = TypeVar("AnyModuleConfig", bound=ModuleConfig)


class Config:
    """The configuration of a run: the validated `runtime`, and `module()` for each module."""

    def __init__(self, layer: Layer, source: Path | None = None) -> None:
        """Interpolate and validate `layer`; `source` is the YAML file it came from."""
        self.source = source
        """The YAML file, if there is one."""
        self._origins = dict(layer.origins)
        values = resolve(layer)
        problems = [*self._unknown_sections(values)]
        sections: dict[str, dict[str, Any]] = {"runtime": {}, "models": {}}
        for name in sections:
            value = values.get(name)
            if isinstance(value, dict):
                sections[name] = cast(dict[str, Any], value)
            elif value is not None:
                problems.append(self._not_a_section((name,), value))
        self._models: dict[str, dict[str, Any]] = {}
        for name, value in sections["models"].items():
            if value is None or isinstance(value, dict):
                self._models[str(name)] = cast(dict[str, Any], value or {})
            else:
                problems.append(self._not_a_section(("models", str(name)), value))
        script = values.get("script")
        if script is not None and not isinstance(script, str):
            problems.append(
                Problem(f"script is {script!r}, expected a path", self._place(("script",)), "")
            )
        self.script = Path(script) if isinstance(script, str) else None
        """The script that a recipe runs."""
        try:
            self.runtime = RuntimeConfig.model_validate(sections["runtime"])
        except ValidationError as error:
            problems += validation_problems(error, RuntimeConfig, ("runtime",), self._place)
        raise_all(problems)

    def module(
        self, name: str, config_class: type[AnyModuleConfig], settings: Mapping[str, Any]
    ) -> AnyModuleConfig:
        """Resolve `models.<name>`: defaults < constructor `settings` < YAML < overrides."""
        section = ("models", name)
        for path, origin in code_origins(settings, section).items():
            self._origins.setdefault(path, origin)
        try:
            return config_class.model_validate(overlay(settings, self._models.get(name, {})))
        except ValidationError as error:
            raise_all(validation_problems(error, config_class, section, self._place))
            raise

    def check_modules(self, names: Collection[str], *, only_typos: bool = False) -> None:
        """Refuse a `models.<name>` that no module of the flows has (`only_typos`: that is close to one)."""
        unknown = [name for name in self._models if name not in names]
        if only_typos:
            unknown = [n for n in unknown if difflib.get_close_matches(n, list(names), 1, 0.8)]
        raise_all([unknown_key(("models", name), names, self._place) for name in unknown])

    def provenance(self, path: str) -> str:
        """Tell who set `path`: `default`, `code`, `grpo.yaml:3`, `override` or `command line`."""
        keys = tuple(path.split("."))
        parts = [
            other
            for other in self._origins
            if len(other) > len(keys) and other[: len(keys)] == keys
        ]
        if parts:  # a mapping, whose parts may have been set in different places
            places = {self._origins[p]: None for p in parts if not any(q[:-1] == p for q in parts)}
            return ", ".join(places)
        return self._origins.get(keys, "default")

    def to_dict(self, modules: Mapping[str, ModuleConfig] | None = None) -> dict[str, Any]:
        """Return every value, safe for JSON and YAML; `modules` are the resolved ones by name."""
        return plain(self._values(modules))

    def to_yaml(self, modules: Mapping[str, ModuleConfig] | None = None) -> str:
        """Return the values as YAML that `init` reads again.

        Objects that only code can hold (a reward function, a model) stand in comments at its end:
        a module that is constructed with them keeps them.
        """
        return to_yaml(self._values(modules))

    def _values(self, modules: Mapping[str, ModuleConfig] | None) -> dict[str, Any]:
        resolved = {name: config.model_dump() for name, config in (modules or {}).items()}
        return {"runtime": self.runtime.model_dump(), "models": {**self._models, **resolved}}

    def digest(self, modules: Mapping[str, ModuleConfig] | None = None) -> str:
        """Return the SHA-256 of what the run computes: all but `output_dir`, `resume`, `trackers`."""
        values = self.to_dict(modules)
        for place in ("output_dir", "resume", "trackers"):
            del values["runtime"][place]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def _place(self, path: KeyPath) -> str:
        return f"{nearest(self._origins, path) or 'default'} {'.'.join(path)}"

    def _unknown_sections(self, values: Mapping[str, Any]) -> Iterator[Problem]:
        sections = ("runtime", "models", "include", "script")
        for key in map(str, values):
            if key in sections:
                continue
            if inner := closest(key, RuntimeConfig.model_fields):
                fix = f"did you mean 'runtime.{inner}'?"
                yield Problem(f"unknown key {key!r}", self._place((key,)), fix)
            else:
                yield unknown_key((key,), sections, self._place)

    def _not_a_section(self, path: KeyPath, value: Any) -> Problem:
        cause = f"{'.'.join(path)} is {value!r} ({type(value).__name__}), expected keys and values"
        return Problem(cause, self._place(path), "write one `key: value` per line below it")


@dataclass
class _Session:
    """What `init` set and what the command line brought; one per process, for all its threads."""

    config: Config | None = None
    recipe: Path | None = None
    overrides: tuple[str, ...] = ()


_session = _Session()


def init(
    config: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Set and return the active configuration, from a YAML path, a dict or nothing.

    `overrides` are strings such as `"runtime.num_episode=3"`.

    Example:
        >>> init({"runtime": {"num_episode": 2}}, ["runtime.seed=7"]).runtime.seed
        7
    """
    given = _session.recipe if config is None else config
    layers: list[Layer] = []
    source = None
    if isinstance(given, Mapping):
        layers.append(read_mapping(given))
    elif isinstance(given, str | Path):
        source = Path(given)
        layers.append(read_file(source))
    elif given is not None:
        raise ConfigError(
            f"chatlearn.init takes a path, a dict or nothing, not {type(given).__name__}",
            fix='write chatlearn.init("grpo.yaml")',
        )
    layers.append(read_overrides(overrides, "override"))
    layers.append(read_overrides(_session.overrides, "command line"))
    _session.config = Config(merge(layers), source)
    return _session.config


def active() -> Config:
    """Return the configuration that `init` set last, or the default one."""
    return _session.config or init()


def given_on_command_line() -> tuple[Path | None, tuple[str, ...]]:
    """Return the recipe and the overrides that the command line brought."""
    return _session.recipe, _session.overrides


@contextmanager
def command_line(overrides: Sequence[str] = (), recipe: Path | None = None) -> Generator[None]:
    """Within the block, every `init` ends with `overrides`, and a bare one reads `recipe`."""
    before = (_session.config, _session.recipe, _session.overrides)
    _session.config, _session.recipe, _session.overrides = None, recipe, tuple(overrides)
    try:
        yield
    finally:
        _session.config, _session.recipe, _session.overrides = before
