# SPDX-License-Identifier: Apache-2.0
"""Time what recording costs: GRPO episodes with and without `runtime.record`, bytes and seconds.

A Qwen3-shaped model of 0.8 million random weights samples 256 responses of up to 32 tokens per episode, a reference
and a function score them, two updates learn from them. Runs that record and runs that do not take turns in
one process, equal but for that. Seconds are those of the fastest episode of each side, the one that others on the
machine have disturbed least; the first of every run is left out.

    python benchmarks/recording.py [--quick] [--rounds 4] [--results FILE]

The last line is one JSON object: `ratio_episode` is the episode's time with the record over that without,
`ms_record` the milliseconds that recording took (`ms_write` of them on the disk, after the last update),
`bytes_per_sample` what is written. `bytes_<codec>` and `ms_<codec>` are the files of one episode written once more
with other compression, `ratio_copied` what they would hold if every node's inputs and outputs were copied.
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

from harness import conclude, options, pin_threads

REACH_RATIO = 1.05
PROMPTS, GROUP, TOKENS = 32, 8, 32
CODECS = [("none", None), ("snappy", None), ("zstd", 1), ("zstd", 3), ("zstd", 9)]


def model() -> Any:
    """Make the model and a tokenizer with a token per character."""
    from chatlearn.testing import tiny_model, tiny_tokenizer

    return tiny_model(hidden=128, layers=5, max_positions=128), tiny_tokenizer()


def digits(completions: list[str]) -> list[float]:
    """Score a response by its share of digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def make_engine() -> Any:
    """Make the engine of a GRPO run with a reference."""
    from chatlearn import Engine, Environment, Trainer
    from chatlearn.models import (
        FunctionReward,
        GroupAdvantage,
        PolicyInference,
        PolicyReference,
        PolicyTrainer,
    )

    policy = PolicyInference("policy", model=model, max_new_tokens=TOKENS)
    reference = PolicyReference("reference", model=model)
    reward, advantage = FunctionReward("reward", digits), GroupAdvantage("advantage")
    learner = PolicyTrainer("policy_trainer", model=model, lr=1e-4, kl_coef=0.01)

    def env_flow(batch: Any) -> Any:
        rollout = policy.forward_step(batch)
        scored = reward.forward_step(rollout)
        return advantage.forward_step(scored, reference.forward_step(rollout))

    def trainer_flow(batch: Any) -> None:
        learner.train_step(batch)

    engine = Engine(Environment(env_flow), Trainer(trainer_flow))
    prompts = [f"{i} + {2 * i} = " for i in range(PROMPTS)]
    return engine.set_parameter_sync(learner, policy).set_dataset(prompts)


def run(folder: Path, episodes: int, *, record: bool) -> list[dict[str, float]]:
    """Run an engine and return the metrics of its episodes but the first."""
    import chatlearn

    runtime = {
        "num_episode": episodes + 1,
        "sample_per_episode": PROMPTS * GROUP,
        "num_inference_per_prompt": GROUP,
        "train_global_batch_size": PROMPTS * GROUP // 2,
        "output_dir": str(folder),
        "record": record,
        "trackers": [],
    }
    chatlearn.init({"runtime": runtime})
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with quiet[0], quiet[1], make_engine() as engine:
        engine.learn()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["episode"] > 1]


def median(rows: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def fastest(rows: list[dict[str, float]], name: str) -> float:
    return min(row[name] for row in rows)


def compare(folder: Path, rounds: int, episodes: int) -> dict[str, float]:
    """Let runs with and without a record take turns; return the figures."""
    sides: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for number in range(rounds):
        for record in (False, True) if number % 2 == 0 else (True, False):
            sides[record] += run(folder / f"{number}-{record}", episodes, record=record)
    plain, recorded = (fastest(sides[record], "time/episode") for record in (False, True))
    samples = PROMPTS * GROUP
    return {
        "ms_episode": round(plain * 1e3, 1),
        "ms_episode_recorded": round(recorded * 1e3, 1),
        "ratio_episode": round(recorded / plain, 4),
        "ms_record": round(fastest(sides[True], "record/seconds") * 1e3, 2),
        "ms_write": round(fastest(sides[True], "time/record") * 1e3, 2),
        "ratio_record": round(fastest(sides[True], "record/seconds") / plain, 4),
        "bytes_per_episode": median(sides[True], "record/bytes"),
        "bytes_per_sample": round(median(sides[True], "record/bytes") / samples, 1),
        "tokens_per_sample": round(median(sides[True], "policy/generated_tokens") / samples, 1),
    }


def compression(episode: Path, repeats: int) -> dict[str, float]:
    """Write the files of one episode once more with every codec."""
    import pyarrow.parquet as pq

    tables = {
        path: pq.ParquetFile(path, pre_buffer=False).read(use_threads=False)
        for path in episode.rglob("*.parquet")
    }
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "x.parquet"
        for codec, level in CODECS:
            size, taken = 0, []
            for _ in range(repeats):
                began, size = time.perf_counter(), 0
                for table in tables.values():
                    pq.write_table(table, target, compression=codec, compression_level=level)
                    size += target.stat().st_size
                taken.append(time.perf_counter() - began)
            name = codec if level is None else f"{codec}{level}"
            figures[f"bytes_{name}"] = size
            figures[f"ms_{name}"] = round(min(taken) * 1e3, 2)
    return figures


def copied(run_folder: Path, number: int) -> float:
    """Return how many cells a record with copies would hold, for one that this one stores."""
    from chatlearn.record.reading import RunRecord

    stored, all_cells = 0, 0
    for node in RunRecord(run_folder).episode(number).nodes():
        for call in node.calls:
            for layouts, rows in (
                (call.input_layouts, call.parts),
                (call.output_layouts, call.kept_parts),
            ):
                for layout, part in zip(layouts, rows, strict=False):
                    all_cells += len(layout) * len(part)
                    stored += sum(place.source == "stored" for place in layout) * len(part)
        if node.number == 0:  # what enters the flow stands in a file of its own
            flow = node.flow
            stored += sum(
                call.rows * sum(p.source == "stored" for p in flow.batch.layouts[call.inputs[0]])
                for call in flow.batch.calls
            )
    return all_cells / stored


def main() -> int:
    """Run both sides, print the figures and say whether the reach was met."""
    parser = options(__doc__, "two rounds of few episodes")
    parser.add_argument("--rounds", type=int, default=0, help="runs of either side")
    arguments = parser.parse_args()
    pin_threads()
    rounds = arguments.rounds or (2 if arguments.quick else 4)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "warm-up", 1, record=True)
        figures = compare(Path(folder), rounds, 3 if arguments.quick else 8)
        recorded = Path(folder) / "0-True"
        episode = recorded / "record/episode-000002"
        figures |= compression(episode, 3 if arguments.quick else 15)
        figures["ratio_copied"] = round(copied(recorded, 2), 2)
    for name, value in figures.items():
        print(f"{name:<22}{value:>14,.4g}" if value < 1e5 else f"{name:<22}{value:>14,.0f}")
    share, most = figures["ratio_record"], REACH_RATIO - 1
    reach = f"recording takes < {most:.0%} of an episode: {{}} ({share:.2%})"
    return conclude(figures, arguments.results, reach, reached=share < most)


if __name__ == "__main__":
    sys.exit(main())
