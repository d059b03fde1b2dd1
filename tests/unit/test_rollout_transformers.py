# SPDX-License-Identifier: Apache-2.0
"""When responses end, what limits them, and what is refused."""

from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from chatlearn.errors import ChatLearnError, ConfigError, DataError
from chatlearn.rollout import PromptRequest, SamplingParams
from chatlearn.rollout.kv_cache import closing_moves
from chatlearn.rollout.transformers import TransformersEngine, eos_ids, special_id
from chatlearn.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(tiny_model(max_positions=64), tiny_tokenizer())


def requests(*texts: str) -> list[PromptRequest]:
    tokenizer = tiny_tokenizer()
    return [
        PromptRequest(uid, torch.tensor(tokenizer(text).input_ids, dtype=torch.int64))
        for uid, text in enumerate(texts)
    ]


class Script(torch.nn.Module):
    """Says a given text whatever the prompt, one character per position, through a model's interface."""

    def __init__(self, text: str, prompt: int, eos: bool = True) -> None:
        super().__init__()
        tokenizer = tiny_tokenizer()
        self.inner = tiny_model()
        self.config, self.device, self.dtype = (
            self.inner.config,
            self.inner.device,
            self.inner.dtype,
        )
        self.ids = tokenizer(text).input_ids + [1] * eos
        self.prompt = prompt

    def forward(self, input_ids: Any, past_key_values: Any, **kwargs: Any) -> Any:
        output = self.inner(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        at = past_key_values.get_seq_length() - self.prompt
        output.logits = torch.full_like(output.logits, -30.0)
        output.logits[..., self.ids[at % len(self.ids)]] = 30.0
        return output


def test_a_response_ends_with_eos_or_at_the_limit() -> None:
    engine = TransformersEngine(Script("42", prompt=4), tiny_tokenizer())
    done, again = engine.generate(
        requests("1+1=", "2+2="), SamplingParams(max_new_tokens=9), seed=0
    )
    assert done.response_ids.tolist() == again.response_ids.tolist() == [8, 6, 1]
    assert done.finish_reason == "stop"
    (cut,) = engine.generate(requests("1+1="), SamplingParams(max_new_tokens=2), seed=0)
    assert cut.response_ids.tolist() == [8, 6]
    assert cut.finish_reason == "length"
    (exact,) = engine.generate(requests("1+1="), SamplingParams(max_new_tokens=3), seed=0)
    assert exact.finish_reason == "stop"


def test_a_stop_text_ends_a_response_and_stays_in_it() -> None:
    engine = TransformersEngine(Script("so: 12</a> 13", prompt=4), tiny_tokenizer())
    params = SamplingParams(max_new_tokens=30, stop=("never", "</a>"))
    for done in engine.generate(requests("1+1=", "1+1=", "2+2="), params, seed=0):
        assert tiny_tokenizer().decode(done.response_ids) == "so: 12</a>"
        assert done.finish_reason == "stop"
    params = SamplingParams(max_new_tokens=30, stop=("absent",))
    (done,) = engine.generate(requests("1+1="), params, seed=0)
    assert tiny_tokenizer().decode(done.response_ids) == "so: 12</a> 13<eos>"


def test_a_special_token_as_stop_text_ends_a_response() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    script = Script("so: 12", prompt=4, eos=False)
    script.ids += [2, *tokenizer("13").input_ids, 1]  # 2 is <unk>, a special token
    engine = TransformersEngine(script, tokenizer)
    params = SamplingParams(max_new_tokens=30, stop=("<end>", "<unk>"))
    for done in engine.generate(requests("1+1=", "2+2="), params, seed=0):
        assert tokenizer.decode(done.response_ids) == "so: 12<unk>"
        assert done.finish_reason == "stop"
    beside = SamplingParams(max_new_tokens=30, stop=("<unk>", "12"))
    (done,) = engine.generate(requests("1+1="), beside, seed=0)
    assert tokenizer.decode(done.response_ids) == "so: 12"
    (done,) = engine.generate(requests("1+1="), SamplingParams(max_new_tokens=30), seed=0)
    assert tokenizer.decode(done.response_ids) == "so: 12<unk>13<eos>"
    assert special_id(tokenizer, "<end>") == 101
    tokenizer.add_tokens([AddedToken("<turn>", special=True)], special_tokens=True)
    assert special_id(tokenizer, "<turn>") == 102
    assert special_id(tokenizer, "a") is None


def test_stop_texts_of_sampled_responses_end_each_row_by_itself(engine: TransformersEngine) -> None:
    tokenizer = tiny_tokenizer()
    many = requests(*["ab", "abcd", "x"] * 8)
    free = engine.generate(many, SamplingParams(max_new_tokens=30), seed=1)
    stop = tuple("aeiou")
    ended = engine.generate(many, SamplingParams(max_new_tokens=30, stop=stop), seed=1)
    for one, other in zip(free, ended, strict=True):
        texts = [tokenizer.decode([token]) for token in one.response_ids]
        first = next((at for at, text in enumerate(texts) if text in stop), None)
        length = len(texts) if first is None else first + 1
        assert other.response_ids.tolist() == one.response_ids[:length].tolist()
        assert other.finish_reason == (one.finish_reason if first is None else "stop")


def test_prompt_and_response_stay_within_the_models_positions(engine: TransformersEngine) -> None:
    long, short = requests("x" * 60, "x")
    params = SamplingParams(max_new_tokens=40)
    engine = TransformersEngine(engine.model, engine.tokenizer)
    engine.eos_ids = [10**6]
    done = engine.generate([long, short], params, seed=0)
    assert [len(one.response_ids) for one in done] == [4, 40]
    assert [one.finish_reason for one in done] == ["length", "length"]
    with pytest.raises(DataError, match="sample 0 has 64 tokens"):
        engine.generate(requests("x" * 64), params, seed=0)


def test_learned_positions_are_not_overrun_by_rows_that_have_finished() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=103, n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=1
    )
    engine = TransformersEngine(GPT2LMHeadModel(config).eval(), tiny_tokenizer(), compact=False)
    engine.eos_ids = [10**6]
    done = engine.generate(requests("x" * 30, "x"), SamplingParams(max_new_tokens=30), seed=0)
    assert [len(one.response_ids) for one in done] == [2, 30]


