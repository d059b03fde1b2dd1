# SPDX-License-Identifier: Apache-2.0
"""Makes models and tokenizers from what a user writes under `model:` and `tokenizer:`.

A model's source is one of
  a path or hub id   real weights, read by `AutoModelForCausalLM.from_pretrained`; safetensors only
  a dict or config   random weights drawn from a seed, the same in every module with that seed
  a callable         returns a model or a `(model, tokenizer)` pair; each module takes a deep copy
"""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from chatlearn.errors import ChatLearnError, ConfigError

DType = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


class LoadedModel(NamedTuple):
    """A causal LM in eval mode on its device, and the tokenizer that goes with it (or None)."""

    model: Any
    tokenizer: Any


def resolve_device(device: Device) -> str:
    """Return "cuda" or "cpu"; "auto" takes CUDA where there is a usable device."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda', but this machine has no usable CUDA device",
            place="device",
            fix="set device to 'cpu' or 'auto'",
        )
    return device


def resolve_dtype(dtype: DType) -> Any:
    """Return the `torch.dtype` that a configuration's "fp32" or "bf16" stands for."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


def load(
    source: Any,
    tokenizer: Any = None,
    *,
    dtype: DType = "fp32",
    device: Device = "auto",
    attn: str | None = None,
    seed: int = 0,
    eos_token: str | None = None,
    trust_remote_code: bool = False,
    needs_tokenizer: bool = True,
) -> LoadedModel:
    """Load a model together with its tokenizer; a callable source is called once for both.

    Args:
        source: What the module docstring lists.
        tokenizer: Path, hub id, tokenizer object or callable returning one; None takes the model's.
        dtype: Precision of the weights.
        device: Where the weights live.
        attn: `attn_implementation` of transformers; None lets transformers choose.
        seed: Seed of random weights, for a source that is a config.
        eos_token: Text of the end-of-sequence token, for tokenizers that name none or another one.
        trust_remote_code: Whether code from the model's repository may run.
        needs_tokenizer: Whether it is an error that the source brings no tokenizer.

    Returns:
        The model (eval mode, its own copy) and the tokenizer (with an EOS token; None if not found).

    Raises:
        ConfigError: The source does not exist, is no causal LM, or there is no tokenizer with EOS.

    Example:
        >>> model, tokenizer = load("Qwen/Qwen3-0.6B", dtype="bf16")  # doctest: +SKIP
    """
    model, made_tokenizer = _make(source, dtype, attn, seed, trust_remote_code)
    model = model.to(device=resolve_device(device), dtype=resolve_dtype(dtype)).eval()
    chosen: Any = tokenizer if tokenizer is not None else made_tokenizer
    if chosen is None and isinstance(source, str | os.PathLike):
        if needs_tokenizer or not _check_tokenizer_files(_text(source), "model"):
            chosen = _text(source)
    elif chosen is None and needs_tokenizer:
        raise ConfigError(
            "a model that a config or a callable made alone brings no tokenizer",
            place="tokenizer",
            fix="set `tokenizer` to a folder or hub id, or return (model, tokenizer)",
        )
    if chosen is None:
        return LoadedModel(model, None)
    return LoadedModel(
        model,
        load_tokenizer(chosen, eos_token=eos_token, trust_remote_code=trust_remote_code),
    )


