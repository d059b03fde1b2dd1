# SPDX-License-Identifier: Apache-2.0
"""Time what a checkpoint costs: the seconds that it blocks a run, against the bytes that it writes.

A model of bf16 or fp32 weights and the two moments of AdamW, as `PolicyTrainer` keeps them, is written as a run
writes it: digests, flushed to disk, renamed, `latest`. Beside it, in the same process and in turn with it, the same
tensors go to the same disk by bare `safetensors.save_file` and `torch.save` and one `fsync` for each. Medians.

    python benchmarks/checkpoint.py [--quick] [--repeats 5] [--folder DIR] [--results FILE]

The last line is one JSON object: `ratio_<MB>` is the checkpoint's time over the bare one's for a checkpoint of so many
megabytes, `s_<MB>` its seconds and `gb_per_s_<MB>` its speed; `share_digest_<MB>`, `share_fsync_<MB>` and others are
parts of the checkpoint's time, `verify_s_<MB>` is reading all of it before setup, `load_s_<MB>` loading it afterwards.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import conclude, options, pin_threads

REACH = 1.3
WARM_UP = 2
QUICK = [4, 16]
FULL = [4, 16, 64, 160]
"""Millions of bytes of weights; a checkpoint has three times as many."""
WIDTH = 512
"""A layer has 4 of `WIDTH`^2 parameters."""


def make_module(weight_bytes: int) -> Any:
    """Make a module with fp32 weights of about so many bytes, tied embeddings and moments of every parameter."""
    import torch
    from torch import nn

    from chatlearn import BaseModule

    layers = max(1, weight_bytes // (16 * WIDTH * WIDTH))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(256, WIDTH)
            self.layers = nn.ModuleList(
                nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in "qkvo"})
                for _ in range(layers)
            )
            self.head = nn.Linear(WIDTH, 256, bias=False)
            self.head.weight = self.embedding.weight

    class Trained(BaseModule):
        def setup(self) -> None:
            self.model = Model()
            self.optimiser = torch.optim.AdamW(self.model.parameters(), fused=True)
            for parameter in self.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            self.optimiser.step()
            self.optimiser.zero_grad()

        def training_state(self) -> dict[str, Any]:
            return {"adam": self.optimiser.state_dict()}

        def load_training_state(self, state: dict[str, Any]) -> None:
            self.optimiser.load_state_dict(state["adam"])

    module = Trained("policy_trainer")
    module.setup()
    return module


def bare(module: Any, folder: Path) -> None:
    """Write the same tensors as one would by hand."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    weights = dict(module.model.state_dict())
    del weights["head.weight"]  # which is tied
    save_file(weights, folder / "weights.safetensors")
    torch.save(module.training_state(), folder / "training.pt")
    torch.save({"torch": torch.get_rng_state()}, folder / "rng.pt")
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def timed_parts(spent: Counter[str]) -> Iterator[None]:
    """Within the block, take down the time of the parts of a checkpoint's write."""
    from chatlearn.checkpoint import files

    parts = {
        "digest": "digest",
        "fsync": "flush",
        "weights": "write_weights",
        "training_state": "write_values",
    }
    before = {name: getattr(files, name) for name in parts.values()}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[part] += time.perf_counter() - start

        return call

    for part, name in parts.items():
        setattr(files, name, timed(part, before[name]))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(files, name, function)


def seconds(function: Callable[[], Any]) -> float:
    """Time one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(megabytes: int, repeats: int, folder: Path) -> dict[str, float]:
    """Compare both sides, print a line of the table and return the figures."""
    from chatlearn.checkpoint import folder as checkpoints
    from chatlearn.checkpoint.state import RunState

    module, root = make_module(megabytes * 10**6), folder / "checkpoints"
    ours: list[float] = []
    theirs: list[float] = []
    spent: Counter[str] = Counter()
    rows = '{"episode":1,"policy_trainer/loss":0.1}\n' * 500

    def save() -> Path:
        state = RunState(episode=1)
        return checkpoints.save(
            root, state, [module], with_weights=["policy_trainer"], metrics=rows
        )

    for _ in range(WARM_UP):  # memory for the page cache is slow to come by the first time
        save()
        shutil.rmtree(root)
        bare(module, folder / "bare")
        shutil.rmtree(folder / "bare")
    for repeat in range(repeats):
        sides = [
            (theirs, lambda: bare(module, folder / "bare"), folder / "bare"),
            (ours, save, root),
        ]
        for found, write, where in sides if repeat % 2 else reversed(sides):
            with timed_parts(spent):
                found.append(seconds(write))
            shutil.rmtree(where)
    last = save()
    written = sum(RunState.read(last).files.values())
    verify = statistics.median(seconds(lambda: checkpoints.verify(last)) for _ in range(3))
    load = statistics.median(seconds(lambda: checkpoints.load(last, [module])) for _ in range(3))
    shutil.rmtree(root)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    blocked, by_hand = statistics.median(ours), statistics.median(theirs)
    size = round(written / 10**6)
    shares = {part: round(s / sum(ours), 3) for part, s in spent.items()}
    shares["rest"] = round(1 - sum(shares.values()), 3)
    print(
        f"{size:>8}{blocked:>10.3f}{by_hand:>10.3f}{ratio:>8.2f}{written / blocked / 1e9:>8.2f}"
        f"{shares['digest']:>9.1%}{shares['fsync']:>8.1%}{verify:>10.3f}{load:>9.3f}",
        flush=True,
    )
    return {
        f"s_{size}": round(blocked, 4),
        f"bare_s_{size}": round(by_hand, 4),
        f"ratio_{size}": round(ratio, 3),
        f"gb_per_s_{size}": round(written / blocked / 1e9, 3),
        f"verify_s_{size}": round(verify, 4),
        f"load_s_{size}": round(load, 4),
        **{f"share_{part}_{size}": share for part, share in shares.items()},
    }


def main() -> int:
    """Measure every size, print the table and say whether the reach was met."""
    parser = options(__doc__, "two small sizes, few repeats")
    parser.add_argument("--repeats", type=int, default=0, help="pairs per size")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    pin_threads()
    print(f"{'MB':>8}{'s':>10}{'bare s':>10}{'ratio':>8}{'GB/s':>8}", end="")
    print(f"{'digest':>9}{'fsync':>8}{'verify s':>10}{'load s':>9}")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for megabytes in QUICK if arguments.quick else FULL:
            repeats = arguments.repeats or (3 if arguments.quick else 7)
            figures |= measure(megabytes, repeats, Path(folder))
    largest = [value for name, value in figures.items() if name.startswith("ratio_")][-1]
    reach = f"a large checkpoint in less than {REACH} times a bare one's: {{}} ({largest})"
    return conclude(figures, arguments.results, reach, reached=largest < REACH)


if __name__ == "__main__":
    sys.exit(main())
