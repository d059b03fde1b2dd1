# SPDX-License-Identifier: Apache-2.0
"""Parameter sync through `Engine.learn()`: what is hard to carry arrives, and what does not arrive stops the run."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer
from chatlearn.errors import SyncError
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.rollout.transformers import TransformersEngine
from chatlearn.testing import tiny_model, tiny_tokenizer

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}
TIED, UNTIED = {**CONFIG, "tie_word_embeddings": True}, {**CONFIG, "tie_word_embeddings": False}
PAIR = "sync/learner -> policy"


def vowels(completion: list[str]) -> list[float]:
    return [
        float(sum(letter in "aeiou" for letter in text)) + len(set(text)) for text in completion
    ]


def learn(
    source: Any,
    destination: Any,
    *,
    trainer: Any = PolicyTrainer,
    policy: Any = PolicyInference,
    models: Mapping[str, Any] | None = None,
    **runtime: Any,
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Run GRPO; return the trainer, the policy and the rows of the metrics."""
    settings = {"num_episode": 2, "sample_per_episode": 8, "num_inference_per_prompt": 4}
    chatlearn.init(
        {
            "runtime": {**settings, "output_dir": "run", "trackers": [], **runtime},
            "models": models or {},
        }
    )
    sampler = policy(
        "policy", model=destination, tokenizer=tiny_tokenizer, max_new_tokens=6, device="cpu"
    )
    learner = trainer("learner", model=source, lr=1e-2, device="cpu")
    reward, advantage = FunctionReward("reward", vowels), GroupAdvantage("advantage")

    def env_flow(batch: Any) -> Any:
        return advantage.forward_step(reward.forward_step(sampler.forward_step(batch)))

    def trainer_flow(batch: Any) -> None:
        learner.train_step(batch)

    engine = Engine(Environment(env_flow), Trainer(trainer_flow))
    engine.set_parameter_sync(learner, sampler).set_dataset(["1+1=", "ab"]).learn()
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return learner, sampler, rows


def greedy(model: Any) -> list[int]:
    ids = torch.tensor([[5, 76, 5, 84]])
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


class Deduplicated(PolicyTrainer):
    """Leaves the second name of a tied tensor out of its state."""

    def state_dict(self) -> Mapping[str, Any]:
        return dict(self.model.named_parameters())


class Copied(PolicyInference):
    """Does not say that it may share weights."""


@pytest.mark.parametrize("trainer", [PolicyTrainer, Deduplicated])
@pytest.mark.parametrize("policy", [PolicyInference, Copied])
def test_a_tied_head_arrives_where_it_is_kept_apart(trainer: Any, policy: Any) -> None:
    learner, sampler, rows = learn(TIED, UNTIED, trainer=trainer, policy=policy)
    assert sampler.model.lm_head.weight is not sampler.model.model.embed_tokens.weight
    assert torch.equal(sampler.model.lm_head.weight, learner.model.model.embed_tokens.weight)
    assert greedy(sampler.model) == greedy(learner.model)
    assert rows[0][f"{PAIR}/probe_difference"] < 1e-4
    assert rows[-1][f"{PAIR}/digest"] != rows[0][f"{PAIR}/digest"], "something was learned"


def test_a_head_of_its_own_does_not_fit_a_tied_one() -> None:
    with pytest.raises(
        SyncError, match="are one tensor in the destination, and two in the source"
    ) as caught:
        learn(UNTIED, TIED)
    assert f"set_parameter_sync at {__file__}:" in caught.value.place
    assert not Path("run/metrics.jsonl").exists(), "no episode was begun"


def test_a_head_that_begins_as_the_embedding_is_refused_at_the_first_sync() -> None:
    from transformers import Qwen3ForCausalLM

    def parted() -> Any:
        tied = tiny_model()
        config = copy.deepcopy(tied.config)
        config.tie_word_embeddings = False
        model = Qwen3ForCausalLM(config)
        model.load_state_dict(tied.state_dict())
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        return model

    with pytest.raises(SyncError, match="two in the source, which training makes differ") as caught:
        learn(parted, tiny_model)
    assert "tie_word_embeddings" in caught.value.fix
    assert not Path("run/metrics.jsonl").exists(), "no episode was begun"


def test_a_trainer_in_fp32_and_policies_in_bf16() -> None:
    models = {"policy": {"dtype": "bf16", "num_replica": 2, "generation_batch_size": 4}}
    learner, sampler, rows = learn(TIED, TIED, models=models, verify_every=1)
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor.bfloat16(), sampler.model.state_dict()[name])
    assert all(0 < row[f"{PAIR}/probe_difference"] < 0.5 for row in rows)


