# SPDX-License-Identifier: Apache-2.0
"""Presets: with a user's own small torch modules they learn, with ours they run, wrong input is named at its line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import chatlearn
from chatlearn import (
    BaseModule,
    DPOEngine,
    Engine,
    Environment,
    EvalEngine,
    Evaluator,
    GRPOEngine,
    ModuleError,
    OnlineDPOEngine,
    RLHFEngine,
    Trainer,
)
from chatlearn.cli import main
from chatlearn.errors import EngineError
from chatlearn.models import FunctionReward, PolicyInference, PolicyReference, PolicyTrainer
from chatlearn.testing import tiny_pair

Batch = dict[str, Any]
STATES, ACTIONS = 3, 5
PROMPTS = [{"state": i % STATES} for i in range(12)]
"""A game of one move: in state s, action s + 1 is right."""


# ---- a user's modules ------------------------------------------------------------------------------------------------


class Net(BaseModule):
    """Holds one linear layer from states, and remembers the columns that its calls got."""

    width = ACTIONS
    lr = 0.0

    def setup(self) -> None:
        self.model = nn.Linear(STATES, self.width, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=self.lr or 1e-9)
        self.columns: set[str] = set()

    def of(self, states: torch.Tensor) -> torch.Tensor:
        assert self.model is not None
        return self.model(functional.one_hot(states, STATES).float())

    def logprob(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.of(states).log_softmax(-1).gather(1, actions[:, None])[:, 0]

    def learn(self, loss: torch.Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.log(loss=loss)

    @property
    def weights(self) -> torch.Tensor:
        assert self.model is not None
        return self.model.weight.detach().clone()  # type: ignore[union-attr]


class Policy(Net):
    def forward_step(self, data: Batch, iteration: int) -> Batch:
        self.columns |= set(data)
        draw = torch.Generator().manual_seed(iteration)
        with torch.no_grad():
            chances = self.of(data["state"]).softmax(-1)
        data["action"] = torch.multinomial(chances, 1, generator=draw)[:, 0]
        return data

    def eval_step(self, data: Batch) -> Batch:
        return {**data, "action": self.of(data["state"]).argmax(-1)}


class Reference(Net):
    def forward_step(self, data: Batch) -> Batch:
        self.columns |= set(data)
        pairs = [name for name in ("action", "chosen", "rejected") if name in data]
        with torch.no_grad():
            return {**data, **{f"ref_{p}": self.logprob(data["state"], data[p]) for p in pairs}}


class Value(Net):
    width = 1

    def forward_step(self, data: Batch) -> Batch:
        self.columns |= set(data)
        with torch.no_grad():
            return {"values": self.of(data["state"])[:, 0]}


class Reward(BaseModule):
    columns: frozenset[str] = frozenset()

    def forward_step(self, data: Batch) -> Batch:
        self.columns |= set(data)
        data["rewards"] = (data["action"] == data["state"] + 1).float()
        self.log(mean=data["rewards"].mean())
        return data

    eval_step = forward_step


def merged(data_list: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in data_list]) for name in data_list[0]}


class PPOTrainer(Net):
    lr = 0.2

    def train_step(self, data_list: list[Batch]) -> None:
        data = merged(data_list)
        self.columns |= set(data)
        logprob = self.logprob(data["state"], data["action"])
        advantages = data["rewards"] - data["values"]
        self.learn(-(advantages * logprob).mean() + 0.01 * (logprob - data["ref_action"]).mean())


class ValueTrainer(Value):
    lr = 0.1

    def train_step(self, data_list: list[Batch]) -> None:
        data = merged(data_list)
        self.columns |= set(data)
        self.learn(functional.mse_loss(self.of(data["state"])[:, 0], data["rewards"]))


class GroupTrainer(Net):
    """Compares the samples of a prompt by itself."""

    lr = 0.2

    def train_step(self, data_list: list[Batch]) -> None:
        data = merged(data_list)
        self.columns |= set(data)
        if "advantages" in data:
            advantages = data["advantages"]
        else:
            _, group = data["prompt_uid"].unique(return_inverse=True)
            sums = torch.zeros(int(group.max()) + 1).index_add(0, group, data["rewards"])
            advantages = data["rewards"] - sums[group] / group.bincount()[group]
        self.learn(-(advantages * self.logprob(data["state"], data["action"])).mean())


class DPOTrainer(Net):
    """DPO in twenty lines: on pairs of the dataset, or of each prompt's best and worst sample."""

    lr, beta = 0.2, 1.0

    def train_step(self, data_list: list[Batch]) -> None:
        data = merged(data_list)
        self.columns |= set(data)
        state = data["state"]
        if "rewards" in data:
            groups = [torch.where(data["prompt_uid"] == u)[0] for u in data["prompt_uid"].unique()]
            best = torch.stack([g[data["rewards"][g].argmax()] for g in groups])
            worst = torch.stack([g[data["rewards"][g].argmin()] for g in groups])
            differ = data["rewards"][best] > data["rewards"][worst]
            best, worst, action = best[differ], worst[differ], data["action"]
            chosen, rejected = (
                self.logprob(state[best], action[best]),
                self.logprob(state[worst], action[worst]),
            )
            margin = chosen - rejected - data["ref_action"][best] + data["ref_action"][worst]
        else:
            chosen, rejected = (
                self.logprob(state, data["chosen"]),
                self.logprob(state, data["rejected"]),
            )
            margin = chosen - rejected - data["ref_chosen"] + data["ref_rejected"]
        if len(margin):
            self.learn(-functional.logsigmoid(self.beta * margin).mean())


