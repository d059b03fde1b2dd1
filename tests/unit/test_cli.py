# SPDX-License-Identifier: Apache-2.0
"""The command line, with a stand-in for the engine; the last section uses the real one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import chatlearn
from chatlearn.cli import main
from chatlearn.inspection import Inspection, inspecting, intercept

STAND_IN = """
import sys
from types import SimpleNamespace
import chatlearn
from chatlearn import BaseModule, ConfigError, ModuleError
from chatlearn.config import active
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.inspection import intercept

class StandIn:
    problems = ()
    evaluator = SimpleNamespace(metrics={"reward/rewards": 0.5})
    def __init__(self, *names):
        self.modules = [BaseModule(name) for name in names]
    def check(self):
        nodes = tuple(
            Node(i, f"{m.name}.forward_step", m, "forward_step", (i - 1 if i else FEED,), ())
            for i, m in enumerate(self.modules)
        )
        return SimpleNamespace(
            graphs={"env_flow": FlowGraph("env_flow", nodes, (len(nodes) - 1,))},
            modules=self.modules, data_owner=None, problems=self.problems, warnings=[], notes=['a note'])
    def learn(self):
        intercept(self)
        print("learning", active().runtime.num_episode, active().runtime.seed)
    def stop(self):
        pass
    def eval(self):
        import torch
        return {"reward": [{"uid": torch.tensor([0, 1]), "rewards": torch.tensor([0.0, 1.0])},
                           {"uid": torch.tensor([2]), "rewards": torch.tensor([0.5])}]}
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.chdir(tmp_path)

    def write(body: str) -> Path:
        path = Path("train.py")
        path.write_text(STAND_IN + textwrap.dedent(body))
        return path

    return write


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


Cli = Callable[..., tuple[int, str, str]]
Script = Callable[[str], Path]


# run


def test_run_executes_the_script_as_python_does(cli: Cli, script: Script) -> None:
    Path("beside.py").write_text("VALUE = 41\n")
    path = script("import beside\nprint(__name__, sys.argv, beside.VALUE)\n")
    before = list(sys.path), sys.argv
    code, out, err = cli("run", path, "--", "--flag", "x=1")
    assert (code, err) == (0, "")
    assert out == "__main__ ['train.py', '--flag', 'x=1'] 41\n"
    assert (sys.path, sys.argv) == before


def test_overrides_reach_a_script_with_and_without_init(cli: Cli, script: Script) -> None:
    assert cli("run", script("StandIn().learn()"), "runtime.num_episode=3")[1] == "learning 3 0\n"
    path = script("chatlearn.init({'runtime': {'num_episode': 1, 'seed': 2}})\nStandIn().learn()")
    assert cli("run", path, "runtime.num_episode=3")[1] == "learning 3 2\n"
    assert chatlearn.init().runtime.num_episode == 1, "the command left its overrides behind"


def test_a_recipe_runs_its_script(cli: Cli, script: Script) -> None:
    script("StandIn().learn()")
    Path("recipes").mkdir()
    Path("recipes/a.yaml").write_text("script: ../train.py\nruntime: {num_episode: 7, seed: 1}\n")
    assert cli("run", "recipes/a.yaml", "runtime.seed=5") == (0, "learning 7 5\n", "")


def test_a_recipe_without_a_script_is_refused(cli: Cli, script: Script) -> None:
    script("")
    Path("a.yaml").write_text("runtime: {seed: 1}\n")
    code, _, err = cli("run", "a.yaml")
    assert code == 1
    assert "add `script: train.py`" in err


def test_configuration_errors_are_short_and_come_before_the_script_runs(
    cli: Cli, script: Script
) -> None:
    path = script("print('ran')")
    for override, expected in [
        ("runtime.num_epsode=3", "did you mean 'num_episode'?"),
        ("num_episode", "write num_episode=VALUE"),
    ]:
        code, out, err = cli("run", path, override)
        assert (code, out) == (1, "")
        assert expected in err
        assert "Traceback" not in err


def test_a_missing_script_is_named(cli: Cli, script: Script) -> None:
    script("")
    code, _, err = cli("run", "gone.py")
    assert code == 1
    assert "there is no script gone.py" in err


def test_a_module_error_shows_the_traceback_and_ends_with_its_message(
    cli: Cli, script: Script
) -> None:
    path = script(
        """
        try:
            1 / 0
        except ZeroDivisionError as error:
            raise ModuleError("policy.step failed", place="episode 3", fix="look") from error
        """
    )
    code, _, err = cli("run", path)
    assert code == 1
    assert "ZeroDivisionError: division by zero" in err
    assert err.rstrip().endswith("policy.step failed\n  at: episode 3\n  fix: look")
    assert "cli.py" not in err


