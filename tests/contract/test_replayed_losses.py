# SPDX-License-Identifier: Apache-2.0
"""Nodes that fail on other samples in a replay than they did: what no longer comes out, and what is trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from training_scripts import train

import chatlearn
from chatlearn.cli import main
from chatlearn.errors import CheckpointError
from chatlearn.record.reading import RunRecord
from chatlearn.rerun.comparison import NodeComparison, UpdateSamples
from chatlearn.rerun.replay import Replay

SCRIPT = """
import sys
import torch
import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
from chatlearn.testing import tiny_pair

torch.set_num_threads(1)
chatlearn.init({"runtime": {
    "num_episode": 2, "sample_per_episode": 12, "num_inference_per_prompt": 4, "train_global_batch_size": 4,
    "save_episode_interval": 1, "record": True, "output_dir": "run", "trackers": [],
}, "models": {"reward": {"on_failure": "mask", "timeout_s": 0.5}, "judge": {"on_failure": "mask"}}},
overrides=sys.argv[1:])
FAILING = {}


def score(completions, uid):
    for u in map(int, uid):
        if FAILING.get(u) == "raises":
            raise ValueError(f"no score\\nfor {u}")
        while FAILING.get(u) == "hangs":
            pass
    return [float("nan") if FAILING.get(int(u)) == "nan" else float(len(set(c))) for c, u in zip(completions, uid)]


def plain(completions):
    return [float(len(set(c))) for c in completions]


class Judge(BaseModule):
    def forward_step(self, data):
        return {**data, "judged": [True] * len(data["uid"])}


class Log(BaseModule):
    def forward_step(self, data):
        score(data["completion"], data["uid"])


policy, reward = PolicyInference("policy", model=tiny_pair, max_new_tokens=4), FunctionReward("reward", score)
judge, log, advantage = Judge("judge"), Log("reward_log"), GroupAdvantage("advantage")
learner = PolicyTrainer("policy_trainer", model=tiny_pair, lr=1e-2)


def env_flow(batch):
    return advantage.forward_step(judge.forward_step(reward.forward_step(policy.forward_step(batch))))


def trainer_flow(batch):
    learner.train_step(batch)


