# SPDX-License-Identifier: Apache-2.0
import io
import math

import pytest
import torch

import chatlearn
from chatlearn.errors import BatchError, ConfigError
from chatlearn.models import PolicyTrainer
from chatlearn.module import state_of
from chatlearn.testing import tiny_pair, tiny_tokenizer
from chatlearn.training.logprobs import response_logprobs


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make(**settings):
    settings = {"model": tiny_pair, "device": "cpu", "lr": 1e-2, **settings}
    trainer = PolicyTrainer("policy_trainer", **settings)
    trainer.setup()
    return trainer


def test_recording_changes_nothing_of_what_a_step_returns():
    chatlearn.init({"runtime": {"record": True}})
    trainer = make()
    assert trainer.train_step([batch(3), batch(1)]) is None
    told = state_of(trainer).recorded
    assert [len(part["ratio"]) for part in told] == [3, 1]


def batch(samples=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + i % 3 for i in range(samples)]
    prompts = [torch.randint(4, 99, (5,), generator=generator) for _ in lengths]
    responses = [torch.randint(4, 99, (n,), generator=generator) for n in lengths]
    return {
        "uid": torch.arange(samples),
        "prompt_ids": prompts,
        "response_ids": responses,
        "rollout_logprobs": response_logprobs(
            tiny_pair()[0], prompts, responses, 1.0, max_tokens=1000
        ),
        "advantages": torch.tensor([1.0, -1.0] * samples)[:samples],
        "temperature": torch.ones(samples),
    }


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def split(data, sizes):
    parts, start = [], 0
    for size in sizes:
        parts.append({name: column[start : start + size] for name, column in data.items()})
        start += size
    return parts


def test_training_raises_the_probability_of_what_was_good():
    trainer, data = make(), batch()
    before = trainer.forward_step(dict(data))["old_logprobs"]
    for iteration in range(5):
        trainer.train_step([data], iteration)
    after = trainer.forward_step(dict(data))["old_logprobs"]
    gains = torch.tensor([float((a - b).sum()) for a, b in zip(after, before, strict=True)])
    assert (gains * data["advantages"] > 0).all()


def test_micro_batches_as_given_do_not_matter():
    whole, parts = make(), make()
    data = batch(6)
    whole.train_step([data], 0)
    parts.train_step(split(data, [1, 3, 2]), 0)
    assert torch.equal(weights(whole), weights(parts))


