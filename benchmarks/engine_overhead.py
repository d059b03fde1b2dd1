# SPDX-License-Identifier: Apache-2.0
"""Time what the engine itself costs: an RLHF-shaped episode of six models that do nothing.

Four models in the environment flow (policy, reference, reward, value), two in the trainer flow, as
`RLHFEngine` has them. The engine runs its episodes with everything a run leaves behind (metrics,
transcripts, run folder); between them, in the same process, a plain Python loop calls the methods of
the same modules with the same batches. Medians of interleaved pairs.

    python benchmarks/engine_overhead.py [--quick] [--episodes 40] [--results FILE]

The last line is one JSON object: `ms_<samples>` is the engine's milliseconds per episode with one
batch per model, `ms_<samples>_<generation_batch_size>` with smaller ones; `ratio_...` is the engine's
time over the plain loop's, `us_per_call_...` what the engine adds to a call.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harness import conclude, options, pin_threads

REACH_MS, REACH_SAMPLES = 50.0, 16
QUICK = [(16, None), (16, 1), (1024, None), (1024, 16)]
FULL = [(16, None), (16, 16), (16, 1), (1024, None), (1024, 16), (1024, 1)]
GROWTH = [(256, 1), (1024, 1), (4096, 1)]
ENVIRONMENT = ("policy", "reference", "reward", "value")
TRAINERS = ("policy_trainer", "value_trainer")


@dataclass
class Pairs:
    """Interleaved episodes of both sides, in seconds."""

    engine: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)


def make_models(between: Callable[[], None]) -> dict[str, Any]:
    """Make the six models; `between` is called between the engine's episodes."""
    import torch

    from chatlearn import BaseModule

    class Model(BaseModule):
        def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
            return {self.name: torch.zeros(len(data["prompt"]))}

        def train_step(self, data_list: list[dict[str, Any]]) -> None:
            pass

    class Policy(Model):
        def before_episode(self) -> None:
            between()

        def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
            data["completion"] = data["prompt"]
            return data

    models: dict[str, Any] = {name: Model(name) for name in (*ENVIRONMENT, *TRAINERS)}
    models["policy"] = Policy("policy")
    return models


def plain_episode(models: dict[str, Any], prompts: list[str], size: int) -> None:
    """Run the episode as a loop that one would write by hand."""
    import torch

    policy, reference, reward, value = (models[name] for name in ENVIRONMENT)
    done: list[dict[str, Any]] = []
    for start in range(0, len(prompts), size):
        chosen = prompts[start : start + size]
        numbers = torch.arange(start, start + len(chosen))
        rollout = policy.forward_step({"prompt": chosen, "uid": numbers, "prompt_uid": numbers})
        done.append(
            rollout
            | reference.forward_step(rollout)
            | value.forward_step(rollout)
            | reward.forward_step(rollout)
        )
    episode: dict[str, Any] = {}
    for name, column in done[0].items():
        if isinstance(column, torch.Tensor):
            episode[name] = torch.cat([part[name] for part in done])
        else:
            episode[name] = [entry for part in done for entry in part[name]]
    for name in TRAINERS:
        models[name].train_step([episode])


def run_engine(models: dict[str, Any], prompts: list[str], size: int | None, episodes: int) -> None:
    """Run the same with the engine."""
    import chatlearn
    from chatlearn import Engine, Environment, Trainer

    policy, reference, reward, value = (models[name] for name in ENVIRONMENT)

    def env_flow(batch: Any) -> Any:
        rollout = policy.forward_step(batch)
        reference_out = reference.forward_step(rollout)
        value_out = value.forward_step(rollout)
        return rollout, reference_out, value_out, reward.forward_step(rollout)

    def trainer_flow(batch: Any) -> None:
        for name in TRAINERS:
            models[name].train_step(batch)

    with tempfile.TemporaryDirectory() as folder:
        runtime = {
            "num_episode": episodes,
            "generation_batch_size": size,
            "output_dir": f"{folder}/run",
        }
        chatlearn.init({"runtime": runtime})
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with quiet[0], quiet[1], Engine(Environment(env_flow), Trainer(trainer_flow)) as engine:
            engine.set_dataset(prompts).learn()


def compare(samples: int, size: int | None, episodes: int) -> Pairs:
    """Interleave the engine's episodes with the plain loop's."""
    prompts = [f"prompt {i}" for i in range(samples)]
    pairs = Pairs()
    left = 0.0

    def between() -> None:
        nonlocal left
        now = time.perf_counter()
        if left:
            pairs.engine.append(now - left)
        plain_episode(models, prompts, size or samples)
        left = time.perf_counter()
        pairs.plain.append(left - now)

    models = make_models(between)
    run_engine(models, prompts, size, episodes + 2)  # the first warms up, the last has no end
    del pairs.engine[0], pairs.plain[0]
    return pairs


def measure(samples: int, size: int | None, episodes: int) -> dict[str, float]:
    """Compare, print a line of the table and return the figures."""
    pairs = compare(samples, size, episodes)
    calls = len(ENVIRONMENT) * -(-samples // (size or samples)) + len(TRAINERS)
    engine, plain = statistics.median(pairs.engine), statistics.median(pairs.plain)
    ratio = statistics.median(e / p for e, p in zip(pairs.engine, pairs.plain, strict=False))
    added = (engine - plain) / calls * 1e6
    batch = "all" if size is None else str(size)
    print(
        f"{samples:>8}{batch:>7}{calls:>8}{engine * 1e3:>12.2f}{plain * 1e3:>12.3f}"
        f"{added:>12.1f}{ratio:>9.1f}",
        flush=True,
    )
    key = f"{samples}" if size is None else f"{samples}_{size}"
    return {
        f"ms_{key}": round(engine * 1e3, 3),
        f"plain_ms_{key}": round(plain * 1e3, 4),
        f"us_per_call_{key}": round(added, 1),
        f"ratio_{key}": round(ratio, 2),
    }


def main() -> int:
    """Run every configuration, print the table and say whether the reach was met."""
    parser = options(__doc__, "few episodes, no 1,024 single calls")
    parser.add_argument("--episodes", type=int, default=0, help="pairs per configuration")
    arguments = parser.parse_args()
    pin_threads()
    print(f"{'samples':>8}{'batch':>7}{'calls':>8}{'engine ms':>12}{'plain ms':>12}", end="")
    print(f"{'us/call':>12}{'ratio':>9}")
    figures: dict[str, float] = {}
    for samples, size in QUICK if arguments.quick else FULL:
        calls = samples // (size or samples)
        episodes = arguments.episodes or (5 if arguments.quick else 40 if calls < 100 else 9)
        figures |= measure(samples, size, episodes)
    if not arguments.quick:
        print("a call's cost must not grow with their number:")
        for samples, size in GROWTH:
            grown = measure(samples, size, 5)
            figures[f"us_per_call_{samples}_1"] = grown[f"us_per_call_{samples}_1"]
        figures["ratio_growth"] = round(
            figures["us_per_call_4096_1"] / figures["us_per_call_256_1"], 3
        )
    taken = figures[f"ms_{REACH_SAMPLES}"]
    reach = f"< {REACH_MS:.0f} ms per episode of {REACH_SAMPLES} samples: {{}} ({taken:.2f} ms)"
    return conclude(figures, arguments.results, reach, reached=taken < REACH_MS)


if __name__ == "__main__":
    sys.exit(main())
