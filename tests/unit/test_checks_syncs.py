# SPDX-License-Identifier: Apache-2.0
"""What is known of both ends of a parameter sync before setup is compared before setup, at the user's line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer
from chatlearn.errors import FlowError, SyncError
from chatlearn.models import PolicyInference, PolicyReference, PolicyTrainer
from chatlearn.testing import tiny_model, tiny_pair, tiny_tokenizer
from chatlearn.training import description

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


class Made(BaseModule):
    """Makes its model in the constructor, as small programs do."""

    def __init__(self, name: str, model: Any = None) -> None:
        super().__init__(name)
        self.model = model

    def forward_step(self, data: Any) -> Any:
        return data

    def train_step(self, data: Any) -> None: ...


def engine(source: Any, destination: Any) -> Engine:
    made = Engine(
        Environment(lambda batch: destination.forward_step(batch)),
        Trainer(lambda batch: source.train_step(batch)),
    )
    return made.set_dataset(["p"]).set_parameter_sync(source, destination)


def problems(source: Any, destination: Any) -> list[str]:
    chatlearn.init()
    everything = engine(source, destination).check().problems  # the flow may lack rewards, too
    found = [problem for problem in everything if isinstance(problem, SyncError)]
    assert all(f"set_parameter_sync at {__file__}:" in problem.place for problem in found)
    return [problem.cause for problem in found]


def policy(model: Any, kind: Any = PolicyInference, **settings: Any) -> Any:
    return kind("policy", model=model, tokenizer=tiny_tokenizer, **settings)


def learner(model: Any, kind: Any = PolicyTrainer, **settings: Any) -> Any:
    return kind("learner", model=model, **settings)


def test_all_differences_of_two_configurations_at_once() -> None:
    other = {**CONFIG, "num_hidden_layers": 1, "vocab_size": 99}
    [cause] = problems(learner(CONFIG), policy(other))
    assert cause.startswith("parameters of learner -> policy do not match:")
    assert (
        "model.embed_tokens.weight is [101, 16] in the source, [99, 16] in the destination" in cause
    )
    assert "model.layers.1.mlp.up_proj.weight is missing in the destination" in cause
    [cause] = problems(learner(other), policy(CONFIG))
    assert "model.layers.1.mlp.up_proj.weight is missing in the source" in cause


def test_nothing_is_set_up_and_nothing_is_made_for_one_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was made")

    monkeypatch.setattr(description, "_make", refuse)
    assert problems(learner(CONFIG), policy(dict(CONFIG), dtype="bf16")) == []


def test_ends_that_fit() -> None:
    assert problems(learner({**CONFIG, "tie_word_embeddings": True}), policy(CONFIG)) == []
    reference = PolicyReference("policy", model={**CONFIG, "rope_theta": 5.0}, dtype="bf16")
    assert problems(learner(CONFIG), reference) == []
    assert problems(Made("a", nn.Linear(2, 2)), Made("b", nn.Linear(2, 2).bfloat16())) == []
    assert problems(Made("a"), Made("b")) == []
    assert problems(Made("a", nn.Linear(2, 2)), Made("b")) == [], "setup() may make one"


def test_models_from_constructors_are_known() -> None:
    [cause] = problems(Made("a", nn.Linear(2, 3)), Made("b", nn.Linear(2, 2, bias=False)))
    assert "weight is [3, 2] in the source, [2, 2] in the destination" in cause
    assert "bias is missing in the destination" in cause
    assert (
        "float32 in the source, int64"
        in problems(Made("a", counter(1.0)), Made("b", counter(1)))[0]
    )


def counter(value: float) -> nn.Module:
    module = nn.Module()
    module.register_buffer("seen", torch.tensor([value]))
    return module


def test_a_model_that_an_earlier_setup_left_says_nothing() -> None:
    class SetUp(Made):
        def setup(self) -> None:
            self.model = nn.Linear(self.size, 1)

    source, destination = SetUp("a"), SetUp("b")
    source.size = destination.size = 2  # type: ignore[attr-defined]
    chatlearn.init()
    engine(source, destination).learn()
    source.size = 3  # type: ignore[attr-defined]
    source.setup()
    assert problems(source, destination) == []


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_a_trained_head_of_its_own_does_not_fit_one_that_is_the_embedding() -> None:
    tied, apart = ({**CONFIG, "tie_word_embeddings": value} for value in (True, False))
    (cause,) = problems(learner(apart), policy(tied))
    assert "are one tensor in the destination, and two in the source, which training" in cause
    assert problems(learner(tied), policy(apart)) == []
    assert problems(learner(tied), policy(tied, dtype="bf16")) == []
    assert "head.weight" in problems(Made("a", Tied(tied=False)), Made("b", Tied(tied=True)))[0]
    frozen = Made("a", Tied(tied=False).requires_grad_(False))
    assert problems(frozen, Made("b", Tied(tied=True))) == []


def test_what_the_first_sync_compares_is_noted() -> None:
    def noted(source: Any, destination: Any) -> bool:
        chatlearn.init()
        notes = engine(source, destination).check().notes
        arrow = f"{source.name} -> {destination.name}"
        said = [note for note in notes if "compared at the first sync" in note]
        assert all(note.startswith(f"{arrow}: ") for note in said)
        return bool(said)

    class Maps(Made):
        def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    assert noted(learner(tiny_pair), policy(tiny_model))
    assert noted(learner(tiny_pair), policy(CONFIG))
    assert noted(Made("a", nn.Linear(1, 1)), Maps("b", nn.Linear(1, 1)))
    assert not noted(learner(tiny_pair), policy(tiny_pair))
    assert not noted(learner(CONFIG), policy(CONFIG))
    assert not noted(Made("a", nn.Linear(1, 1)), Made("b", nn.Linear(1, 1)))
    assert not noted(Made("a"), Made("b")), "neither can have parameters"


def test_what_only_the_first_sync_can_know_is_left_to_it() -> None:
    wide = nn.Linear(5, 5)

    class Own(Made):
        def state_dict(self) -> Mapping[str, Any]:
            return {}

    class Maps(Made):
        def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    class Resized(PolicyTrainer):
        def setup(self) -> None: ...

    class Renamed(PolicyTrainer):
        def state_dict(self) -> Mapping[str, Any]:
            return {}

    narrow = {**CONFIG, "vocab_size": 99}
    assert problems(Own("a", wide), Made("b", nn.Linear(1, 1))) == []
    assert problems(Made("a", wide), Maps("b", nn.Linear(1, 1))) == []
    assert problems(learner(tiny_pair), policy(CONFIG)) == []
    for kind in (Resized, Renamed):
        assert problems(learner(narrow, kind), policy(CONFIG)) == []
    assert problems(learner({"model_type": "qwen3"}), policy("owner/never-downloaded")) == []


def test_what_the_flow_lacks_is_said_in_the_same_breath() -> None:
    chatlearn.init()
    found = engine(learner({**CONFIG, "vocab_size": 99}), policy(CONFIG)).check().problems
    assert {type(problem) for problem in found} == {SyncError, FlowError}


def test_a_subclass_that_changes_neither_setup_nor_state_is_known() -> None:
    class Logging(PolicyTrainer):
        def before_episode(self) -> None: ...

    assert len(problems(learner({**CONFIG, "vocab_size": 99}, Logging), policy(CONFIG))) == 1


def test_a_user_may_describe_a_model_that_setup_makes() -> None:
    class Described(Made):
        def describe_parameters(self) -> Mapping[str, Tensor]:
            return {"weight": torch.empty(2, 2, device="meta")}

        def setup(self) -> None:
            self.model = nn.Linear(2, 2, bias=False)

    assert problems(Described("a"), Described("b")) == []
    assert len(problems(Described("a"), Made("b", nn.Linear(2, 2)))) == 1


def test_a_model_with_adapters_says_nothing() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    assert problems(Made("a", adapted), Made("b", tiny_model())) == []


def test_learn_refuses_before_setup() -> None:
    class Never(Made):
        def setup(self) -> None:
            raise AssertionError("set up although the program is wrong")

    chatlearn.init()
    with pytest.raises(SyncError, match="missing in the destination"):
        engine(Never("a", nn.Linear(2, 2)), Never("b", nn.Linear(2, 2, bias=False))).learn()


NOTES: dict[str, tuple[Any, list[str]]] = {
    "no sync": (None, ["runtime.verify_every: no effect without a parameter sync"]),
    "ends that cannot tell": (
        (Made("t"), Made("m")),
        ["runtime.verify_every: no effect, since t, m cannot tell: no probe_logprobs()"],
    ),
    "an end that cannot": (
        (learner(CONFIG), Made("m")),
        ["runtime.verify_every: no effect, since m cannot tell: no probe_logprobs()"],
    ),
    "ends that can": ((learner(CONFIG), policy(CONFIG)), []),
}


@pytest.mark.parametrize("case", NOTES)
def test_a_probe_that_never_comes_is_noted(case: str) -> None:
    pair, notes = NOTES[case]
    source, destination = pair or (Made("t"), Made("m"))
    chatlearn.init({"runtime": {"verify_every": 3}})
    program = (
        engine(source, destination)
        if pair
        else Engine(Environment(lambda batch: destination.forward_step(batch))).set_dataset(["p"])
    ).check()
    assert [note for note in program.notes if "verify_every" in note] == notes
    if pair:
        chatlearn.init({"runtime": {"verify_every": 0}})
        assert not any("verify" in note for note in engine(source, destination).check().notes)
