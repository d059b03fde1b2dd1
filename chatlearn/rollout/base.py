# SPDX-License-Identifier: Apache-2.0
"""The port of sampling: what goes into a rollout engine and what comes out.

    requests (uid, prompt ids) + SamplingParams + seed  ->  generate  ->  one Completion per request

What every engine promises:
  * A sample's tokens depend on its own prompt, `(seed, uid, turn)` and the weights alone: not on
    which samples share its batch, nor on how many replicas there are. (Up to the rounding of the
    matrix products, whose order of summation may depend on the batch's shape: a token can differ
    only where a uniform number falls within about 1e-6 of the border between two tokens.)
  * `logprobs` are those of the distribution at the sampling temperature *before* top-p and top-k
    cut it, because that is what a trainer can compute too. At temperature 0 (argmax) they are those
    at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from chatlearn.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]
Progress = Callable[[int], None]
"""Called after each decoding step with the number of tokens that the step added to responses."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Say how tokens are drawn and when a response ends.

    Example:
        >>> SamplingParams(temperature=0.0, max_new_tokens=16).greedy
        True
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with at least this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens, before `top_p`; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; they stay part of it. A special token of the tokenizer counts as
    that token, wherever it is sampled."""
    max_new_tokens: int = 256
    """Tokens of a response at most."""

    def __post_init__(self) -> None:
        wrong = ""
        if not 0.0 <= self.temperature < float("inf"):
            wrong = f"temperature must be a number >= 0, not {self.temperature}"
        elif not 0.0 < self.top_p <= 1.0:
            wrong = f"top_p must be in (0, 1], not {self.top_p}"
        elif self.top_k < 0:
            wrong = f"top_k must be >= 0 (0 keeps all tokens), not {self.top_k}"
        elif self.max_new_tokens < 1:
            wrong = f"max_new_tokens must be >= 1, not {self.max_new_tokens}"
        elif not all(self.stop):
            wrong = "a stop text is empty, so every response would end at once"
        if wrong:
            raise ConfigError(wrong, place="SamplingParams")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken and nothing is drawn."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class PromptRequest:
    """Ask for one response.

    Requests with equal `prompt_ids` share the work on the prompt, whatever their uids.

    Example:
        >>> PromptRequest(uid=7, prompt_ids=torch.tensor([5, 9, 5]))  # doctest: +SKIP
    """

    uid: int
    """Number of the sample; with the seed and `turn` it keys the sample's random numbers."""
    prompt_ids: Tensor
    """int64 `[P]`, on the CPU; at least one token."""
    turn: int = 0
    """Which response of the sample this is, where a flow asks for several."""


@dataclass(frozen=True)
class Completion:
    """Hold one response.

    Example:
        `Completion(7, response_ids=tensor([6, 1]), logprobs=tensor([-0.1, -0.3]), ...)`
    """

    uid: int
    response_ids: Tensor
    """int64 `[T]`, on the CPU; ends with the EOS token if that was sampled; T >= 1."""
    logprobs: Tensor
    """float32 `[T]`, on the CPU: nats, at the sampling temperature, not cut by top-p and top-k."""
    finish_reason: FinishReason
    """"stop": an EOS token or a stop text; "length": a limit on tokens."""


class RolloutEngine(Protocol):
    """Samples responses; implemented once per way of running a model.

    Example:
        >>> engine = TransformersEngine(model, tokenizer)  # doctest: +SKIP
        >>> requests = [PromptRequest(0, ids), PromptRequest(1, ids)]  # doctest: +SKIP
        >>> engine.generate(requests, SamplingParams(), seed=1)  # doctest: +SKIP
    """

    def generate(
        self,
        requests: Sequence[PromptRequest],
        params: SamplingParams,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Sample one response per request.

        Args:
            requests: Prompts, of any lengths.
            params: How to sample; the same for the whole batch.
            seed: Seed of the stream (`derive_seed`), the first part of every sample's key.
            progress: Called after each decoding step.

        Returns:
            One completion per request, in the order of the requests.

        Raises:
            DataError: A prompt is empty, or leaves no room for a response within the model's
                positions.
        """
        ...
