# SPDX-License-Identifier: Apache-2.0
"""Trained models that are left behind: whole or not at all, readable, with what is needed to use them."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer
from chatlearn.checkpoint.files import write_weights
from chatlearn.errors import ModuleError, OutputError
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.observability.atomic import write_atomically
from chatlearn.testing import tiny_model, tiny_tokenizer


class Learner(BaseModule):
    """Writes one file, then fails if it is to."""

    def __init__(self, name: str = "learner", error: BaseException | None = None) -> None:
        super().__init__(name)
        self.error = error
        self.file = "weights"

    def train_step(self, data_list: Any) -> None:
        pass

    def export_model(self, folder: Path) -> bool:
        folder.mkdir()
        (folder / self.file).write_text("learned")
        if self.error is not None:
            raise self.error
        return True


class Sampler(BaseModule):
    def forward_step(self, data: Any) -> Any:
        return data


def learn(folder: Path, *learners: BaseModule, **runtime: Any) -> None:
    chatlearn.init({"runtime": {"output_dir": str(folder), **runtime}})
    sampler = Sampler("sampler")

    def trainer_flow(batch: Any) -> None:
        for learner in learners:
            learner.train_step(batch)  # type: ignore[attr-defined]

    engine = Engine(Environment(lambda b: sampler.forward_step(b)), Trainer(trainer_flow))
    engine.set_dataset(["a", "b"]).learn()


def rust_error() -> Exception:
    return RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "said", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left"), "No space left on device", "free space there"),
        (rust_error(), "No space left on device", "free space there"),
        (PermissionError(errno.EACCES, "no"), "Permission denied", "writable for this user"),
        (OSError(errno.EROFS, "no"), "Read-only file system", "writable for this user"),
    ],
)
def test_a_disk_that_takes_no_model_is_named_and_the_report_is_written(
    tmp_path: Path, error: Exception, said: str, fix: str
) -> None:
    with pytest.raises(OutputError, match=said) as caught:
        learn(tmp_path / "run", Learner(error=error))
    assert caught.value.place == str(tmp_path / "run" / "model")
    assert fix in caught.value.fix
    assert "runtime.resume=auto exports again" in caught.value.fix
    assert json.loads((tmp_path / "run/summary.json").read_text())["complete"] is False
    assert (tmp_path / "run/report.html").exists()
    assert not (tmp_path / "run/model").exists()
    assert not list((tmp_path / "run").glob(".exporting*"))
    learn(tmp_path / "run", Learner(), resume="auto")
    assert (tmp_path / "run/model/weights").read_text() == "learned"
    assert json.loads((tmp_path / "run/summary.json").read_text())["complete"] is True


def test_an_export_that_fails_of_itself_names_the_module(tmp_path: Path) -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file", "template.json")
    for error in (ValueError("no such format"), missing):
        with pytest.raises(ModuleError, match="export_model"):
            learn(tmp_path / "run", Learner(error=error))
        assert (tmp_path / "run/report.html").exists()


def test_an_older_model_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    run, learner = tmp_path / "run", Learner()
    learn(run, learner)
    learner.file, learner.error = "other", OSError(errno.ENOSPC, "full")
    with pytest.raises(OutputError):
        learn(run, learner, resume="auto")
    assert [path.name for path in (run / "model").iterdir()] == ["weights"]
    learner.error = None
    learn(run, learner, resume="auto")
    assert [path.name for path in (run / "model").iterdir()] == ["other"]


def test_several_models_are_put_in_place_together(tmp_path: Path) -> None:
    first, second = Learner("first"), Learner("second", OSError(errno.ENOSPC, "full"))
    with pytest.raises(OutputError):
        learn(tmp_path / "run", first, second)
    assert not (tmp_path / "run/model").exists()
    second.error = None
    learn(tmp_path / "run", first, second, resume="auto")
    assert sorted(p.name for p in (tmp_path / "run/model").iterdir()) == ["first", "second"]


def test_a_link_to_another_place_stays_one(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "large disk"
    learn(run, Learner())
    (run / "model").rename(other)
    (run / "model").symlink_to(other)
    learn(run, Learner(), resume="auto")
    assert (run / "model").is_symlink()
    assert (other / "weights").exists()


# ---- who may read what is written ---------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_weights(tmp_path / "w.safetensors", {"a": torch.ones(3)})
    write_weights(tmp_path / "w.safetensors", {"a": torch.ones(3)})
    write_atomically(tmp_path / "text", "text")
    trainer = PolicyTrainer("trainer", model=tiny_model, tokenizer=tiny_tokenizer)
    chatlearn.init()
    trainer.setup()
    trainer.export_model(tmp_path / "model")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert {mode(path) for path in files} == {0o666 & ~umask}


# ---- what is in it ------------------------------------------------------------------------------------------------


def grpo(folder: Path, model: Any) -> PolicyTrainer:
    runtime = {"sample_per_episode": 4, "num_inference_per_prompt": 2, "output_dir": str(folder)}
    chatlearn.init({"runtime": runtime})
    policy = PolicyInference("policy", model=tiny_model, tokenizer=tiny_tokenizer, max_new_tokens=3)
    reward = FunctionReward("reward", lambda completion: [float(len(set(c))) for c in completion])
    advantage, learner = GroupAdvantage("advantage"), PolicyTrainer("learner", model=model, lr=1e-2)

    def env_flow(batch: Any) -> Any:
        return advantage.forward_step(reward.forward_step(policy.forward_step(batch)))

    engine = Engine(Environment(env_flow), Trainer(lambda batch: learner.train_step(batch)))
    engine.set_parameter_sync(learner, policy).set_dataset(["a", "b"]).learn()
    return learner


def test_a_trainer_without_tokenizer_gets_that_of_the_policy(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    learner = grpo(tmp_path, tiny_model)
    assert learner.tokenizer is None
    text = AutoTokenizer.from_pretrained(tmp_path / "model").decode([5, 6])
    assert text == tiny_tokenizer().decode([5, 6])


def test_adapters_are_exported_merged_and_by_themselves(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def adapted() -> Any:
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(tiny_model(), config)

    learner = grpo(tmp_path, adapted)
    ids = torch.arange(5, 17)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "model" / "adapter")
    with torch.no_grad():
        wanted = learner.model(ids).logits
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(tiny_model()(ids).logits, wanted, atol=1e-3)
