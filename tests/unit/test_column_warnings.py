# SPDX-License-Identifier: Apache-2.0
"""What a program does in vain is named, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chatlearn
from chatlearn import (
    BaseModule,
    ControlDependencies,
    Engine,
    Environment,
    Evaluator,
    GRPOEngine,
    Trainer,
    declares,
)
from chatlearn.models import (
    FunctionReward,
    GroupAdvantage,
    PolicyInference,
    PolicyReference,
    PolicyTrainer,
)

ROWS = [{"prompt": "1+1=", "answer": "2"}]


def score(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


class Plain(BaseModule):
    def forward_step(self, data: Any) -> Any:
        return data

    def train_step(self, data: Any) -> None: ...


class Costly(BaseModule):
    @declares(reads=(), writes={"embedding"}, passes_on=True, cost="an hour")
    def forward_step(self, data: Any) -> Any:
        return data


class Sampler(BaseModule):
    """Samples without any weights of its own."""

    @declares(
        reads={"prompt"}, passes_on=True, writes={"prompt_ids", "response_ids", "rollout_logprobs"}
    )
    def forward_step(self, data: Any) -> Any:
        return data


class Weighty(Sampler):
    def setup(self) -> None: ...


class Saves(BaseModule):
    writes = frozenset({"saved"})

    def train_step(self, data: Any) -> None: ...


class Parts:
    def __init__(self, **trainer: Any) -> None:
        self.policy = PolicyInference("policy", model=dict)
        self.other = PolicyInference("other", model=dict)
        self.reference = PolicyReference("reference", model=dict)
        self.reward, self.second = FunctionReward("reward", score), FunctionReward("second", score)
        self.advantage = GroupAdvantage("advantage")
        self.learner = PolicyTrainer("learner", model=dict, **trainer)
        self.plain, self.costly = Plain("plain"), Costly("costly")

    def scored(self, batch: Any) -> Any:
        return self.advantage.forward_step(self.reward.forward_step(batch))

    def engine(self, env_flow: Any, *learners: Any, sync: Any = None) -> Engine:
        def trainer_flow(batch: Any) -> None:
            for learner in learners or (self.learner,):
                learner.train_step(batch)

        engine = Engine(Environment(env_flow), Trainer(trainer_flow)).set_dataset(ROWS)
        return engine.set_parameter_sync(self.learner, self.policy if sync is None else sync)


def line_of(marker: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, text in enumerate(lines, 1) if text.endswith(f"# line: {marker}"))
    return number


def unused() -> tuple[Engine, str, str]:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        p.second.forward_step(rollout)  # line: unused
        return p.scored(rollout)

    return p.engine(env_flow), "nothing takes the output of second.forward_step", "return it"


def unused_in_evaluation() -> tuple[Engine, str, str]:
    p = Parts()

    def eval_flow(batch: Any) -> Any:
        rollout = p.policy.eval_step(batch)
        p.reward.eval_step(rollout)  # line: unused_in_evaluation
        return rollout

    engine = p.engine(lambda batch: p.scored(p.policy.forward_step(batch)))
    engine.set_evaluator(Evaluator(eval_flow).set_multiple_datasets([ROWS, ROWS]))
    return engine, "nothing takes the output of reward.eval_step", "only what the step logs"


def unread_reference() -> tuple[Engine, str, str]:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        referred = p.reference.forward_step(rollout)  # line: unread_reference
        return p.scored(referred)

    cause = "reference.forward_step costs a forward pass over every sample, and nothing reads its 'ref_logprobs'"
    return p.engine(env_flow), cause, "learner would read it with kl_coef above 0"


def unread_cost_of_a_users_own() -> tuple[Engine, str, str]:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        return p.scored(p.costly.forward_step(rollout))  # line: unread_cost_of_a_users_own

    cause = "costly.forward_step costs an hour, and nothing reads its 'embedding'"
    return p.engine(env_flow), cause, "leave the call out"


def replaced() -> tuple[Engine, str, str]:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        scored = p.reward.forward_step(rollout)  # line: replaced
        return p.advantage.forward_step(p.second.forward_step(scored))

    cause = r"columns of reward.forward_step are replaced before .*: .*'rewards', .* by second.forward_step \(.*\)"
    return p.engine(env_flow), cause, "namespace"


def replaced_where_two_branches_meet() -> tuple[Engine, str, str]:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        one = p.policy.forward_step(batch)  # line: replaced_where_two_branches_meet
        two = p.other.forward_step(batch)
        return p.scored(p.plain.first(one, two))

    class Merges(Plain):
        @declares(reads={"completion"}, writes=(), passes_on=True)
        def first(self, data: Any) -> Any:
            return data

    p.plain = Merges("plain")
    return (
        p.engine(env_flow, sync=p.other),
        r"columns of policy.forward_step are replaced",
        "namespace",
    )


def never_synced() -> tuple[Engine, str, str]:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        return p.scored(p.other.forward_step(batch))  # line: never_synced

    engine = Engine(Environment(env_flow), Trainer(lambda batch: p.learner.train_step(batch)))
    cause = "other samples for learner, but no parameter sync leads into it"
    return engine.set_dataset(ROWS), cause, r"engine.set_parameter_sync\(learner, other\)"


def a_sampler_with_weights() -> tuple[Engine, str, str]:
    p = Parts()
    sampler = Weighty("sampler")

    class Scored(BaseModule):
        @declares(reads=(), writes={"rewards"}, passes_on=True)
        def forward_step(self, data: Any) -> Any:
            return data

    scored = Scored("scored")

    def env_flow(batch: Any) -> Any:
        sampled = sampler.forward_step(batch)  # line: a_sampler_with_weights
        return p.advantage.forward_step(scored.forward_step(sampled))

    engine = Engine(Environment(env_flow), Trainer(lambda batch: p.learner.train_step(batch)))
    return engine.set_dataset(ROWS), "sampler samples for learner", "set_parameter_sync"


@pytest.mark.parametrize(
    "make",
    [
        unused,
        unused_in_evaluation,
        unread_reference,
        unread_cost_of_a_users_own,
        replaced,
        replaced_where_two_branches_meet,
        never_synced,
        a_sampler_with_weights,
    ],
)
def test_what_is_in_vain_is_named_at_its_line(make: Callable[[], tuple[Engine, str, str]]) -> None:
    engine, cause, fix = make()
    program = engine.check()
    assert program.problems == []
    (warning,) = program.warnings
    assert re.search(cause, warning.cause), warning
    assert re.search(fix, warning.fix), warning
    assert warning.place.startswith(f"{__file__}:{line_of(make.__name__)} "), warning
    assert str(warning) == f"{warning.cause}\n  at: {warning.place}\n  fix: {warning.fix}"
    assert program.remarks[0] == f"warning: {warning}"


def waited_for(p: Parts) -> Any:
    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        with ControlDependencies(p.second.forward_step(rollout)):
            return p.scored(rollout)

    return p.engine(env_flow)


def trains_itself(p: Parts) -> Any:
    class Both(PolicyTrainer):
        def sample_step(self, data: Any) -> Any:
            return data

        def describe_columns(self, method: str) -> Any:
            return Sampler.forward_step._chatlearn_columns if method == "sample_step" else None

    both = Both("both", model=dict)
    env = Environment(
        lambda batch: p.advantage.forward_step(p.plain.forward_step(both.sample_step(batch)))
    )
    return Engine(env, Trainer(lambda batch: both.train_step(batch))).set_dataset(ROWS)


FINE: dict[str, Callable[[Parts], Any]] = {
    "the usual": lambda p: p.engine(lambda batch: p.scored(p.policy.forward_step(batch))),
    "a reference that is read": lambda p: (q := Parts(kl_coef=0.1)).engine(
        lambda batch: q.scored(q.reference.forward_step(q.policy.forward_step(batch)))
    ),
    "a plain module may read anything": lambda p: p.engine(
        lambda batch: p.scored(
            p.plain.forward_step(p.reference.forward_step(p.policy.forward_step(batch)))
        )
    ),
    "a plain trainer may read anything": lambda p: Engine(
        Environment(lambda batch: p.scored(p.reference.forward_step(p.policy.forward_step(batch)))),
        Trainer(lambda batch: p.plain.train_step(batch)),
    ).set_dataset(ROWS),
    "what generates alone is for its user": lambda p: Engine(
        Environment(lambda batch: p.costly.forward_step(p.policy.forward_step(batch)))
    ).set_dataset(ROWS),
    "what an evaluation returns is for its user": lambda p: Evaluator(
        lambda batch: p.reference.eval_step(p.policy.eval_step(batch))
    ).set_dataset(ROWS),
    "waited for": waited_for,
    "a sampler without weights": lambda p: Engine(
        Environment(
            lambda batch: p.advantage.forward_step(
                Plain("x").forward_step(Sampler("sampler").forward_step(batch))
            )
        ),
        Trainer(lambda batch: p.learner.train_step(batch)),
    ).set_dataset(ROWS),
    "a train step whose class writes columns elsewhere": lambda p: Engine(
        Environment(lambda batch: p.policy.forward_step(batch)),
        Trainer(lambda batch: Saves("saves").train_step(batch)),
    ).set_dataset(ROWS),
    "trains itself": trains_itself,
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_not_in_vain_is_not_named(name: str) -> None:
    program = FINE[name](Parts()).check()
    assert program.problems == []
    assert program.warnings == []


def test_a_preset_whose_reference_nobody_reads_is_named_where_it_is_made() -> None:
    p = Parts()
    engine = GRPOEngine(p.policy, p.reference, p.reward, p.learner)  # line: preset
    (warning,) = engine.set_dataset(ROWS).check().warnings
    assert warning.cause.startswith("reference.forward_step costs")
    assert warning.place.startswith(f"{__file__}:{line_of('preset')} ")
    chatlearn.init({"models": {"learner": {"kl_coef": 0.01}}})
    assert engine.check().warnings == []


def test_a_replay_sampler_may_read_anything() -> None:
    chatlearn.init({"runtime": {"max_replay_episode": 2}})
    p = Parts()
    engine = p.engine(
        lambda batch: p.scored(p.reference.forward_step(p.policy.forward_step(batch)))
    )
    assert len(engine.check().warnings) == 1
    assert engine.set_replay_sampler(lambda buffers: buffers[-1].samples).check().warnings == []
