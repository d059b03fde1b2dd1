# SPDX-License-Identifier: Apache-2.0
"""Time the proof of a parameter sync: against the copy that it proves, and against the episode that it belongs to.

First, both sides in one process and interleaved: `load_state_dict` alone, and a sync with its proof (a look for NaN,
the digests of both ends). Then real GRPO episodes by the engine (the model and the work of `grpo_step.py`, 128 samples
of 32 tokens), whose own metrics say what of an episode was proof: with storage shared, as in one process by default,
and with copies. The probe is counted as a tenth, for `runtime.verify_every` is 10.

    python benchmarks/sync_proof.py [--quick] [--results FILE]

The last line is one JSON object: `ratio_<model>_<from>_<to>` is a sync's median seconds over the copy's,
`ratio_episode_<model>_<shared|copied>` the proof's share of an episode (the reach is 0.02), `ms_...` the milliseconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_step import (
    CPU_SIZES,
    GROUP,
    PROMPTS,
    make_model,
    make_prompts,
    make_tokenizer,
    reward_of,
)
from harness import conclude, options, pin_threads

REACH, TOKENS, EVERY = 0.02, 32, 10


def time_syncs(name: str, repeats: int) -> dict[str, float]:
    """Interleave the bare copy with syncs that prove it."""
    import torch

    from chatlearn import BaseModule
    from chatlearn.weights.local import ParameterSync

    figures: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        source, destination = BaseModule("source"), BaseModule("destination")
        source.model = make_model(*CPU_SIZES[name])
        destination.model = make_model(*CPU_SIZES[name]).to(dtype)
        sync = ParameterSync(source, [destination], share=False)
        copies: list[float] = []
        syncs: list[float] = []
        proofs: list[float] = []
        for _ in range(repeats + 2):
            with torch.no_grad():
                for parameter in source.model.parameters():
                    parameter.add_(1e-6)
            start = time.perf_counter()
            destination.model.load_state_dict(source.model.state_dict())
            copies.append(time.perf_counter() - start)
            start = time.perf_counter()
            report = sync.run()
            syncs.append(time.perf_counter() - start)
            proofs.append(report.proof_seconds)
        key = f"{name}_fp32_{'fp32' if dtype == torch.float32 else 'bf16'}"
        copy, whole, proof = (statistics.median(times[2:]) for times in (copies, syncs, proofs))
        print(
            f"{key:20}{copy * 1e3:>10.2f}{whole * 1e3:>10.2f}{proof * 1e3:>10.2f}{whole / copy:>9.1f}"
        )
        figures |= {
            f"ratio_{key}": round(whole / copy, 3),
            f"ms_copy_{key}": round(copy * 1e3, 3),
            f"ms_sync_{key}": round(whole * 1e3, 3),
            f"ms_proof_{key}": round(proof * 1e3, 3),
        }
    return figures


def run_episodes(name: str, episodes: int, copies: bool) -> list[dict[str, Any]]:
    """Run GRPO episodes, each with a probe, and return the rows of their metrics."""
    import chatlearn
    from chatlearn import Engine, Environment, Trainer
    from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer

    class Copied(PolicyInference):
        """Does not say that it may share weights, so it is copied to."""

    def source() -> Any:
        return make_model(*CPU_SIZES[name]), make_tokenizer()

    with tempfile.TemporaryDirectory() as folder:
        runtime = {
            "num_episode": episodes,
            "sample_per_episode": PROMPTS * GROUP,
            "num_inference_per_prompt": GROUP,
            "output_dir": f"{folder}/run",
            "verify_every": 1,
        }
        chatlearn.init({"runtime": runtime})
        kind = Copied if copies else PolicyInference
        policy = kind("policy", model=source, max_new_tokens=TOKENS, device="cpu")
        reward, advantage = FunctionReward("reward", reward_of), GroupAdvantage("advantage")
        learner = PolicyTrainer("learner", model=source, lr=1e-4, device="cpu",
                                max_tokens_per_micro_batch=1 << 20)  # fmt: skip

        def env_flow(batch: Any) -> Any:
            return advantage.forward_step(reward.forward_step(policy.forward_step(batch)))

        def trainer_flow(batch: Any) -> None:
            learner.train_step(batch)

        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        engine = Engine(Environment(env_flow), Trainer(trainer_flow))
        engine.set_parameter_sync(learner, policy).set_dataset(make_prompts(PROMPTS))
        with quiet[0], quiet[1], engine:
            engine.learn()
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["episode"] > 1]  # the first warms up


def time_episodes(name: str, episodes: int) -> dict[str, float]:
    """Say what of an episode is proof."""
    figures: dict[str, float] = {}
    for how in ("shared", "copied"):
        rows = run_episodes(name, episodes + 1, how == "copied")
        pair = "sync/learner -> policy"
        moved = statistics.median(row[f"{pair}/bytes"] for row in rows)
        assert (moved == 0) == (how == "shared"), f"{how}, and {moved} bytes moved"
        proof, probe = (
            statistics.median(row[f"{pair}/{part}_seconds"] for row in rows)
            for part in ("proof", "probe")
        )
        # An episode of these holds a whole probe, where one in ten has one.
        episode = statistics.median(row["time/episode"] for row in rows) - probe * (1 - 1 / EVERY)
        share = (proof + probe / EVERY) / episode
        key = f"{name}_{how}"
        print(f"{key:20}{episode:>10.3f}{proof * 1e3:>10.2f}{probe * 1e3:>10.2f}{share:>9.2%}")
        figures |= {
            f"ratio_episode_{key}": round(share, 5),
            f"s_episode_{key}": round(episode, 4),
            f"ms_proof_{key}": round(proof * 1e3, 3),
            f"ms_probe_{key}": round(probe * 1e3, 3),
        }
    return figures


def main() -> int:
    """Run everything, print both tables and say whether the reach was met."""
    parser = options(__doc__, "few repetitions, the small model only")
    arguments = parser.parse_args()
    pin_threads()
    names = list(CPU_SIZES)[:1] if arguments.quick else list(CPU_SIZES)
    figures: dict[str, float] = {}
    print(f"{'one sync':20}{'copy ms':>10}{'sync ms':>10}{'proof ms':>10}{'ratio':>9}")
    for name in names:
        figures |= time_syncs(name, 5 if arguments.quick else 40)
    tables: dict[str, float] = {}
    print(f"{'one episode':20}{'seconds':>10}{'proof ms':>10}{'probe ms':>10}{'share':>9}")
    for name in names:
        tables |= time_episodes(name, 3 if arguments.quick else 10)
    figures |= tables
    worst = max(figures[key] for key in figures if key.startswith("ratio_episode"))
    reach = f"< {REACH:.0%} of an episode: {{}} ({worst:.2%})"
    return conclude(figures, arguments.results, reach, reached=worst < REACH)


if __name__ == "__main__":
    sys.exit(main())
