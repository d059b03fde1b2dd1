# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft arrive merged in plain models, and as they are in models that have them, too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import chatlearn
from chatlearn import BaseModule
from chatlearn.errors import SyncError
from chatlearn.testing import tiny_model
from chatlearn.weights.adapters import has_adapters, merged_state
from chatlearn.weights.export import export
from chatlearn.weights.local import ParameterSync

peft = pytest.importorskip("peft")
IDS = torch.arange(5, 17)[None]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})


def adapted(config: Any, model: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model or tiny_model(), config)


def two_active() -> Any:
    model = adapted(lora())
    model.add_adapter("second", lora(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def second_active() -> Any:
    model = two_active()
    model.set_adapter("second")
    return model


def injected() -> Any:
    model = tiny_model()
    model.add_adapter(lora())
    return model


def disabled() -> Any:
    model = perturbed(adapted(lora(modules_to_save=["norm"])))
    model.base_model.disable_adapter_layers()
    return model


def merged_already() -> Any:
    model = perturbed(adapted(lora()))
    model.merge_adapter()
    return model


KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: adapted(lora(task_type="CAUSAL_LM")),
    "all linear layers, rank-stabilised": lambda: adapted(
        lora(target_modules="all-linear", use_rslora=True)
    ),
    "dora": lambda: adapted(lora(use_dora=True)),
    "with a trained norm": lambda: adapted(lora(modules_to_save=["norm"])),
    "with trained tokens": lambda: adapted(lora(trainable_token_indices=[5, 6])),
    "of a bare parameter": lambda: adapted(
        lora(target_parameters=["model.layers.0.mlp.up_proj.weight"])
    ),
    "two adapters": two_active,
    "the second of two": second_active,
    "injected": injected,
    "disabled": disabled,
    "merged already": merged_already,
    "ia3": lambda: adapted(
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])
    ),
    "loha": lambda: adapted(peft.LoHaConfig(r=4, target_modules=TARGETS)),
}


def perturbed(model: Any) -> Any:
    """Move the adapters away from where they begin, which is where they do nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_in_transformers_and_answers_as_the_adapted_model(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model = perturbed(KINDS[kind]())
    if kind in ("injected", "two adapters"):
        model.set_adapter("default")
    export(model, tmp_path)
    assert list((tmp_path / "adapter").glob("*.safetensors"))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_a_tied_embedding_alone_parts_it_from_the_head(tmp_path):
    from transformers import AutoModelForCausalLM

    model = perturbed(adapted(lora(target_modules=["embed_tokens"])))
    export(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


class Holder(BaseModule):
    shares_weights = True

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__(name)
        self.model = model


@pytest.fixture(autouse=True)
def _configured() -> None:
    chatlearn.init()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_arrive_merged_and_stay_as_they_are(kind: str) -> None:
    fixed = kind in ("disabled", "merged already")
    model = KINDS[kind]() if fixed else perturbed(KINDS[kind]())
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected, plain = model(IDS).logits, tiny_model()(IDS).logits
    destination = Holder("policy", tiny_model(seed=3))
    sync = ParameterSync(Holder("learner", model), [destination], share=True)
    report = sync.run()
    assert not report.shared
    with torch.no_grad():
        found = destination.model(IDS).logits
    assert float((found - expected).abs().max()) < 1e-4
    assert float((plain - expected).abs().max()) > 0.1 or kind == "disabled", "they do something"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the source has changed"
    again = sync.run()
    assert (again.bytes, again.skipped) == (0, len(destination.model.state_dict()))
    assert again.digest == report.digest


def test_a_model_around_an_adapted_one() -> None:
    class Around(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            self.value = nn.Linear(2, 2)

    source = Around(perturbed(adapted(lora())))
    assert has_adapters(source)
    assert merged_state(source).keys() == Around(tiny_model()).state_dict().keys()


def test_a_layer_that_is_an_adapter_itself() -> None:
    layer = perturbed(
        adapted(lora(target_modules=["0"]), nn.Sequential(nn.Linear(3, 3)))
    ).base_model.model[0]
    assert merged_state(layer).keys() == {"weight", "bias"}


def test_a_destination_with_the_same_adapters_gets_them_as_they_are() -> None:
    source, destination = (Holder(n, adapted(lora())) for n in ("learner", "policy"))
    perturbed(source.model)
    report = ParameterSync(source, [destination], share=False).run()
    assert report.tensors == len(source.model.state_dict())
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, destination.model.state_dict()[name])


def test_other_adapters_do_not_match() -> None:
    source, destination = Holder("learner", adapted(lora())), Holder("policy", adapted(lora(r=2)))
    with pytest.raises(
        SyncError, match=r"lora_A\.default\.weight is \[4, 32\] in the source, \[2, 32\]"
    ):
        ParameterSync(source, [destination], share=False).run()


def test_an_adapted_head_does_not_fit_one_that_is_tied() -> None:
    source = Holder("learner", perturbed(adapted(lora(target_modules=["lm_head"]))))
    with pytest.raises(
        SyncError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one tensor"
    ):
        ParameterSync(source, [Holder("policy", tiny_model())], share=False).run()


def test_an_adapter_that_cannot_be_merged_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lora())
    layer = type(model.base_model.model.model.layers[0].self_attn.q_proj)

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("not this one")

    monkeypatch.setattr(layer, "merge", refuse)
    with pytest.raises(SyncError, match=r"q_proj cannot be merged into its weights: not this one"):
        ParameterSync(Holder("learner", model), [Holder("policy", tiny_model())], share=False).run()


def test_nan_in_an_adapter_is_found() -> None:
    model = adapted(lora())
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.down_proj.lora_B["default"].weight[0] = torch.nan
    with pytest.raises(
        SyncError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' of the source holds NaN"
    ):
        ParameterSync(Holder("learner", model), [Holder("policy", tiny_model())], share=False).run()


def test_plain_models_have_none() -> None:
    assert not has_adapters(tiny_model())
    assert not has_adapters(None)
