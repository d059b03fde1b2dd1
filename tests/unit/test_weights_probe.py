# SPDX-License-Identifier: Apache-2.0
"""The probe: the same tokens, both computations, a bound that fits their precision, and a culprit by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chatlearn
from chatlearn import BaseModule
from chatlearn.errors import SyncError
from chatlearn.models import PolicyInference, PolicyReference, PolicyTrainer
from chatlearn.rollout.transformers import TransformersEngine
from chatlearn.testing import tiny_model, tiny_pair, tiny_tokenizer
from chatlearn.weights.local import ParameterSync
from chatlearn.weights.probe import BOUNDS, probe_ids


@pytest.fixture(autouse=True)
def _configured() -> None:
    chatlearn.init()


def policy(
    model: Any = tiny_pair, name: str = "policy", kind: Any = PolicyInference, **settings: Any
) -> Any:
    made = kind(name, model=model, device="cpu", **settings)
    made.setup()
    return made


def learner(model: Any = tiny_pair, **settings: Any) -> PolicyTrainer:
    made = PolicyTrainer("learner", model=model, device="cpu", **settings)
    made.setup()
    return made


def probed(source: BaseModule, *destinations: BaseModule) -> Any:
    sync = ParameterSync(source, destinations, share=False)
    sync.run()
    return sync.probe()


class Table(BaseModule):
    """A model of a vocabulary of its own kind, whose log-probs are given."""

    def __init__(self, name: str, logprobs: Any = None, model: Any = None) -> None:
        super().__init__(name)
        self.logprobs, self.model = logprobs, model or nn.Linear(1, 1)

    def probe_logprobs(self, token_ids: Tensor) -> Tensor | None:
        self.asked = token_ids
        return None if self.logprobs is None else torch.tensor(self.logprobs)


def test_training_sampling_and_reference_agree() -> None:
    reference = PolicyReference("reference", model=tiny_pair, device="cpu")
    reference.setup()
    for destination in (policy(), reference):
        report = probed(learner(), destination)
        assert report.tokens == 12
        assert report.precision == "fp32"
        assert report.difference < 1e-5


@pytest.mark.parametrize(
    ("trains", "samples"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")]
)
def test_the_bound_fits_the_coarser_precision(trains: str, samples: str) -> None:
    report = probed(learner(dtype=trains), policy(dtype=samples))
    assert report.precision == "bf16"
    assert 1e-4 < report.difference < BOUNDS["bf16"]


def test_scores_are_those_of_sampling() -> None:
    engine = policy()._engine
    ids = torch.tensor([5, 76, 5, 84, 20, 21, 22, 9, 1, 30])  # 1 is EOS, which ends nothing here
    expected = engine.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    for length in (2, 3, 5, 6, 10):
        found = engine.score(ids[:length])
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected[: length - 1], atol=1e-5)


def test_scores_too_small_for_a_probability_are_finite() -> None:
    model = tiny_model()
    model.lm_head.weight.data *= 100.0
    engine = TransformersEngine(model, tiny_tokenizer())
    ids = torch.arange(4, 17)
    expected = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert float(expected.detach().min()) < -150
    assert torch.allclose(engine.score(ids), expected, rtol=1e-4)


def test_every_log_prob_is_decoded_or_behind_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, shapes = policy()._engine, []
    forward = TransformersEngine.forward

    def seen(self: Any, tokens: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(TransformersEngine, "forward", seen)
    engine.score(torch.arange(4, 17))
    assert shapes == [(3, 9), (3, 1), (3, 1), (3, 1)], "one padded prefill, three steps of decoding"


def test_a_probe_disturbs_nothing() -> None:
    source, destination = learner(), policy()
    sync = ParameterSync(source, [destination], share=False)
    sync.run()
    modes = [part.training for part in (*source.model.modules(), *destination.model.modules())]
    states = [copy.deepcopy(m.model.state_dict()) for m in (source, destination)]
    drawn, attention = torch.get_rng_state(), destination.model.config._attn_implementation
    sync.probe()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert attention == destination.model.config._attn_implementation
    assert modes == [
        part.training for part in (*source.model.modules(), *destination.model.modules())
    ]
    assert all(p.grad is None for p in source.model.parameters())
    for module, state in zip((source, destination), states, strict=True):
        for name, tensor in module.model.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_a_policy_that_caches_weights_is_found() -> None:
    class Caching(PolicyInference):
        def setup(self) -> None:
            super().setup()
            self._engine = TransformersEngine(copy.deepcopy(self.model), self.tokenizer)

    source, destination = learner(), policy(kind=Caching)
    assert probed(source, destination).difference < 1e-5, "nothing has been learned yet"
    with torch.no_grad():
        source.model.model.norm.weight += 0.05
    with pytest.raises(SyncError) as caught:
        probed(source, destination)
    assert (
        "every tensor arrived, but the log-probs of a fixed prompt differ: token"
        in caught.value.cause
    )
    assert "keeps weights elsewhere" in caught.value.fix
    assert caught.value.place == "learner -> policy"


def test_configurations_and_buffers_that_differ_are_named() -> None:
    def turned() -> Any:
        model, tokenizer = tiny_pair()
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 50.0}
        return type(model)(model.config).eval(), tokenizer

    with pytest.raises(SyncError) as caught:
        probed(learner(), policy(turned))
    assert "model configurations differ: rope_parameters" in caught.value.cause
    assert "tensors outside the state differ: model.rotary_emb.inv_freq" in caught.value.cause


def test_a_head_outside_the_state_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 4), nn.Linear(4, 20, bias=False)

    class Headless(Table):
        def state_dict(self) -> dict[str, Tensor]:
            return {"embed.weight": self.model.embed.weight}

        def load_state_dict(self, state: Any) -> None:
            self.model.load_state_dict(state, strict=False)

    source = Table("a", [-1.0], nn.ModuleDict({"embed": nn.Embedding(20, 4)}))
    with pytest.raises(
        SyncError, match=r"tensors of b that its state does not carry: head\.weight"
    ):
        probed(source, Headless("b", [-2.0], Model()))


def test_the_replica_that_differs_is_named() -> None:
    source, replicas = Table("a", [-1.0, -2.0]), [Table("b", [-1.0, x]) for x in (-2.0001, -2.1)]
    with pytest.raises(SyncError, match=r"token 2 has -2 from a and -2\.1 from b") as caught:
        probed(source, *replicas)
    assert caught.value.place == "a -> b, replica 1"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_log_probs_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(SyncError, match="are not all finite"):
        probed(Table("a", [-1.0]), Table("b", [value]))
    with pytest.raises(SyncError, match="are not all finite"):
        probed(Table("a", [value]), Table("b", [value]))


def test_another_number_of_log_probs_is_refused() -> None:
    with pytest.raises(
        SyncError, match=r"probe_logprobs\(\) of b returned \[2\] log-probs, that of a \[1\]"
    ):
        probed(Table("a", [-1.0]), Table("b", [-1.0, -1.0]))


def test_ends_that_cannot_tell_have_no_probe() -> None:
    assert probed(Table("a"), Table("b", [-1.0])) is None
    assert probed(Table("a", [-1.0]), Table("b")) is None


def test_tokens_are_those_that_both_ends_know() -> None:
    small, large = tiny_model(vocab_size=11), tiny_model()
    ids = probe_ids([Table("a", model=large), Table("b", model=small)])
    assert torch.equal(ids, probe_ids([Table("b", model=small), Table("a", model=large)]))
    assert ids.dtype == torch.int64
    assert len(ids) == 13
    assert 0 <= int(ids.min()) <= int(ids.max()) < 11
    assert len(set(ids.tolist())) > 5
    assert len(probe_ids([Table("c", model=tiny_model(max_positions=7))])) == 7
    tables = nn.ModuleDict({"a": nn.Embedding(5, 2), "b": nn.Embedding(9, 2)})
    assert int(probe_ids([Table("d", model=tables)]).max()) < 5
    assert int(probe_ids([Table("e")]).max()) < 2, "nobody tells, and every vocabulary has two"


def test_a_tokenizer_is_not_needed() -> None:
    assert probed(learner(lambda: tiny_model()), policy(tiny_model, tokenizer=tiny_tokenizer()))
