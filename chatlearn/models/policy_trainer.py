# SPDX-License-Identifier: Apache-2.0
"""`PolicyTrainer`: learns from scored responses by GRPO and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from chatlearn import columns
from chatlearn.config import ModuleConfig, active
from chatlearn.errors import BatchError, ChatLearnError, ConfigError
from chatlearn.flow.declaration import Declaration, Need
from chatlearn.module import BaseModule, state_of
from chatlearn.training.description import described
from chatlearn.training.loading import (
    Device,
    DType,
    check_source,
    load,
    resolve_device,
)

if TYPE_CHECKING:
    from torch import Tensor

    from chatlearn.training.optimiser import Optimiser
    from chatlearn.training.samples import TrainSamples
    from chatlearn.training.step import StepSettings


class PolicyTrainer(BaseModule):
    """Trains a causal LM on responses with advantages; `train_step` is one update on one global
    batch.

    Reads `prompt_ids`, `response_ids`, `advantages` and the log-probs to compare with:
    `old_logprobs` if the flow made them (by this module's `forward_step`), else the sampler's
    `rollout_logprobs`. Optional: `ref_logprobs`, `loss_mask`, `temperature`, `policy_version`,
    `uid`, `outcome`. A column that some samples have, all must have. Samples whose `outcome` is
    `failed` or `timed_out` count nowhere: a step is what it would be without them. The model runs in
    eval mode: dropout would train another policy than the one that was sampled.

    `mismatch` and `mismatch_max` say how far the sampler's log-probs are from the trainer's for the
    same weights. With `old_logprobs` they compare those with `rollout_logprobs`, in every step.
    Without, they compare the weights of this step, and later steps on the same samples would
    measure how far training has moved instead: so they are reported in the first step whose samples
    are all of another `policy_version` than the newest of the step before, and in every step where
    there is no such column.

    Example:
        >>> learner = PolicyTrainer("policy_trainer", model="Qwen/Qwen3-0.6B", lr=2e-6, clip_high=0.28)
    """

    shares_weights = True  # changes its weights in `train_step` only
    writes = frozenset({columns.OLD_LOGPROBS, columns.RATIO, columns.CLIPPED, columns.LOSS_WEIGHT})

    class Config(ModuleConfig):
        """Fields of `models.<name>`, those set most often first."""

        model: Any
        """Folder or hub id; or a dict with `model_type` (random weights); or a callable that
        returns a model or (model, tokenizer)."""
        tokenizer: Any = None
        """Folder, hub id, or a callable that returns one, exported beside the weights; None takes
        the model's, if it has one."""
        lr: float = Field(default=1e-6, gt=0)
        """Learning rate at the top of the schedule."""
        clip_low: float = Field(default=0.2, ge=0)
        """How far below 1 the probability ratio may push."""
        clip_high: float = Field(default=0.2, ge=0)
        """How far above 1 the probability ratio may push; 0.28 is DAPO's clip-higher."""
        kl_coef: float = Field(default=0.0, ge=0)
        """Weight of the KL to the reference in the loss; above 0 it needs the `ref_logprobs`
        column."""
        kl_type: Literal["k1", "k2", "k3"] = "k3"
        """Estimator of that KL; as a loss, k2 has the gradient of the reverse KL, k3 is GRPO's
        choice."""
        loss_aggregation: Literal[
            "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
        ] = "token-mean"
        """How token losses become one number; always over the global batch."""
        loss_norm_length: float | None = Field(default=None, gt=0)
        """The constant length, in tokens, that `seq-mean-token-sum-norm` (Dr.GRPO) divides by."""
        entropy_coef: float = 0.0
        """Weight of an entropy bonus in the loss."""
        max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
        """Tokens (padding included) of one forward and backward pass; moves memory and speed, never
        results."""
        packing: bool = False
        """Whether several samples share a row; pays where lengths differ much."""
        max_grad_norm: float | None = Field(default=1.0, gt=0)
        """Global norm that gradients are clipped to; None leaves them as they are."""
        lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
        """What follows the warm-up; linear and cosine fall to 0 at `total_steps`."""
        warmup_steps: int = Field(default=0, ge=0)
        """Updates over which the learning rate rises linearly."""
        total_steps: int | None = Field(default=None, ge=1)
        """Updates until a linear or cosine schedule reaches 0."""
        weight_decay: float = Field(default=0.0, ge=0)
        """AdamW's decay of matrices; norms and biases never decay."""
        betas: tuple[float, float] = (0.9, 0.999)
        """AdamW's decay rates of its two moments."""
        dtype: DType = "fp32"
        """Precision of the forward pass; parameters, gradients and optimiser stay in fp32."""
        gradient_checkpointing: bool = False
        """Whether activations are made again in the backward pass: less memory, a third more
        time."""
        device: Device = "auto"
        """Where the model lives; auto takes a GPU if there is one."""
        non_finite: Literal["error", "skip"] = "error"
        """What a loss or gradient that is not finite does: end the run, or skip the update and
        count it."""
        eos_token: str | None = None
        """Token that ends a response, for a tokenizer that names none or another one."""
        attn_implementation: str | None = None
        """Attention of transformers ("sdpa", "eager", ...); None lets transformers choose."""
        trust_remote_code: bool = False
        """Whether code that comes with the model may run."""
        seed: int | None = None
        """Seed of the weights of a model made from a dict; None takes `runtime.seed`, as the policy
        does."""
        trainable: bool = True
        """Always true: the module's weights are trained."""

        @model_validator(mode="after")
        def _check_combinations(self) -> Self:
            if self.lr_schedule != "constant" and self.total_steps is None:
                raise ValueError(f"lr_schedule {self.lr_schedule!r} needs total_steps")
            if self.loss_aggregation == "seq-mean-token-sum-norm" and self.loss_norm_length is None:
                raise ValueError(
                    "loss_aggregation 'seq-mean-token-sum-norm' needs loss_norm_length"
                )
            return self

    tokenizer: Any = None
    optimiser: Optimiser | None = None
    _newest_version: int = -1
    """Of the samples of the last step; -1 before the first."""

    def check_config(self) -> list[ChatLearnError]:
        """Return what is wrong with the model's and the tokenizer's source."""
        # A tokenizer is only exported, never needed: any object stands for "there is one".
        return check_source(
            self.config.model,
            self.config.tokenizer or object(),
            place=f"models.{self.name}.model",
        )

    def describe_columns(self, method: str) -> Declaration | None:
        """Return what a train step needs, and what `forward_step` adds for it."""
        sampled = columns.kinds_of(columns.PROMPT_IDS, columns.RESPONSE_IDS)
        if method == "forward_step":
            return Declaration.of(
                reads=sampled,
                optional=columns.kinds_of(columns.TEMPERATURE),
                writes=columns.kinds_of(columns.OLD_LOGPROBS),
                passes_on=True,
                cost="a forward pass over every sample",
            )
        if method != "train_step":
            return None
        needs = [Need.of(columns.kinds_of(columns.ROLLOUT_LOGPROBS, columns.OLD_LOGPROBS))]
        has_kl = self.config.kl_coef > 0
        if has_kl:
            reference = columns.kinds_of(columns.REF_LOGPROBS)
            needs.append(Need.of(reference, because="kl_coef > 0", instead="set kl_coef to 0"))
        return Declaration.of(
            reads=sampled | columns.kinds_of(columns.ADVANTAGES),
            needs=needs,
            optional=columns.kinds_of(columns.LOSS_MASK, columns.TEMPERATURE, columns.UID)
            | columns.kinds_of(columns.POLICY_VERSION, columns.OUTCOME),
            writes=(),
            would_read={} if has_kl else {columns.REF_LOGPROBS: "kl_coef above 0"},
            trains=True,
        )

    def setup(self) -> None:
        """Load model and tokenizer, and make the optimiser.

        What a model that a callable made has frozen (an adapter's base, embeddings) stays frozen.
        """
        from chatlearn.training.architecture import require_packing
        from chatlearn.training.optimiser import Optimiser

        config = self.config
        self._newest_version = -1
        model, self.tokenizer = self._load()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            model.requires_grad_(True)
        self.model = model
        if config.gradient_checkpointing:
            self._checkpoint_gradients(model)
        if config.packing:
            require_packing(model)
        self.optimiser = Optimiser(
            model,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            total_steps=config.total_steps,
            max_grad_norm=config.max_grad_norm,
            non_finite=config.non_finite,
        )

    def train_step(
        self, data: Sequence[Mapping[str, Any]] | Mapping[str, Any], iteration: int = 0
    ) -> None:
        """Update the weights once on one global batch: a list of micro-batches, or one batch.

        How the batch comes cut does not matter: it is merged and cut anew by
        `max_tokens_per_micro_batch`. While a run is recorded, its record gets `ratio`, `clipped`
        and `loss_weight` of every sample.

        Raises:
            BatchError: no samples, a missing column, or one with wrong lengths or numbers that are
                not finite.
            NonFiniteError: the loss or its gradient is not finite.
        """
        from chatlearn.training.samples import merge_samples, without_lost
        from chatlearn.training.step import train_step
        from chatlearn.training.token_log import TokenLog

        assert self.optimiser is not None, "setup() runs before any step"
        given = [data] if isinstance(data, Mapping) else data
        batches = without_lost(given)
        state_of(self).recorded = []
        if not any(map(_count, batches)) and any(map(_count, given)):
            self.log(trained_tokens=0.0)  # all of them were lost
            return
        samples = merge_samples(batches, module=self.name, needs_ref=self.config.kl_coef > 0)
        if self._moved_since_sampling(samples) and not samples.has_own_logprobs:
            # What differs now is what training has done, and no mismatch.
            samples = replace(samples, rollout_logprobs=None)
        log = TokenLog(samples) if active().runtime.record else None
        report = train_step(self.model, self.optimiser, samples, self._step_settings(), log)
        if self.optimiser.skipped:
            report["skipped_updates"] = float(self.optimiser.skipped)
        self.log(**report)
        if log is not None:
            state_of(self).recorded = log.columns(given)

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Add `old_logprobs`: the current weights' log-probs of the responses, ragged float32
        `[T_i]`.
        """
        from chatlearn.training.logprobs import response_logprobs

        for name in (columns.PROMPT_IDS, columns.RESPONSE_IDS):
            if name not in data:
                raise BatchError(
                    f"column {name!r} is missing; there are {sorted(data)}",
                    place=f"module {self.name!r}",
                    fix="give it the output of PolicyInference.forward_step",
                )
        with self._precision():
            data[columns.OLD_LOGPROBS] = response_logprobs(
                self.model,
                data[columns.PROMPT_IDS],
                data[columns.RESPONSE_IDS],
                data.get(columns.TEMPERATURE, 1.0),
                max_tokens=self.config.max_tokens_per_micro_batch,
                packing=self.config.packing,
            )
        return data

    def describe_parameters(self) -> Mapping[str, Tensor] | None:
        """Return the names, shapes and dtypes of the weights, from the model's configuration alone."""
        return described(self.config.model, "fp32", self.config.trust_remote_code)

    def probe_logprobs(self, token_ids: Tensor) -> Tensor:
        """Return log-probs by the forward pass of a train step."""
        from chatlearn.training.logprobs import sequence_logprobs

        with self._precision():
            return sequence_logprobs(self.model, token_ids)

    def training_state(self) -> dict[str, Any]:
        """Return the optimiser's moments, the number of updates and the newest version trained on."""
        if self.optimiser is None:
            return {}
        return {**self.optimiser.state_dict(), "newest_version": self._newest_version}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what `training_state()` returned; settings of the optimiser stay the configured
        ones.
        """
        assert self.optimiser is not None, "setup() runs before a resume"
        self.optimiser.load_state_dict(state)
        self._newest_version = int(state.get("newest_version", -1))  # not kept by the first version

    def export_model(self, folder: Path) -> bool:
        """Write weights (safetensors), config and tokenizer to `folder` in Hugging Face format.

        Adapters are merged into the weights; by themselves they stand in `folder/adapter`, in peft's format.
        """
        if self.model is None:
            return False
        from chatlearn.weights.export import export

        export(self.model, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        return True

    def onload(self) -> None:
        """Bring weights and optimiser state to the configured device."""
        self._move(resolve_device(self.config.device))

    def offload(self) -> None:
        """Take weights and optimiser state to the CPU."""
        self._move("cpu")

    def _move(self, device: str) -> None:
        if self.model is not None and self.optimiser is not None:
            self.model.to(device)
            self.optimiser.to(device)

    def _load(self) -> tuple[Any, Any]:
        """Load fp32 weights, and the tokenizer if there is any to be found."""
        config = self.config
        return load(
            config.model,
            config.tokenizer,
            device=config.device,
            attn=config.attn_implementation,
            seed=active().runtime.seed if config.seed is None else config.seed,
            eos_token=config.eos_token,
            trust_remote_code=config.trust_remote_code,
            needs_tokenizer=False,
        )

    def _moved_since_sampling(self, samples: TrainSamples) -> bool:
        """Tell whether the weights are known to be others than some sample's; see the class."""
        versions = samples.policy_version
        if versions is None:
            return False
        before, self._newest_version = self._newest_version, int(versions.max())
        return before == self._newest_version or int(versions.min()) != self._newest_version

    def _checkpoint_gradients(self, model: Any) -> None:
        """Switch gradient checkpointing on; transformers honours it only in layers in training
        mode.
        """
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                f"{type(model).__name__} does not support gradient checkpointing",
                place=f"models.{self.name}.gradient_checkpointing",
                fix="set it to false",
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for part in model.modules():
            if getattr(part, "gradient_checkpointing", False):
                part.training = True  # this part alone: the modules inside keep dropout off

    def _step_settings(self) -> StepSettings:
        import torch

        from chatlearn.training.step import StepSettings

        config = self.config
        return StepSettings(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coef=config.kl_coef,
            kl_type=config.kl_type,
            entropy_coef=config.entropy_coef,
            aggregation=config.loss_aggregation,
            norm_length=config.loss_norm_length,
            max_tokens=config.max_tokens_per_micro_batch,
            packing=config.packing,
            autocast=torch.bfloat16 if config.dtype == "bf16" else None,
        )

    def _precision(self) -> AbstractContextManager[Any]:
        """Return the context that the forward pass of a train step runs in, too."""
        import torch

        if self.config.dtype == "fp32":
            return nullcontext()
        model: Any = self.model
        return torch.autocast(model.device.type, torch.bfloat16)


def _count(batch: Mapping[str, Any]) -> int:
    return len(batch.get(columns.RESPONSE_IDS, ()))
