# SPDX-License-Identifier: Apache-2.0
"""What keeps the package readable: import arrows, budgets, public names, a light import."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import chatlearn

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "chatlearn").rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_IMPORT_S = 0.5

PUBLIC = {
    "BaseModule",
    "ChatLearnError",
    "Config",
    "ConfigError",
    "ControlDependencies",
    "Engine",
    "Environment",
    "DPOEngine",
    "EvalEngine",
    "GRPOEngine",
    "OnlineDPOEngine",
    "RLHFEngine",
    "Evaluator",
    "FlowError",
    "ModuleError",
    "Trainer",
    "__version__",
    "declares",
    "init",
    "replay",
}
NEEDS_TORCH = {"replay"}
"""Public names that load torch when they are first used; the others do when something runs."""
HEAVY_LIBRARIES = (
    "torch",
    "transformers",
    "numpy",
    "datasets",
    "pyarrow",
    "ray",
    "vllm",
    "sglang",
    "wandb",
)
SCRIPT = """\
from chatlearn import Engine, Environment, Evaluator, Trainer
from chatlearn.models import (
    FunctionReward, GroupAdvantage, PolicyInference, PolicyReference, PolicyTrainer
)
from chatlearn.testing import tiny_pair

policy = PolicyInference("policy", model=tiny_pair)
reference = PolicyReference("reference", model="Qwen/Qwen3-0.6B")
reward = FunctionReward("reward", lambda completions, answer: [0.0] * len(completions))
advantage, learner = GroupAdvantage("advantage"), PolicyTrainer("learner", model=tiny_pair, kl_coef=0.1)

def env_flow(batch):
    rollout = reference.forward_step(policy.forward_step(batch))
    scored = reward.forward_step(rollout)
    return advantage.forward_step(scored)

def eval_flow(batch):
    return reward.eval_step(policy.eval_step(batch))

evaluator = Evaluator(eval_flow).set_dataset([{"prompt": "1+1=", "answer": "2"}])
engine = Engine(Environment(env_flow), Trainer(lambda batch: learner.train_step(batch)), evaluator)
engine.set_parameter_sync(learner, policy).set_dataset([{"prompt": "1+2=", "answer": "3"}]).learn()
"""
"""Says all that an engine can be told, and imports nothing heavy itself."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)


def test_import_arrows() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_file_is_too_long() -> None:
    lengths = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in PACKAGE}
    assert {path: n for path, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    long = {
        f"{relative(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in PACKAGE
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long == {}


def test_every_file_names_its_licence() -> None:
    files = [
        p
        for folder in ("chatlearn", "tests", "examples", "benchmarks", "docs")
        for p in (ROOT / folder).rglob("*.py")
    ]
    line = "# SPDX-License-Identifier: Apache-2.0"
    bare = [
        relative(p) for p in files if line not in p.read_text(encoding="utf-8").splitlines()[:2]
    ]
    assert bare == []


def test_nothing_is_printed_but_by_the_command_line() -> None:
    prints = [
        f"{relative(path)}:{node.lineno}"
        for path in PACKAGE
        if path.name != "cli.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and not any(keyword.arg == "file" for keyword in node.keywords)
    ]
    assert prints == []


def test_no_module_is_named_after_nothing() -> None:
    vague = {"utils", "util", "misc", "helpers", "common"}
    assert [
        relative(p)
        for p in PACKAGE
        if p.stem in vague or any(p.stem.endswith(f"_{word}") for word in vague)
    ] == []


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("ray", "chatlearn/runtime/"),
        ("vllm", "chatlearn/rollout/"),
        ("sglang", "chatlearn/rollout/"),
        ("wandb", "chatlearn/observability/"),
    ],
)
def test_an_extra_is_imported_in_one_file_at_most(library: str, home: str) -> None:
    importers = [
        relative(path)
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (
            isinstance(node, ast.Import)
            and any(a.name.split(".")[0] == library for a in node.names)
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] == library
        )
    ]
    assert len(set(importers)) <= 1
    assert all(path.startswith(home) for path in importers)


def test_public_names_are_pinned() -> None:
    assert set(chatlearn.__all__) == PUBLIC
    assert set(dir(chatlearn)) == PUBLIC
    missing = [name for name in PUBLIC if not hasattr(chatlearn, name)]
    assert missing == []


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        chatlearn.Engin  # noqa: B018


def test_names_that_need_no_torch_load_none() -> None:
    names = ", ".join(sorted(PUBLIC - NEEDS_TORCH))
    code = f"import sys; from chatlearn import {names}; print(*sys.modules)"
    loaded = set(python("-c", code).stdout.split())
    assert loaded.isdisjoint(HEAVY_LIBRARIES)


def command(*arguments: str) -> tuple[str, str, set[str]]:
    """Run a command; return what it says on both streams, and the names of the modules that it loads."""
    code = (
        "import sys; from chatlearn.cli import main\n"
        f"try: main({list(arguments)})\n"
        "finally: print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said, _, loaded = done.stdout.partition("LOADED")
    return said, done.stderr, set(loaded.split())


@pytest.mark.parametrize(
    ("what", "shows"),
    [("check", "everything fits together"), ("graph", "env_flow.svg"), ("explain", "episode")],
)
def test_a_check_loads_nothing_heavy(what: str, shows: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    out = ["--out", str(tmp_path)] if what == "graph" else ["runtime.num_inference_per_prompt=8"]
    said, errors, loaded = command(what, str(script), *out)
    assert shows in said
    assert errors == ""
    assert "chatlearn.compilation" in loaded
    assert loaded.isdisjoint(HEAVY_LIBRARIES)


def test_a_check_that_loads_nothing_heavy_finds_mistakes_at_their_lines(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("return advantage.forward_step(scored)", "return scored"))
    (line,) = (n for n, text in enumerate(SCRIPT.splitlines(), 1) if "learner.train_step" in text)
    _, errors, loaded = command("check", str(script))
    assert "error: learner.train_step reads 'advantages'" in errors
    assert f"at: {script}:{line} in <lambda>" in errors
    assert "chatlearn.compilation" in loaded
    assert loaded.isdisjoint(HEAVY_LIBRARIES)


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import chatlearn, sys; print(*sys.modules)"], ["-m", "chatlearn.cli", "--help"]],
    ids=["import chatlearn", "chatlearn --help"],
)
def test_start_is_instant(arguments: list[str]) -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        output = python(*arguments).stdout
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < MAX_IMPORT_S
    assert "usage: chatlearn" in output.lower() or set(output.split()).isdisjoint(HEAVY_LIBRARIES)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from chatlearn.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('LOADED', *sys.modules)"
    )
    loaded = set(python("-c", code).stdout.partition("LOADED")[2].split())
    assert "chatlearn.cli" in loaded
    assert loaded.isdisjoint(HEAVY_LIBRARIES)


def test_python_files_have_no_relic_names() -> None:
    relics = ("v0", "v1", "new_", "legacy", "old_")
    named = [
        relative(p) for p in PACKAGE if p.stem.startswith(relics) or p.stem.endswith("_legacy")
    ]
    assert named == []
