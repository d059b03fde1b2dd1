# SPDX-License-Identifier: Apache-2.0
"""Time what a check costs, against finding the same mistakes by running into them.

The checker alone, over flows of 6 and of 200 calls: of declared modules, and by a dry run of undeclared ones. The
command, `chatlearn check script.py`, from start to exit, imports included. And two mistakes in a GRPO program of a
small model: a misspelt parameter of the reward, and a trainer that gets no advantages; the old way is to run until
the first call fails, with the same modules under classes that declare nothing.

    python benchmarks/flow_checker.py [--quick] [--results FILE]

The last line is one JSON object: `check_ms_<calls>` and `dry_run_ms_<calls>` are medians, `columns_ms_<calls>` the part
of a check that looks at columns; `command_s` and `command_import_torch_s` seconds of the command and of `import torch`
alone; `found_s_<mistake>` seconds until a run fails (its model is made in milliseconds, and transformers imported
before), `ratio_<mistake>` a check's time over that.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import conclude, options, pin_threads

REACH_S = 2.0
CALLS = (6, 200)
PROMPTS, GROUP, TOKENS = 32, 8, 32
SCRIPT = """
    from chatlearn import Engine, Environment, Trainer
    from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
    from chatlearn.testing import tiny_pair

    policy = PolicyInference("policy", model=tiny_pair)
    learner = PolicyTrainer("learner", model=tiny_pair)
    reward = FunctionReward("reward", lambda completions, answer: [0.0] * len(completions))
    advantage = GroupAdvantage("advantage")

    def env_flow(batch):
        return advantage.forward_step(reward.forward_step(policy.forward_step(batch)))

    engine = Engine(Environment(env_flow), Trainer(lambda batch: learner.train_step(batch)))
    engine.set_parameter_sync(learner, policy).set_dataset([{"prompt": "1+1=", "answer": "2"}]).learn()
"""


def median_s(call: Callable[[], Any], times: int) -> float:
    """Return the median seconds of a call, after one that warms up."""
    call()
    seconds: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def chain(calls: int, *, declared: bool) -> Any:
    """Make an engine whose flow is a chain; each module reads the column of the one before it."""
    from chatlearn import BaseModule, Engine, Environment
    from chatlearn.flow.declaration import Declaration

    class Link(BaseModule):
        def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
            number = int(self.name)
            before = data[f"column_{number - 1}"] if number else data["prompt"]
            return {**data, f"column_{number}": list(before)}

    class Declared(Link):
        def describe_columns(self, method: str) -> Declaration:
            number = int(self.name)
            reads = f"column_{number - 1}" if number else "prompt"
            return Declaration.of(reads={reads}, writes={f"column_{number}"}, passes_on=True)

    links = [(Declared if declared else Link)(str(number)) for number in range(calls)]

    def env_flow(batch: Any) -> Any:
        for link in links:
            batch = link.forward_step(batch)
        return batch

    return Engine(Environment(env_flow)).set_dataset(["one", "two"])


def time_checks(times: int) -> dict[str, float]:
    """Time checks of chains, and the part of them that looks at columns."""
    from chatlearn.checks.column_warnings import warn_of_columns
    from chatlearn.checks.columns import check_columns, follow

    figures: dict[str, float] = {}
    print(f"{'calls':>6}{'check ms':>11}{'of columns ms':>15}{'dry run ms':>12}")
    for calls in CALLS:
        engine, silent = chain(calls, declared=True), chain(calls, declared=False)
        program = engine.check()
        assert not program.problems
        assert len(silent.check(dry_run=True).notes) == 1

        def columns(program: Any = program) -> None:
            flows = follow(program)
            check_columns(program, flows)
            warn_of_columns(program, flows)

        seconds = (
            median_s(engine.check, times),
            median_s(columns, times),
            median_s(lambda silent=silent: silent.check(dry_run=True), max(times // 4, 1)),
        )
        check, of_columns, dry_run = (round(second * 1e3, 3) for second in seconds)
        print(f"{calls:>6}{check:>11.2f}{of_columns:>15.2f}{dry_run:>12.2f}", flush=True)
        figures |= {f"check_ms_{calls}": check, f"columns_ms_{calls}": of_columns}
        figures[f"dry_run_ms_{calls}"] = dry_run
    return figures


def time_command(times: int) -> dict[str, float]:
    """Time the command and, in the same way, what importing torch takes, which the command does not."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(textwrap.dedent(SCRIPT))

        def run(*arguments: str) -> None:
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

        command = median_s(lambda: run("-m", "chatlearn.cli", "check", str(script)), times)
        torch = median_s(lambda: run("-c", "import torch"), times)
    print(f"chatlearn check train.py: {command:.2f} s; `import torch` alone: {torch:.2f} s")
    return {"command_s": round(command, 3), "command_import_torch_s": round(torch, 3)}


