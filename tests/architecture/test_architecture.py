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
LIGHT = {"ChatLearnError", "Config", "ConfigError", "FlowError", "ModuleError", "init"}
"""Public names that can be used without torch."""
HEAVY_LIBRARIES = ("torch", "transformers", "datasets", "ray", "vllm", "sglang", "wandb")


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
    code = f"import sys; from chatlearn import {', '.join(sorted(LIGHT))}; print(*sys.modules)"
    loaded = set(python("-c", code).stdout.split())
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
