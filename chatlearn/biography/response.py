# SPDX-License-Identifier: Apache-2.0
"""One response of a recorded sample, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from chatlearn import columns
from chatlearn.record.nodes import NodeRecord
from chatlearn.record.recording import tokenizer_of

_SETTINGS = ("temperature", "top_p", "top_k", "max_new_tokens", "stop", "seed")
_PER_TOKEN = tuple(c.name for c in columns.COLUMNS.values() if c.shape.endswith("[T_i]"))
_OF_UPDATES = (columns.RATIO, columns.CLIPPED)


@dataclass
class Response:
    """One response of the sample: several policies, or several turns, give several."""

    node: str
    namespace: str
    settings: dict[str, Any]
    """Of the sampler, as far as its configuration has them."""
    policy_version: int | None
    """None where it is not known, or differs from token to token (then it is in `per_token`)."""
    finish_reason: str | None
    completion: str | None
    token_ids: list[int]
    per_token: dict[str, list[Any]]
    """Columns with one entry per token: log-probs, mask."""
    pieces: list[str] | None = None
    """The tokens as text, if there is a tokenizer."""


def make_response(
    node: NodeRecord,
    space: str,
    sample: Mapping[str, Any],
    settings: Mapping[str, Any],
    is_evaluation: bool,
) -> Response:
    def cell(name: str) -> Any:
        return plain(sample.get(space + name))

    chosen = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    if is_evaluation:
        own = {name: settings.get(f"eval_{name}") for name in chosen}
        chosen |= {name: value for name, value in own.items() if value is not None}
    ids = cast("list[int]", cell(columns.RESPONSE_IDS))
    others = (columns.RESPONSE_IDS, *_OF_UPDATES)
    version = cell(columns.POLICY_VERSION)
    found = {name: cell(name) for name in _PER_TOKEN if name not in others}
    found[columns.POLICY_VERSION] = version
    per_token: dict[str, list[Any]] = {
        name: values
        for name, values in found.items()
        if isinstance(values, list) and len(cast("list[Any]", values)) == len(ids)
    }
    return Response(
        node.name,
        space.rstrip("/"),
        chosen,
        None if version is None or isinstance(version, list) else int(version),
        cell(columns.FINISH_REASON),
        cell(columns.COMPLETION),
        ids,
        per_token,
    )


def add_pieces(responses: Sequence[Response], run: Path, models: Mapping[str, Any]) -> list[str]:
    """Give every response its tokens as text, if a tokenizer lies in the record, the exported model or a local folder.

    Returns:
        What is missing for it.
    """
    missing: list[str] = []
    for response in responses:
        module = response.node.rpartition(".")[0]
        settings: Mapping[str, Any] = models.get(module, {})
        given = (settings.get("tokenizer"), settings.get("model"))
        exported = (run / "model", *sorted(path for path in (run / "model").glob("*/")))
        folders = [
            tokenizer_of(run / "record", module),
            *exported,
            *(Path(name) for name in given if isinstance(name, str)),
        ]
        tokenizer = next((t for t in map(_load_tokenizer, folders) if t is not None), None)
        if tokenizer is None:
            missing.append(
                f"tokens of {response.node} as text: no tokenizer is recorded, or exported to {run / 'model'}"
            )
        else:
            response.pieces = [tokenizer.decode([token]) for token in response.token_ids]
    return missing


def _load_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return cast("Any", AutoTokenizer).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError):  # a biography in ids is better than none
        return None


def plain(value: Any) -> Any:
    """Return a cell as plain Python values: tensors as numbers and lists."""
    if isinstance(value, Tensor):
        return cast("Any", value.float() if value.dtype is torch.bfloat16 else value).tolist()
    return value.tolist() if type(value).__module__ == "numpy" else value
