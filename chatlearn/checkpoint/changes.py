# SPDX-License-Identifier: Apache-2.0
"""What is another than it was when a run was saved: configuration, libraries, models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from chatlearn.checkpoint.files import Shapes
from chatlearn.checkpoint.state import RunState, versions
from chatlearn.errors import CheckpointError
from chatlearn.module import BaseModule, has_model

_PLACES = ("runtime.output_dir", "runtime.resume", "runtime.trackers")
_NO_ARCHITECTURE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys of a Hugging Face configuration that change neither what a model computes nor what it is."""
_SHOWN = 8
_LONGEST = 60


def config_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which values of the configuration changed since a checkpoint was written, if any did.

    Example:
        >>> config_changes({"runtime": {"seed": 0, "a": 1}}, {"runtime": {"seed": 0, "a": 2}})
        ['the configuration changed since the checkpoint: runtime.a: 1 -> 2']
    """
    if not then:  # of a version that did not keep it
        return []
    before, after = dict(_flat(then)), dict(_flat(now))
    lines = [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in {**before, **after}
        if key not in _PLACES and before.get(key, _NONE) != after.get(key, _NONE)
    ]
    if not lines:
        return []
    more = f", and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return [f"the configuration changed since the checkpoint: {', '.join(lines[:_SHOWN])}{more}"]


def version_changes(state: RunState) -> list[str]:
    """Say which libraries are of another version than those that a checkpoint was written with."""
    now = versions()
    changed = [
        f"{name} {then} -> {now.get(name, 'none')}"
        for name, then in state.versions.items()
        if then != now.get(name)
    ]
    if not changed:
        return []
    return [
        f"other versions than the checkpoint was written with: {', '.join(changed)}; "
        "the run goes on, but its numbers may differ in their last bits"
    ]


def left_behind(state: RunState, names: Sequence[str]) -> list[str]:
    """Name the modules whose saved state nobody in this program takes over."""
    saved = {
        "/".join(Path(name).parts[1:-1]) for name in state.files if name.startswith("modules/")
    }
    gone = sorted(saved - set(names))
    return [f"no such module now, so its saved state is left behind: {', '.join(gone)}"] * bool(
        gone
    )


def architecture(module: BaseModule) -> dict[str, Any] | None:
    """Describe a module's model, as far as names and shapes of its weights do not: its class and configuration."""
    if not has_model(module):
        return None
    model: Any = module.model
    described: dict[str, Any] = {"class": type(model).__qualname__}
    config = getattr(model, "config", None)
    if callable(getattr(config, "to_dict", None)):
        given = cast("dict[str, Any]", cast("Any", config).to_dict())
        described["config"] = {
            key: value
            for key, value in given.items()
            if key not in _NO_ARCHITECTURE and _is_plain(value)
        }
    return described


def refuse_other_architecture(
    path: Path, then: Mapping[str, Any] | None, module: BaseModule
) -> None:
    """Refuse a model that computes something else than the saved one, though its weights may have the same shapes.

    Raises:
        CheckpointError: the class differs, or a value of the model's configuration.
    """
    now = architecture(module)
    if not then or not now:
        return
    changed: list[str] = []
    if then["class"] != now["class"]:
        changed.append(f"class: {then['class']} -> {now['class']}")
    else:
        before, after = dict(_flat(then.get("config", {}))), dict(_flat(now.get("config", {})))
        changed += [
            f"{key}: {value} -> {after[key]}"
            for key, value in before.items()
            if key in after and after[key] != value
        ]
    if changed:
        raise _other_model(path, module.name, ", ".join(changed[:_SHOWN]))


def refuse_other_shapes(path: Path, name: str, then: Shapes, now: Shapes) -> None:
    """Refuse weights that do not fit a module's, naming the tensors.

    Raises:
        CheckpointError: a tensor is missing, one too many, or of another shape.
    """
    lines = [f"{key} is not in the checkpoint" for key in now if key not in then]
    lines += [f"{key} is not in the model" for key in then if key not in now]
    lines += [
        f"{key} has shape {list(now[key])} instead of {list(shape)}"
        for key, shape in then.items()
        if key in now and now[key] != shape
    ]
    if lines:
        more = f", and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise _other_model(path, name, ", ".join(lines[:_SHOWN]) + more)


def _other_model(path: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint does not fit module {name!r}: {what}",
        place=str(path),
        fix="resume with the model that the run was started with, or start anew with runtime.resume=never",
    )


class _Nothing:
    """Stands for a value that is not there; None is one."""


_NONE = _Nothing()


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    text = str(values[key])
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(cast("Mapping[str, Any]", value), f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _is_plain(value: Any) -> bool:
    """Tell whether JSON gives a value back as it was."""
    if value is None or isinstance(value, str | bool | int | float):
        return True
    if isinstance(value, list):
        return all(map(_is_plain, cast("list[Any]", value)))
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value).items()
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in entries)
    return False
