# SPDX-License-Identifier: Apache-2.0
"""Time one GRPO episode: chatlearn against a loop written by hand, interleaved in one process.

Both sides do the same work with the same Hugging Face model class: 16 prompts x 8 samples of a
fixed number of tokens, group advantages, one clipped update with AdamW over all 128 samples. EOS
cannot be sampled, so no side saves tokens. The loop by hand is what a careful person writes: KV
cache, log-probs kept from sampling, logits only where they are needed, one padded batch.

    python benchmarks/grpo_step.py [--quick] [--threads 1] [--device cpu] [--dtype fp32]
        [--results FILE]

The last line is one JSON object; `ratio_<model>_<tokens>` is chatlearn's median seconds per
episode over the hand-written loop's, the median of the pairwise ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import conclude, options, pin_threads

REACH = 1.05
PROMPTS, GROUP, PROMPT_TOKENS, VOCAB = 16, 8, 20, 64
CPU_SIZES = {"0.8M": (128, 4, 384), "4.8M": (256, 6, 768)}
GPU_SIZES = {"0.5B": (1024, 28, 3072)}


@dataclass
class Side:
    """What was measured of one side."""

    seconds: list[float] = field(default_factory=list)
    generation: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)


def make_model(hidden: int, layers: int, inner: int, vocab: int = VOCAB) -> Any:
    """Make a Qwen3 model from a config, the same weights every time."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32 if hidden < 1024 else 16,
        num_key_value_heads=hidden // 64 if hidden < 1024 else 8,
        head_dim=32 if hidden < 1024 else 128,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


def make_tokenizer() -> Any:
    """Make a character tokenizer whose EOS lies outside the model's vocabulary, so nothing ends."""
    import string

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = (string.ascii_letters + string.digits + "+=")[:VOCAB]
    vocab = {letter: i for i, letter in enumerate(letters)} | {"<eos>": VOCAB, "<unk>": VOCAB + 1}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


def make_prompts(count: int) -> list[str]:
    """Make random prompts of `PROMPT_TOKENS` letters."""
    import random
    import string

    draw = random.Random(0)
    return ["".join(draw.choices(string.ascii_letters, k=PROMPT_TOKENS)) for _ in range(count)]


def reward_of(completions: list[str]) -> list[float]:
    """Give the share of the letter a; any cheap reward does."""
    return [text.count("a") / max(len(text), 1) for text in completions]


class ByHand:
    """The hand-written loop: `step()` is one episode."""

    def __init__(self, model: Any, tokenizer: Any, tokens: int, device: str, bf16: bool) -> None:
        import torch

        self.trainer = model.to(device)
        self.sampler = self.trainer
        self.bf16 = bf16
        self.tokenizer, self.tokens, self.device = tokenizer, tokens, device
        self.optimiser = torch.optim.AdamW(
            self.trainer.parameters(), lr=1e-4, weight_decay=0.0, fused=True
        )

    def generate(self, prompts: list[str]) -> tuple[Any, Any]:
        """Sample `GROUP` completions per prompt; return token ids and log-probs."""
        import torch
        from transformers import DynamicCache

        ids = self.tokenizer(prompts, return_tensors="pt").input_ids.to(self.device)
        ids = ids.repeat_interleave(GROUP, 0)
        sampled, kept = [], []
        cache: Any = DynamicCache(config=self.sampler.config)
        step_ids = ids
        with torch.inference_mode(), self.precision():
            for _ in range(self.tokens):
                out = self.sampler(
                    input_ids=step_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                logprobs = out.logits[:, -1].float().log_softmax(-1)
                step_ids = torch.multinomial(logprobs.exp(), 1)
                sampled.append(step_ids)
                kept.append(logprobs.gather(1, step_ids))
        return torch.cat([ids, *sampled], 1), torch.cat(kept, 1)

    def precision(self) -> Any:
        """Return the autocast context."""
        import torch

        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def train(self, ids: Any, old: Any, advantages: Any) -> None:
        """Take one clipped policy-gradient step over all samples."""
        import torch

        ids, old = ids.clone(), old.clone()  # out of inference mode
        with self.precision():
            out = self.trainer(input_ids=ids[:, :-1], logits_to_keep=self.tokens, use_cache=False)
        logprobs = out.logits.float().log_softmax(-1)
        new = logprobs.gather(2, ids[:, -self.tokens :, None])[..., 0]
        ratio = (new - old).exp()
        a = advantages[:, None]
        loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainer.parameters(), 1.0)
        self.optimiser.step()

    def step(self, prompts: list[str]) -> tuple[float, float]:
        """Run one episode; return the seconds of generation and of training."""
        import torch

        start = time.perf_counter()
        ids, old = self.generate(prompts)
        texts = self.tokenizer.batch_decode(ids[:, -self.tokens :])
        middle = time.perf_counter()
        rewards = torch.tensor(reward_of(texts)).view(-1, GROUP)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-6)).flatten().to(self.device)
        self.train(ids, old, advantages)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return middle - start, time.perf_counter() - middle