def test_other_errors_of_the_script_look_as_in_python(cli: Cli, script: Script) -> None:
    code, _, err = cli("run", script("raise ValueError('mine')"))
    assert code == 1
    assert 'File "train.py"' in err
    assert err.rstrip().endswith("ValueError: mine")
    assert "runpy" not in err
    assert cli("run", script("sys.exit(7)"))[0] == 7


# check, graph, explain, eval


def test_check_says_what_fits(cli: Cli, script: Script) -> None:
    path = script("StandIn('policy', 'reward').learn()\nprint('went on')")
    code, out, err = cli("check", path)
    assert (code, err) == (0, "")
    assert "env_flow: policy.forward_step -> reward.forward_step" in out
    assert "note: a note" in out
    assert "went on" not in out


def test_check_reports_every_problem(cli: Cli, script: Script) -> None:
    path = script(
        """
        engine = StandIn('policy')
        engine.problems = [ConfigError("first", fix="do this"), ConfigError("second")]
        engine.learn()
        """
    )
    code, _, err = cli("check", path)
    assert code == 1
    assert "error: first\n  fix: do this" in err
    assert "error: second" in err


def test_the_script_cannot_swallow_the_stop_or_a_problem(cli: Cli, script: Script) -> None:
    path = script(
        """
        class Broken(StandIn):
            def check(self):
                raise ConfigError("cannot be checked")
        try:
            Broken().learn()
        except Exception:
            print("swallowed")
        """
    )
    code, out, err = cli("check", path)
    assert (code, out) == (1, "")
    assert "error: cannot be checked" in err


@pytest.mark.parametrize("body", ["x = 1", "sys.exit()"])
def test_a_script_that_never_learns_is_told_so(cli: Cli, script: Script, body: str) -> None:
    code, _, err = cli("check", script(body))
    assert code == 1
    assert "ended without calling learn() or eval()" in err


def test_graph_draws_and_writes(cli: Cli, script: Script) -> None:
    path = script("StandIn('policy', 'reward').learn()")
    code, out, _ = cli("graph", path, "--out", "drawn")
    assert code == 0
    assert "policy" in out
    assert "wrote drawn/env_flow.mmd, drawn/env_flow.svg" in out
    assert "reward" in Path("drawn/env_flow.mmd").read_text()
    assert Path("drawn/env_flow.svg").read_text().lstrip().startswith("<svg")
    assert cli("graph", path)[0] == 0
    assert Path("flows/env_flow.svg").exists()


def test_graph_into_a_file_is_refused(cli: Cli, script: Script) -> None:
    code, _, err = cli("graph", script("StandIn('policy').learn()"), "--out", "train.py")
    assert code == 1
    assert "cannot write the drawings" in err


def test_eval_evaluates_instead_of_learning(cli: Cli, script: Script) -> None:
    code, out, _ = cli("eval", script("StandIn('policy').learn()"))
    assert code == 0
    assert out == "reward: 3 samples\nreward/rewards 0.5\n"


def test_eval_does_not_pretend_to_resume(cli: Cli, script: Script) -> None:
    code, _, err = cli("eval", script("StandIn('policy').learn()"), "runtime.resume=auto")
    assert code == 1
    assert "does not resume" in err
    assert "models.<policy>.model=" in err


# inspection


def test_intercept_does_nothing_outside_a_command() -> None:
    intercept(object())


def test_intercept_stops_once_per_command_and_lets_the_action_run_flows() -> None:
    subject = object()

    def action(seen: object) -> str:
        intercept(seen)  # what `eval()` within the action does
        return "result"

    with pytest.raises(Inspection) as stopped, inspecting(action):
        intercept(subject)
    assert (stopped.value.subject, stopped.value.result) == (subject, "result")
    assert not isinstance(stopped.value, Exception)


# the program


