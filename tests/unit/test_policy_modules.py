# SPDX-License-Identifier: Apache-2.0
"""`PolicyInference` and `PolicyReference` as a user calls them."""

from typing import Any

import numpy as np
import pytest
import torch

from chatlearn.errors import BatchError, ConfigError, DataError
from chatlearn.models import PolicyInference, PolicyReference
from chatlearn.module import state_of
from chatlearn.rollout.prompts import PromptEncoder
from chatlearn.testing import tiny_model, tiny_pair, tiny_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def policy(**settings: Any) -> PolicyInference:
    module = PolicyInference(
        "policy", **{"model": tiny_pair, "device": "cpu", "max_new_tokens": 8, **settings}
    )
    module.setup()
    return module


def batch(**more: Any) -> dict[str, Any]:
    return {"uid": torch.arange(4), "prompt": ["1+1=", "1+1=", "22+3=", "x"], **more}


def ids(data: dict[str, Any]) -> list[list[int]]:
    return [response.tolist() for response in data["response_ids"]]


def test_the_columns_have_the_documented_types_and_shapes() -> None:
    module = policy(temperature=0.5)
    module.policy_version = 3
    data = module.forward_step(batch(answer=["2", "2", "25", "?"]))
    assert data["answer"] == ["2", "2", "25", "?"]
    assert [len(prompt) for prompt in data["prompt_ids"]] == [4, 4, 5, 1]
    for response, logprobs in zip(data["response_ids"], data["rollout_logprobs"], strict=True):
        assert response.dtype == torch.int64
        assert logprobs.dtype == torch.float32
        assert response.shape == logprobs.shape
        assert bool((logprobs <= 0).all())
    assert all(isinstance(text, str) for text in data["completion"])
    assert set(data["finish_reason"]) <= {"stop", "length"}
    assert data["temperature"].tolist() == [0.5] * 4
    assert data["policy_version"].tolist() == [3] * 4
    assert data["policy_version"].dtype == torch.int64


def test_the_completion_leaves_special_tokens_out() -> None:
    data = policy().forward_step(batch())
    tokenizer = tiny_tokenizer()
    for response, text in zip(data["response_ids"], data["completion"], strict=True):
        assert text == "".join(tokenizer.decode([token]) for token in response if token >= 4)


def test_samples_do_not_depend_on_the_calls_they_come_in() -> None:
    module = policy()
    whole = ids(module.forward_step(batch()))
    parts: list[list[int]] = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: values[rows] for name, values in batch().items()}
        parts += ids(module.forward_step(part))
    assert parts == whole
    assert whole[0] != whole[1]  # one prompt, two uids


def test_the_seed_decides_and_evaluation_has_its_own_numbers() -> None:
    module = policy()
    train, evaluation = ids(module.forward_step(batch())), ids(module.eval_step(batch()))
    assert train != evaluation
    assert evaluation == ids(module.eval_step(batch()))
    assert train != ids(policy(seed=1).forward_step(batch()))
    assert train == ids(policy(seed=0).forward_step(batch()))


def test_repeated_calls_in_a_flow_and_other_policies_draw_their_own_numbers() -> None:
    module, other = policy(), PolicyInference("policy_b", model=tiny_pair, device="cpu")
    state_of(other).settings["max_new_tokens"] = 8
    other.setup()
    for method in ("forward_step", "eval_step"):
        drawn: list[list[list[int]]] = []
        for turn in (0, 1, 2):
            state_of(module).turn = turn
            drawn.append(ids(getattr(module, method)(batch())))
        drawn.append(ids(getattr(other, method)(batch())))
        assert len({str(responses) for responses in drawn}) == 4
        state_of(module).turn = 1
        assert ids(getattr(module, method)(batch())) == drawn[1]


def test_a_flow_that_samples_twice_gets_two_responses(tmp_path: Any) -> None:
    import chatlearn
    from chatlearn import Engine, Environment

    chatlearn.init({"runtime": {"output_dir": tmp_path}})
    seen: list[dict[str, Any]] = []

    class Sink(chatlearn.BaseModule):
        def forward_step(self, first: dict[str, Any]) -> dict[str, Any]:
            seen.append(first)
            return first

    class Rename(chatlearn.BaseModule):
        def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
            return {"uid": data["uid"], "first": data["response_ids"]}

    one = PolicyInference("policy", model=tiny_pair, device="cpu", max_new_tokens=8)
    rename, sink = Rename("rename"), Sink("sink")

    def flow(data: Any) -> Any:
        return sink.forward_step(
            rename.forward_step(one.forward_step(data)), one.forward_step(data)
        )

    Engine(Environment(flow)).set_dataset(["1+1=", "22+3="]).learn()
    (data,) = seen
    assert [r.tolist() for r in data["first"]] != [r.tolist() for r in data["response_ids"]]


