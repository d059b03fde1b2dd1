# SPDX-License-Identifier: Apache-2.0
"""The quickstart, for real: what its README claims, and that the loop by hand gives its losses."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import chatlearn
from chatlearn import Engine, Environment, Trainer
from chatlearn.config import RuntimeConfig, active, command_line
from chatlearn.inspection import Inspection, inspecting
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"
EPISODES = 3


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the example's own files be imported, for this test alone."""
    names = ("tasks", "base_model", "by_hand")
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in names:
        sys.modules.pop(name, None)


def learn(model, tokenizer, problems, folder: Path) -> tuple[list[list[float]], torch.nn.Module]:
    """Train with the quickstart's settings through the engine; return losses and the model."""
    import by_hand
    import tasks

    chatlearn.init(
        {
            "runtime": {
                "num_episode": EPISODES,
                "sample_per_episode": by_hand.PROMPTS * by_hand.SAMPLES,
                "num_inference_per_prompt": by_hand.SAMPLES,
                "train_global_batch_size": by_hand.PROMPTS * by_hand.SAMPLES // by_hand.UPDATES,
                "output_dir": folder,
            }
        }
    )
    losses: list[float] = []

    class Learner(PolicyTrainer):
        def log(self, metrics=None, /, **more: float) -> None:
            losses.append({**(metrics or {}), **more}["loss"])
            super().log(metrics, **more)

    def source():
        return model, tokenizer

    policy = PolicyInference("policy", model=source, max_new_tokens=tasks.LONGEST_COMPLETION)
    reward = FunctionReward("reward", tasks.exact)
    advantage = GroupAdvantage("advantage")
    learner = Learner(
        "learner",
        model=source,
        lr=by_hand.LR,
        clip_low=by_hand.CLIP_LOW,
        clip_high=by_hand.CLIP_HIGH,
        betas=(0.9, 0.99),
        lr_schedule="linear",
        warmup_steps=by_hand.WARMUP,
        total_steps=EPISODES * by_hand.UPDATES,
    )

    def env_flow(batch):
        return advantage.forward_step(reward.forward_step(policy.forward_step(batch)))

    def trainer_flow(batch):
        learner.train_step(batch)

    engine = Engine(Environment(env_flow), Trainer(trainer_flow))
    engine.set_parameter_sync(learner, policy).set_dataset(problems).learn()
    per_update = iter(losses)
    assert learner.model is not None
    return [
        [next(per_update) for _ in range(by_hand.UPDATES)] for _ in range(EPISODES)
    ], learner.model


def test_the_loop_by_hand_gives_the_engine_s_losses(examples, tmp_path):
    import base_model
    import by_hand
    import tasks

    supervised = tasks.make_problems(1, 300)
    problems = tasks.make_problems(2, 120, {p["prompt"] for p in supervised})
    # A short warm start: answers vary, so groups have a signal.
    model, tokenizer = base_model.warm_start(supervised, seed=0, steps=60)
    mine, trained = learn(model, tokenizer, problems, tmp_path)
    theirs = [losses for _, losses in by_hand.grpo(model, tokenizer, problems, 0, EPISODES)]
    assert any(abs(loss) > 1e-4 for losses in mine for loss in losses), "nothing was learned from"
    for ours, hand in zip(mine, theirs, strict=True):
        assert ours == pytest.approx(hand, abs=2e-5)
    for ours, hand in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, hand, atol=2e-4, rtol=0)


def test_the_quickstart_s_settings_are_those_of_the_loop_by_hand(examples, tmp_path, monkeypatch):
    """The test above gives the engine the settings of the loop; the recipe must have the same."""
    import by_hand
    import tasks

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    threads = torch.get_num_threads()
    with command_line(), pytest.raises(Inspection) as stopped, inspecting(resolved_settings):
        runpy.run_path(str(FOLDER / "quickstart.py"), run_name="__main__")
    torch.set_num_threads(threads)
    assert stopped.value.error is None
    runtime, modules = stopped.value.result
    samples, updates = by_hand.PROMPTS * by_hand.SAMPLES, by_hand.EPISODES * by_hand.UPDATES
    assert (runtime.num_episode, runtime.sample_per_episode) == (by_hand.EPISODES, samples)
    assert runtime.num_inference_per_prompt == by_hand.SAMPLES
    assert runtime.train_global_batch_size == samples // by_hand.UPDATES
    assert (runtime.num_training_epoch, runtime.data_shuffle) == (1, False)
    policy, learner = modules["policy"], modules["policy_trainer"]
    assert (policy.temperature, policy.top_p, policy.top_k) == (1.0, 1.0, 0)
    assert (policy.eval_temperature, policy.max_new_tokens) == (0.0, tasks.LONGEST_COMPLETION)
    assert (learner.lr, learner.max_grad_norm) == (by_hand.LR, by_hand.MAX_GRAD_NORM)
    assert (learner.clip_low, learner.clip_high) == (by_hand.CLIP_LOW, by_hand.CLIP_HIGH)
    assert (learner.lr_schedule, learner.warmup_steps) == ("linear", by_hand.WARMUP)
    assert learner.total_steps == updates
    assert (learner.kl_coef, learner.entropy_coef) == (0.0, 0.0)
    assert learner.loss_aggregation == "token-mean"
    adam = optimiser_by_hand(by_hand)
    assert (learner.betas, learner.weight_decay) == (adam["betas"], adam["weight_decay"])
    advantage = modules["advantage"]
    assert (advantage.normalise_std, advantage.leave_one_out, advantage.eps) == (True, False, 1e-6)


def resolved_settings(engine: Engine) -> tuple[RuntimeConfig, dict[str, Any]]:
    """Return what the recipe resolves to, before a weight is loaded."""
    return active().runtime, {m.name: m.config for m in engine.check().modules}


def optimiser_by_hand(by_hand: Any) -> dict[str, Any]:
    """Return the settings of the optimiser that the loop makes before its first episode."""
    loop = by_hand.grpo(torch.nn.Linear(1, 1), None, [], seed=0, episodes=0)
    made: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", lambda parameters, **settings: made.append(settings))
        assert list(loop) == []
    return made[0]


def test_by_hand_fits_on_a_page():
    assert len((FOLDER / "by_hand.py").read_text().splitlines()) <= 100


def test_the_quickstart_learns(tmp_path):
    """A quarter of its episodes; the last line is what a script can read."""
    command = [sys.executable, str(FOLDER / "quickstart.py"), "runtime.num_episode=10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"accuracy_before", "accuracy_after", "seconds", "episodes"}
    assert result["episodes"] == 10
    assert result["accuracy_before"] <= 0.5
    assert result["accuracy_after"] >= result["accuracy_before"] + 0.3
    run = tmp_path / "runs" / "quickstart"
    for name in (
        "metrics.jsonl",
        "transcripts.jsonl",
        "config.yaml",
        "report.html",
        "summary.json",
    ):
        assert (run / name).stat().st_size > 0
    assert (run / "model" / "model.safetensors").exists()