def run_chatlearn(
    size: tuple[int, int, int],
    tokens: int,
    episodes: int,
    device: str,
    bf16: bool,
    before_episode: Callable[[], None],
    folder: str,
) -> list[dict[str, float]]:
    """Run the same GRPO with chatlearn; `before_episode` is called between episodes."""
    import chatlearn
    from chatlearn import BaseModule, Engine, Environment, Trainer
    from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer

    rows: list[dict[str, float]] = []

    class Learner(PolicyTrainer):
        def before_episode(self) -> None:
            before_episode()

        def log(self, metrics: Any = None, /, **more: float) -> None:
            rows.append({**(metrics or {}), **more})
            super().log(metrics, **more)

    def source() -> Any:
        return make_model(*size), make_tokenizer()

    dtype = "bf16" if bf16 else "fp32"
    chatlearn.init(
        {
            "runtime": {
                "num_episode": episodes,
                "sample_per_episode": PROMPTS * GROUP,
                "num_inference_per_prompt": GROUP,
                "output_dir": folder,
            }
        }
    )
    policy = PolicyInference(
        "policy", model=source, max_new_tokens=tokens, device=device, dtype=dtype
    )
    reward = FunctionReward("reward", reward_of)
    advantage: BaseModule = GroupAdvantage("advantage")
    learner = Learner("learner", model=source, lr=1e-4, device=device, dtype=dtype,
                      max_tokens_per_micro_batch=1 << 20)  # fmt: skip

    def env_flow(batch: Any) -> Any:
        return advantage.forward_step(reward.forward_step(policy.forward_step(batch)))

    def trainer_flow(batch: Any) -> None:
        learner.train_step(batch)

    engine = Engine(Environment(env_flow), Trainer(trainer_flow)).set_parameter_sync(
        learner, policy
    )
    with engine.set_dataset(make_prompts(PROMPTS)):
        engine.learn()
    metrics = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, metrics) if row["episode"] > 0]


def compare(
    size: tuple[int, int, int], tokens: int, episodes: int, device: str, bf16: bool
) -> tuple[Side, Side, float]:
    """Interleave both sides; return them and the share of time spent in the engine itself."""
    hand, ours = Side(), Side()
    by_hand = ByHand(make_model(*size), make_tokenizer(), tokens, device, bf16)
    prompts = make_prompts(PROMPTS)
    left = 0.0

    def hand_written_step() -> None:
        nonlocal left
        now = time.perf_counter()
        if left:
            ours.seconds.append(now - left)
        start = time.perf_counter()
        generation, training = by_hand.step(prompts)
        hand.seconds.append(time.perf_counter() - start)
        hand.generation.append(generation)
        hand.training.append(training)
        left = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        rows = run_chatlearn(size, tokens, episodes, device, bf16, hand_written_step, folder)
    ours.generation = [row["time/env_flow"] for row in rows]
    ours.training = [row["time/trainer_flow"] for row in rows]
    # `time/engine` holds the hand-written step, which runs in a hook: take it from the wall time.
    inside = [g + t for g, t in zip(ours.generation, ours.training, strict=True)]
    engine = [1 - busy / wall for busy, wall in zip(inside, ours.seconds, strict=False)]
    return hand, ours, statistics.median(engine[1:])