engine = Engine(Environment(env_flow), Trainer(trainer_flow)).set_parameter_sync(learner, policy)
engine.set_dataset(["x", "y", "z"]).learn()
"""
REWARD = "reward.forward_step"
DROP = "models.reward.on_failure=drop_group"


def failing(outcomes: dict[int, str]) -> str:
    return SCRIPT.replace("FAILING = {}", f"FAILING = {outcomes}")


def again(run: Path, outcomes: dict[int, str], **options: Any) -> Replay:
    """Run episode 2 again with a reward that fails on other samples."""
    script = run.parent / "train.py"
    script.write_text(failing(outcomes))
    return chatlearn.replay(run, episode=2, **options)


def node(replayed: Replay, name: str) -> NodeComparison:
    return next(comparison for comparison in replayed.nodes if comparison.node == name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reward fails on nothing."""
    return train(tmp_path_factory.mktemp("whole"), SCRIPT)


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that loses group 12-15."""
    return train(tmp_path_factory.mktemp("dropped"), failing({13: "raises"}), DROP)


# ---- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["mask", "drop_group"])
@pytest.mark.parametrize(
    ("kind", "what", "message"),
    [
        ("raises", "failed", "ValueError: no score\nfor 13"),
        ("hangs", "timed out", "took longer than models.reward.timeout_s=0.5 seconds"),
        ("nan", "failed", "nan"),
    ],
)
def test_a_node_that_now_fails_on_a_sample_is_not_equal(
    whole: Path, fate: str, kind: str, what: str, message: str
) -> None:
    overrides = [f"models.reward.on_failure={fate}"]
    replayed = again(whole, {13: kind}, node="reward", overrides=overrides)
    (comparison,) = replayed.nodes
    assert not replayed.is_equal
    assert comparison.samples == 11
    assert comparison.remarks == [
        f"1 sample came out then and no longer does: uid 13, {what} in {REWARD}"
    ]
    (failure,) = comparison.failures
    assert (failure.uid, failure.what) == (13, f"{what} in {REWARD}")
    assert message in failure.cause
    # Of samples that a step names itself, the others are not listed.
    assert failure.cause.endswith("samples: uid 13")
    assert comparison.recoveries == []


def test_a_whole_episode_names_the_node_that_now_fails(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replayed = again(whole, {13: "raises", 21: "raises"})
    lost = f"2 samples came out then and no longer do: uid 13, 21, failed in {REWARD}"
    for name in (REWARD, "judge.forward_step", "advantage.forward_step"):
        assert node(replayed, name).remarks == [lost]
    assert [loss.uid for loss in node(replayed, REWARD).failures] == [13, 21]
    assert node(replayed, "judge.forward_step").failures == []
    with pytest.raises(SystemExit):
        main(["replay", str(whole), "--episode", "2"])
    shown = capsys.readouterr().out
    assert f"{REWARD}  10 samples compared\n  {lost}" in shown
    assert shown.count("ValueError: no score") == 1
    assert f"differs from the record: {REWARD}, judge.forward_step" in shown


def test_a_node_that_no_longer_fails_is_not_equal(
    dropped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replayed = again(dropped, {}, node="reward")
    (comparison,) = replayed.nodes
    assert comparison.remarks == [
        f"1 sample comes out now and did not then: uid 13, then failed in {REWARD}"
    ]
    assert comparison.failures == []
    assert "ValueError: no score" in comparison.recoveries[0].cause
    with pytest.raises(SystemExit):
        main(["replay", str(dropped), "--episode", "2", "--node", "reward"])
    shown = capsys.readouterr().out
    assert f"uid 13 failed in {REWARD}, then:" in shown
    assert f"episode 2: differs from the record: {REWARD}" in shown


def test_a_sample_that_fails_otherwise_is_told(dropped: Path) -> None:
    (comparison,) = again(dropped, {13: "hangs"}, node="reward").nodes
    assert comparison.remarks == [
        f"1 sample fails otherwise than then: uid 13, timed out in {REWARD}"
    ]
    assert [loss.outcome for loss in comparison.failures] == ["timed_out"]
    assert again(dropped, {13: "raises"}, node="reward").is_equal


def test_a_node_that_returns_nothing_can_fail_too(tmp_path: Path) -> None:
    """Nothing came out of it then, so only its failure tells."""
    old = "    return advantage"
    extra = "    rollout = policy.forward_step(batch)\n    log.forward_step(rollout)\n    return advantage"
    settings = '"judge": {"on_failure": "mask"}'

    def logging(outcomes: dict[int, str]) -> str:
        script = (
            failing(outcomes)
            .replace(old, extra)
            .replace("policy.forward_step(batch))))\n", "rollout)))\n")
        )
        script = script.replace(
            'FunctionReward("reward", score)', 'FunctionReward("reward", plain)'
        )
        return script.replace(settings, f'{settings}, "reward_log": {{"on_failure": "mask"}}')

    run = train(tmp_path, logging({}))
    assert chatlearn.replay(run, episode=2, node="reward_log").is_equal
    (run.parent / "train.py").write_text(logging({13: "raises"}))
    (comparison,) = chatlearn.replay(run, episode=2, node="reward_log").nodes
    assert comparison.remarks == [
        "1 sample fails now and did not then: uid 13, failed in reward_log.forward_step"
    ]
    bad = train(tmp_path / "bad", logging({13: "raises"}))
    (bad.parent / "train.py").write_text(logging({}))
    (comparison,) = chatlearn.replay(bad, episode=2, node="reward_log").nodes
    assert comparison.remarks == [
        "1 sample failed then and no longer does: uid 13, then failed in reward_log.forward_step"
    ]


# ---- train steps ---------------------------------------------------------------------------------------------------


def test_updates_say_which_samples_they_hold(
    dropped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replayed = again(dropped, {21: "raises"})
    steps = node(replayed, "policy_trainer.train_step")
    assert steps.updates == [
        UpdateSamples(4, now=[12, 13, 14, 15], then=[16, 17, 18, 19], both=0),
        UpdateSamples(5, now=[16, 17, 18, 19], then=[20, 21, 22, 23], both=0),
    ]
    # No update has a sample that it had then: no token is compared with one of another sample.
    assert [(c.samples, c.differing, c.note) for c in steps.columns] == [
        (0, 0, "no sample in common")
    ] * 3
    assert replayed.uids["policy_trainer.train_step"] == [[12, 13, 14, 15], [16, 17, 18, 19]]
    with pytest.raises(SystemExit):
        main(["replay", str(dropped), "--episode", "2"])
    shown = capsys.readouterr().out
    assert "  update 4: uid 12-15 now, 16-19 then\n" in shown
    assert "  update 5: uid 16-19 now, 20-23 then\n" in shown


def test_tokens_are_compared_with_those_of_the_same_sample(tmp_path: Path) -> None:
    """Updates of six samples, where every second one stays: pairs are found by uid, not by place."""
    run = train(tmp_path, failing({13: "raises"}), DROP, "runtime.train_global_batch_size=6")
    replayed = again(run, {21: "raises"})
    steps = node(replayed, "policy_trainer.train_step")
    calls = RunRecord(run).episode(2).flow("trainer_flow").nodes[0].calls
    now = replayed.uids[steps.node]
    shared = [set(call.uids) & set(uids) for call, uids in zip(calls, now, strict=True)]
    assert any(shared)
    for update, call, uids in zip(steps.updates, calls, now, strict=False):
        assert set(update.now) == set(uids) - set(call.uids)
        assert set(update.then) == set(call.uids) - set(uids)
    expected: dict[str, set[int]] = {}
    for call, uids, made in zip(calls, now, replayed.outputs[steps.node], strict=True):
        (recorded,) = call.outputs()
        for name in recorded:
            for uid in set(call.uids) & set(uids):
                old = recorded[name][call.uids.index(uid)]
                if old.tolist() != made[name][uids.index(uid)].tolist():
                    expected.setdefault(name, set()).add(uid)
    for column in steps.columns:
        assert column.samples == sum(map(len, shared))
        assert set(column.uids) <= expected.get(column.column, set())
        assert column.differing == len(expected.get(column.column, set()))


def test_fewer_updates_compare_what_both_have(dropped: Path) -> None:
    replayed = again(
        dropped,
        {13: "raises"},
        node="policy_trainer",
        overrides=["runtime.train_global_batch_size=8"],
    )
    (steps,) = replayed.nodes
    assert steps.remarks == ["1 update now, 2 then"]
    assert [str(update) for update in steps.updates] == [
        "update 4: uid 20-23 now, none then; 4 more in both"
    ]
    assert {column.samples for column in steps.columns} == {4}


def test_outputs_of_train_steps_are_kept_with_uids(dropped: Path, tmp_path: Path) -> None:
    out = tmp_path / "steps.parquet"
    again(dropped, {13: "raises"}, node="policy_trainer", out=out)
    rows = pq.ParquetFile(out, pre_buffer=False).read(use_threads=False).to_pydict()
    assert rows["uid"] == list(range(16, 24))


# ---- runs that were resumed elsewhere ------------------------------------------------------------------------------


def test_a_checkpoint_in_the_folder_resumed_from_is_named(tmp_path: Path) -> None:
    first = train(tmp_path / "first", SCRIPT, "runtime.num_episode=1")
    origin = first / "checkpoints/episode-000001"
    run = train(tmp_path / "second", SCRIPT, f"runtime.resume={origin}")
    replayed = chatlearn.replay(run, episode=2)
    assert replayed.left_out == ["policy_trainer.train_step"]
    (note,) = (note for note in replayed.notes if "train steps are left out" in note)
    own = run / "checkpoints/episode-000001"
    assert note.endswith(f"the run was resumed from {origin}; copy it to {own.resolve()}")
    with pytest.raises(CheckpointError, match="the run was resumed from"):
        chatlearn.replay(run, episode=2, node="policy_trainer")
    shutil.copytree(origin, own)
    replayed = chatlearn.replay(run, episode=2)
    assert replayed.is_equal
    assert not replayed.left_out
    shutil.rmtree(own)
    shutil.rmtree(origin)
    assert "which is gone" in " ".join(chatlearn.replay(run, episode=2).notes)