def test_an_empty_prompt_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(DataError, match="sample 1 has no tokens"):
        engine.generate(requests("x", ""), SamplingParams(), seed=0)


def test_no_requests_give_no_completions(engine: TransformersEngine) -> None:
    assert engine.generate([], SamplingParams(), seed=0) == []


def test_seed_uid_and_turn_each_change_the_sample(engine: TransformersEngine) -> None:
    ids = requests("1+1=")[0].prompt_ids
    params = SamplingParams(max_new_tokens=12)

    def sample(uid: int, turn: int, seed: int) -> list[int]:
        return engine.generate([PromptRequest(uid, ids, turn)], params, seed=seed)[
            0
        ].response_ids.tolist()

    base = sample(0, 0, 0)
    assert base == sample(0, 0, 0)
    assert len({tuple(x) for x in (base, sample(1, 0, 0), sample(0, 1, 0), sample(0, 0, 1))}) == 4


def test_the_global_random_state_is_neither_read_nor_moved(engine: TransformersEngine) -> None:
    torch.manual_seed(0)
    first = engine.generate(requests("ab"), SamplingParams(max_new_tokens=8), seed=0)
    state = torch.get_rng_state()
    second = engine.generate(requests("ab"), SamplingParams(max_new_tokens=8), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert first[0].response_ids.tolist() == second[0].response_ids.tolist()


def test_progress_counts_every_token_of_every_response(engine: TransformersEngine) -> None:
    seen: list[int] = []
    engine = TransformersEngine(engine.model, engine.tokenizer)
    engine.eos_ids = list(range(4, 14))
    done = engine.generate(
        requests(*["ab"] * 9), SamplingParams(max_new_tokens=20), seed=0, progress=seen.append
    )
    assert sum(seen) == sum(len(one.response_ids) for one in done)


def test_weights_that_are_not_finite_are_an_error() -> None:
    model = tiny_model()
    model.model.embed_tokens.weight.data[5] = float("nan")
    with pytest.raises(ChatLearnError, match="not finite"):
        TransformersEngine(model, tiny_tokenizer()).generate(
            requests("1+1="), SamplingParams(max_new_tokens=3), seed=0
        )


def test_the_models_eos_list_counts_only_if_it_knows_the_tokenizers() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [7, 1]
    assert eos_ids(model, tokenizer) == [1, 7]
    model.generation_config.eos_token_id = [7, 8]
    assert eos_ids(model, tokenizer) == [1]
    model.generation_config.eos_token_id = None
    assert eos_ids(model, tokenizer) == [1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_senseless_sampling_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams(**wrong)


def test_closing_moves_keep_every_live_row_and_touch_no_more_than_have_finished() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        finished = torch.rand(12, generator=generator) < 0.5
        holes, movers, order = closing_moves(finished)
        rows = torch.arange(12)
        rows[holes] = rows[movers]
        live = int((~finished).sum())
        assert rows[:live].tolist() == order.tolist()
        assert sorted(order.tolist()) == (~finished).nonzero().flatten().tolist()
        assert len(holes) <= int(finished.sum())
