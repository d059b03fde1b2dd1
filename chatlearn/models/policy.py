# SPDX-License-Identifier: Apache-2.0
"""`PolicyInference`: samples responses to prompts with the current policy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from chatlearn import columns
from chatlearn.config import ModuleConfig, active
from chatlearn.errors import BatchError, ChatLearnError, DataError
from chatlearn.flow.declaration import Declaration, Need
from chatlearn.flow.namespace import own_row
from chatlearn.module import BaseModule, state_of
from chatlearn.rollout.base import Completion, PromptRequest, SamplingParams
from chatlearn.training.description import described
from chatlearn.training.loading import Device, DType, check_source, load, resolve_device

if TYPE_CHECKING:
    from torch import Tensor

    from chatlearn.rollout.prompts import PromptEncoder
    from chatlearn.rollout.transformers import TransformersEngine


class PolicyInference(BaseModule):
    """Sample one response per sample: training's in `forward_step`, evaluation's in `eval_step`.

    Reads `prompt` (text or chat messages) or `prompt_ids` (tokens: tensors or lists of int), and
    `uid`. Where both are there, `prompt_ids` wins: drop that column to have a changed `prompt`
    encoded anew. (With a namespace, its own `prompt` goes before `prompt_ids` of others.) Adds
    `prompt_ids`, `response_ids`, `rollout_logprobs`, `completion`, `finish_reason`, `temperature`,
    `policy_version` and `outcome`; see `chatlearn.columns`.

    A response is a function of the weights, the prompt and the key of its random numbers alone:
    the seed, this module's name, training or evaluation, the uid, and which call of the method in
    its flow asks for it. So two calls in one flow, and two policies, draw independently.

    Example:
        >>> policy = PolicyInference("policy", model="Qwen/Qwen3-0.6B", max_new_tokens=128)
    """

    shares_weights = True  # never changes its weights
    writes = columns.kinds_of(
        columns.PROMPT_IDS,
        columns.RESPONSE_IDS,
        columns.ROLLOUT_LOGPROBS,
        columns.COMPLETION,
        columns.FINISH_REASON,
        columns.TEMPERATURE,
        columns.POLICY_VERSION,
        columns.OUTCOME,
    )

    class Config(ModuleConfig):
        """Fields of `models.<name>`, those set most often first."""

        model: Any
        """Folder or hub id; a dict with `model_type` (random weights); or a callable that returns
        (model, tokenizer)."""
        max_new_tokens: int = Field(default=256, ge=1)
        """Tokens of a response at most."""
        temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
        """Divides the logits; 0 takes the most likely token."""
        tokenizer: Any = None
        """Folder, hub id, or a callable that returns one; None takes the model's."""
        top_p: float = Field(default=1.0, gt=0, le=1)
        """Sample from the smallest set of tokens with at least this probability. Below 1 the
        trainer's log-probs are not those of what was sampled from."""
        top_k: int = Field(default=0, ge=0)
        """Sample from this many most likely tokens; 0 takes all. See `top_p`."""
        stop: list[str] = Field(default_factory=list[str])
        """Texts that end a response; they stay part of it. A special token of the tokenizer counts
        as that token."""
        max_prompt_tokens: int | None = Field(default=None, ge=1)
        """A longer prompt is an error; None allows what the model's positions allow."""
        eval_temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
        """`temperature` in evaluation; None takes `temperature`."""
        eval_top_p: float | None = Field(default=None, gt=0, le=1)
        """`top_p` in evaluation; None takes `top_p`."""
        eval_top_k: int | None = Field(default=None, ge=0)
        """`top_k` in evaluation; None takes `top_k`."""
        eval_max_new_tokens: int | None = Field(default=None, ge=1)
        """`max_new_tokens` in evaluation; None takes `max_new_tokens`."""
        dtype: DType = "fp32"
        """Precision of weights and matrix products; log-probs are fp32, from the logits."""
        device: Device = "auto"
        """Where the model lives; auto takes a GPU if there is one."""
        chat_template: bool | None = None
        """Apply the chat template: None to chat messages, True to plain text too, False never."""
        add_bos: bool | None = None
        """Begin plain text with a BOS token; None does what the tokenizer does by itself."""
        eos_token: str | None = None
        """Token that ends a response, for a tokenizer that names none or another one."""
        attn_implementation: str | None = None
        """Attention of transformers ("sdpa", "eager", ...); None lets transformers choose."""
        trust_remote_code: bool = False
        """Whether code that comes with the model may run."""
        seed: int | None = None
        """Seed of sampling, and of the weights of a model made from a dict; None takes
        `runtime.seed`."""

    def check_config(self) -> list[ChatLearnError]:
        """Return what is wrong with the model's and the tokenizer's source."""
        return check_source(
            self.config.model, self.config.tokenizer, place=f"models.{self.name}.model"
        )

    def describe_columns(self, method: str) -> Declaration | None:
        """Return what both steps read and write: they differ in settings alone."""
        if method not in ("forward_step", "eval_step"):
            return None
        return Declaration.of(
            reads={columns.UID},
            needs=[Need.of(columns.kinds_of(columns.PROMPT, columns.PROMPT_IDS))],
            writes=PolicyInference.writes,
            passes_on=True,
        )

    def setup(self) -> None:
        """Load the model and its tokenizer; weights take no gradient here."""
        from chatlearn.rollout.prompts import PromptEncoder
        from chatlearn.rollout.transformers import TransformersEngine

        config = self.config
        loaded = load(
            config.model,
            config.tokenizer,
            dtype=config.dtype,
            device=config.device,
            attn=config.attn_implementation,
            seed=self._seed(),
            eos_token=config.eos_token,
            trust_remote_code=config.trust_remote_code,
        )
        self.model = loaded.model.requires_grad_(False)
        self.tokenizer = loaded.tokenizer
        self._encoder: PromptEncoder = PromptEncoder(
            tokenizer=loaded.tokenizer,
            chat_template=config.chat_template,
            add_bos=config.add_bos,
            max_tokens=config.max_prompt_tokens,
        )
        self._engine: TransformersEngine = TransformersEngine(loaded.model, loaded.tokenizer)

    def check_rows(self, rows: Sequence[Any]) -> None:
        """Refuse a dataset with a prompt that is missing, empty or too long, before anything is sampled.

        Raises:
            DataError: naming the first such row.
        """
        most = self._engine.max_positions
        for index in range(len(rows)):
            row = rows[index]
            given = (
                cast("Mapping[str, Any]", row)
                if isinstance(row, Mapping)
                else {columns.PROMPT: row}
            )
            columns_of, own = own_row(given, self.config.namespace)
            if _ids_count(columns_of, own):
                continue
            if columns.PROMPT not in columns_of:
                raise DataError(
                    f"row {index} of the dataset has no column {columns.PROMPT!r}, only {sorted(columns_of)}",
                    place=f"module {self.name!r}",
                    fix="name the text or the chat messages `prompt`",
                )
            ids = self._encoder.encode([columns_of[columns.PROMPT]], uids=[index], noun="row")[0]
            if len(ids) == 0 or (most is not None and len(ids) >= most):
                what = (
                    "no tokens"
                    if len(ids) == 0
                    else f"{len(ids)} tokens; the model has {most} positions"
                )
                raise DataError(
                    f"the prompt of row {index} has {what}",
                    place=f"module {self.name!r}",
                    fix="leave it out of the dataset, or shorten it",
                )

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Sample one response per sample of `data`, with training's settings.

        Args:
            data: Columns `uid` and `prompt` or `prompt_ids`; `[B]`.

        Returns:
            `data` with the columns that the class lists.

        Raises:
            BatchError: `uid` or both prompt columns are missing, or `prompt_ids` are no token ids.
            DataError: A prompt is no prompt, is empty, or is too long.
        """
        config = self.config
        params = SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop=tuple(config.stop),
            max_new_tokens=config.max_new_tokens,
        )
        return self._generate(data, params, "train")

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Sample as `forward_step` does, with evaluation's settings and its own random numbers.

        Every evaluation uses the same random numbers for the same uid, so that two of them differ
        by the weights alone.
        """
        config = self.config
        params = SamplingParams(
            temperature=_first(config.eval_temperature, config.temperature),
            top_p=_first(config.eval_top_p, config.top_p),
            top_k=_first(config.eval_top_k, config.top_k),
            stop=tuple(config.stop),
            max_new_tokens=_first(config.eval_max_new_tokens, config.max_new_tokens),
        )
        return self._generate(data, params, "eval")

    def describe_parameters(self) -> Mapping[str, Tensor] | None:
        """Return the names, shapes and dtypes of the weights, from the model's configuration alone."""
        return described(self.config.model, self.config.dtype, self.config.trust_remote_code)

    def probe_logprobs(self, token_ids: Tensor) -> Tensor:
        """Return log-probs by the prefill and the decoding, token by token, that sampling uses."""
        return self._engine.score(token_ids)

    def onload(self) -> None:
        """Bring the weights to the configured device."""
        if self.model is not None:
            self.model.to(resolve_device(self.config.device))

    def offload(self) -> None:
        """Take the weights to the CPU."""
        if self.model is not None:
            self.model.to("cpu")

    def _seed(self) -> int:
        seed: int | None = self.config.seed
        return active().runtime.seed if seed is None else seed

    def _generate(
        self, data: dict[str, Any], params: SamplingParams, phase: Literal["train", "eval"]
    ) -> dict[str, Any]:
        """Encode prompts, sample, and add the columns."""
        from chatlearn.rollout.sampling import derive_seed

        uids = self._uids(data)
        prompt_ids = self._prompt_ids(data, uids)
        turn = state_of(self).turn
        requests = [
            PromptRequest(uid, ids, turn) for uid, ids in zip(uids, prompt_ids, strict=True)
        ]
        seed = derive_seed(self._seed(), f"{self.name}/{phase}")
        done = self._engine.generate(requests, params, seed=seed, progress=self.progress)
        self._report(prompt_ids, done)
        data.update(self._columns(prompt_ids, done, params.temperature))
        return data

    def _uids(self, data: dict[str, Any]) -> list[int]:
        if columns.UID not in data:
            raise BatchError(
                f"the batch has no column {columns.UID!r}, which keys each sample's random numbers",
                place=f"module {self.name!r}",
                fix="let an engine run the flow, or add it: data['uid'] = list(range(n))",
            )
        return [int(uid) for uid in data[columns.UID]]

    def _prompt_ids(self, data: dict[str, Any], uids: list[int]) -> list[Tensor]:
        if _ids_count(data, state_of(self).own_columns):
            given = list(data[columns.PROMPT_IDS])
            if len(given) != len(uids):
                raise BatchError(
                    f"column {columns.PROMPT_IDS!r} holds {len(given)} prompts, "
                    f"{columns.UID!r} holds {len(uids)}",
                    place=f"module {self.name!r}",
                    fix="give every column one entry per sample",
                )
            ids = [self._token_ids(one, uid) for one, uid in zip(given, uids, strict=True)]
            self._encoder.check(ids, uids=uids)
            return ids
        if columns.PROMPT not in data:
            raise BatchError(
                f"the batch has neither {columns.PROMPT!r} nor {columns.PROMPT_IDS!r}, "
                f"only {sorted(data)}",
                place=f"module {self.name!r}",
                fix="give the dataset a `prompt` column",
            )
        return self._encoder.encode(data[columns.PROMPT], uids=uids)

    def _token_ids(self, given: Any, uid: int) -> Tensor:
        """Return int64 `[P]` on the CPU, of a prompt given as tensor, array or list of int."""
        import torch

        if isinstance(given, torch.Tensor) and given.ndim == 1 and given.dtype == torch.int64:
            return given.cpu()
        plain = cast("Any", given).tolist() if hasattr(given, "tolist") else given
        if isinstance(plain, list | tuple):
            tokens = cast("Sequence[Any]", plain)
            if not any(isinstance(x, bool) or not isinstance(x, Integral) for x in tokens):
                return torch.tensor(tokens, dtype=torch.int64)
        raise BatchError(
            f"{columns.PROMPT_IDS!r} of sample {uid} are no token ids: {repr(given)[:80]}",
            place=f"module {self.name!r}, uid {uid}",
            fix="give a list of ints or a 1-D tensor of integers per sample; text goes into `prompt`",
        )

    def _columns(
        self, prompt_ids: list[Tensor], done: Sequence[Completion], temperature: float
    ) -> dict[str, Any]:
        import torch

        responses = [completion.response_ids for completion in done]
        return {
            columns.PROMPT_IDS: prompt_ids,
            columns.RESPONSE_IDS: responses,
            columns.ROLLOUT_LOGPROBS: [completion.logprobs for completion in done],
            columns.COMPLETION: [
                self.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses
            ],
            columns.FINISH_REASON: [completion.finish_reason for completion in done],
            columns.TEMPERATURE: torch.full((len(done),), temperature, dtype=torch.float32),
            columns.POLICY_VERSION: torch.full((len(done),), self.policy_version),
            columns.OUTCOME: [
                columns.CUT if c.finish_reason == "length" else columns.OK for c in done
            ],
        }

    def _report(self, prompt_ids: list[Tensor], done: Sequence[Completion]) -> None:
        if not done:
            return
        lengths = [len(completion.response_ids) for completion in done]
        self.log(
            generated_tokens=sum(lengths),
            prompt_length=sum(map(len, prompt_ids)) / len(done),
            response_length=sum(lengths) / len(done),
            response_length_max=max(lengths),
            stop_fraction=sum(c.finish_reason == "stop" for c in done) / len(done),
            # The mean of -log p over sampled tokens estimates the policy's entropy per token.
            sampled_entropy=-sum(float(c.logprobs.sum()) for c in done) / sum(lengths),
        )


def _ids_count(data: Mapping[str, Any], own: Collection[str]) -> bool:
    """Tell whether a prompt's tokens go before its text: not those of others before a text of the own namespace."""
    has_own_text = columns.PROMPT in own and columns.PROMPT_IDS not in own
    return columns.PROMPT_IDS in data and not has_own_text


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