def test_on_policy_the_first_step_reports_no_mismatch():
    trainer = make()
    trainer.train_step([batch()], 0)
    report = state_of(trainer).metrics[0]
    assert report["mismatch_max"] < 1e-5
    assert report["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert report["clip_low"] == report["clip_high"] == 0.0
    assert report["trained_tokens"] == 15
    assert report["lr"] == 1e-2
    assert report["grad_norm"] > 0
    assert report["entropy"] > 0


def test_old_logprobs_are_preferred_to_rollout_logprobs():
    data = batch()
    trainer = make()
    trainer.train_step([{**data, "old_logprobs": [x - 1 for x in data["rollout_logprobs"]]}], 0)
    assert state_of(trainer).metrics[0]["ratio"] == pytest.approx(math.e, rel=1e-4)


def test_the_mismatch_is_the_samplers_and_not_what_training_has_moved():
    trainer, data = make(), batch()
    shifted = [x + 0.25 for x in data["rollout_logprobs"]]
    for _ in range(3):
        trainer.train_step([{**data, "old_logprobs": shifted}], 0)
    for report in state_of(trainer).metrics:
        assert report["mismatch"] == pytest.approx(0.25, abs=1e-6)
        assert report["mismatch_max"] == pytest.approx(0.25, abs=1e-6)


def test_without_old_logprobs_the_mismatch_is_reported_once_per_policy_version():
    trainer, reports = make(lr=1e-3), []
    for versions in ([1] * 4, [1] * 4, [2] * 4, [2] * 4, [2, 2, 3, 3], [3] * 4, [4] * 4):
        trainer.train_step(split({**batch(), "policy_version": torch.tensor(versions)}, [2, 2]), 0)
        reports.append("mismatch" in state_of(trainer).metrics[-1])
        assert reports[-1] == ("mismatch_max" in state_of(trainer).metrics[-1])
        assert state_of(trainer).metrics[-1]["ratio"] > 0
    assert reports == [True, False, True, False, False, False, True]
    trainer.setup()
    trainer.train_step([{**batch(), "policy_version": torch.full((4,), 4)}], 0)
    assert "mismatch" in state_of(trainer).metrics[-1]
    for _ in range(2):
        trainer.train_step([batch()], 0)
        assert "mismatch" in state_of(trainer).metrics[-1]


def test_forward_step_adds_old_logprobs_like_the_rollouts():
    data = make(packing=True, max_tokens_per_micro_batch=16).forward_step(batch())
    for mine, sampled in zip(data["old_logprobs"], data["rollout_logprobs"], strict=True):
        assert torch.allclose(mine, sampled, atol=1e-5)


@pytest.mark.parametrize("column", ["prompt_ids", "response_ids", "rollout_logprobs", "advantages"])
def test_a_missing_column_is_named_with_its_maker(column):
    data = batch()
    del data[column]
    with pytest.raises(BatchError, match="forward_step usually makes it") as caught:
        make().train_step([data], 0)
    assert column in str(caught.value)
    assert "policy_trainer" in str(caught.value)


@pytest.mark.parametrize(
    "column",
    [
        *("uid", "loss_mask", "old_logprobs", "ref_logprobs", "rollout_logprobs"),
        *("temperature", "policy_version", "advantages"),
    ],
)
def test_a_column_that_only_some_micro_batches_have_is_named(column):
    data = batch()
    data["old_logprobs"] = data["ref_logprobs"] = data["rollout_logprobs"]
    data["loss_mask"] = [torch.ones(len(x), dtype=torch.bool) for x in data["response_ids"]]
    data["policy_version"] = torch.ones(4, dtype=torch.int64)
    for gap in (0, 1):
        parts = split(data, [2, 2])
        del parts[gap][column]
        with pytest.raises(BatchError, match=f"column '{column}' is missing") as caught:
            make(kl_coef=0.1).train_step(parts, 0)
        assert "policy_trainer" in caught.value.place
    make(kl_coef=0.1).train_step([*split(data, [2, 2]), {}], 0)  # empty ones do not count


def test_a_kl_term_needs_the_reference():
    with pytest.raises(BatchError, match="ref_logprobs") as caught:
        make(kl_coef=0.1).train_step([batch()], 0)
    assert "PolicyReference" in str(caught.value)
    assert "kl_coef" in str(caught.value)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_term_is_reported_and_counts(kind):
    data = batch()
    data["ref_logprobs"] = [x - 0.5 for x in data["rollout_logprobs"]]
    trainer = make(kl_coef=0.1, kl_type=kind)
    trainer.train_step([data], 0)
    report = state_of(trainer).metrics[0]
    assert report["loss"] == pytest.approx(report["pg_loss"] + 0.1 * report["kl"], abs=1e-6)
    assert report["kl"] > 0


@pytest.mark.parametrize("data", [[], [{}], [{"response_ids": [], "uid": []}], {}])
def test_no_samples_is_an_error(data):
    with pytest.raises(BatchError, match="no samples"):
        make().train_step(data, 0)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("advantages", torch.tensor([1.0, math.nan, 1.0, 1.0]), "uids.*1"),
        ("advantages", torch.ones(3), "holds 3 samples"),
        ("rollout_logprobs", [torch.zeros(2)] * 4, "response of 3 tokens"),
        ("rollout_logprobs", [torch.full((n,), -math.inf) for n in (3, 4, 5, 3)], "not finite"),
        ("response_ids", torch.zeros(4, dtype=torch.int64), "1-D tensor per sample"),
    ],
)
def test_bad_columns_are_named(column, value, message):
    with pytest.raises(BatchError, match=f"(?s){column}.*{message}|{message}"):
        make().train_step([{**batch(), column: value}], 0)


def test_equal_lengths_may_come_stacked():
    data = batch(1)
    stacked = {
        name: torch.stack(column) if isinstance(column, list) else column
        for name, column in data.items()
    }
    one, other = make(), make()
    one.train_step([data], 0)
    other.train_step([stacked], 0)
    assert torch.equal(weights(one), weights(other))