def load_model(
    source: Any,
    *,
    dtype: DType = "fp32",
    device: Device = "auto",
    attn: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal LM alone, in eval mode on its device; see `load`."""
    model, _ = _make(source, dtype, attn, seed, trust_remote_code)
    return model.to(device=resolve_device(device), dtype=resolve_dtype(dtype)).eval()


def load_tokenizer(
    source: Any, *, eos_token: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a tokenizer from a path, hub id, object or callable, and ensure that it has an EOS.

    A missing pad token is filled with the EOS token: padding is only ever filling, masks are
    explicit.

    Raises:
        ConfigError: The source does not exist, or the tokenizer has no EOS and `eos_token` names
            none.
    """
    if isinstance(source, str | os.PathLike):
        tokenizer = _tokenizer_from_pretrained(_text(source), trust_remote_code)
    else:
        made: Any = source() if _is_factory(source) else source
        tokenizer = copy.deepcopy(cast("Any", made[1] if isinstance(made, tuple) else made))
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"the tokenizer has no token {eos_token!r}",
                place="eos_token",
                fix="name a token of the tokenizer's vocabulary",
            )
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-sequence token, so no response could ever end by itself",
            place="tokenizer",
            fix="set `eos_token` to the token that ends a response",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_source(
    source: Any, tokenizer: Any = None, *, place: str = "model"
) -> list[ChatLearnError]:
    """List what is wrong with a model's source, without loading weights or asking the network.

    Args:
        source: What the module docstring lists.
        tokenizer: The configured tokenizer, or None for the model's own.
        place: Key of the source, for example `models.policy.model`; errors name it, and the
            `tokenizer` beside it.

    Returns:
        The problems found; empty when there are none. Callables and hub ids are taken on trust.
    """
    problems: list[ChatLearnError] = []
    if isinstance(source, str | os.PathLike):
        problems += _check_folder(_text(source), "model", weights=True)
        if tokenizer is None and not problems:
            problems += _check_tokenizer_files(_text(source), "model")
    elif not _is_factory(source):
        try:
            as_config(source)
        except ConfigError as error:
            problems.append(error)
        if tokenizer is None and (isinstance(source, Mapping) or not problems):
            problems.append(
                ConfigError(
                    "a model made from a config brings no tokenizer",
                    place="tokenizer",
                    fix="set `tokenizer` to a folder or hub id",
                )
            )
    if isinstance(tokenizer, str | os.PathLike):
        found = _check_folder(_text(tokenizer), "tokenizer", weights=False)
        problems += found or _check_tokenizer_files(_text(tokenizer), "tokenizer")
    for problem in problems:
        problem.place = place.removesuffix("model") + problem.place
    return problems


def _make(
    source: Any, dtype: DType, attn: str | None, seed: int, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Return a model of its own and, from a callable that makes one, its tokenizer."""
    if isinstance(source, str | os.PathLike):
        return _from_pretrained(_text(source), dtype, attn, trust_remote_code), None
    if not _is_factory(source):
        return _from_config(source, attn, seed), None
    made, tokenizer = _call_factory(source)
    model = copy.deepcopy(made)  # two modules never share weights by accident
    if attn is not None:
        model.set_attn_implementation(attn)
    return model, tokenizer


def _text(source: Any) -> str:
    return str(source)  # not str(Path(...)), which would drop a leading "./"


def _is_factory(source: Any) -> bool:
    """Tell a factory from a tokenizer or config object (a tokenizer is callable too)."""
    return callable(source) and not hasattr(source, "get_vocab")


def _call_factory(source: Callable[[], Any]) -> tuple[Any, Any]:
    """Call a user's factory; return its model and its tokenizer or None."""
    made: object = source()
    pair = cast("tuple[Any, ...]", made) if isinstance(made, tuple) else (made, None)
    if len(pair) != 2 or not hasattr(pair[0], "state_dict"):
        raise ConfigError(
            f"the callable given as `model` returned {', '.join(type(x).__name__ for x in pair)}",
            place="model",
            fix="return a torch model, or a pair (model, tokenizer)",
        )
    return pair[0], pair[1]


def as_config(source: Any) -> Any:
    """Turn a dict into a transformers config; pass a config through."""
    if not isinstance(source, Mapping):
        if hasattr(source, "model_type"):
            return source
        raise ConfigError(
            f"`model` is a {type(source).__name__}",
            place="model",
            fix="give a folder, a hub id, a dict with `model_type`, or a callable",
        )
    from transformers import AutoConfig

    fields = dict(cast("Mapping[str, Any]", source))
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError(
            "the dict given as `model` names no architecture",
            place="model",
            fix="add model_type, for example model_type: qwen3",
        )
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"no config can be made from the dict given as `model`: {_first_line(error)}",
            place="model",
        ) from None


