# SPDX-License-Identifier: Apache-2.0
"""Models described from their configurations: the names and shapes that loading them gives, without weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chatlearn.testing import save_tiny_model, tiny_model
from chatlearn.training.description import described
from chatlearn.training.loading import load_model

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 103,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def sources(folder: Path) -> list[Any]:
    return [
        CONFIG,
        {**CONFIG, "tie_word_embeddings": True},
        tiny_model().config,
        folder,
        str(folder),
    ]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_description_is_what_loading_gives(folder: Path, number: int, dtype: Any) -> None:
    source = sources(folder)[number]
    state = torch.get_rng_state()
    found = described(source, dtype)
    assert found is not None
    made = load_model(source, dtype=dtype, device="cpu").state_dict()
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in made.items()
    }
    assert len(found) == len(made)
    assert all(tensor.is_meta for tensor in found.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_one_source_is_recognised_without_making_a_model(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from chatlearn.training.description import described as d\n"
        f"folder = {str(folder)!r}\n"
        "assert d(folder, 'fp32') == d(Path(folder) / '..' / Path(folder).name, 'bf16')\n"
        "assert d({'a': 1, 'b': 2}, 'fp32') == d({'b': 2, 'a': 1}, 'fp32')\n"
        "assert d({'a': 1}, 'fp32') != d({'a': 2}, 'fp32')\n"
        "assert d('owner/name', 'fp32') != d('owner/name', 'fp32', True)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_equal_configurations_are_one_source() -> None:
    one, other = (described(tiny_model().config, "fp32") for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != described(tiny_model(hidden=64).config, "fp32")
    assert one != {}


def test_what_cannot_be_known_is_not_described(folder: Path) -> None:
    assert described(tiny_model, "fp32") is None
    assert described(object(), "fp32") is None
    for unknown in ("owner/never-downloaded", {"model_type": "no such type"}):
        found = described(unknown, "fp32")
        assert found is not None
        assert len(found) == 0
    config = tiny_model().config
    config.quantization_config = {"quant_method": "fp8"}
    assert dict(described(config, "fp32") or {}) == {}