def test_version_and_help() -> None:
    def output(*arguments: str) -> str:
        command = [sys.executable, "-m", "chatlearn.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert output("--version") == f"chatlearn {chatlearn.__version__}\n"
    for command in ("run", "check", "graph", "explain", "eval", "report"):
        assert f"  {command} " in output("--help")


def test_report_of_no_run_is_refused(cli: Cli, script: Script) -> None:
    script("")
    code, _, err = cli("report", "gone")
    assert code == 1
    assert "there is no run folder gone" in err


# with the real engine

REAL = """
    from chatlearn import Engine, Environment, Trainer, Evaluator, BaseModule
    class Length(BaseModule):
        def setup(self):
            print("SETUP")
        def forward_step(self, data):
            data["length"] = [len(p) for p in data["prompt"]]
            return data
        def train_step(self, data_list, iteration):
            print("TRAIN", iteration, sum(len(d["length"]) for d in data_list))
        eval_step = forward_step
    policy, learner = Length("policy"), Length("learner")
    def env_flow(batch):
        return policy.forward_step(batch)
    def trainer_flow(batch):
        learner.train_step(batch)
    def eval_flow(batch):
        return policy.eval_step(batch)
    evaluator = Evaluator(eval_flow).set_dataset(["aa", "b", "c"])
    Engine(Environment(env_flow), Trainer(trainer_flow), evaluator).set_dataset(["a"] * 4).learn()
"""


def test_the_real_engine_is_checked_without_setup(cli: Cli, script: Script) -> None:
    code, out, err = cli("check", script(REAL), "runtime.num_inference_per_prompt=2")
    assert (code, err) == (0, "")
    assert "env_flow: policy.forward_step" in out
    assert "trainer_flow: learner.train_step" in out
    assert "eval_flow: policy.eval_step" in out
    assert "1 episode = 4 prompts x 2 = 8 samples = 1 update x 1 micro-batch of 8\n" in out
    assert "1 run = 1 episode = 8 samples = 1 update\n" in out
    assert "4 prompts = 1 pass over a dataset of 4\n" in out
    assert "SETUP" not in out


def test_the_real_engine_draws_three_flows(cli: Cli, script: Script) -> None:
    assert cli("graph", script(REAL), "--out", "drawn")[0] == 0
    drawn = {path.name for path in Path("drawn").iterdir()}
    flows = ("env_flow", "trainer_flow", "eval_flow")
    assert drawn == {f"{flow}.{kind}" for flow in flows for kind in ("mmd", "svg")}


def test_explain_tells_who_set_each_value(cli: Cli, script: Script) -> None:
    Path("a.yaml").write_text("script: train.py\nmodels:\n  policy: {num_gpu: 1}\n")
    script(REAL.replace('Length("policy")', 'Length("policy", num_cpu=2)'))
    code, out, _ = cli("explain", "a.yaml", "runtime.sample_per_episode=32")
    assert code == 0
    assert out.startswith("1 episode = 32 samples = 1 update x 1 micro-batch of 32\n")
    assert "SETUP" not in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["runtime.sample_per_episode"] == ["32", "command", "line"]
    assert rows["runtime.seed"] == ["0", "default"]
    assert rows["models.policy.num_gpu"] == ["1.0", "a.yaml:3"]
    assert rows["models.policy.num_cpu"] == ["2.0", "code"]


def test_explain_of_a_wrong_program_shows_its_values_and_what_is_wrong(
    cli: Cli, script: Script
) -> None:
    code, out, err = cli("explain", script(REAL), "runtime.replay_episode_offset=3")
    assert code == 1
    assert out.startswith("key")
    assert "runtime.replay_episode_offset" in out
    assert "error: runtime.replay_episode_offset=3 has no effect" in err


def test_the_real_engine_explains_and_refuses_unknown_modules(cli: Cli, script: Script) -> None:
    path = script(REAL)
    code, out, _ = cli("explain", path, "models.policy.num_cpu=3")
    assert code == 0
    assert "models.policy.num_cpu" in out
    code, _, err = cli("check", path, "models.polcy.num_cpu=3")
    assert code == 1
    assert "did you mean 'policy'?" in err


def test_the_real_engine_runs_and_evaluates(cli: Cli, script: Script) -> None:
    path = script(REAL)
    code, out, _ = cli("run", path, "runtime.num_episode=2")
    assert code == 0
    assert "TRAIN 1 4" in out
    code, out, _ = cli("eval", path)
    assert code == 0
    assert "policy: 3 samples" in out
    assert "TRAIN" not in out


def test_a_failing_module_of_the_real_engine_ends_the_run_with_its_place(
    cli: Cli, script: Script
) -> None:
    path = script(
        REAL.replace('print("TRAIN", iteration', 'raise ValueError("mine") or print(iteration')
    )
    code, _, err = cli("run", path)
    assert code == 1
    assert "ValueError: mine" in err
    last = err[err.rindex("chatlearn.errors.ModuleError") :]
    assert "learner" in last
    assert "train_step" in last
