# SPDX-License-Identifier: Apache-2.0
"""The columns our own modules read and write, named once.

Legend: `B` samples of the batch, `P_i` prompt tokens and `T_i` response tokens of sample `i`. A ragged column
is a Python list of `B` one-dimensional tensors, one per sample, never padded between modules.

Example:
    A batch of two samples, as `PolicyInference` returns it::

        {"uid": tensor([0, 1]), "prompt_uid": tensor([0, 0]), "prompt": ["1+1=", "1+1="],
         "prompt_ids": [tensor([5, 9, 5]), tensor([5, 9, 5])],
         "response_ids": [tensor([6, 1]), tensor([7, 7, 1])],
         "rollout_logprobs": [tensor([-0.1, -0.0]), tensor([-2.3, -0.5, -0.1])], ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Column:
    """Describe one column: its dtype, its shape in the legend's letters and what it means."""

    name: str
    dtype: str
    shape: str
    meaning: str

    @property
    def kind(self) -> str:
        """Return which of `KINDS` the column may be, as the flow checker compares them: `"number | floats"`."""
        found: list[str] = []
        for dtype in self.dtype.split(" | "):
            if dtype in _PLAIN_KINDS:
                found.append(_PLAIN_KINDS[dtype])
                continue
            if "[B]" in self.shape:
                found.append("number")
            if "ragged" in self.shape:
                found.append(_RAGGED_KINDS[dtype])
        return " | ".join(found)


KINDS: Final[dict[str, str]] = {
    "text": "a string per sample",
    "messages": "chat messages per sample: dicts with role and content",
    "number": "one number per sample",
    "tokens": "whole numbers per sample, as many as it has tokens",
    "floats": "numbers per sample, as many as it has tokens",
    "flags": "true or false per token of the sample",
}
"""What a column may hold, as modules declare it."""
_PLAIN_KINDS = {"str": "text", "list[dict]": "messages"}
_RAGGED_KINDS = {"int64": "tokens", "int8": "tokens", "float32": "floats", "bool": "flags"}

UID: Final = "uid"
PROMPT_UID: Final = "prompt_uid"
PROMPT: Final = "prompt"
PROMPT_IDS: Final = "prompt_ids"
RESPONSE_IDS: Final = "response_ids"
COMPLETION: Final = "completion"
FINISH_REASON: Final = "finish_reason"
TEMPERATURE: Final = "temperature"
POLICY_VERSION: Final = "policy_version"
OUTCOME: Final = "outcome"
LOSS_MASK: Final = "loss_mask"
ROLLOUT_LOGPROBS: Final = "rollout_logprobs"
OLD_LOGPROBS: Final = "old_logprobs"
REF_LOGPROBS: Final = "ref_logprobs"
REWARDS: Final = "rewards"
ADVANTAGES: Final = "advantages"
RETURNS: Final = "returns"
VALUES: Final = "values"
RATIO: Final = "ratio"
CLIPPED: Final = "clipped"
LOSS_WEIGHT: Final = "loss_weight"

OK: Final = "ok"
CUT: Final = "cut"
FAILED: Final = "failed"
TIMED_OUT: Final = "timed_out"
OUTCOMES: Final = (OK, CUT, FAILED, TIMED_OUT)
"""Whole; response cut off at its limit; a step raised or gave no usable value; a step gave no answer in time."""
RETRIED: Final = "retried"
"""Counted beside outcomes: a sample that was tried once more."""

COLUMNS: Final[dict[str, Column]] = {
    column.name: column
    for column in (
        Column(UID, "int64", "[B]", "number of the sample in the run, given by the engine"),
        Column(PROMPT_UID, "int64", "[B]", "number of the prompt; the samples of a group share it"),
        Column(PROMPT, "str | list[dict]", "[B]", "text, or chat messages with role and content"),
        Column(PROMPT_IDS, "int64", "ragged [P_i]", "tokens of the prompt, chat template applied"),
        Column(
            RESPONSE_IDS, "int64", "ragged [T_i]", "sampled tokens, the EOS included if sampled"
        ),
        Column(COMPLETION, "str", "[B]", "the response as text, special tokens left out"),
        Column(FINISH_REASON, "str", "[B]", "'stop' (EOS or stop string) or 'length'"),
        Column(TEMPERATURE, "float32", "[B]", "temperature that the response was sampled with"),
        Column(POLICY_VERSION, "int64", "[B]", "parameter syncs the sampler had received"),
        Column(OUTCOME, "str", "[B]", "how the sample fared: one of `OUTCOMES`"),
        Column(LOSS_MASK, "bool", "ragged [T_i]", "which response tokens are trained on"),
        Column(ROLLOUT_LOGPROBS, "float32", "ragged [T_i]", "the sampler's log-probs, nats"),
        Column(OLD_LOGPROBS, "float32", "ragged [T_i]", "the trainer's log-probs at step start"),
        Column(REF_LOGPROBS, "float32", "ragged [T_i]", "the reference's log-probs, nats"),
        Column(REWARDS, "float32", "[B]", "the sample's reward, weighted sum of its parts"),
        Column(ADVANTAGES, "float32", "[B] or ragged [T_i]", "per sample, or per response token"),
        Column(RETURNS, "float32", "ragged [T_i]", "regression target of the value model"),
        Column(VALUES, "float32", "ragged [T_i]", "the value model's estimates"),
        Column(
            RATIO,
            "float32",
            "ragged [T_i]",
            "of an update: current over old probability; NaN where not trained on",
        ),
        Column(
            CLIPPED, "int8", "ragged [T_i]", "of an update: 1 held back above, -1 below, else 0"
        ),
        Column(LOSS_WEIGHT, "float32", "[B]", "of an update: weight of each of its trained tokens"),
    )
}

_SAMPLED = (
    *(PROMPT_IDS, RESPONSE_IDS, COMPLETION, FINISH_REASON),
    *(TEMPERATURE, POLICY_VERSION, ROLLOUT_LOGPROBS),
)
MAKERS: Final[dict[str, str]] = {
    **dict.fromkeys(_SAMPLED, "PolicyInference.forward_step"),
    OLD_LOGPROBS: "PolicyTrainer.forward_step",
    REF_LOGPROBS: "PolicyReference.forward_step",
    REWARDS: "FunctionReward.forward_step",
    ADVANTAGES: "GroupAdvantage.forward_step",
}
"""Which step of ours usually makes a column."""


def kinds_of(*names: str) -> dict[str, str]:
    """Return the kind of each of these columns, to be declared as what a step reads or writes.

    Example:
        >>> kinds_of("prompt", "advantages")
        {'prompt': 'text | messages', 'advantages': 'number | floats'}
    """
    return {name: COLUMNS[name].kind for name in names}
