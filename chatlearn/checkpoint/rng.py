# SPDX-License-Identifier: Apache-2.0
"""The global random generators: seed them, take their states down, bring them back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RngStates = dict[str, Any]


def rng_states() -> RngStates:
    """Return the states of torch's, Python's and numpy's generators."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = legacy
    states: RngStates = {
        "torch": torch.get_rng_state(),
        "python": (version, list(numbers), gauss),
        "numpy": (str(kind), torch.tensor(keys.astype("int64")), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: RngStates) -> None:
    """Bring the generators to `states`; of GPUs, as many as this machine has."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states.get("cuda", [])[: torch.cuda.device_count()])


def seed_all(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