def test_lora_arrives_merged_and_trains_nothing_else() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
        return peft.get_peft_model(tiny_model(), config)

    learner, sampler, rows = learn(adapted, tiny_model, num_episode=4, verify_every=1)
    trained = {n for n, p in learner.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    base = learner.model.get_base_model().model.layers[0]
    first = tiny_model().model.layers[0]
    assert torch.equal(base.self_attn.q_proj.base_layer.weight, first.self_attn.q_proj.weight)
    assert not torch.equal(
        sampler.model.model.layers[0].self_attn.q_proj.weight, first.self_attn.q_proj.weight
    )
    merged = copy.deepcopy(learner.model).merge_and_unload()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, sampler.model.state_dict()[name])
    assert [row[f"{PAIR}/probe_difference"] < 1e-4 for row in rows] == [True] * 5
    moved = [row[f"{PAIR}/bytes"] for row in rows]
    adapted_bytes = sum(
        4 * tensor.numel()
        for name, tensor in sampler.model.state_dict().items()
        if "q_proj.weight" in name or "down_proj.weight" in name
    )
    assert moved[0] == sum(4 * t.numel() for t in sampler.model.state_dict().values())
    assert moved[-1] == adapted_bytes, "what no adapter changed is not moved again"


def test_a_policy_that_caches_its_weights_stops_the_run() -> None:
    class Caching(PolicyInference):
        def setup(self) -> None:
            super().setup()
            self._engine = TransformersEngine(copy.deepcopy(self.model), self.tokenizer)

    with pytest.raises(
        SyncError, match="every tensor arrived, but the log-probs of a fixed prompt differ"
    ):
        learn(TIED, TIED, policy=Caching, verify_every=1, num_episode=3)
    learn(TIED, TIED, policy=Caching, verify_every=0)


def test_how_often_the_probe_runs() -> None:
    def probed(**runtime: Any) -> list[bool]:
        return [f"{PAIR}/probe_seconds" in row for row in learn(TIED, TIED, **runtime)[2]]

    assert probed(num_episode=5, verify_every=2) == [True, False, True, False, True, False]
    assert probed(num_episode=3) == [True, False, False, False]
    assert probed(num_episode=2, verify_every=0) == [False] * 3


def test_the_probe_of_a_resumed_run_comes_when_it_would_have() -> None:
    def rows(**runtime: Any) -> list[dict[str, Any]]:
        return learn(TIED, TIED, verify_every=3, save_episode_interval=1, **runtime)[2]

    whole = rows(num_episode=6)
    rows(num_episode=2, output_dir="other")
    learn(TIED, TIED, num_episode=6, verify_every=3, output_dir="other", resume="auto")
    resumed = [json.loads(line) for line in Path("other/metrics.jsonl").read_text().splitlines()]
    for key in ("digest", "probe_difference", "bytes", "skipped"):
        found = [[row.get(f"{PAIR}/{key}") for row in run] for run in (whole, resumed)]
        assert found[0] == found[1], key


def test_the_probe_changes_no_number_of_a_run() -> None:
    drawn: list[Tensor] = []

    class Drawing(PolicyInference):
        def probe_logprobs(self, token_ids: Tensor) -> Tensor:
            torch.rand(3)
            return super().probe_logprobs(token_ids)

        def before_episode(self) -> None:
            drawn.append(torch.rand(2))

    losses = [
        [row.get("learner/loss") for row in learn(TIED, TIED, policy=Drawing, verify_every=n)[2]]
        for n in (0, 1)
    ]
    assert losses[0] == losses[1]
    assert torch.equal(torch.stack(drawn[:2]), torch.stack(drawn[2:]))


# ---- modules of the user's own -------------------------------------------------------------------------------------


class Weights(BaseModule):
    """Two square matrices and a vector; as a trainer it turns them a little."""

    def setup(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(len(self.name))
            self.model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "two")})

    def forward_step(self, data: Any) -> Any:
        return data

    def train_step(self, data_list: Any) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += torch.arange(parameter.numel()).view(parameter.shape) * 0.1


def carry(source: Any, destination: Any, **models: Any) -> None:
    chatlearn.init({"runtime": {"num_episode": 2, "output_dir": "run"}, "models": models})
    engine = Engine(
        Environment(lambda batch: destination.forward_step(batch)),
        Trainer(lambda batch: source.train_step(batch)),
    )
    engine.set_parameter_sync(source, destination).set_dataset(["p", "q"]).learn()


