# SPDX-License-Identifier: Apache-2.0
"""Where models and tokenizers come from, and what is said when they do not come."""

from pathlib import Path

import pytest
import torch

from chatlearn.errors import ConfigError
from chatlearn.testing import save_tiny_model, tiny_model, tiny_pair, tiny_tokenizer
from chatlearn.training.loading import check_source, load, load_model, load_tokenizer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 103,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def test_a_saved_model_comes_back_with_its_weights_and_tokenizer(saved: Path) -> None:
    for source in (saved, str(saved)):
        model, tokenizer = load(source, device="cpu")
        for name, tensor in tiny_model().state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
        assert tokenizer("1+1=").input_ids == tiny_tokenizer()("1+1=").input_ids
        assert not model.training
    assert check_source(saved) == []


def test_dtype_and_attention_are_taken(saved: Path) -> None:
    model, _ = load(saved, dtype="bf16", device="cpu", attn="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load_model(tiny_pair, attn="eager", device="cpu").config._attn_implementation == "eager"


def test_a_config_gives_weights_by_seed_and_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = (load_model(CONFIG, seed=1, device="cpu") for _ in range(2))
    other = load_model(CONFIG, seed=2, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[weight], second.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    assert torch.equal(
        load_model(first.config, seed=1, device="cpu").state_dict()[weight],
        first.state_dict()[weight],
    )


def test_a_callable_is_called_once_and_its_model_is_copied() -> None:
    pair, calls = tiny_pair(), 0

    def make():
        nonlocal calls
        calls += 1
        return pair

    model, tokenizer = load(make, device="cpu")
    assert calls == 1
    assert model is not pair[0]
    model.lm_head.weight.data.zero_()
    assert float(pair[0].lm_head.weight.detach().abs().sum()) > 0
    assert tokenizer.eos_token == "<eos>"
    alone, _ = load(lambda: pair[0], tiny_tokenizer(), device="cpu")
    assert alone is not pair[0]


@pytest.mark.parametrize("made", [None, (1, 2), (1, 2, 3)])
def test_a_callable_that_returns_no_model_is_refused(made: object) -> None:
    with pytest.raises(ConfigError, match="callable given as `model`"):
        load(lambda: made, tiny_tokenizer())


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./none", "../none", "~/none-at-all", "a/b/c"]
)
def test_a_path_that_does_not_exist_is_one_short_error(source: str) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load(source)
    assert caught.value.place == "model"
    assert caught.value.fix
    assert len(str(caught.value).splitlines()) <= 3
    assert len(check_source(source)) == 1


def test_a_problem_is_placed_at_the_key_of_its_module() -> None:
    problems = check_source("./none", "./nor-this", place="models.policy.model")
    assert [p.place for p in problems] == ["models.policy.model", "models.policy.tokenizer"]
    assert [p.place for p in check_source({"hidden_size": 8}, place="models.policy.model")] == [
        "models.policy.model",
        "models.policy.tokenizer",
    ]
    assert [p.place for p in check_source("./none", "./nor-this")] == ["model", "tokenizer"]


def test_an_unreachable_hub_is_one_short_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("chatlearn.training.loading.getproxies", dict)
    for what in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match="cannot be reached"):
            what("nobody/no-such-model")
    assert check_source("nobody/no-such-model") == []  # a hub id is taken on trust


def test_a_folder_without_config_weights_or_tokenizer_says_which(saved: Path) -> None:
    for name, words in (
        ("model.safetensors", "pickled weights"),
        ("config.json", "no config.json"),
    ):
        (saved / name).unlink()
        (problem,) = check_source(saved)
        assert words in problem.cause
        with pytest.raises(ConfigError, match=words):
            load(saved)
    other = save_tiny_model(saved.parent / "other")
    (other / "tokenizer.json").unlink()
    (problem,) = check_source(other)
    assert "no tokenizer" in problem.cause
    assert check_source(other, tokenizer=object()) == []


def test_a_damaged_weights_file_is_no_long_traceback(saved: Path) -> None:
    (saved / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(saved)


def test_a_config_needs_an_architecture_and_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="names no architecture"):
        load({"hidden_size": 8}, tiny_tokenizer())
    with pytest.raises(ConfigError, match="no config can be made"):
        load({"model_type": "no-such-type"}, tiny_tokenizer())
    with pytest.raises(ConfigError, match="brings no tokenizer"):
        load(CONFIG)
    with pytest.raises(ConfigError, match="is a int"):
        load(3, tiny_tokenizer())
    with pytest.raises(ConfigError, match="callable made alone brings no tokenizer"):
        load(tiny_model, device="cpu")
    assert load(tiny_model, device="cpu", needs_tokenizer=False).tokenizer is None
    assert len(check_source(CONFIG)) == 1
    assert len(check_source({"hidden_size": 8})) == 2
    assert check_source(CONFIG, tiny_tokenizer()) == []


def test_a_tokenizer_without_eos_is_refused_unless_one_is_named() -> None:
    bare = tiny_tokenizer(eos=False, pad=False)
    with pytest.raises(ConfigError, match="no end-of-sequence token") as caught:
        load_tokenizer(bare)
    assert "eos_token" in caught.value.fix
    named = load_tokenizer(bare, eos_token="<eos>")
    assert named.eos_token_id == 1
    assert bare.eos_token is None  # the user's object is left alone
    with pytest.raises(ConfigError, match="has no token '<stop>'"):
        load_tokenizer(bare, eos_token="<stop>")


def test_a_tokenizer_without_pad_fills_with_eos() -> None:
    assert load_tokenizer(tiny_tokenizer(pad=False)).pad_token == "<eos>"
    assert load_tokenizer(lambda: tiny_tokenizer()).pad_token == "<pad>"
    assert load_tokenizer(tiny_pair).eos_token == "<eos>"


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no usable CUDA device"):
        load_model(tiny_pair, device="cuda")