GROUP = {"prompt_uid", "uid"}


def configure(episodes: int = 40, group: int = 4, **runtime: Any) -> None:
    samples = {"num_inference_per_prompt": group, "sample_per_episode": 12 * group}
    chatlearn.init({"runtime": {"num_episode": episodes, **samples, **runtime}})


def reward_rises(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    means = [
        row["reward/mean"] for row in rows if "reward/mean" in row and "policy_trainer/loss" in row
    ]
    assert sum(means[:5]) / 5 < 0.5, means
    assert sum(means[-5:]) / 5 > 0.85, means


# ---- (1) they learn --------------------------------------------------------------------------------------------------


def test_rlhf_learns_and_teaches_policy_and_value() -> None:
    configure()
    modules = [Policy("policy"), Reference("reference"), Reward("reward"), Value("value")]
    policy, reference, reward, value = modules
    actor, critic = PPOTrainer("policy_trainer"), ValueTrainer("value_trainer")
    with RLHFEngine(policy, reference, reward, value, actor, critic).set_dataset(PROMPTS) as engine:
        result = engine.learn()
        assert torch.equal(policy.weights, actor.weights)
        assert torch.equal(value.weights, critic.weights)
        assert actor.weights.abs().max() > 0.5
        assert critic.weights.max() > 0.5, "the value of a state has risen with the rewards"
        assert not reference.weights.any(), "the reference stays"
    reward_rises(result.folder)
    given = GROUP | {"state"}
    assert policy.columns == given
    assert reference.columns == value.columns == given | {"action"}
    assert reward.columns == given | {"action", "ref_action", "values"}
    assert actor.columns == critic.columns == reward.columns | {"rewards"}


def test_grpo_learns_with_a_trainer_that_compares_by_itself() -> None:
    configure()
    policy, reference, learner = (
        Policy("policy"),
        Reference("reference"),
        GroupTrainer("policy_trainer"),
    )
    with GRPOEngine(policy, reference, Reward("reward"), learner).set_dataset(PROMPTS) as engine:
        result = engine.learn()
        assert torch.equal(policy.weights, learner.weights)
        assert learner.weights.abs().max() > 0.5
    reward_rises(result.folder)
    assert learner.columns == GROUP | {"state", "action", "ref_action", "rewards"}


def test_grpo_takes_an_advantage_of_the_user() -> None:
    class Advantage(BaseModule):
        batch_by = "group"

        def forward_step(self, data: Batch) -> Batch:
            return {**data, "advantages": data["rewards"] - 0.5}

    configure()
    policy, learner = Policy("policy"), GroupTrainer("policy_trainer")
    engine = GRPOEngine(
        policy, Reference("reference"), Reward("reward"), learner, Advantage("mine")
    )
    reward_rises(engine.set_dataset(PROMPTS).learn().folder)
    assert "advantages" in learner.columns


def test_online_dpo_learns() -> None:
    configure()
    policy, reference, learner = (
        Policy("policy"),
        Reference("reference"),
        DPOTrainer("policy_trainer"),
    )
    reward = Reward("reward")
    with OnlineDPOEngine(policy, reference, reward, learner).set_dataset(PROMPTS) as engine:
        result = engine.learn()
        assert torch.equal(policy.weights, learner.weights)
    reward_rises(result.folder)
    assert reward.columns == GROUP | {"state", "action", "ref_action"}
    assert learner.columns == reward.columns | {"rewards"}


def test_dpo_learns_from_pairs_of_the_dataset() -> None:
    configure(group=1)
    pairs = [
        {"state": i % 3, "chosen": i % 3 + 1, "rejected": (i % 3 + 2 + i % 4) % 5}
        for i in range(12)
    ]
    reference, learner = Reference("reference"), DPOTrainer("policy_trainer")
    with DPOEngine(reference, learner).set_dataset(pairs) as engine:
        result = engine.learn()
        assert learner.of(torch.arange(3)).argmax(-1).tolist() == [1, 2, 3]
        assert not reference.weights.any()
    assert result.metrics["policy_trainer/loss"] < 0.2
    assert learner.columns == GROUP | set(pairs[0]) | {"ref_chosen", "ref_rejected"}


# ---- (2) with our modules --------------------------------------------------------------------------------------------


def exact(completions: list[str], answer: list[str]) -> list[float]:
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def test_grpo_runs_with_the_ready_made_modules() -> None:
    chatlearn.init(
        {"runtime": {"num_episode": 2, "sample_per_episode": 16, "num_inference_per_prompt": 8}}
    )
    policy = PolicyInference("policy", model=tiny_pair, max_new_tokens=4)
    reference = PolicyReference("reference", model=tiny_pair)
    learner = PolicyTrainer("policy_trainer", model=tiny_pair, lr=1e-2, kl_coef=0.1)
    engine = GRPOEngine(policy, reference, FunctionReward("reward", digits), learner)
    before = tiny_pair()[0].state_dict()
    with engine.set_dataset(["1+1=", "2+2="]):
        result = engine.learn()
        after, sampler = learner.state_dict(), policy.state_dict()
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert all(torch.equal(sampler[name], after[name]) for name in after)
        frozen = reference.state_dict()
        assert all(torch.equal(frozen[name], before[name]) for name in before)
    assert (result.episodes, result.train_iteration) == (2, 2)
    assert result.metrics["policy_trainer/kl"] >= 0
    assert "advantage/zero_std_fraction" in result.metrics, (
        "a GroupAdvantage stands before our trainer"
    )


def digits(completions: list[str]) -> list[int]:
    return [sum(map(str.isalpha, text)) for text in completions]


# ---- (3) their flows -------------------------------------------------------------------------------------------------


class Any_(BaseModule):
    def forward_step(self, data: Batch) -> Batch:
        return data

    def train_step(self, data: Batch) -> None: ...


def modules(*names: str) -> list[BaseModule]:
    return [Any_(name) for name in names]


def shape(engine: Engine) -> dict[str, Any]:
    """Return what stands in a flow and what waits for what, and who teaches whom."""
    program = engine.check()
    assert not program.problems
    flows = {
        name: ([(node.name, node.inputs, node.after) for node in graph.nodes], graph.outputs)
        for name, graph in program.graphs.items()
    }
    return {**flows, "pairs": [(a.name, b.name) for a, b in program.sync_pairs]}


def test_rlhf_is_the_seed_s_last_example() -> None:
    names = ("policy", "reference", "reward", "value", "ppo_policy", "ppo_value")
    policy, reference, reward, value, ppo_policy, ppo_value = modules(*names)

    def env_flow(batch: Any) -> Any:
        policy_out = policy.forward_step(batch)
        ref_out = reference.forward_step(policy_out)
        value_out = value.forward_step(policy_out)
        return reward.forward_step(policy_out, ref_out, value_out)

    def trainer_flow(batch: Any) -> None:
        ppo_policy.train_step(batch)
        ppo_value.train_step(batch)

    by_hand = Engine(Environment(env_flow), Trainer(trainer_flow)).set_dataset(["a"])
    by_hand.set_parameter_sync(ppo_policy, policy).set_parameter_sync(ppo_value, value)
    preset = RLHFEngine(policy, reference, reward, value, ppo_policy, ppo_value).set_dataset(["a"])
    assert shape(preset) == shape(by_hand)


SAMPLED = [
    ("p.forward_step", (-1,), ()),
    ("ref.forward_step", (0,), ()),
    ("r.forward_step", (0, 1), ()),
]
TRAINED = ([("t.train_step", (-1,), ())], ())


def test_the_other_flows_are_the_documented_ones() -> None:
    p, ref, r, t, a = modules("p", "ref", "r", "t", "a")
    grpo = shape(GRPOEngine(p, ref, r, t).set_dataset(["a"]))
    assert grpo == {"env_flow": (SAMPLED, (2,)), "trainer_flow": TRAINED, "pairs": [("t", "p")]}
    assert shape(OnlineDPOEngine(p, ref, r, t).set_dataset(["a"])) == grpo
    advantages = [*SAMPLED, ("a.forward_step", (2,), ())]
    longer = {**grpo, "env_flow": (advantages, (3,))}
    assert shape(GRPOEngine(p, ref, r, t, advantage=a).set_dataset(["a"])) == longer
    reference_only = {"env_flow": ([("ref.forward_step", (-1,), ())], (0,)), "pairs": []}
    assert shape(DPOEngine(ref, t).set_dataset(["a"])) == {
        "trainer_flow": TRAINED,
        **reference_only,
    }


def test_setters_chain_and_an_evaluator_is_added() -> None:
    configure(episodes=2)
    policy, reward = Policy("policy"), Reward("reward")
    seen: list[int] = []

    def share(results: Any, info: Any) -> dict[str, float]:
        seen.append(info.episode_iteration)
        return {"right": float(torch.cat([b["rewards"] for b in results["reward"]]).mean())}

    evaluator = Evaluator(lambda batch: reward.eval_step(policy.eval_step(batch)))
    engine = (
        GRPOEngine(policy, Reference("reference"), reward, GroupTrainer("t"))
        .set_evaluator(evaluator.set_dataset(PROMPTS).set_post_process_func(share))
        .set_multiple_datasets([PROMPTS[:5], PROMPTS[5:]])
    )
    assert isinstance(engine, GRPOEngine)
    result = engine.learn()
    assert seen == [0, 1]
    assert [set(m) >= {"right"} for _, m in result.evaluations] == [True, True]


def test_eval_engine_takes_a_flow_or_an_evaluator() -> None:
    def flow(batch: Any) -> Any:
        return policy.eval_step(batch)

    policy, hooked = Policy("policy"), []
    for engine in (
        EvalEngine(flow),
        EvalEngine(Evaluator(flow)),
        EvalEngine(evaluator=Evaluator(flow)),
    ):
        engine.set_dataset(PROMPTS[:7]).set_post_process_func(
            lambda results, info: hooked.append(results)
        )
        results = engine.eval()
        assert sum(len(batch["action"]) for batch in results["policy"]) == 7
        assert hooked[-1] is results
        engine.stop()
        engine.stop()


SCRIPT = """
from chatlearn import BaseModule, GRPOEngine

class Module(BaseModule):
    def forward_step(self, data):
        return data

    def train_step(self, data):
        pass

parts = [Module(name) for name in ("policy", "reference", "reward", "learner")]
engine = GRPOEngine(
    *parts
)
engine.set_dataset(["a", "b"]).learn()
"""


@pytest.mark.parametrize("command", ["check", "graph"])
def test_the_command_line_knows_presets(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("train.py").write_text(SCRIPT)
    with pytest.raises(SystemExit) as ended:
        main([command, "train.py"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert not Path("runs").exists()
    if command == "graph":
        for name in ("policy", "reference", "reward", "learner"):
            assert name in out


# ---- (4) wrong input -------------------------------------------------------------------------------------------------


class NoSteps(BaseModule):
    """Has no step at all."""


def here() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


a, b, c, d, e, f = modules("a", "b", "c", "d", "e", "f")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RLHFEngine("a", b, c, d, e, f), "RLHFEngine: policy is 'a', not a module"),
        (lambda: RLHFEngine(a, b, c, None, e, f), "RLHFEngine: value is None, not a module"),
        (
            lambda: RLHFEngine(a, b, c, d, e, NoSteps("n")),
            r"value_trainer is NoSteps\('n'\), which has no method train_step",
        ),
        (
            lambda: GRPOEngine(a, NoSteps("n"), c, d),
            r"GRPOEngine: reference is .* no method forward_step",
        ),
        (lambda: GRPOEngine(a, b, exact, d), "GRPOEngine: reward is <function exact"),
        (
            lambda: GRPOEngine(PolicyTrainer("x"), b, c, PolicyInference("y")),
            r"policy_trainer is PolicyInference\('y'\), which",
        ),
        (lambda: GRPOEngine(a, b, c, d, advantage=3), "GRPOEngine: advantage is 3"),
        (
            lambda: OnlineDPOEngine(a, b, c, nn.Linear(1, 1)),
            "OnlineDPOEngine: policy_trainer is Linear",
        ),
        (lambda: DPOEngine(Any_, b), "DPOEngine: reference is <class .*Any_'>, not a module"),
        (
            lambda: DPOEngine(a, FunctionReward("r", exact)),
            r"DPOEngine: policy_trainer is FunctionReward\('r'\)",
        ),
        (lambda: EvalEngine("flow"), "EvalEngine: 'flow' is neither a flow nor an Evaluator"),
        (
            lambda: EvalEngine(evaluator=Environment(lambda batch: batch)),
            "EvalEngine: <.* is neither",
        ),
        (lambda: EvalEngine(), "EvalEngine takes either"),
        (
            lambda: EvalEngine(lambda batch: batch, Evaluator(lambda batch: batch)),
            "EvalEngine takes either",
        ),
    ],
)
def test_a_wrong_argument_is_named_where_it_is_given(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(EngineError, match=says) as raised:
        make()
    line = make.__code__.co_firstlineno
    assert raised.value.place.startswith(f"{__file__}:{line} "), raised.value.place
    assert raised.value.fix


def test_the_fix_names_the_class_that_was_not_constructed() -> None:
    with pytest.raises(EngineError, match=r"e.g. Any_\('reference', ...\)"):
        DPOEngine(Any_, b)
    with pytest.raises(EngineError, match=r"e.g. PolicyTrainer\('policy_trainer', ...\)"):
        DPOEngine(a, "b")
    with pytest.raises(
        EngineError, match=r"by name, as policy_trainer=.* should they be in another"
    ):
        GRPOEngine(a, b, c, FunctionReward("r", exact))


def test_a_policy_trainer_whose_advantages_nobody_makes_is_refused() -> None:
    policy, reference, reward, learner = (
        PolicyInference("policy", model=tiny_pair),
        PolicyReference("reference", model=tiny_pair),
        FunctionReward("reward", exact),
        PolicyTrainer("learner", model=tiny_pair),
    )
    with pytest.raises(
        EngineError, match=r"OnlineDPOEngine: .*'learner'.* reads the column"
    ) as raised:
        OnlineDPOEngine(policy, reference, reward, learner)
    assert raised.value.place.startswith(__file__)
    value = FunctionReward("value", exact)
    with pytest.raises(EngineError, match=r"RLHFEngine: .* reads the column 'advantages'"):
        RLHFEngine(policy, reference, reward, value, learner, d)
    RLHFEngine(policy, reference, c, value, learner, d)  # nobody knows what c writes


class Loses(Any_):
    def forward_step(self, data: Batch) -> Batch:
        return {"uid": data["uid"][1:]}


def test_errors_of_nodes_name_the_line_that_constructs_the_preset() -> None:
    engine = GRPOEngine(a, Loses("loses"), c, d).set_dataset(["x", "y"])
    line = here() - 1
    nodes = [node for graph in engine.check().graphs.values() for node in graph.nodes]
    assert {node.place for node in nodes} == {
        f"{__file__}:{line} in test_errors_of_nodes_name_the_line_that_constructs_the_preset"
    }
    with pytest.raises(chatlearn.ChatLearnError, match="returned 1 samples for 2") as raised:
        engine.learn()
    assert f"{__file__}:{line}" in str(raised.value)


def test_a_flow_of_the_user_s_own_is_placed_as_ever_after_a_preset() -> None:
    def env_flow(batch: Any) -> Any:
        return a.forward_step(batch)

    GRPOEngine(a, b, c, d).set_dataset(["x"]).check()
    node = Engine(Environment(env_flow)).set_dataset(["x"]).check().graphs["env_flow"].nodes[0]
    assert node.place == f"{__file__}:{here() - 4} in env_flow"


def test_an_error_inside_a_module_of_a_preset() -> None:
    class Fails(Any_):
        def forward_step(self, data: Batch) -> Batch:
            raise ValueError("original")

    with pytest.raises(ModuleError, match="original\n  module: fails"):
        GRPOEngine(a, Fails("fails"), c, d).set_dataset(["x"]).learn()
