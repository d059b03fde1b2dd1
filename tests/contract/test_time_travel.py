# SPDX-License-Identifier: Apache-2.0
"""Time travel: recorded nodes run again, equal where nothing has changed and different where something has."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from training_scripts import train

import chatlearn
from chatlearn.biography.story import biography
from chatlearn.cli import main
from chatlearn.errors import ChatLearnError, CheckpointError, ConfigError, RecordError
from chatlearn.record.reading import RunRecord
from chatlearn.rerun.replay import Replay

SCRIPT = '''
import sys
import random
import torch
import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyReference, PolicyTrainer
from chatlearn.testing import tiny_pair

torch.set_num_threads(1)
chatlearn.init({"runtime": {
    "num_episode": 3, "sample_per_episode": 12, "num_inference_per_prompt": 3, "generation_batch_size": 6,
    "train_global_batch_size": 5, "train_micro_batch_size": 2, "num_training_epoch": 2, "save_episode_interval": 1,
    "record": True, "output_dir": "run", "trackers": [],
}}, overrides=sys.argv[1:])


def vowels(completions):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def brevity(completions):
    return [-0.1 * len(text) for text in completions]


class Noise(BaseModule):
    """Draws from all three global generators, and keeps a count in its state."""
    writes = frozenset({"noise"})

    def setup(self):
        self.calls = self.episodes = 0

    def before_episode(self):
        self.episodes += 1

    def forward_step(self, data, iteration):
        self.calls += 1
        data["noise"] = torch.rand(len(data["uid"])) + random.random() + 10 * self.calls + 100 * iteration
        data["noise"] += 1000 * self.episodes
        return data

    def training_state(self):
        return {"calls": self.calls, "episodes": self.episodes}

    def load_training_state(self, state):
        self.calls, self.episodes = state["calls"], state["episodes"]


policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=6)
reference = PolicyReference("reference", model=tiny_pair)
reward = FunctionReward("reward", [vowels, brevity])
advantage = GroupAdvantage("advantage")
dither, noise = Noise("dither"), Noise("noise")
learner = PolicyTrainer("policy_trainer", model=tiny_pair, lr=1e-2, kl_coef=0.01)


def env_flow(batch):
    rollout = policy.forward_step(batch)
    dither.forward_step(rollout)
    return advantage.forward_step(noise.forward_step(reward.forward_step(rollout)), reference.forward_step(rollout))


def trainer_flow(batch):
    learner.train_step(batch)


def eval_flow(batch):
    return reward.eval_step(policy.eval_step(batch))


engine = Engine(Environment(env_flow), Trainer(trainer_flow), Evaluator(eval_flow).set_dataset(["1", "2"]))
engine.set_parameter_sync(learner, policy).set_dataset([f"{i}+{i}=" for i in range(7)]).learn()
'''
ENVIRONMENT = [
    "dither.forward_step",
    "reward.forward_step",
    "noise.forward_step",
    "reference.forward_step",
    "advantage.forward_step",
]


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("recorded"), SCRIPT)


@pytest.fixture(autouse=True)
def _run_stays_as_it_is(request: pytest.FixtureRequest) -> Any:
    """Whatever a test does: it changes nothing of the run that it looks at."""
    if "recorded" not in request.fixturenames:
        yield
        return
    run: Path = request.getfixturevalue("recorded")
    before = digest(run)
    yield
    assert digest(run) == before


def columns(replayed: Replay, node: str) -> dict[str, int]:
    """Return how many samples differ in each column that a node made."""
    comparison = next(c for c in replayed.nodes if c.node == node)
    return {column.column: column.differing for column in comparison.columns}


# ---- unchanged code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("episode", [1, 2, 3])
@pytest.mark.parametrize(
    "node", ["policy", "reference", "reward", "noise.forward_step", "advantage", "policy_trainer"]
)
def test_any_node_runs_again_and_is_equal_bit_for_bit(
    recorded: Path, node: str, episode: int
) -> None:
    replayed = chatlearn.replay(recorded, episode=episode, node=node)
    assert replayed.is_equal, replayed.nodes
    assert [comparison.node.split(".")[0] for comparison in replayed.nodes] == [
        node.partition(".")[0]
    ]
    assert replayed.nodes[0].columns or replayed.nodes[0].numbers
    assert replayed.changes == replayed.notes == []


@pytest.mark.parametrize("episode", [1, 2, 3])
def test_a_whole_episode_runs_again_from_its_rollouts(recorded: Path, episode: int) -> None:
    replayed = chatlearn.replay(recorded, episode=episode)
    assert replayed.is_equal
    assert [comparison.node for comparison in replayed.nodes] == [
        *ENVIRONMENT,
        "policy_trainer.train_step",
    ]
    numbers = {number.name for number in replayed.nodes[-1].numbers}
    assert {"loss", "grad_norm", "clip_low", "trained_tokens", "lr"} <= numbers
    assert replayed.nodes[-1].samples == 6
    assert replayed.notes == ["taken from the record: policy.forward_step"]


@pytest.mark.parametrize("node", ["policy", "reward.eval_step"])
def test_nodes_of_an_evaluation_run_again(recorded: Path, node: str) -> None:
    replayed = chatlearn.replay(recorded, episode=2, node=node, evaluation=True)
    assert replayed.is_equal
    assert replayed.nodes[0].samples == 2


def test_train_steps_of_a_record_are_those_of_the_run(recorded: Path) -> None:
    """What is compared with is what the run logged: the last row of metrics is the mean over its updates."""
    rows = [json.loads(line) for line in (recorded / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        record = RunRecord(recorded).episode(row["episode"]).flow("trainer_flow").nodes[0]
        losses = [call.entry.numbers["loss"] for call in record.calls]
        assert sum(losses) / len(losses) == pytest.approx(row["policy_trainer/loss"], abs=1e-12)


def test_a_run_may_be_named_relative_to_where_one_is(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script runs where it ran, but the record stays where it was."""
    (recorded.parent / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(recorded.parent / "elsewhere")
    assert chatlearn.replay("../run", episode=2).nodes[-1].trains
    assert chatlearn.replay("../run", episode=2, node="policy_trainer").is_equal
    with pytest.raises(RecordError, match="there are 1-3"):
        chatlearn.replay("../run", episode=9)


def test_only_what_is_needed_is_set_up(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatlearn.models import PolicyInference, PolicyReference, PolicyTrainer

    made: list[str] = []
    for kind in (PolicyInference, PolicyReference, PolicyTrainer):
        setup = kind.setup

        def counted(self: Any, setup: Any = setup) -> None:
            made.append(self.name)
            setup(self)

        monkeypatch.setattr(kind, "setup", counted)
    chatlearn.replay(recorded, node="advantage")
    assert made == []
    chatlearn.replay(recorded, node="reference")
    assert made == ["reference"]
    chatlearn.replay(recorded, node="policy")
    assert sorted(made[1:]) == ["policy", "policy_trainer"]  # which has the policy's weights


def test_the_random_numbers_of_whoever_asks_go_on_as_before(recorded: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    chatlearn.replay(recorded, node="noise")
    assert torch.equal(torch.rand(3), expected)


# ---- changed code --------------------------------------------------------------------------------------------------


def with_script(recorded: Path, folder: Path, old: str, new: str) -> Path:
    assert old in SCRIPT
    path = folder / "changed.py"
    path.write_text(SCRIPT.replace(old, new))
    return path


def test_a_changed_setting_changes_what_it_should(recorded: Path) -> None:
    replayed = chatlearn.replay(
        recorded, episode=2, node="advantage", overrides=["models.advantage.normalise_std=false"]
    )
    assert replayed.changes == ["models.advantage.normalise_std: True then, False now"]
    record = RunRecord(recorded).episode(2).flow("env_flow").node("advantage.forward_step")
    uids = [uid for uids in replayed.uids["advantage.forward_step"] for uid in uids]
    made = torch.cat([batch["advantages"] for batch in replayed.outputs["advantage.forward_step"]])
    rewards = torch.stack(record.input("rewards")).double().reshape(-1, 3)
    assert torch.allclose(
        made.double().reshape(-1, 3), rewards - rewards.mean(1, keepdim=True), atol=1e-6
    )
    assert uids == list(range(12, 24))
    old = torch.stack(record.output("advantages"))
    (difference,) = replayed.nodes[0].columns
    assert difference.differing == int((old != made).sum()) > 0
    assert difference.largest == pytest.approx(float((old - made).abs().max()))


def test_a_changed_reward_changes_exactly_what_depends_on_it(
    recorded: Path, tmp_path: Path
) -> None:
    script = with_script(recorded, tmp_path, '"aeiou"', '"0123456789"')
    replayed = chatlearn.replay(recorded, episode=2, script=script)
    assert columns(replayed, "reference.forward_step") == {"ref_logprobs": 0}
    assert columns(replayed, "noise.forward_step") == {"noise": 0}
    rewards = columns(replayed, "reward.forward_step")
    assert rewards.pop("rewards/brevity") == 0
    assert all(rewards.values())
    assert columns(replayed, "advantage.forward_step")["advantages"] > 0
    numbers = {number.name: number.differing for number in replayed.nodes[-1].numbers}
    assert numbers["loss"] > 0
    assert numbers["trained_tokens"] == numbers["lr"] == 0
    completions = (
        RunRecord(recorded)
        .episode(2)
        .flow("env_flow")
        .node("policy.forward_step")
        .output("completion")
    )
    made = torch.cat([batch["rewards/vowels"] for batch in replayed.outputs["reward.forward_step"]])
    assert made.tolist() == [float(sum(c.isdigit() for c in text)) for text in completions]


def test_a_changed_loss_changes_the_updates_from_where_it_matters(recorded: Path) -> None:
    replayed = chatlearn.replay(
        recorded, episode=3, node="policy_trainer", overrides=["models.policy_trainer.kl_coef=0.5"]
    )
    numbers = {number.name: number for number in replayed.nodes[0].numbers}
    assert numbers["loss"].differing > 0
    assert numbers["pg_loss"].recorded is not None
    assert numbers["trained_tokens"].differing == 0
    # The first update begins from the same weights: its policy loss and its KL are what they were.
    assert numbers["kl"].differing <= 5
    calls = RunRecord(recorded).episode(3).flow("trainer_flow").nodes[0].calls
    for number in replayed.nodes[0].numbers:
        assert number.recorded == calls[number.update - 13].entry.numbers[number.name]
        assert number.made is not None
        assert abs(number.recorded - number.made) == number.largest
    assert numbers["loss"].largest > 0


def test_a_new_node_runs_on_recorded_samples(recorded: Path, tmp_path: Path) -> None:
    script = tmp_path / "changed.py"
    script.write_text(
        SCRIPT.replace(
            "    return advantage", "    extra.forward_step(rollout)\n    return advantage"
        ).replace("def env_flow", 'extra = FunctionReward("extra", vowels)\n\n\ndef env_flow')
    )
    replayed = chatlearn.replay(recorded, episode=1, node="extra", script=script)
    assert not replayed.is_equal
    assert replayed.nodes[0].remarks == ["the record has no such node: nothing to compare with"]
    record = RunRecord(recorded).episode(1).flow("env_flow").node("reward.forward_step")
    made = torch.cat([batch["rewards"] for batch in replayed.outputs["extra.forward_step"]])
    assert made.tolist() == [float(x) for x in record.output("rewards/vowels")]


def test_other_updates_of_the_same_samples(recorded: Path) -> None:
    replayed = chatlearn.replay(
        recorded, episode=1, node="policy_trainer", overrides=["runtime.num_training_epoch=1"]
    )
    assert replayed.nodes[0].remarks == ["3 updates now, 6 then"]
    assert not any(number.differing for number in replayed.nodes[0].numbers)


def test_some_samples_bring_their_groups(recorded: Path) -> None:
    replayed = chatlearn.replay(recorded, episode=2, node="advantage", samples=[13, 20])
    assert replayed.uids["advantage.forward_step"] == [[12, 13, 14, 18, 19, 20]]
    assert columns(replayed, "advantage.forward_step") == {"advantages": 0}
    assert "samples run in whole groups: 6 of them" in replayed.notes


def test_the_outputs_can_be_kept(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "advantages.parquet"
    replayed = chatlearn.replay(recorded, episode=2, node="advantage", out=out)
    rows = pq.ParquetFile(out, pre_buffer=False).read(use_threads=False).to_pydict()
    assert rows["uid"] == list(range(12, 24))
    made = torch.cat([batch["advantages"] for batch in replayed.outputs["advantage.forward_step"]])
    assert rows["advantages"] == made.tolist()


def test_nodes_can_be_kept_besides_the_rollouts(recorded: Path) -> None:
    replayed = chatlearn.replay(
        recorded, episode=2, keep=["reference", "noise.forward_step", "dither"]
    )
    names = [comparison.node for comparison in replayed.nodes]
    # The reward is what noise was made of, so it is kept with it.
    assert names == ["advantage.forward_step", "policy_trainer.train_step"]
    assert replayed.is_equal


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_weights_that_no_checkpoint_holds_are_missed_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, SCRIPT, "runtime.save_episode_interval=2")
    assert chatlearn.replay(run, episode=3, node="policy_trainer").is_equal
    with pytest.raises(CheckpointError) as raised:
        chatlearn.replay(run, episode=2, node="policy_trainer")
    assert (
        "the checkpoint of episode 1 is not there; the nearest is that of episode 2"
        in raised.value.cause
    )
    assert "choose episode 3" in raised.value.fix
    assert "runtime.save_episode_interval=1" in raised.value.fix
    assert chatlearn.replay(run, episode=2, node="advantage").is_equal
    noise = chatlearn.replay(run, episode=2, node="noise")  # its count is in no checkpoint
    assert noise.notes == [
        "noise: runs with the state that setup() makes; there is no checkpoint of episode 1"
    ]
    assert chatlearn.replay(run, episode=1).is_equal  # from what setup() makes
    without_training = chatlearn.replay(run, episode=2, keep=["noise", "dither"])
    assert [node.node for node in without_training.nodes] == [
        "reference.forward_step",
        "advantage.forward_step",
    ]
    assert any("train steps are left out" in note for note in without_training.notes)
    assert without_training.left_out == ["policy_trainer.train_step"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["replay", str(run), "--episode", "2", "--keep", "noise", "--keep", "dither"])
    assert (
        "episode 2: what ran is equal to the record, bit for bit; left out: policy_trainer.train_step"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"episode": 9}, RecordError, "episode 9 is not recorded; there are 1-3"),
        ({"node": "advantag"}, RecordError, "did you mean 'advantage'?"),
        ({"node": "policy.eval_step"}, RecordError, "did you mean 'policy.forward_step'?"),
        ({"node": "advantage", "samples": [999]}, RecordError, "its uids go from 24 to 35"),
        ({"samples": [24]}, ConfigError, "name a node"),
        ({"node": "policy_trainer", "samples": [24]}, ConfigError, "whole global batches"),
        ({"node": "advantage", "out": "no/such/folder/x.parquet"}, ChatLearnError, "no file can be written"),
        ({"out": "x.parquet"}, ConfigError, "name the node with --node"),
        ({"node": "advantage", "out": "x.csv"}, ChatLearnError, "name it x.parquet"),
        ({"keep": ["nobody"]}, RecordError, "no node 'nobody'"),
        ({"script": "gone.py"}, ConfigError, "there is no script"),
        ({"node": "advantage", "overrides": ["models.advantage.epss=1"]}, ConfigError, "did you mean 'eps'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(recorded: Path, more: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind) as raised:
        chatlearn.replay(recorded, **more)
    assert message in str(raised.value)


EVALUATION = (
    SCRIPT.partition("engine = ")[0]
    + """
Engine(evaluator=Evaluator(eval_flow).set_dataset(["1", "2"])).learn()
"""
)
ALONE = (
    SCRIPT.partition("engine = ")[0]
    + """
class Rows(PolicyTrainer):
    def build_dataset(self, prompts, is_eval=False):
        made = [[4, 5, 6], [7, 8], [9], [5]]
        return [{"prompt": p, "prompt_ids": torch.tensor([5, 6]), "response_ids": torch.tensor(ids),
                 "rollout_logprobs": -torch.ones(len(ids)), "advantages": 0.5} for p, ids in zip(prompts, made)]


learner = Rows("policy_trainer", model=tiny_pair, lr=1e-2)
Engine(trainer=Trainer(trainer_flow)).set_dataset(list("abcd")).learn()
"""
)


def test_a_run_that_only_evaluates(tmp_path: Path) -> None:
    run = train(tmp_path, EVALUATION)
    assert chatlearn.replay(run, node="policy", evaluation=True).is_equal
    assert biography(run, 1, evaluation=True).prompt == "2"
    with pytest.raises(RecordError, match="nothing of episode 0 can run again"):
        chatlearn.replay(run, episode=0)
    with pytest.raises(RecordError, match=r"no samples of training are recorded \(episodes: 0\)"):
        biography(run, 1)


def test_a_run_that_trains_on_its_dataset(tmp_path: Path) -> None:
    run = train(
        tmp_path, ALONE, "runtime.num_inference_per_prompt=1", "runtime.sample_per_episode=4"
    )
    for episode in (1, 2, 3):
        replayed = chatlearn.replay(run, episode=episode)
        assert replayed.is_equal
        assert replayed.nodes[0].trains
    life = biography(run, 5)
    assert (life.episode, life.prompt, len(life.updates)) == (2, "b", 2)


def test_a_file_within_the_record_is_refused(recorded: Path) -> None:
    with pytest.raises(ChatLearnError, match="a run's record is never changed"):
        chatlearn.replay(recorded, node="advantage", out=recorded / "record/x.parquet")


def test_a_node_that_the_script_has_no_more(recorded: Path, tmp_path: Path) -> None:
    script = with_script(
        recorded, tmp_path, 'GroupAdvantage("advantage")', 'GroupAdvantage("whiten")'
    )
    with pytest.raises(RecordError) as raised:
        chatlearn.replay(recorded, node="advantage", script=script)
    assert "in the record, but no longer in the script" in raised.value.cause
    with pytest.raises(RecordError, match=r"no node 'whiten.forward_step'"):
        # the trainer takes what a node makes that was never recorded
        chatlearn.replay(recorded, node="policy_trainer", script=script)


def test_a_script_that_was_moved(tmp_path: Path) -> None:
    run = train(tmp_path, SCRIPT)
    (tmp_path / "train.py").rename(tmp_path / "moved.py")
    with pytest.raises(ConfigError, match="is gone"):
        chatlearn.replay(run, node="advantage")
    moved = tmp_path / "moved.py"
    replayed = chatlearn.replay(
        run, node="advantage", script=moved, arguments=["models.advantage.eps=1"]
    )
    assert replayed.changes == [
        f"script: {tmp_path / 'train.py'} then, {moved} now",
        "arguments: none then, models.advantage.eps=1 now",
        "models.advantage.eps: 1e-06 then, 1.0 now",
    ]
    assert chatlearn.replay(run, node="advantage", script=moved).is_equal


def test_an_error_of_a_changed_reward_names_its_line(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = with_script(recorded, tmp_path, 'c in "aeiou"', "c in missing")
    with pytest.raises(SystemExit) as stopped:
        main(["replay", str(recorded), "--node", "reward", "--script", str(script)])
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert "NameError: name 'missing' is not defined" in shown
    assert "in vowels" in shown


# ---- flows of other shapes -----------------------------------------------------------------------------------------

BREVITY = "def brevity(completions):\n    return [-0.1 * len(text) for text in completions]"
SHAPES = {
    "streaming": (["runtime.stream_data_loader_type=dynamic"], {}),
    "replicas": (["models.policy.num_replica=2", "models.noise.num_replica=1"], {}),
    "replay buffers": (["runtime.max_replay_episode=2"], {}),
    "a policy that is synced rarely": (["models.policy.sync_frequency=2"], {}),
    "the trainer's own log-probs": (
        [],
        {"reward.forward_step(rollout)": "reward.forward_step(learner.forward_step(rollout))"},
    ),
    "lost samples": (
        ["models.reward.on_failure=mask"],
        {BREVITY: "def brevity(completions, uid):\n    return [float('nan') if int(u) % 5 == 1 else 0.5 for u in uid]"},
    ),
    "dropped groups": (
        ["models.reward.on_failure=drop_group", "runtime.sample_per_episode=21"],
        {BREVITY: "def brevity(completions, uid):\n    assert not any(int(u) % 7 == 2 for u in uid)\n"
            "    return [-0.1 * len(text) for text in completions]"},
    ),
    "a namespace": (["models.advantage.namespace=own"], {"kl_coef=0.01)": 'kl_coef=0.01, namespace="own")'}),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "changes"), SHAPES.values(), ids=SHAPES)
def test_an_unchanged_episode_is_equal_whatever_its_shape(
    arguments: list[str], changes: dict[str, str], tmp_path: Path
) -> None:
    script = SCRIPT
    for old, new in changes.items():
        assert old in script
        script = script.replace(old, new)
    run = train(tmp_path, script, *arguments)
    for episode in (2, 3):
        replayed = chatlearn.replay(run, episode=episode)
        assert replayed.is_equal, (episode, replayed.nodes, replayed.notes)
        assert replayed.nodes[-1].trains


def test_a_run_that_was_resumed_is_recorded_as_one(tmp_path: Path) -> None:
    run = train(tmp_path, SCRIPT)
    whole = {
        n: chatlearn.replay(run, episode=n, node="policy_trainer").nodes[0].numbers
        for n in (1, 2, 3)
    }
    train(tmp_path, SCRIPT, f"runtime.resume={run / 'checkpoints/episode-000001'}")
    for episode in (1, 2, 3):
        replayed = chatlearn.replay(run, episode=episode)
        assert replayed.is_equal
        then = {number.name: number.recorded for number in replayed.nodes[-1].numbers}
        assert then == {number.name: number.recorded for number in whole[episode]}


# ---- why -----------------------------------------------------------------------------------------------------------


def test_the_story_of_a_sample_is_that_of_the_record(recorded: Path) -> None:
    life = biography(recorded, 16)
    assert (life.episode, life.prompt_uid, life.group) == (2, 5, [15, 16, 17])
    assert life.prompt == "5+5="
    (response,) = life.responses
    assert response.settings == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 6,
        "stop": [],
    }
    assert response.policy_version == 2
    assert response.pieces is not None
    assert "".join(response.pieces) == response.completion
    assert set(response.per_token) == {"rollout_logprobs", "ref_logprobs"}
    (reward,) = life.rewards
    assert sum(reward.weights[n] * v for n, v in reward.parts.items()) == pytest.approx(
        reward.value
    )
    (advantage,) = life.advantages
    assert advantage.agrees
    assert list(advantage.rewards) == life.group
    assert advantage.rewards[16] == pytest.approx(reward.value)
    # Twelve samples in updates of five: three of each pass, the last filled up with the first three samples.
    assert [update.training_pass for update in life.updates] == [1, 2]
    record = RunRecord(recorded).episode(2).flow("trainer_flow").nodes[0]
    for update in life.updates:
        call = record.calls[update.update_of_episode - 1]
        assert update.update == 6 + update.update_of_episode
        assert 16 in call.uids
        assert update.numbers["loss"] == call.entry.numbers["loss"]
        assert update.trained == len(response.token_ids)
    assert life.updates[0].update_of_episode == 1  # the fifth sample of its episode
    assert life.missing == life.remarks == []


def test_ratio_and_clip_add_up_to_what_the_update_logged(recorded: Path) -> None:
    record = RunRecord(recorded).episode(3).flow("trainer_flow").nodes[0]
    for call in record.calls:
        outputs = call.outputs()
        ratio = torch.cat([cell for batch in outputs for cell in batch["ratio"]])
        clipped = torch.cat([cell for batch in outputs for cell in batch["clipped"]])
        numbers = call.entry.numbers
        assert ratio.isfinite().all()
        assert len(ratio) == numbers["trained_tokens"]
        assert float(ratio.mean()) == pytest.approx(numbers["ratio"], rel=1e-6)
        assert float((clipped > 0).float().mean()) == pytest.approx(numbers["clip_high"], abs=1e-6)
        assert float((clipped < 0).float().mean()) == pytest.approx(numbers["clip_low"], abs=1e-6)
        weights = torch.cat([batch["loss_weight"] for batch in outputs])
        assert weights.tolist() == pytest.approx([1 / numbers["trained_tokens"]] * len(weights))


def test_a_sample_that_fills_an_update_up_is_in_it_again(recorded: Path) -> None:
    first = biography(recorded, 0)
    assert [(u.training_pass, u.update_of_episode) for u in first.updates][:2] == [(1, 1), (1, 3)]


def test_a_sample_of_an_evaluation(recorded: Path) -> None:
    life = biography(recorded, 1, evaluation=True)
    assert (life.episode, life.prompt, life.is_evaluation) == (3, "2", True)
    assert life.responses[0].policy_version == 4
    assert life.updates == []
    assert biography(recorded, 1, evaluation=True, episode=1).episode == 1


def test_the_arithmetic_of_other_advantages(tmp_path: Path) -> None:
    """RLOO, Dr.GRPO, and a module that is not ours."""
    dr_grpo = ["models.advantage.normalise_std=false", "models.advantage.eps=0"]
    for name, settings in (("rloo", ["models.advantage.leave_one_out=true"]), ("dr", dr_grpo)):
        run = train(tmp_path / name, SCRIPT, *settings)
        advantages = [biography(run, uid).advantages[0] for uid in range(12)]
        assert all(advantage.agrees for advantage in advantages)
        assert any(abs(advantage.result) > 0.1 for advantage in advantages)
    own = SCRIPT.replace(
        'advantage = GroupAdvantage("advantage")',
        "class Own(GroupAdvantage):\n    pass\n\n\nadvantage = Own('advantage')",
    )
    (advantage,) = biography(train(tmp_path / "own", own), 5).advantages
    assert advantage.computed is None
    assert advantage.inputs.keys() >= {"rewards", "noise", "prompt_uid"}


def test_tokens_are_text_though_only_the_policy_has_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = SCRIPT.replace("import tiny_pair", "import tiny_model, tiny_pair, tiny_tokenizer")
    script = script.replace(
        'PolicyTrainer("policy_trainer", model=tiny_pair',
        'PolicyTrainer("policy_trainer", model=tiny_model',
    )
    script = script.replace(
        '"policy", model=tiny_pair', '"policy", model=tiny_model, tokenizer=tiny_tokenizer'
    )
    run = train(tmp_path, script, "runtime.num_episode=1")
    shutil.rmtree(run / "model")  # the exported model brings the policy's tokenizer, too
    (response,) = biography(run, 3).responses
    assert response.pieces is not None
    assert "".join(response.pieces) == response.completion
    shutil.rmtree(run / "record/tokenizers")
    life = biography(run, 3)
    assert life.responses[0].pieces is None
    assert "no tokenizer is recorded" in life.missing[0]
    with pytest.raises(SystemExit):
        main(["why", str(run), "3"])
    heading = next(line for line in capsys.readouterr().out.splitlines() if "token  id" in line)
    assert "text" not in heading


def test_an_unknown_sample(recorded: Path) -> None:
    with pytest.raises(RecordError) as raised:
        biography(recorded, 40)
    assert "no recorded episode has a sample uid 40; recorded are uids 0-35" in raised.value.cause
    assert "the nearest are those of episode 3: 24-35" in raised.value.fix


def test_with_replay_a_sample_is_trained_on_in_later_episodes(tmp_path: Path) -> None:
    run = train(tmp_path, SCRIPT, "runtime.max_replay_episode=2")
    life = biography(run, 4)
    assert {update.episode for update in life.updates} == {1, 2}
    assert life.episode == 1


def test_what_a_kept_node_lost_stays_lost(tmp_path: Path) -> None:
    for name in ("lost samples", "dropped groups"):
        arguments, changes = SHAPES[name]
        ((old, new),) = changes.items()
        run = train(tmp_path / name, SCRIPT.replace(old, new), *arguments)
        flow = RunRecord(run).episode(2).flow("env_flow")
        assert len(flow.node("reward.forward_step").came_out) < len(flow.uids)
        replayed = chatlearn.replay(run, episode=2, keep=["reward"])
        assert "reward.forward_step" not in [node.node for node in replayed.nodes]
        assert replayed.is_equal, replayed.nodes


def test_a_lost_sample_says_where_it_was_lost(tmp_path: Path) -> None:
    arguments, changes = SHAPES["lost samples"]
    ((old, new),) = changes.items()
    run = train(tmp_path, SCRIPT.replace(old, new), *arguments)
    flow = RunRecord(run).episode(1).flow("env_flow")
    lost = [uid for uid in flow.uids if uid not in flow.node("reward.forward_step").came_out]
    assert lost
    life = biography(run, lost[0])
    assert life.outcome == "failed"
    loss = life.losses[lost[0]]
    assert (loss.what, loss.drops_group) == ("failed in reward.forward_step", False)
    assert "'brevity'" in loss.cause
    assert life.remarks == [
        "no later node of env_flow got it",
        "none of its tokens is trained on: its outcome is failed",
    ]
    assert life.updates
    assert sum(update.trained for update in life.updates) == 0
    assert not life.missing
    sibling = next(uid for uid in life.group if uid not in lost)
    (advantage,) = biography(run, sibling).advantages
    assert advantage.absent == [uid for uid in life.group if uid in lost]
    assert advantage.agrees


def test_a_dropped_group_names_the_sample_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, changes = SHAPES["dropped groups"]
    ((old, new),) = changes.items()
    run = train(tmp_path, SCRIPT.replace(old, new), *arguments)
    for uid in (1, 2):  # a sibling of it, and itself
        life = biography(run, uid)
        why = "its group left training because uid 2 failed (reward.forward_step)"
        assert why in life.remarks
        assert not any("dropped it" in r or "not delivered" in r for r in life.remarks)
    with pytest.raises(SystemExit):
        main(["why", str(run), "2"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "outcome failed in reward.forward_step: reward function 'brevity' raised" in shown


def test_equal_rewards_still_teach_through_a_kl_term(tmp_path: Path) -> None:
    same = SCRIPT.replace('sum(c in "aeiou" for c in text)', "1").replace("-0.1 * len(text)", "0.0")
    for coefficient, taught in (
        (0.01, "it teaches only through the KL term"),
        (0, "it teaches nothing"),
    ):
        settings = [f"models.policy_trainer.kl_coef={coefficient}", "runtime.num_episode=1"]
        life = biography(train(tmp_path / str(coefficient), same, *settings), 1)
        assert life.remarks == [
            f"advantage.forward_step: all rewards of the group are equal, so {taught}"
        ]


# ---- the command line ----------------------------------------------------------------------------------------------


def test_replay_prints_a_table(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(
            [
                "replay",
                str(recorded),
                "models.advantage.eps=0.5",
                "--episode",
                "2",
                "--node",
                "advantage",
            ]
        )
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "changed since the run: models.advantage.eps: 1e-06 then, 0.5 now" in shown
    assert "advantage.forward_step  12 samples compared" in shown
    assert "episode 2: differs from the record: advantage.forward_step" in shown


def test_why_prints_a_story_and_json(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["why", str(recorded), "16"])
    shown = capsys.readouterr().out
    life = biography(recorded, 16)
    for part in (
        "sample uid 16",
        "5+5=",
        "1 x vowels",
        "rewards of the group, by uid: 15:",
        "its 1., pass 1",
        "ratio in 7",
    ):
        assert part in shown
    assert life.responses[0].completion is not None
    with pytest.raises(SystemExit):
        main(["why", str(recorded), "16", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["uid"] == 16
    assert told["advantages"][0]["rewards"] == {
        str(k): v for k, v in life.advantages[0].rewards.items()
    }
    assert len(told["updates"]) == 2


@pytest.mark.parametrize("arguments", [["replay", "nowhere"], ["why", "nowhere", "1"]])
def test_a_folder_that_is_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    assert "there is no run folder nowhere" in capsys.readouterr().err