def test_evaluation_takes_its_own_settings_and_else_trainings() -> None:
    module = policy(eval_temperature=0.0, eval_max_new_tokens=3)
    data = module.eval_step(batch())
    assert data["temperature"].tolist() == [0.0] * 4
    assert max(len(response) for response in ids(data)) <= 3
    assert ids(data)[0] == ids(data)[1]  # greedy: siblings agree
    with torch.no_grad():
        logits = tiny_model()(input_ids=data["prompt_ids"][2][None]).logits[0, -1]
    assert ids(data)[2][0] == int(logits.argmax())
    assert policy(temperature=0.3).eval_step(batch())["temperature"].tolist() == pytest.approx(
        [0.3] * 4
    )
    only_best = policy(eval_top_k=1).eval_step(batch())
    assert ids(only_best)[2][0] == int(logits.argmax())


def test_prompt_ids_are_taken_as_they_are() -> None:
    encoded = [torch.tensor([5, 76, 5, 84]), torch.tensor([9])]
    data = policy().forward_step({"uid": [0, 1], "prompt_ids": encoded})
    assert [prompt.tolist() for prompt in data["prompt_ids"]] == [[5, 76, 5, 84], [9]]
    assert ids(data)[0] == ids(policy().forward_step(batch()))[0]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        np.array,
        lambda ids: list(np.array(ids)),
    ],
)
def test_prompt_ids_come_in_any_usual_form_and_beat_the_prompt(convert: Any) -> None:
    given = [convert([5, 76, 5, 84]), convert([9])]
    data = policy().forward_step({"uid": [0, 1], "prompt": ["x", "y"], "prompt_ids": given})
    for prompt, expected in zip(data["prompt_ids"], ([5, 76, 5, 84], [9]), strict=True):
        assert prompt.dtype == torch.int64
        assert prompt.tolist() == expected
    assert ids(data)[0] == ids(policy().forward_step(batch()))[0]


@pytest.mark.parametrize(
    "wrong", ["1+1=", 5, None, [1.0], ["a"], [[1]], [True], torch.ones(2), torch.ones(1, 2).long()]
)
def test_what_are_no_prompt_ids_is_refused_with_its_sample(wrong: Any) -> None:
    with pytest.raises(BatchError, match="'prompt_ids' of sample 8 are no token ids") as caught:
        policy().forward_step({"uid": [7, 8], "prompt_ids": [[5], wrong]})
    assert "'policy', uid 8" in caught.value.place
    with pytest.raises(BatchError, match="holds 1 prompts, 'uid' holds 2"):
        policy().forward_step({"uid": [7, 8], "prompt_ids": [[5]]})


def test_missing_columns_name_themselves_and_the_way_out() -> None:
    module = policy()
    with pytest.raises(BatchError, match="'uid'") as caught:
        module.forward_step({"prompt": ["x"]})
    assert "engine" in caught.value.fix
    with pytest.raises(BatchError, match="neither 'prompt' nor 'prompt_ids'"):
        module.forward_step({"uid": [0], "text": ["x"]})


def test_a_prompt_longer_than_the_limit_is_refused_before_generation() -> None:
    module = policy(max_prompt_tokens=4)
    with pytest.raises(DataError, match=r"sample 2 has 5 tokens; max_prompt_tokens is 4"):
        module.forward_step(batch())
    with pytest.raises(DataError, match="sample 7 has 5 tokens"):
        module.forward_step({"uid": [7], "prompt_ids": [torch.arange(4, 9)]})


def test_reported_metrics_count_what_was_generated() -> None:
    module = policy()
    data = module.forward_step(batch())
    (metrics,) = state_of(module).metrics
    assert metrics["generated_tokens"] == sum(map(len, ids(data)))
    assert metrics["response_length"] == metrics["generated_tokens"] / 4
    assert metrics["prompt_length"] == 14 / 4
    assert 0 <= metrics["stop_fraction"] <= 1
    assert metrics["sampled_entropy"] > 0


def test_progress_reaches_the_modules_callable() -> None:
    module, seen = policy(), []
    module.progress = seen.append
    data = module.forward_step(batch())
    assert sum(seen) == sum(map(len, ids(data)))


def test_weights_take_no_gradient_and_are_the_modules_own() -> None:
    pair = tiny_pair()
    first, second = policy(model=lambda: pair), policy(model=lambda: pair)
    assert not any(parameter.requires_grad for parameter in first.model.parameters())
    shared = {p.data_ptr() for p in first.model.parameters()} & {
        p.data_ptr() for p in second.model.parameters()
    }
    assert not shared
    assert all(parameter.requires_grad for parameter in pair[0].parameters())


