# SPDX-License-Identifier: Apache-2.0
"""Where configuration comes from: YAML files, dicts and `key=value` strings; who set each key."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chatlearn.errors import ConfigError

KeyPath = tuple[str, ...]

_OVERRIDE_KEY = re.compile(r"[^\s.=\[\]]+(\.[^\s.=\[\]]+)*")


@dataclass(frozen=True)
class Layer:
    """One source of values, not yet interpolated, with the place that set each key.

    Example:
        `runtime: {seed: 3}` in line 1 of `grpo.yaml` is
        `Layer(conf, {("runtime",): "grpo.yaml:1", ("runtime", "seed"): "grpo.yaml:1"})`.
    """

    conf: DictConfig
    origins: dict[KeyPath, str] = field(default_factory=dict[KeyPath, str])


def read_file(path: Path, including: tuple[Path, ...] = ()) -> Layer:
    """Read a YAML file and the files that it includes, which it overrules."""
    path = path.expanduser().absolute()
    label = _label(path)
    if path in including:
        chain = " -> ".join(_label(p) for p in (*including, path))
        raise ConfigError(
            f"configuration files include each other: {chain}",
            place=_label(including[-1]),
            fix="remove one of these `include` entries",
        )
    text = _read_text(path, including)
    try:
        root = _compose(text)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                f"a configuration file holds keys and values, not a {root.tag.rpartition(':')[2]}",
                place=f"{label}:{root.start_mark.line + 1}",
                fix="start with `runtime:` or `models:`",
            )
        conf = cast(DictConfig, OmegaConf.create("{}" if root is None else text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"not valid YAML: {getattr(error, 'problem', None) or error}",
            place=label if mark is None else f"{label}:{mark.line + 1}",
            fix="check quotes, colons, doubled keys and indentation near this line",
        ) from error
    own = Layer(conf, {} if root is None else _yaml_origins(root, label, ()))
    if isinstance(script := conf.get("script"), str):
        conf["script"] = str(path.parent / Path(script).expanduser())
    layers = [read_file(file, (*including, path)) for file in _pop_includes(own, path)]
    return merge([*layers, own])


def read_mapping(values: Mapping[str, Any]) -> Layer:
    """Take a dict given in code; its `include` entries are relative to the working directory."""
    conf = OmegaConf.create(dict(values), flags={"allow_objects": True})
    own = Layer(conf, _mapping_origins(values, "code", ()))
    return merge([*(read_file(file) for file in _pop_includes(own, Path.cwd() / "code")), own])


def read_overrides(overrides: Sequence[str], origin: str) -> Layer:
    """Parse `"runtime.num_episode=3"` strings; a later one overrules an earlier one."""
    if isinstance(overrides, str):
        raise ConfigError(
            f"overrides must be a list of strings, not the string {overrides!r}",
            fix=f"write overrides=[{overrides!r}]",
        )
    layers: list[Layer] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not _OVERRIDE_KEY.fullmatch(key):
            example = f"{key.strip()}=VALUE" if _OVERRIDE_KEY.fullmatch(key.strip()) else ""
            raise ConfigError(
                f"malformed override {text!r}",
                place=origin,
                fix=f"write {example or 'key=value without blanks, as runtime.num_episode=3'}",
            )
        try:
            conf = OmegaConf.from_dotlist([f"{key}={value}"])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(
                f"the value of override {text!r} is not valid YAML",
                place=origin,
                fix=f"""quote it: {key}='"..."'""",
            ) from error
        path = tuple(key.split("."))
        layers.append(Layer(conf, {path[:n]: origin for n in range(1, len(path) + 1)}))
    return merge(layers)


def merge(layers: Sequence[Layer]) -> Layer:
    """Lay the layers on each other: later ones overrule, mappings merge, lists are replaced."""
    origins: dict[KeyPath, str] = {}
    for layer in layers:
        origins.update(layer.origins)
    conf = OmegaConf.merge(
        OmegaConf.create({}, flags={"allow_objects": True}), *(layer.conf for layer in layers)
    )
    return Layer(cast(DictConfig, conf), origins)


def resolve(layer: Layer) -> dict[str, Any]:
    """Carry out interpolations (`${runtime.seed}`, `${env:NAME,default}`); return plain values."""
    _register_env_resolver()
    try:
        return cast(dict[str, Any], OmegaConf.to_container(layer.conf, resolve=True))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        origin = nearest(layer.origins, tuple(key.split("."))) or ""
        raise ConfigError(
            f"cannot interpolate {key!r}: {str(error.msg or error).splitlines()[0]}",
            place=f"{origin} {key}".strip(),
            fix="name an existing key, or give a default as in ${env:NAME,default}",
        ) from error


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Lay plain `top` on plain `base`, which may hold any Python objects; mappings merge."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = overlay(cast(Mapping[str, Any], below), cast(Mapping[str, Any], value))
        else:
            merged[key] = value
    return merged


def nearest(origins: Mapping[KeyPath, str], path: KeyPath) -> str | None:
    """Return the origin of `path` or of the nearest key above it."""
    return next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)


def _read_text(path: Path, including: tuple[Path, ...]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        place = f"include of {_label(including[-1])}" if including else str(Path.cwd())
        raise ConfigError(
            f"cannot read the configuration file {_label(path)}: {reason}",
            place=place,
            fix="a path is relative to the working directory, in `include` to the including file",
        ) from error


def _compose(text: str) -> yaml.Node | None:
    """Parse the tree of nodes, which know their lines."""
    return cast("yaml.Node | None", cast(Any, yaml).compose(text, Loader=yaml.SafeLoader))


def _pop_includes(layer: Layer, file: Path) -> list[Path]:
    """Take `include` out of the layer and return the files, relative to `file`."""
    if "include" not in layer.conf:
        return []
    _register_env_resolver()
    value: Any = layer.conf.pop("include")
    names = list(value) if isinstance(value, ListConfig) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"`include` must be a list of file names, not {value!r}",
            place=layer.origins.get(("include",), _label(file)),
            fix="write include: [base.yaml]",
        )
    return [file.parent / Path(name).expanduser() for name in names]


def _yaml_origins(node: yaml.MappingNode, label: str, above: KeyPath) -> dict[KeyPath, str]:
    origins: dict[KeyPath, str] = {}
    for key, value in node.value:
        path = (*above, str(key.value))
        origins[path] = f"{label}:{key.start_mark.line + 1}"
        if isinstance(value, yaml.MappingNode):
            origins.update(_yaml_origins(value, label, path))
    return origins


def _mapping_origins(values: Mapping[str, Any], origin: str, above: KeyPath) -> dict[KeyPath, str]:
    origins: dict[KeyPath, str] = {}
    for key, value in values.items():
        path = (*above, str(key))
        origins[path] = origin
        if isinstance(value, Mapping):
            origins.update(_mapping_origins(cast(Mapping[str, Any], value), origin, path))
    return origins


def code_origins(settings: Mapping[str, Any], above: KeyPath) -> dict[KeyPath, str]:
    """Mark every key of constructor settings as set in code."""
    return _mapping_origins(settings, "code", above)


def _label(path: Path) -> str:
    """Name a file relative to the working directory if it lies below it."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)


def _register_env_resolver() -> None:
    if not OmegaConf.has_resolver("env"):
        OmegaConf.register_resolver("env", _environment_value)


_REQUIRED = object()


def _environment_value(name: str, default: Any = _REQUIRED) -> Any:
    text = os.environ.get(name)
    if text is None:
        if default is _REQUIRED:
            raise KeyError(f"environment variable {name} is not set and has no default")
        return default
    # Scalars stay text, which the typed fields convert; only what text cannot express is parsed.
    return OmegaConf.create(text) if text.startswith(("[", "{")) else text
