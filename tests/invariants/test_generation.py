# SPDX-License-Identifier: Apache-2.0
"""How samples are batched must not change them: same tokens, log-probs within 1e-4 nats in fp32.

The bound is generous: what is measured on these models is below 5e-6. Tokens are compared exactly, which rounding could
break only where a uniform number falls within rounding of the border between two tokens; seeds here are fixed.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from chatlearn.rollout import Completion, PromptRequest, SamplingParams
from chatlearn.rollout.kv_cache import GrowingCache, InPlaceCache, make_cache
from chatlearn.rollout.transformers import TransformersEngine
from chatlearn.testing import VOCAB_SIZE, tiny_model, tiny_tokenizer
from chatlearn.training.loading import load_model

BOUND = 1e-4
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 3,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, Any] = {
    "qwen3": tiny_model().config,  # rotary positions, grouped heads, norms on queries and keys
    "llama": {"model_type": "llama", **SMALL},
    "gpt2": {  # learned positions, no grouped heads
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.2,
        "bos_token_id": 3,
        "eos_token_id": 1,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 8, **SMALL},  # another kind of cache
}
LENGTHS = (3, 11, 3, 1, 25, 11, 7)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> Any:
    return load_model(ARCHITECTURES[request.param], seed=1, device="cpu")


@pytest.fixture(scope="module")
def engine(model: Any) -> TransformersEngine:
    return TransformersEngine(model, tiny_tokenizer())


def prompts(lengths: Sequence[int], group: int = 1) -> list[PromptRequest]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, VOCAB_SIZE, (length,), generator=generator) for length in lengths]
    return [PromptRequest(uid, ids[uid // group]) for uid in range(len(ids) * group)]


def assert_same(left: Sequence[Completion], right: Sequence[Completion]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.uid == other.uid
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.finish_reason == other.finish_reason
        assert float((one.logprobs - other.logprobs).abs().max()) < BOUND


SETTINGS = [
    SamplingParams(max_new_tokens=20),
    SamplingParams(max_new_tokens=20, temperature=0.7, top_p=0.9, top_k=30),
    SamplingParams(max_new_tokens=20, temperature=0.0),
]


@pytest.mark.parametrize("params", SETTINGS, ids=["plain", "cut", "greedy"])
def test_alone_equals_in_a_batch_of_mixed_lengths(
    engine: TransformersEngine, params: SamplingParams
) -> None:
    requests = prompts(LENGTHS)
    together = engine.generate(requests, params, seed=5)
    alone = [engine.generate([request], params, seed=5)[0] for request in requests]
    assert_same(together, alone)
    shuffled = engine.generate(requests[::-1], params, seed=5)
    assert_same(together, shuffled[::-1])


def test_prefill_once_per_group_equals_prefill_of_every_sample(engine: TransformersEngine) -> None:
    params = SamplingParams(max_new_tokens=16)
    for lengths in ((6, 6, 6), (3, 9, 14)):
        requests = prompts(lengths, group=4)
        shared = engine.generate(requests, params, seed=2)
        separate = [engine.generate([request], params, seed=2)[0] for request in requests]
        assert_same(shared, separate)
        first = [done.response_ids.tolist() for done in shared[:4]]
        assert len({tuple(ids) for ids in first}) > 1  # siblings differ: each has its own key


def test_finished_rows_leaving_equals_rows_staying(model: Any) -> None:
    leaving, staying = (
        TransformersEngine(model, tiny_tokenizer(), compact=compact) for compact in (True, False)
    )
    for one in (leaving, staying):
        one.eos_ids = list(range(4, 16))  # many tokens end a response, so that rows leave early
    params = SamplingParams(max_new_tokens=40)
    for lengths in ((5,) * 6, (2, 9, 5, 30, 7, 7)):
        requests = prompts(lengths, group=4)
        left, stayed = (one.generate(requests, params, seed=3) for one in (leaving, staying))
        assert_same(left, stayed)
        assert len({len(done.response_ids) for done in left}) > 4


def test_rollout_logprobs_equal_those_of_a_plain_forward_pass(
    model: Any, engine: TransformersEngine
) -> None:
    for params in SETTINGS:
        requests = prompts(LENGTHS, group=2)
        done = engine.generate(requests, params, seed=7)
        for request, completion in zip(requests, done, strict=True):
            ids = torch.cat([request.prompt_ids, completion.response_ids])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, len(request.prompt_ids) - 1 : -1]
            logprobs = (logits / (params.temperature or 1.0)).log_softmax(-1)
            expected = logprobs.gather(-1, completion.response_ids[:, None])[:, 0]
            assert float((completion.logprobs - expected).abs().max()) < BOUND


def test_splitting_the_prefill_changes_nothing(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_new_tokens=8)
    for lengths in (LENGTHS, (4,) * 7):
        whole = engine.generate(prompts(lengths, group=2), params, seed=1)
        with monkeypatch.context() as patch:
            patch.setattr("chatlearn.rollout.transformers._PREFILL_TOKENS", 60)
            assert_same(whole, engine.generate(prompts(lengths, group=2), params, seed=1))


def test_growing_the_buffers_changes_nothing(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_new_tokens=30)
    whole = engine.generate(prompts((4, 9), group=3), params, seed=1)
    monkeypatch.setattr("chatlearn.rollout.kv_cache._FIRST_ROOM", 2)
    assert_same(whole, engine.generate(prompts((4, 9), group=3), params, seed=1))


def test_the_models_attention_is_what_it_was(model: Any, engine: TransformersEngine) -> None:
    before = model.config._attn_implementation
    engine.generate(prompts(LENGTHS), SamplingParams(max_new_tokens=2), seed=0)
    assert model.config._attn_implementation == before


def test_eager_attention_gives_the_same_samples(model: Any, engine: TransformersEngine) -> None:
    params = SamplingParams(max_new_tokens=12)
    expected = engine.generate(prompts(LENGTHS, group=2), params, seed=4)
    model.set_attn_implementation("eager")
    try:
        assert_same(expected, engine.generate(prompts(LENGTHS, group=2), params, seed=4))
    finally:
        model.set_attn_implementation("sdpa")


def test_full_attention_is_cached_in_place_and_other_layers_are_not() -> None:
    for name, kind in (
        ("qwen3", InPlaceCache),
        ("llama", InPlaceCache),
        ("gpt2", InPlaceCache),
        ("mistral", GrowingCache),
    ):
        config = load_model(ARCHITECTURES[name], device="cpu").config
        assert type(make_cache(config, 4)) is kind


@pytest.mark.parametrize("lengths", [LENGTHS, (6,) * 5])
def test_the_number_of_threads_changes_nothing(
    engine: TransformersEngine, lengths: tuple[int, ...]
) -> None:
    """The attention kernel is chosen by the number of threads; both choices compute the same."""
    params = SamplingParams(max_new_tokens=12)
    threads = torch.get_num_threads()
    done: list[list[Completion]] = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            done.append(engine.generate(prompts(lengths, group=2), params, seed=6))
    finally:
        torch.set_num_threads(threads)
    assert_same(done[0], done[1])
