# SPDX-License-Identifier: Apache-2.0
"""What observers are told of the calls of modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from chatlearn.observability.progress import Call as ShownCall


class Call(ShownCall, Protocol):
    """What is known of a finished call of a module, beyond what the display shows of it."""

    @property
    def seconds(self) -> float: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def is_training(self) -> bool: ...
    @property
    def outcomes(self) -> Mapping[str, int]: ...
    @property
    def cause(self) -> str: ...
