# SPDX-License-Identifier: Apache-2.0
"""What every benchmark does before and after it measures: options, pinned threads, the verdict, one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path


def options(doc: str, quick: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark takes; `quick` says what `--quick` leaves out."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--results", type=Path, help="write the JSON object to this file, too")
    return parser


def pin_threads(threads: int = 1) -> None:
    """Give torch and OpenMP `threads` threads, here and in processes begun from here; before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def conclude(
    figures: dict[str, float], results: Path | None, reach: str = "", *, reached: bool = True
) -> int:
    """Print whether the reach was met and, last, the figures as one JSON object; return the exit status."""
    if reach:
        print(f"reach: {reach.format('pass' if reached else 'FAIL')}")
    line = json.dumps(figures)
    if results is not None:
        results.write_text(line + "\n")
    print(line)
    return 0 if reached else 1