def peak_memory(side: str, name: str, tokens: int, arguments: argparse.Namespace) -> float:
    """Return the peak memory in MB of one side alone, over two episodes in a process of its own."""
    command = [sys.executable, __file__, "--only", side, "--size", name, "--tokens", str(tokens)]
    for option in ("threads", "device", "dtype"):
        command += [f"--{option}", str(getattr(arguments, option))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def run_alone(arguments: argparse.Namespace) -> None:
    """Run two episodes of one side and print the peak memory in MB."""
    import torch

    size = {**CPU_SIZES, **GPU_SIZES}[arguments.size]
    device, bf16 = arguments.device, arguments.dtype == "bf16"
    if arguments.only == "hand":
        by_hand = ByHand(make_model(*size), make_tokenizer(), arguments.tokens, device, bf16)
        for _ in range(2):
            by_hand.step(make_prompts(PROMPTS))
    else:
        with tempfile.TemporaryDirectory() as folder:
            run_chatlearn(size, arguments.tokens, 2, device, bf16, lambda: None, folder)
    if device == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
    else:
        # Not getrusage: its ru_maxrss begins with the peak of the process that started this one.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)


def report(
    name: str, tokens: int, measured: tuple[Side, Side, float], peaks: tuple[float, float]
) -> dict[str, float]:
    """Print one configuration's table and return its figures."""
    hand, ours, engine = measured
    pairs = list(zip(ours.seconds, hand.seconds, strict=False))[1:]  # the first one warms up
    ratio = statistics.median(a / b for a, b in pairs)
    total = PROMPTS * GROUP * tokens
    print(f"\n{name} parameters, {PROMPTS * GROUP} samples of {tokens} tokens, {len(pairs)} pairs")
    print(f"{'':14}{'s/episode':>10}{'gen tok/s':>12}{'train tok/s':>13}{'peak MB':>9}")
    sides = (("by hand", hand, peaks[0]), ("chatlearn", ours, peaks[1]))
    for label, side, peak in sides:
        seconds = statistics.median(side.seconds[1:])
        generated = total / statistics.median(side.generation[1:])
        trained = total / statistics.median(side.training[1:])
        print(f"{label:14}{seconds:>10.3f}{generated:>12,.0f}{trained:>13,.0f}{peak:>9,.0f}")
    print(f"ratio {ratio:.3f}   engine {engine:.1%} of an episode")
    key = f"{name}_{tokens}"
    return {
        f"ratio_{key}": round(ratio, 4),
        f"engine_share_{key}": round(engine, 4),
        f"seconds_{key}": round(statistics.median(ours.seconds[1:]), 4),
        f"seconds_by_hand_{key}": round(statistics.median(hand.seconds[1:]), 4),
        f"ratio_memory_{key}": round(peaks[1] / peaks[0], 4),
    }


def main() -> int:
    """Run every configuration and print the ratios."""
    parser = options(__doc__, "few episodes, the small model only")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--episodes", type=int, default=0, help="pairs per configuration")
    parser.add_argument("--only", choices=["hand", "chatlearn"], help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    if arguments.only:
        run_alone(arguments)
        return 0
    sizes = GPU_SIZES if arguments.device == "cuda" else CPU_SIZES
    lengths = [32, 128]
    if arguments.quick:
        sizes, lengths = dict(list(sizes.items())[:1]), lengths[:1]
    figures: dict[str, float] = {}
    for name, size in sizes.items():
        for tokens in lengths:
            episodes = arguments.episodes or (5 if arguments.quick else 13)
            measured = compare(size, tokens, episodes, arguments.device, arguments.dtype == "bf16")
            peaks = tuple(
                peak_memory(side, name, tokens, arguments) for side in ("hand", "chatlearn")
            )
            figures |= report(name, tokens, measured, peaks)
    figures["threads"] = arguments.threads
    worst = max(figures[f"ratio_{name}_{tokens}"] for name in sizes for tokens in lengths)
    reach = f"at most {REACH} times the seconds of the loop by hand: {{}} ({worst:.3f})"
    return conclude(figures, arguments.results, reach, reached=worst <= REACH)


if __name__ == "__main__":
    sys.exit(main())
