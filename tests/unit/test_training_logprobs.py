# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from chatlearn.errors import BatchError, ConfigError
from chatlearn.testing import VOCAB_SIZE, tiny_model
from chatlearn.training.logprobs import lay_out, response_logprobs, token_logprobs

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
ARCHITECTURES = {
    "qwen3": {**SMALL, "head_dim": 8},
    "llama": SMALL,
    "gpt2": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "gemma2": {
        **SMALL,
        "head_dim": 8,
        "final_logit_softcapping": 5.0,
    },  # logits capped after the head
    "granite": {**SMALL, "logits_scaling": 3.0},  # and scaled
    "mistral": {**SMALL, "sliding_window": 4},
}


def make(architecture, dtype=torch.float64):
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture], **options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def samples():
    torch.manual_seed(1)
    prompts = [torch.randint(0, 99, (n,)) for n in (3, 9, 5, 4, 7)]
    responses = [torch.randint(0, 99, (n,)) for n in (4, 0, 8, 1, 2)]
    return prompts, responses, torch.tensor([1.0, 1.0, 0.7, 2.0, 0.0])


@torch.no_grad()
def one_by_one(model):
    """Compute the same without any batching: one sample at a time, all logits."""
    result = []
    for prompt, response, temperature in zip(*samples(), strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0]
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)[len(prompt) - 1 : -1]
        result.append(logprobs.gather(1, response[:, None])[:, 0])
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 24, 10_000])
def test_equals_one_sample_at_a_time(architecture, packing, max_tokens):
    torch.set_num_threads(1)
    model = make(architecture)
    prompts, responses, temperature = samples()
    got = response_logprobs(
        model, prompts, responses, temperature, max_tokens=max_tokens, packing=packing
    )
    for mine, expected in zip(got, one_by_one(model), strict=True):
        assert mine.dtype == torch.float32
        assert torch.allclose(mine, expected.float(), atol=1e-6, rtol=0)


def test_chunks_over_the_vocabulary_change_neither_values_nor_gradients():
    prompts, responses, temperature = samples()
    layout = lay_out([[0], [2], [3, 4]], prompts, responses)
    results = []
    for chunk_bytes in (2**30, 4 * 99 * 2):  # everything at once; two tokens at a time
        model = make("qwen3")
        divisor = temperature.clamp(min=0.5).double()[layout.sample_N]
        logprobs, entropy = token_logprobs(
            model, layout, divisor, entropy="train", chunk_bytes=chunk_bytes
        )
        (logprobs.sum() + entropy.square().sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logprobs.detach(), entropy.detach(), gradient))
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(whole, chunked, atol=1e-11, rtol=1e-11)


def test_entropy_is_that_of_the_tempered_distribution():
    prompts, responses, _ = samples()
    model = make("llama")
    layout = lay_out([[0]], prompts, responses)
    _, entropy = token_logprobs(model, layout, torch.full((4,), 0.5).double(), entropy="report")
    logits = model(torch.cat([prompts[0], responses[0]])[None]).logits[0, 2:6] / 0.5
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(entropy, expected, atol=1e-12)
    assert not entropy.requires_grad


def test_only_kept_tokens_are_laid_out():
    layout = lay_out(
        [[1], [0]],
        [torch.tensor([1, 2]), torch.tensor([3])],
        [torch.tensor([4, 5, 6]), torch.tensor([7, 8])],
        keep=[torch.tensor([True, False, True]), torch.tensor([False, True])],
    )
    assert layout.input_ids_RL.tolist() == [[3, 7, 0, 0], [1, 2, 4, 5]]
    assert layout.target_N.tolist() == [8, 4, 6]
    assert layout.sample_N.tolist() == [1, 0, 0]
    assert layout.place_N.tolist() == [1, 5, 7]
    assert layout.position_ids_RL is None


def test_packed_rows_restart_positions():
    layout = lay_out([[0, 1]], [torch.tensor([1, 2])] * 2, [torch.tensor([3, 4])] * 2)
    assert layout.input_ids_RL.tolist() == [[1, 2, 3, 1, 2, 3]]
    assert layout.position_ids_RL.tolist() == [[0, 1, 2, 0, 1, 2]]


def test_bf16_models_give_float32_logprobs_that_are_normalised():
    model = tiny_model().to(torch.bfloat16)
    prompt = [torch.tensor([5, 6])] * VOCAB_SIZE
    tokens = [torch.tensor([token]) for token in range(VOCAB_SIZE)]
    got = torch.cat(response_logprobs(model, prompt, tokens, max_tokens=1000))
    assert got.dtype == torch.float32
    assert float(got.exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_an_empty_prompt_is_refused():
    with pytest.raises(BatchError, match="empty prompt"):
        response_logprobs(
            tiny_model(),
            [torch.empty(0, dtype=torch.int64)],
            [torch.tensor([1])],
            max_tokens=10,
        )


def test_no_responses():
    assert response_logprobs(tiny_model(), [], [], max_tokens=10) == []


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        (
            "opt",
            {"ffn_dim": 64, "word_embed_proj_dim": 32, "hidden_size": 32},
            "saw the one before",
        ),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "takes no position_ids"),
    ],
)
def test_packing_is_refused_where_sequences_would_mix(name, options, reason):
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = {"num_hidden_layers": 2, "num_attention_heads": 4} if name == "opt" else {}
    config = AutoConfig.for_model(name, vocab_size=99, **options, **layers)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts, responses, _ = samples()
    assert response_logprobs(model, prompts, responses, max_tokens=1000)
    with pytest.raises(ConfigError, match=reason) as caught:
        response_logprobs(model, prompts, responses, max_tokens=1000, packing=True)
    assert "packing" in str(caught.value)
