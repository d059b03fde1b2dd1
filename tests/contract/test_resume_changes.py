# SPDX-License-Identifier: Apache-2.0
"""What a resumed run says and refuses: other models, configuration and libraries; rows that exist once; what stays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_modules import Batch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.checkpoint.state import RunState
from chatlearn.errors import ChatLearnError, CheckpointError, ConfigError, OutputError
from chatlearn.observability.run_folder import RunFolder
from chatlearn.testing import tiny_model


class Policy(BaseModule):
    """Answers with the weights that it learns."""

    setups = 0

    def __init__(self, name: str = "policy", make: Any = lambda: torch.nn.Linear(2, 2)) -> None:
        super().__init__(name)
        self.make = make

    def setup(self) -> None:
        type(self).setups += 1
        self.model = self.make()
        self.steps = 0

    def forward_step(self, data: Batch) -> Batch:
        total = sum(float(p.detach().sum()) for p in self.model.parameters())
        self.log(level=total)
        return {**data, "rewards": [total + float(torch.rand(1))] * len(data["prompt"])}

    def eval_step(self, data: Batch) -> Batch:
        scores = self.get("scores") or [0.5]
        self.log(accuracy=scores[min(self.steps // 2, len(scores) - 1)])
        return data

    def train_step(self, data_list: list[Batch]) -> None:
        self.steps += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(data_list[0]["rewards"][0])
        self.log(loss=float(data_list[0]["rewards"][0]))

    def training_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "moment": torch.full((3,), float(self.steps))}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def learn(folder: Path, episodes: int, policy: Policy | None = None, **more: Any) -> Policy:
    policy = policy or Policy()
    values = {"output_dir": str(folder), "num_episode": episodes, "sample_per_episode": 4}
    values |= {"train_global_batch_size": 2, "save_episode_interval": 1, "resume": "auto"}
    chatlearn.init({"runtime": {**values, **more}})
    engine = Engine(
        Environment(lambda b: policy.forward_step(b)),
        Trainer(lambda b: policy.train_step(b)),
        Evaluator(lambda b: policy.eval_step(b)).set_dataset(["e"]),
    )
    engine.set_dataset(list("abcdefg")).learn()
    return policy


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (folder / "checkpoints").glob("episode-*"))


def of(folder: Path, episode: int) -> Path:
    return folder / f"checkpoints/episode-{episode:06d}"


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def computed(folder: Path) -> list[tuple[Any, ...]]:
    names = ("episode", "train_iteration", "policy/level", "policy/loss", "eval/policy/accuracy")
    return [tuple(row.get(name) for name in names) for row in rows(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in files
        if "tensorboard" not in p.parts
    }


def refused(folder: Path, error: type[ChatLearnError], policy: Policy, **more: Any) -> str:
    """Resume; hold that it is refused before anything is trained, and that nothing in the folder changed."""
    before = contents(folder)
    with pytest.raises(error) as raised:
        learn(folder, 9, policy, **more)
    assert contents(folder) == before
    assert raised.value.place
    assert raised.value.fix
    return raised.value.cause


# ---- other models -------------------------------------------------------------------------------------------------


def test_a_model_of_other_shapes_is_refused(tmp_path: Path) -> None:
    learn(tmp_path, 2)
    cause = refused(tmp_path, CheckpointError, Policy(make=lambda: torch.nn.Linear(3, 2)))
    assert cause == (
        "the checkpoint does not fit module 'policy': weight has shape [2, 3] instead of [2, 2]"
    )
    cause = refused(
        tmp_path, CheckpointError, Policy(make=lambda: torch.nn.Linear(2, 2, bias=False))
    )
    assert "bias is not in the model" in cause


def test_a_model_of_another_class_is_refused(tmp_path: Path) -> None:
    learn(tmp_path, 2)
    cause = refused(tmp_path, CheckpointError, Policy(make=lambda: torch.nn.Bilinear(1, 2, 2)))
    assert "class: Linear -> Bilinear" in cause


def test_a_model_that_computes_something_else_with_the_same_shapes_is_refused(
    tmp_path: Path,
) -> None:
    def other() -> Any:
        model = tiny_model()
        model.config.num_attention_heads = 8
        return model

    learn(tmp_path, 1, Policy(make=tiny_model))
    cause = refused(tmp_path, CheckpointError, Policy(make=other))
    assert cause.endswith("num_attention_heads: 4 -> 8")
    learn(tmp_path, 2, Policy(make=tiny_model))


def test_shapes_that_are_known_before_setup_are_compared_before_it(tmp_path: Path) -> None:
    class Described(Policy):
        def describe_parameters(self) -> dict[str, torch.Tensor]:
            with torch.device("meta"):
                return dict(self.make().state_dict())

    learn(tmp_path, 1, Described())
    before = Policy.setups, Described.setups
    refused(tmp_path, CheckpointError, Described(make=lambda: torch.nn.Linear(5, 2)))
    assert (Policy.setups, Described.setups) == before
    learn(tmp_path, 2, Described())


def test_a_module_that_is_missing_in_the_checkpoint_is_refused(tmp_path: Path) -> None:
    learn(tmp_path, 1)
    cause = refused(tmp_path, CheckpointError, Policy("renamed"))
    assert "the checkpoint holds no weights of module 'renamed'" in cause


def test_state_that_nobody_takes_over_is_told(tmp_path: Path, capsys: Any) -> None:
    learn(tmp_path, 1)
    policy, idle = Policy(), Policy("policy_2")
    chatlearn.init({"runtime": {"output_dir": str(tmp_path), "num_episode": 2, "resume": "auto"}})
    path = of(tmp_path, 1)
    state = RunState.read(path)
    (path / "modules/gone").mkdir()
    shutil.copy(path / "modules/policy/training.pt", path / "modules/gone/training.pt")
    state.files["modules/gone/training.pt"] = state.files["modules/policy/training.pt"]
    state.digests["modules/gone/training.pt"] = state.digests["modules/policy/training.pt"]
    (path / "checkpoint.json").write_text(state.to_json())
    capsys.readouterr()
    learn(tmp_path, 2, policy)
    assert "so its saved state is left behind: gone" in capsys.readouterr().out
    assert idle.name not in state.policy_versions


# ---- configuration and libraries ----------------------------------------------------------------------------------


def test_what_changed_in_the_configuration_is_told(tmp_path: Path, capsys: Any) -> None:
    learn(tmp_path, 1)
    capsys.readouterr()
    learn(tmp_path, 2, num_training_epoch=2)
    told = "the configuration changed since the checkpoint: "
    out = capsys.readouterr().out
    assert f"{told}runtime.num_episode: 1 -> 2, runtime.num_training_epoch: 1 -> 2\n" in out
    learn(tmp_path, 2, num_training_epoch=2, output_dir=str(tmp_path) + "/")
    assert told not in capsys.readouterr().out  # nothing but places


def test_other_libraries_are_told(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn(tmp_path, 1)
    path = of(tmp_path, 1)
    state = RunState.read(path)
    assert set(state.versions) >= {"python", "chatlearn", "torch", "transformers", "numpy"}
    now = state.versions["torch"]
    state.versions["torch"] = "1.0"
    (path / "checkpoint.json").write_text(state.to_json())
    capsys.readouterr()
    learn(tmp_path, 2)
    out = capsys.readouterr().out
    assert f"other versions than the checkpoint was written with: torch 1.0 -> {now}; " in out
    learn(tmp_path, 3)
    assert "other versions" not in capsys.readouterr().out


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    learn(tmp_path, 1)
    path = of(tmp_path, 1) / "checkpoint.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 3}))
    cause = refused(tmp_path, CheckpointError, Policy())
    assert "has format 3, and this version of chatlearn reads 1 to 2" in cause


# ---- rows of metrics ----------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> list[tuple[Any, ...]]:
    """Return what five episodes compute if nothing disturbs them."""
    learn(tmp_path / "whole", 5)
    return computed(tmp_path / "whole")


def test_a_row_that_was_not_written_yet_comes_from_the_checkpoint(
    tmp_path: Path, whole: list[Any]
) -> None:
    """The process died between the checkpoint and the end of its episode."""
    learn(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for rest in ("", lines[-1][:20], "\0" * 50):
        path.write_text("".join(lines[:-1]) + rest)
        learn(tmp_path, 3)
        assert computed(tmp_path) == whole[:4]
    learn(tmp_path, 5)
    assert computed(tmp_path) == whole


def test_rows_that_are_whole_stay_as_they_are(tmp_path: Path) -> None:
    """The one in the checkpoint was taken down before the time of the checkpoint was known."""
    learn(tmp_path, 2)
    before = rows(tmp_path)
    assert "time/checkpoint" in before[-1]
    learn(tmp_path, 2)
    assert rows(tmp_path) == before


@pytest.mark.parametrize("harm", ["gone", "garbage", "of another branch"])
def test_metrics_survive_what_happens_to_their_file(
    tmp_path: Path, harm: str, whole: list[Any]
) -> None:
    learn(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    if harm == "gone":
        path.unlink()
    elif harm == "garbage":
        path.write_text('{"episode":1}\ngarbage\n{"episode":3}\n')
    else:
        path.write_text(path.read_text().replace('"policy/loss":', '"policy/loss":1'))
    learn(tmp_path, 5)
    assert computed(tmp_path) == whole


def test_a_file_that_is_removed_while_the_run_writes_comes_back(
    tmp_path: Path, whole: list[Any]
) -> None:
    class Removing(Policy):
        def before_episode(self) -> None:
            if self.steps == 6:
                (tmp_path / "metrics.jsonl").unlink()

    learn(tmp_path, 5, Removing())
    assert computed(tmp_path) == whole


def test_transcripts_that_are_gone_are_told(tmp_path: Path, capsys: Any) -> None:
    class Telling(Policy):
        def forward_step(self, data: Batch) -> Batch:
            return {**super().forward_step(data), "completion": list(data["prompt"])}

    learn(tmp_path, 2, Telling())
    before = (tmp_path / "transcripts.jsonl").read_text()
    capsys.readouterr()
    learn(tmp_path, 2, Telling())
    assert "lacks" not in capsys.readouterr().out
    assert (tmp_path / "transcripts.jsonl").read_text() == before
    (tmp_path / "transcripts.jsonl").unlink()
    learn(tmp_path, 3, Telling())
    out = capsys.readouterr().out
    assert "transcripts.jsonl lacks 10 of the 10 samples that were written to it by then" in out


def test_transcripts_that_are_damaged_stop_no_run(tmp_path: Path, capsys: Any) -> None:
    class Telling(Policy):
        def forward_step(self, data: Batch) -> Batch:
            return {**super().forward_step(data), "completion": list(data["prompt"])}

    learn(tmp_path, 2, Telling())
    path = tmp_path / "transcripts.jsonl"
    lines = path.read_text().splitlines()
    damaged = "\n".join([lines[0], "garbage", *lines[2:], ""])
    path.write_text(damaged)
    capsys.readouterr()
    learn(tmp_path, 3, Telling())
    assert "transcripts.jsonl lacks 1 of the 10 samples" in capsys.readouterr().out
    assert path.read_text().splitlines()[:9] == [lines[0], *lines[2:]]
    assert (tmp_path / "transcripts.damaged.jsonl").read_text() == damaged


def test_the_curves_go_along_to_another_folder(tmp_path: Path, whole: list[Any]) -> None:
    learn(tmp_path / "a", 3)
    learn(tmp_path / "b", 5, resume=str(of(tmp_path / "a", 2)))
    assert computed(tmp_path / "b") == whole
    assert saved(tmp_path / "b") == [3, 4, 5]


def test_going_back_forgets_the_rows_of_what_was_left(tmp_path: Path, whole: list[Any]) -> None:
    learn(tmp_path, 4)
    learn(tmp_path, 3, resume=str(of(tmp_path, 2)), num_training_epoch=2)
    branch = computed(tmp_path)
    assert branch[:3] == whole[:3]
    assert branch[3] != whole[3]
    (tmp_path / "checkpoints/latest").unlink()
    learn(tmp_path, 3, num_training_epoch=2)  # auto: the branch, not episode 4 that was left
    assert computed(tmp_path) == branch
    learn(tmp_path, 5, resume=str(of(tmp_path, 4)))  # and back to what was left, curves included
    assert computed(tmp_path) == whole


def test_an_evaluation_before_training_has_one_row(tmp_path: Path) -> None:
    class Stopping(Policy):
        def forward_step(self, data: Batch) -> Batch:
            raise KeyboardInterrupt

    first = {"enable_eval_before_training": True}
    learn(tmp_path / "whole", 2, **first)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "run", 2, Stopping(), **first)
    learn(tmp_path / "run", 2, **first)
    assert computed(tmp_path / "run") == computed(tmp_path / "whole")
    assert [row["episode"] for row in rows(tmp_path / "run")] == [0, 1, 2]


# ---- a finished run, an empty folder ------------------------------------------------------------------------------


def test_resuming_what_is_done_changes_nothing(tmp_path: Path, capsys: Any) -> None:
    learn(tmp_path, 2)
    times = {"report.html", "summary.json"}
    for _ in range(2):
        before = {k: v for k, v in contents(tmp_path).items() if k not in times}
        capsys.readouterr()
        learn(tmp_path, 2)
        assert "nothing left to do: 2 of 2 episodes are done" in capsys.readouterr().out
        assert {k: v for k, v in contents(tmp_path).items() if k not in times} == before


def test_an_empty_folder_begins_anew(tmp_path: Path, whole: list[Any], capsys: Any) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/.lock").touch()
    learn(tmp_path / "run", 5)
    assert computed(tmp_path / "run") == whole


# ---- damage in the middle of resuming -----------------------------------------------------------------------------


def test_auto_takes_the_next_older_one_before_anything_is_loaded(
    tmp_path: Path, whole: list[Any], capsys: Any
) -> None:
    learn(tmp_path, 3)
    damaged = of(tmp_path, 3) / "modules/policy/training.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    capsys.readouterr()
    learn(tmp_path, 5)
    out = capsys.readouterr().out
    assert (
        "not resumed from episode-000003: the checkpoint is damaged: "
        "modules/policy/training.pt has other content than was written" in out
    )
    assert f"resumed from {of(tmp_path, 2)}" in out
    assert computed(tmp_path) == whole
    assert saved(tmp_path) == [1, 2, 3, 4, 5]


def test_a_load_that_fails_halfway_leaves_nothing_to_the_next_run(
    tmp_path: Path, whole: list[Any]
) -> None:
    class Failing(Policy):
        fails = True

        def load_training_state(self, state: dict[str, Any]) -> None:
            if self.fails and state["steps"] == 6:
                self.steps = 77
                raise KeyError("later")
            super().load_training_state(state)

    learn(tmp_path, 3)
    policy = Failing()
    cause = refused(tmp_path, CheckpointError, policy)
    assert cause == "the checkpoint does not fit module 'policy': KeyError: 'later'"
    learn(tmp_path, 5, policy, resume=str(of(tmp_path, 2)))  # the same object
    assert computed(tmp_path) == whole


# ---- what stays ---------------------------------------------------------------------------------------------------


def scored(*scores: float) -> Policy:
    policy = Policy()
    policy.put("scores", [0.0, *scores])
    return policy


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    scores = (0.1, 0.9, 0.3, 0.2, 0.4)
    learn(tmp_path, 4, scored(*scores), keep_last=1, keep_best=1)
    assert saved(tmp_path) == [2, 4]
    learn(tmp_path, 5, scored(*scores), keep_last=1, keep_best=1)
    assert saved(tmp_path) == [2, 4, 5]  # the ranking survived; 4 was resumed from
    assert (tmp_path / "checkpoints/latest").read_text() == "episode-000005\n"


def test_lower_is_better_if_it_is_said(tmp_path: Path) -> None:
    metric = "-eval/policy/accuracy"
    scores = scored(0.5, 0.1, 0.3, 0.4)
    learn(tmp_path, 4, scores, keep_last=1, keep_best=1, best_metric=metric)
    assert saved(tmp_path) == [2, 4]


def test_a_metric_of_training_ranks_too(tmp_path: Path) -> None:
    learn(tmp_path, 4, keep_last=1, keep_best=1, best_metric="-policy/loss")
    losses = {row["episode"]: row.get("policy/loss") for row in rows(tmp_path)}
    best = min(range(1, 5), key=lambda episode: losses[episode])
    assert saved(tmp_path) == sorted({best, 4})


def test_an_episode_that_was_not_evaluated_is_not_ranked(tmp_path: Path) -> None:
    policy = scored(0.9, 0.1, 0.8, 0.2, 0.7)
    learn(tmp_path, 5, policy, keep_last=1, keep_best=1, eval_episode_interval=2)
    assert saved(tmp_path) == [4, 5]


def test_an_unknown_metric_is_refused_before_setup(tmp_path: Path) -> None:
    setups = Policy.setups
    with pytest.raises(ConfigError) as raised:
        learn(tmp_path, 2, keep_last=1, keep_best=1, best_metric="eval/polcy/accuracy")
    assert raised.value.cause == (
        "runtime.best_metric='eval/polcy/accuracy' cannot rank checkpoints: the evaluation measures nothing of "
        "'polcy'; there are: policy"
    )
    assert raised.value.fix == "did you mean 'policy'?"
    with pytest.raises(ConfigError, match="no module is called 'policyy'"):
        learn(tmp_path, 2, keep_last=1, keep_best=1, best_metric="policyy/loss")
    assert Policy.setups == setups


@pytest.mark.parametrize(
    ("metric", "first", "trained"),
    [
        ("eval/policy/acuracy", True, 0),
        ("eval/policy/acuracy", False, 2),
        ("-policy/los", True, 2),
    ],
)
def test_an_unknown_metric_is_refused_as_soon_as_metrics_are_known(
    tmp_path: Path, metric: str, first: bool, trained: int
) -> None:
    policy = Policy()
    more: dict[str, Any] = {"keep_last": 1, "keep_best": 1, "best_metric": metric}
    with pytest.raises(ConfigError, match="is no metric of this run; there are: ") as raised:
        learn(tmp_path, 4, policy, enable_eval_before_training=first, **more)
    assert policy.steps == trained
    assert raised.value.fix.startswith("did you mean '")
    assert raised.value.place.endswith("runtime.best_metric")


def test_ranking_without_an_evaluator_is_refused(tmp_path: Path) -> None:
    chatlearn.init({"runtime": {"output_dir": str(tmp_path), "keep_last": 1, "keep_best": 1}})
    policy = Policy()
    engine = Engine(
        Environment(lambda b: policy.forward_step(b)), Trainer(lambda b: policy.train_step(b))
    )
    with pytest.raises(ConfigError, match="there is no evaluator") as raised:
        engine.set_dataset(["a"]).learn()
    assert "runtime.best_metric" in raised.value.fix


def test_keeping_that_does_nothing_is_noted(tmp_path: Path, capsys: Any) -> None:
    learn(tmp_path / "a", 1, keep_best=1, best_metric="policy/loss")
    assert "runtime.keep_best: no effect without runtime.keep_last" in capsys.readouterr().out
    learn(tmp_path / "b", 1, keep_last=1, best_metric="policy/loss")
    assert "runtime.best_metric: no effect without runtime.keep_best" in capsys.readouterr().out


# ---- two runs, full disks -----------------------------------------------------------------------------------------


MEDDLER = """
import sys, chatlearn
from chatlearn import BaseModule, Engine, Environment
class Echo(BaseModule):
    def forward_step(self, data): return data
