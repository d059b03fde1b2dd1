# SPDX-License-Identifier: Apache-2.0
"""The quickstart, for real: what its README claims, and that the loop by hand gives its losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import chatlearn
from chatlearn import Engine, Environment, Trainer
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