def test_a_resumed_trainer_goes_on_exactly():
    settings = {"lr_schedule": "cosine", "warmup_steps": 1, "total_steps": 9}
    trainer, data = make(**settings), batch()
    trainer.train_step([data], 0)
    file = io.BytesIO()
    torch.save({"model": trainer.state_dict(), "training": trainer.training_state()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = make(**settings)
    resumed.load_state_dict(saved["model"])
    resumed.load_training_state(saved["training"])
    for module in (trainer, resumed):
        module.train_step([data], 1)
    assert torch.equal(weights(trainer), weights(resumed))


def test_the_export_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make(dtype="bf16")
    trainer.train_step([batch()], 0)
    assert trainer.export_model(tmp_path) is True
    assert list(tmp_path.glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    text = AutoTokenizer.from_pretrained(tmp_path).decode([5, 6])
    assert text == tiny_tokenizer().decode([5, 6])


def test_a_config_alone_needs_no_tokenizer(tmp_path):
    config = tiny_pair()[0].config
    trainer = make(model=config)
    assert trainer.check_config() == []
    assert trainer.export_model(tmp_path)


def test_a_callable_may_return_a_model_alone(tmp_path):
    trainer = make(model=lambda: tiny_pair()[0])
    assert trainer.check_config() == []
    assert trainer.tokenizer is None
    trainer.train_step([batch()], 0)
    assert trainer.export_model(tmp_path / "alone")
    assert list((tmp_path / "alone").glob("*.safetensors"))
    again = make(model=tmp_path / "alone")  # a folder without tokenizer is enough, too
    assert again.check_config() == []
    assert again.tokenizer is None
    assert torch.equal(weights(trainer), weights(again))
    paired = make(model=lambda: tiny_pair()[0], tokenizer=tiny_tokenizer)
    assert paired.tokenizer.eos_token == "<eos>"


def test_gradient_checkpointing_changes_nothing_and_is_in_use(monkeypatch):
    plain, saving = make(), make(gradient_checkpointing=True)
    calls = []
    for layer in saving.model.model.layers:
        original = layer._gradient_checkpointing_func
        monkeypatch.setattr(
            layer,
            "_gradient_checkpointing_func",
            lambda *a, original=original, **k: calls.append(1) or original(*a, **k),
        )
    for trainer in (plain, saving):
        trainer.train_step([batch()], 0)
    assert calls
    assert torch.allclose(weights(plain), weights(saving), atol=1e-6)


def test_bf16_trains_fp32_weights():
    trainer = make(dtype="bf16")
    trainer.train_step([batch()], 0)
    assert weights(trainer).dtype == torch.float32
    assert state_of(trainer).metrics[0]["mismatch_max"] < 0.5
    data = trainer.forward_step(batch())
    assert data["old_logprobs"][0].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_schedule": "cosine"}, "total_steps"),
        ({"loss_aggregation": "seq-mean-token-sum-norm"}, "loss_norm_length"),
        ({"kl_type": "k9"}, "kl_type"),
        ({"learning_rate": 1.0}, "learning_rate"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        _ = PolicyTrainer("policy_trainer", model=tiny_pair, **settings).config


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_aggregation": "seq-mean-token-mean"},
        {"loss_aggregation": "seq-mean-token-sum"},
        {"loss_aggregation": "seq-mean-token-sum-norm", "loss_norm_length": 8},
        {"entropy_coef": 0.01, "packing": True},
        {"weight_decay": 0.1, "max_grad_norm": None},
    ],
)
def test_every_choice_runs(settings):
    trainer = make(**settings)
    before = weights(trainer)
    trainer.train_step([batch()], 0)
    assert not torch.equal(before, weights(trainer))
    assert all(math.isfinite(value) for value in state_of(trainer).metrics[0].values())


def test_offload_and_onload_keep_everything():
    trainer, other, data = make(), make(), batch()
    for module in (trainer, other):
        module.train_step([data], 0)
    trainer.offload()
    trainer.onload()
    for module in (trainer, other):
        module.train_step([data], 1)
    assert torch.equal(weights(trainer), weights(other))
