# SPDX-License-Identifier: Apache-2.0
"""Who samples: the port (`base`), the sampling maths (`sampling`) and one file per engine."""

from chatlearn.rollout.base import (
    Completion,
    FinishReason,
    Progress,
    PromptRequest,
    RolloutEngine,
    SamplingParams,
)

__all__ = [
    "Completion",
    "FinishReason",
    "Progress",
    "PromptRequest",
    "RolloutEngine",
    "SamplingParams",
]