for how in ("auto", "never", sys.argv[1] + "/checkpoints/episode-000001"):
    chatlearn.init({"runtime": {"output_dir": sys.argv[1], "resume": how}})
    echo = Echo("echo")
    try:
        Engine(Environment(lambda b: echo.forward_step(b))).set_dataset(list("abcdefg")).learn()
    except chatlearn.ChatLearnError as error:
        print(type(error).__name__, error.cause, error.fix, sep="|")
"""


def test_a_run_that_resumes_while_the_other_writes_is_refused(tmp_path: Path) -> None:
    folder, seen = tmp_path / "run", list[str]()
    learn(folder, 2)

    class Meddled(Policy):
        def before_episode(self) -> None:
            before = contents(folder)
            command = [sys.executable, "-c", MEDDLER, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
            seen.extend(done.stdout.splitlines())
            assert contents(folder) == before

    learn(folder, 3, Meddled())
    assert len(seen) == 3
    for line in seen:
        kind, cause, fix = line.split("|")
        assert kind == "OutputError", line
        assert cause.startswith("another run, process ")
        assert "wait for it" in fix
    learn(tmp_path / "whole", 3)
    assert computed(folder) == computed(tmp_path / "whole")


def test_what_to_do_with_a_folder_is_asked_once_nobody_else_writes_there(tmp_path: Path) -> None:
    asked: list[Path] = []

    def goes_on(path: Path) -> bool:
        asked.append(path)
        return False

    with RunFolder(tmp_path), pytest.raises(OutputError, match="another run"):
        RunFolder(tmp_path, resume=goes_on)
    assert asked == []
    RunFolder(tmp_path, resume=goes_on).close()
    assert asked == [tmp_path]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_says_what_is_not_saved(
    tmp_path: Path, whole: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = torch.save

    def full(value: Any, *rest: Any, **more: Any) -> None:
        if isinstance(value, dict) and value.get("training", {}).get("steps") == 6:
            raise OSError(28, "No space left on device")
        real(value, *rest, **more)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError) as raised:
        learn(tmp_path, 5)
    monkeypatch.undo()
    assert raised.value.cause == (
        "the checkpoint of episode 3 could not be written: No space left on device; "
        "not saved is what came after episode-000002"
    )
    assert saved(tmp_path) == [1, 2]
    assert computed(tmp_path) == whole[:4]  # the episode was done, and its row stands
    assert json.loads((tmp_path / "summary.json").read_text())["complete"] is False
    learn(tmp_path, 5)
    assert computed(tmp_path) == whole


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """Mount a file system at `folder`, where this user may; yields a function that sets its size."""
    folder.mkdir()

    def mount(options: str, *what: str) -> int:
        command = ["mount", "-o", options, *what, str(folder)]
        return subprocess.run(command, capture_output=True, check=bool(what[1:])).returncode

    if sys.platform != "linux" or mount("size=64m", "-t", "tmpfs", "tmpfs"):
        pytest.skip("no file system can be mounted here")
    try:
        yield lambda size: assert_zero(mount(f"remount,size={size}"))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_zero(code: int) -> None:
    assert code == 0


@pytest.mark.parametrize(
    ("place", "left"),
    [("before_episode", 3), ("forward_step", 3), ("train_step", 3), ("eval_step", 2)],
)
def test_a_disk_that_fills_up_at_any_time_costs_no_episode(
    tmp_path: Path, place: str, left: int, whole: list[Any]
) -> None:
    """Something else takes the rest of the disk behind the sixth step; later there is room again."""

    class Filling(Policy):
        def __getattribute__(self, name: str) -> Any:
            if name == place and object.__getattribute__(self, "steps_done")() == 6:
                fill()
            return super().__getattribute__(name)

        def steps_done(self) -> int:
            return vars(self).get("steps", 0)

    disk, filler = tmp_path / "disk", tmp_path / "disk/filler"

    def fill() -> None:
        with suppress(OSError), filler.open("ab") as stream:
            while True:
                stream.write(b"x" * 4096)
                stream.flush()

    with small_disk(disk) as resize:
        resize("2m")
        with pytest.raises((CheckpointError, OutputError)) as raised:
            learn(disk / "run", 5, Filling(), trackers=[])
        assert "No space left on device" in raised.value.cause
        assert raised.value.place.startswith(str(disk / "run"))
        assert "free space there" in raised.value.fix
        assert saved(disk / "run") == [*range(1, left + 1)]
        filler.unlink()
        learn(disk / "run", 5, trackers=[])
        assert computed(disk / "run") == whole


def test_a_folder_that_becomes_read_only_ends_the_run_with_an_error(
    tmp_path: Path, whole: list[Any]
) -> None:
    run = tmp_path / "disk/run"

    class Remounting(Policy):
        def before_episode(self) -> None:
            if self.steps == 4:
                for options in (["--bind", str(run)], ["-o", "remount,bind,ro"]):
                    subprocess.run(["mount", *options, str(run)], check=True)

    with small_disk(tmp_path / "disk"):
        with pytest.raises((CheckpointError, OutputError)) as raised:
            learn(run, 5, Remounting(), trackers=[])
        assert "Read-only file system" in raised.value.cause
        assert raised.value.place.startswith(str(run))
        assert "make the folder writable" in raised.value.fix
        subprocess.run(["umount", str(run)], check=True)
        assert saved(run) == [1, 2]
        learn(run, 5, trackers=[])
        assert computed(run) == whole


def test_a_folder_that_vanishes_ends_the_run_with_an_error(tmp_path: Path) -> None:
    run, away = tmp_path / "run", tmp_path / "away"

    class Moving(Policy):
        def before_episode(self) -> None:
            if self.steps == 4:
                run.rename(away)

    with pytest.raises((CheckpointError, OutputError)) as raised:
        learn(run, 5, Moving(), trackers=[])
    assert "No such file or directory" in raised.value.cause
    assert "leave the run's folder in place" in raised.value.fix
    assert not run.exists()  # nothing is begun anew behind the user's back
    assert saved(away) == [1, 2]
    learn(tmp_path / "whole", 4)
    learn(away, 4)
    assert computed(away) == computed(tmp_path / "whole")


def test_samples_that_no_checkpoint_can_keep_cost_no_episode(tmp_path: Path) -> None:
    class Odd(Policy):
        def forward_step(self, data: Batch) -> Batch:
            odd = {"odd": [object()] * len(data["prompt"])} if self.steps == 4 else {}
            return {**super().forward_step(data), **odd}

    with pytest.raises(CheckpointError, match="column 'odd' holds a object"):
        learn(tmp_path, 5, Odd(), max_replay_episode=1, save_episode_interval=None)
    assert saved(tmp_path) == [2]


def test_what_a_crash_left_half_deleted_goes_when_the_run_is_resumed(tmp_path: Path) -> None:
    learn(tmp_path, 2)
    root = tmp_path / "checkpoints"
    of(tmp_path, 1).rename(root / ".removed-7-episode-000001")
    (root / ".partial-7/modules").mkdir(parents=True)
    (root / ".latest-7").write_text("episode-000003\n")
    learn(tmp_path, 2)
    assert sorted(path.name for path in root.iterdir()) == ["episode-000002", "latest"]