def grpo(mistake: str, *, declared: bool) -> Any:
    """Make a GRPO engine with one mistake; undeclared classes override their steps, and say nothing."""
    from chatlearn import Engine, Environment, Trainer
    from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer
    from chatlearn.testing import tiny_pair

    class Reward(FunctionReward):
        def forward_step(self, data: Any) -> Any:
            return super().forward_step(data)

    class Learner(PolicyTrainer):
        def train_step(self, data: Any, iteration: int = 0) -> None:
            super().train_step(data, iteration)

    def right(completions: list[str], answer: list[str]) -> list[float]:
        return [float(text == asked) for text, asked in zip(completions, answer, strict=True)]

    def misspelt(completions: list[str], anwser: list[str]) -> list[float]:
        return right(completions, anwser)

    policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=TOKENS)
    reward = (FunctionReward if declared else Reward)(
        "reward", misspelt if mistake == "misspelt" else right
    )
    advantage = GroupAdvantage("advantage")
    learner = (PolicyTrainer if declared else Learner)("learner", model=tiny_pair)

    def env_flow(batch: Any) -> Any:
        scored = reward.forward_step(policy.forward_step(batch))
        return scored if mistake == "no_advantages" else advantage.forward_step(scored)

    def trainer_flow(batch: Any) -> None:
        learner.train_step(batch)

    rows = [{"prompt": f"{number}+1=", "answer": "?"} for number in range(PROMPTS)]
    engine = Engine(Environment(env_flow), Trainer(trainer_flow))
    return engine.set_parameter_sync(learner, policy).set_dataset(rows)


def time_mistakes(times: int) -> dict[str, float]:
    """Time how long it takes until a mistake is found, by a check and by a run."""
    import chatlearn
    from chatlearn.errors import ChatLearnError
    from chatlearn.testing import tiny_pair

    figures: dict[str, float] = {}
    tiny_pair()  # imports what only a run needs
    for mistake in ("misspelt", "no_advantages"):
        checked = grpo(mistake, declared=True)
        assert len(checked.check().problems) == 1
        check = median_s(checked.check, times)
        assert not grpo(mistake, declared=False).check().problems
        with tempfile.TemporaryDirectory() as folder:
            runtime = {"num_inference_per_prompt": GROUP, "output_dir": f"{folder}/run"}
            chatlearn.init({"runtime": runtime})
            engine = grpo(mistake, declared=False)
            began, failed = time.perf_counter(), False
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                try:
                    engine.learn()
                except ChatLearnError:
                    failed = True
            found = time.perf_counter() - began
            chatlearn.init()
        assert failed, "the mistake must be found, late"
        print(f"{mistake}: a run fails after {found:.2f} s, a check takes {check * 1e3:.2f} ms")
        figures[f"found_s_{mistake}"] = round(found, 3)
        figures[f"ratio_{mistake}"] = round(check / found, 6)
    return figures


def main() -> int:
    """Time everything, print it and say whether the reach was met."""
    parser = options(__doc__, "few repetitions")
    arguments = parser.parse_args()
    pin_threads()
    times = 3 if arguments.quick else 21
    figures = time_checks(times) | time_mistakes(times) | time_command(1 if arguments.quick else 7)
    slowest = max(figures[f"{what}_ms_{calls}"] for what in ("check", "dry_run") for calls in CALLS)
    slowest_s = max(slowest / 1e3, figures["command_s"])
    reach = f"< {REACH_S:.0f} s per check and per command: {{}} ({slowest:.1f} ms, {figures['command_s']:.2f} s)"
    return conclude(figures, arguments.results, reach, reached=slowest_s < REACH_S)


if __name__ == "__main__":
    sys.exit(main())
