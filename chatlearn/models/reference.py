# SPDX-License-Identifier: Apache-2.0
"""`PolicyReference`: the frozen model that the policy is kept close to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from chatlearn import columns
from chatlearn.config import ModuleConfig, active
from chatlearn.errors import BatchError, ChatLearnError
from chatlearn.flow.declaration import Declaration
from chatlearn.module import BaseModule
from chatlearn.training.description import described
from chatlearn.training.loading import (
    Device,
    DType,
    check_source,
    load_model,
    resolve_device,
)

if TYPE_CHECKING:
    from torch import Tensor


class PolicyReference(BaseModule):
    """Compute the log-probs of responses under frozen weights.

    Reads `prompt_ids`, `response_ids` and, if it is there, `temperature`; adds `ref_logprobs`.

    Example:
        >>> reference = PolicyReference("reference", model="Qwen/Qwen3-0.6B")
    """

    writes = frozenset({columns.REF_LOGPROBS})

    class Config(ModuleConfig):
        """Fields of `models.<name>`, those set most often first."""

        model: Any
        """Folder or hub id; a dict with `model_type` (random weights); or a callable that returns a
        model or (model, tokenizer)."""
        max_tokens: int = Field(default=16384, ge=1)
        """Tokens of one forward call at most, padding included; a longer sample runs alone."""
        packing: bool = False
        """Put several samples into one row instead of padding each; needs a model that keeps them
        apart."""
        dtype: DType = "fp32"
        """Precision of weights and matrix products."""
        device: Device = "auto"
        """Where the model lives; auto takes a GPU if there is one."""
        attn_implementation: str | None = None
        """Attention of transformers ("sdpa", "eager", ...); None lets transformers choose."""
        trust_remote_code: bool = False
        """Whether code that comes with the model may run."""
        seed: int | None = None
        """Seed of the weights of a model made from a dict; None takes `runtime.seed`, as the policy
        does."""

    def check_config(self) -> list[ChatLearnError]:
        """Return what is wrong with the model's source."""
        # No tokenizer is needed: samples arrive as token ids. Any object stands for "there is one".
        return check_source(
            self.config.model, tokenizer=object(), place=f"models.{self.name}.model"
        )

    def describe_columns(self, method: str) -> Declaration | None:
        """Return what both steps read and write."""
        if method not in ("forward_step", "eval_step"):
            return None
        return Declaration.of(
            reads=columns.kinds_of(columns.PROMPT_IDS, columns.RESPONSE_IDS),
            optional=columns.kinds_of(columns.TEMPERATURE),
            writes=columns.kinds_of(columns.REF_LOGPROBS),
            passes_on=True,
            cost="a forward pass over every sample",
        )

    def setup(self) -> None:
        """Load the model; its weights take no gradient."""
        config = self.config
        seed = active().runtime.seed if config.seed is None else config.seed
        self.model = load_model(
            config.model,
            dtype=config.dtype,
            device=config.device,
            attn=config.attn_implementation,
            seed=seed,
            trust_remote_code=config.trust_remote_code,
        ).requires_grad_(False)

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Add `ref_logprobs`, float32 ragged `[T_i]` in nats, at the temperature of each sample.

        Args:
            data: Columns `prompt_ids` and `response_ids`, int64 ragged; `temperature` `[B]`, 1 if
                missing.

        Raises:
            BatchError: A column is missing.
        """
        from chatlearn.training.logprobs import response_logprobs

        for name in (columns.PROMPT_IDS, columns.RESPONSE_IDS):
            if name not in data:
                raise BatchError(
                    f"the batch has no column {name!r}, only {sorted(data)}",
                    place=f"module {self.name!r}",
                    fix="call it with the output of PolicyInference",
                )
        data[columns.REF_LOGPROBS] = response_logprobs(
            self.model,
            data[columns.PROMPT_IDS],
            data[columns.RESPONSE_IDS],
            data.get(columns.TEMPERATURE, 1.0),
            max_tokens=self.config.max_tokens,
            packing=self.config.packing,
        )
        return data

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Do what `forward_step` does."""
        return self.forward_step(data)

    def describe_parameters(self) -> Mapping[str, Tensor] | None:
        """Return the names, shapes and dtypes of the weights, from the model's configuration alone."""
        return described(self.config.model, self.config.dtype, self.config.trust_remote_code)

    def probe_logprobs(self, token_ids: Tensor) -> Tensor:
        """Return log-probs as `forward_step` computes them."""
        from chatlearn.training.logprobs import sequence_logprobs

        return sequence_logprobs(self.model, token_ids)

    def onload(self) -> None:
        """Bring the weights to the configured device."""
        if self.model is not None:
            self.model.to(resolve_device(self.config.device))

    def offload(self) -> None:
        """Take the weights to the CPU."""
        if self.model is not None:
            self.model.to("cpu")