def test_new_weights_change_the_samples_at_once() -> None:
    module = policy()
    before = ids(module.forward_step(batch()))
    module.load_state_dict(tiny_model(seed=5).state_dict())
    assert ids(module.forward_step(batch())) != before
    module.offload()
    module.onload()
    module.load_state_dict(tiny_model(seed=0).state_dict())
    assert ids(module.forward_step(batch())) == before


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}, {"temp": 1}]
)
def test_wrong_settings_are_config_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        _ = PolicyInference("policy", model=tiny_pair, **wrong).config


def test_check_config_finds_a_missing_model_without_loading() -> None:
    module = PolicyInference("policy", model="/no/such/folder")
    assert "does not exist" in module.check_config()[0].cause
    assert "does not exist" in PolicyReference("r", model="./none").check_config()[0].cause
    assert PolicyInference("policy", model=tiny_pair).check_config() == []
    config = tiny_model().config.to_dict()
    assert PolicyReference("r", model=config).check_config() == []
    assert "no tokenizer" in PolicyInference("p", model=config).check_config()[0].cause


def test_the_references_logprobs_are_the_samplers_where_weights_agree() -> None:
    reference = PolicyReference("reference", model=tiny_pair, device="cpu")
    reference.setup()
    for temperature in (1.0, 0.6, 0.0):
        data = reference.forward_step(policy(temperature=temperature).forward_step(batch()))
        for ref, rollout in zip(data["ref_logprobs"], data["rollout_logprobs"], strict=True):
            assert ref.dtype == torch.float32
            assert float((ref - rollout).abs().max()) < 1e-4
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    with pytest.raises(BatchError, match="'response_ids'"):
        reference.forward_step({"prompt_ids": [torch.tensor([5])]})


def test_a_model_made_from_a_dict_is_the_same_in_policy_and_reference() -> None:
    config = tiny_model().config.to_dict()
    sampler = policy(model=config, tokenizer=tiny_tokenizer)
    reference = PolicyReference("reference", model=config, device="cpu")
    reference.setup()
    for name, tensor in sampler.model.state_dict().items():
        assert torch.equal(tensor, reference.model.state_dict()[name])


class TestPrompts:
    def test_messages_go_through_the_chat_template(self) -> None:
        tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
        messages = [{"role": "user", "content": "1+1="}]
        encoder = PromptEncoder(tokenizer=tokenizer)
        (encoded,) = encoder.encode([messages], uids=[0])
        assert tokenizer.decode(encoded) == "<user>1+1=<assistant>"
        (plain,) = encoder.encode(["1+1="], uids=[0])
        assert tokenizer.decode(plain) == "1+1="
        always = PromptEncoder(tokenizer=tokenizer, chat_template=True)
        assert torch.equal(always.encode(["1+1="], uids=[0])[0], encoded)

    def test_messages_without_a_template_are_refused(self) -> None:
        messages = [{"role": "user", "content": "x"}]
        with pytest.raises(DataError, match="sample 3 needs a chat template"):
            PromptEncoder(tokenizer=tiny_tokenizer()).encode([messages], uids=[3])
        never = PromptEncoder(tokenizer=tiny_tokenizer(chat_template=TEMPLATE), chat_template=False)
        with pytest.raises(DataError, match="chat_template is false"):
            never.encode([messages], uids=[3])

    @pytest.mark.parametrize("prompt", [None, 3, [], ["x"], [{"content": "x"}], {"role": "user"}])
    def test_what_is_no_prompt_is_refused(self, prompt: Any) -> None:
        encoder = PromptEncoder(tokenizer=tiny_tokenizer(chat_template=TEMPLATE))
        with pytest.raises(DataError, match="sample 5"):
            encoder.encode([prompt], uids=[5])

    def test_bos_is_added_once_and_only_on_demand(self) -> None:
        tokenizer = tiny_tokenizer()
        for add_bos, expected in ((None, [41]), (False, [41]), (True, [3, 41])):
            encoder = PromptEncoder(tokenizer=tokenizer, add_bos=add_bos)
            assert encoder.encode(["B"], uids=[0])[0].tolist() == expected
        tokenizer.bos_token = None
        with pytest.raises(DataError, match="no BOS token"):
            PromptEncoder(tokenizer=tokenizer, add_bos=True).encode(["B"], uids=[0])

    def test_an_eos_that_the_tokenizer_appends_is_taken_off(self) -> None:
        from tokenizers.processors import TemplateProcessing

        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 3), ("<eos>", 1)]
        )
        assert PromptEncoder(tokenizer=tokenizer).encode(["B"], uids=[0])[0].tolist() == [3, 41]
        never = PromptEncoder(tokenizer=tokenizer, add_bos=False)
        assert never.encode(["B"], uids=[0])[0].tolist() == [41]

    def test_equal_prompts_are_encoded_once(self) -> None:
        encoded = PromptEncoder(tokenizer=tiny_tokenizer()).encode(["x", "y", "x"], uids=[0, 1, 2])
        assert encoded[0] is encoded[2]