def test_missing_extra_and_mis_shaped_at_once_whenever_they_are_known() -> None:
    def other(model: nn.ModuleDict) -> nn.ModuleDict:
        del model["two"]
        model["three"], model["one"] = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        return model

    class AtSetup(Weights):
        def setup(self) -> None:
            super().setup()
            self.model = other(self.model)

    class InConstructor(Weights):
        def __init__(self, name: str, change: Any = lambda model: model) -> None:
            super().__init__(name)
            Weights.setup(self)
            self.model = change(self.model)
            self.was_set_up = False

        def setup(self) -> None:
            self.was_set_up = True

    late, early = AtSetup("policy"), InConstructor("policy", other)
    for source, destination in ((Weights("learner"), late), (InConstructor("learner"), early)):
        with pytest.raises(SyncError) as caught:
            carry(source, destination)
        for part in (
            "three.weight is missing in the source",
            "two.weight is missing in the destination",
            "two.bias is missing in the destination",
            "one.weight is [4, 4] in the source, [3, 4] in the destination",
            "one.bias is [4] in the source, [3] in the destination",
        ):
            assert part in caught.value.cause
        assert re.fullmatch(rf"set_parameter_sync at {__file__}:\d+ in carry", caught.value.place)
    assert not early.was_set_up, "known before training"


def load(change: Any) -> type[Weights]:
    class Loading(Weights):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.model.load_state_dict({**self.model.state_dict(), **change(dict(state))})

    return Loading


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        (lambda state: {n: t for n, t in state.items() if n != "two.bias"}, "two.bias", "by up to"),
        (lambda state: {n: t.half().float() for n, t in state.items()}, "one.weight", "by up to"),
        (lambda state: {**state, "two.weight": state["two.weight"].T}, "two.weight", "transposed"),
        (
            lambda state: {
                **state,
                "one.weight": state["two.weight"],
                "two.weight": state["one.weight"],
            },
            "one.weight",
            "it is what the source calls 'two.weight'",
        ),
    ],
    ids=["forgets one", "rounds", "transposes one", "swaps two"],
)
def test_a_load_state_dict_that_is_wrong_stops_the_run(change: Any, name: str, why: str) -> None:
    with pytest.raises(SyncError, match=why) as caught:
        carry(Weights("learner"), load(change)("policy"))
    assert caught.value.cause.startswith(f"tensor {name!r} differs after the sync")


def test_only_the_second_replica_is_wrong() -> None:
    class Second(Weights):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.model.load_state_dict(state)
            if self.replica_id == 1:
                self.model["one"].bias.data[2] *= 1.0001

    with pytest.raises(SyncError, match=r"'one\.bias' differs after the sync") as caught:
        carry(Weights("learner"), Second("policy"), policy={"num_replica": 2})
    assert caught.value.place == "learner -> policy, replica 1"


def test_parameters_that_become_nan_stop_the_run_before_they_travel() -> None:
    class Diverging(PolicyTrainer):
        def train_step(self, data: Any, iteration: int = 0) -> None:
            super().train_step(data)
            if iteration == 1:
                self.model.model.norm.weight.data[3] = torch.nan

    class Shared(Diverging):
        shares_weights = True

    for kind in (Diverging, Shared):
        with pytest.raises(
            SyncError, match=r"tensor 'model\.norm\.weight' of the source holds NaN"
        ):
            learn(TIED, TIED, trainer=kind, num_episode=4)


def test_a_state_that_cannot_be_compared_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Merging(Weights):
        def setup(self) -> None:
            self.model = nn.Linear(4, 8)

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            parts = [[state[f"{n}.{kind}"] for n in ("one", "two")] for kind in ("weight", "bias")]
            merged = {n: torch.cat(p) for n, p in zip(("weight", "bias"), parts, strict=True)}
            self.model.load_state_dict(merged)

    carry(Weights("learner"), Merging("policy"))
    said = capsys.readouterr().out
    assert (
        " ".join(said.split()).count(
            "learner -> policy: load_state_dict() makes weight, bias of what it gets"
        )
        == 1
    )


@pytest.mark.parametrize(
    ("shown", "note"),
    [
        ({"one.weight": "x", "one.bias": "y", "two.weight": "z"}, "two.bias of the source arrived"),
        ({}, "nothing could be compared after the sync"),
    ],
)
def test_what_was_not_found_is_said_once(
    shown: dict[str, str], note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Remote(Weights):
        """Keeps tensors where no model holds them."""

        def setup(self) -> None:
            self.kept: dict[str, Tensor] = {}

        def state_dict(self) -> Mapping[str, Any]:
            return self.kept

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.kept = {new: state[name] for name, new in shown.items()}

    carry(Weights("learner"), Remote("policy"))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"learner -> policy: {note}") == 1


def test_the_page_s_program_runs() -> None:
    pytest.importorskip("peft")
    page = (Path(__file__).parents[2] / "docs" / "parameter_sync.md").read_text(encoding="utf-8")
    [program] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(program, "parameter_sync.md", "exec"), scope)
    merged = copy.deepcopy(scope["learner"].model).merge_and_unload().state_dict()
    for name, tensor in scope["policy"].model.state_dict().items():
        assert torch.equal(tensor.cpu(), merged[name].cpu())