def _from_config(source: Any, attn: str | None, seed: int) -> Any:
    """Make a model with random weights from a config; the global random state is left untouched."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(as_config(source))
    options: dict[str, Any] = {} if attn is None else {"attn_implementation": attn}
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(config, **options)


def _from_pretrained(source: str, dtype: DType, attn: str | None, trust_remote_code: bool) -> Any:
    """Read real weights, turning the many ways in which that fails into one short error."""
    problem = next(iter(_check_folder(source, "model", weights=True)), None)
    problem = problem or _unreachable(source, "model")
    if problem is not None:
        raise problem
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if attn is None else {"attn_implementation": attn}
    auto: Any = AutoModelForCausalLM
    try:
        return auto.from_pretrained(
            os.path.expanduser(source),
            dtype=resolve_dtype(dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(source, "model", error) from None


def _tokenizer_from_pretrained(source: str, trust_remote_code: bool) -> Any:
    """Read a tokenizer, turning the many ways in which that fails into one short error."""
    problem = next(iter(_check_folder(source, "tokenizer", weights=False)), None)
    problem = problem or _unreachable(source, "tokenizer")
    if problem is not None:
        raise problem
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    try:
        return auto.from_pretrained(os.path.expanduser(source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load(source, "tokenizer", error) from None


def _cannot_load(source: str, what: str, error: Exception) -> ConfigError:
    folder = Path(source).expanduser().is_dir()
    cause = f"the {what} {source!r} cannot be loaded: {_first_line(error)}"
    if not folder:
        cause = f"{source!r} is no folder here, nor can the hub provide it: {_first_line(error)}"
    fix = (
        f"check the folder given as `{what}`" if folder else f"check the path or hub id in `{what}`"
    )
    return ConfigError(cause, place=what, fix=fix)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _unreachable(source: str, what: str) -> ConfigError | None:
    """Return an error for a hub id neither cached nor reachable, sparing a minute of retries."""
    if Path(source).expanduser().exists():
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    name = "config.json" if what == "model" else "tokenizer_config.json"
    cached = isinstance(try_to_load_from_cache(source, name), str)
    if cached or constants.HF_HUB_OFFLINE or getproxies():
        return None
    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=5).close()
    except OSError:
        return ConfigError(
            f"{source!r} is no folder here, and the hub at {constants.ENDPOINT} cannot be reached",
            place=what,
            fix=f"check the path in `{what}` (taken relative to {Path.cwd()}), or the network",
        )
    return None


def _looks_local(source: str) -> bool:
    """Tell a path from a hub id: a hub id is `name` or `owner/name`."""
    return source.startswith((".", "~", os.sep)) or "\\" in source or source.count("/") > 1


def _check_folder(source: str, what: str, *, weights: bool) -> list[ChatLearnError]:
    """Check that a local source is a folder in Hugging Face format; a hub id passes."""
    folder = Path(source).expanduser()
    if not folder.exists():
        if not _looks_local(source):
            return []
        cause = f"the {what} folder {source!r} does not exist"
        fix = f"correct the path, which was taken relative to {Path.cwd()}"
    elif weights and not (folder / "config.json").is_file():
        cause = f"{source!r} holds no config.json, so it is no model in Hugging Face format"
        fix = "give the folder that `save_pretrained` wrote"
    elif weights and not any(folder.glob("*.safetensors")):
        cause = f"{source!r} holds no *.safetensors file; pickled weights are never loaded"
        fix = "save the model again with `save_pretrained`, which writes safetensors"
    else:
        return []
    return [ConfigError(cause, place=what, fix=fix)]


def _check_tokenizer_files(source: str, what: str) -> list[ChatLearnError]:
    """Check that a local folder holds a tokenizer; a hub id passes."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return []
    return [
        ConfigError(
            f"{source!r} holds no tokenizer ({', '.join(_TOKENIZER_FILES[:2])}, ...)",
            place=what,
            fix="save the tokenizer into that folder, or set `tokenizer`",
        )
    ]
