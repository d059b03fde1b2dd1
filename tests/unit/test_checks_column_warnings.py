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


def brevity(completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


class Plain(BaseModule):
    def forward_step(self, data: Any) -> Any:
        return data

    eval_step = forward_step

    def train_step(self, data: Any) -> None: ...


class Learns(Plain):
    """A trainer of a user's own that says nothing of its columns."""

    def setup(self) -> None: ...


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
        self.brevity = FunctionReward("brevity", brevity)
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


@pytest.fixture(autouse=True)
def grouped() -> None:
    chatlearn.init({"runtime": {"num_inference_per_prompt": 2}})


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


def unused_and_undeclared() -> tuple[Engine, str, str]:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        p.plain.forward_step(rollout)  # line: unused_and_undeclared
        return p.scored(rollout)

    cause = "nothing takes the output of plain.forward_step, if it has any"
    return p.engine(env_flow), cause, "says so: @declares"


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


def replaced_but_for_its_parts() -> tuple[Engine, str, str]:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        scored = p.reward.forward_step(rollout)  # line: replaced_but_for_its_parts
        return p.advantage.forward_step(p.brevity.forward_step(scored))

    learns = Learns("learns")  # may read `rewards/score`
    engine = Engine(Environment(env_flow), Trainer(lambda batch: learns.train_step(batch)))
    engine.set_parameter_sync(learns, p.policy).set_dataset(ROWS)
    cause = (
        r"columns of reward.forward_step are replaced before .*: 'rewards', by brevity.forward_step"
    )
    return engine, cause, "give one FunctionReward both functions, with weights, or each of the two"


def replaced_where_two_rewards_meet() -> tuple[Engine, str, str]:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        scored = p.reward.forward_step(rollout)  # line: replaced_where_two_rewards_meet
        return p.advantage.forward_step(scored, p.brevity.forward_step(rollout))

    trainer = Trainer(lambda batch: p.learner.train_step(batch))  # returns what nobody takes
    engine = Engine(Environment(env_flow), trainer).set_parameter_sync(p.learner, p.policy)
    cause = (
        r"columns of reward.forward_step are replaced .*: 'rewards', 'rewards/score', by brevity"
    )
    return engine.set_dataset(ROWS), cause, "both functions"


def replaced_in_evaluation() -> tuple[Engine, str, str]:
    p = Parts()

    def eval_flow(batch: Any) -> Any:
        rollout = p.policy.eval_step(batch)
        scored = p.reward.eval_step(rollout)  # line: replaced_in_evaluation
        return p.brevity.eval_step(scored)

    engine = p.engine(lambda batch: p.scored(p.policy.forward_step(batch)))
    engine.set_evaluator(Evaluator(eval_flow).set_dataset(ROWS))
    return engine, "columns of reward.eval_step are replaced .*: 'rewards', by", "both functions"


def evaluates_what_never_learns() -> tuple[Engine, str, str]:
    p = Parts()

    def eval_flow(batch: Any) -> Any:
        rollout = p.other.eval_step(batch)  # line: evaluates_what_never_learns
        return p.reward.eval_step(rollout)

    engine = p.engine(lambda batch: p.scored(p.policy.forward_step(batch)))
    engine.set_evaluator(Evaluator(eval_flow).set_multiple_datasets([ROWS, ROWS]))
    cause = "nothing is ever synced into other: learner learns, so all evaluations measure the same"
    return engine, cause, r"set_parameter_sync\(learner, other\), or evaluate a policy that learns"


def samples_for_an_undeclared_trainer() -> tuple[Engine, str, str]:
    p = Parts()
    learns = Learns("learns")

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)  # line: samples_for_an_undeclared_trainer
        return p.scored(rollout)

    engine = Engine(Environment(env_flow), Trainer(lambda batch: learns.train_step(batch)))
    evaluator = Evaluator(lambda batch: p.policy.eval_step(batch)).set_dataset(ROWS)  # said once
    engine.set_evaluator(evaluator)
    cause = (
        "nothing is ever synced into policy: learns learns, and it samples the same way for ever"
    )
    return engine.set_dataset(ROWS), cause, r"engine.set_parameter_sync\(learns, policy\)"


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
        unused_and_undeclared,
        unused_in_evaluation,
        unread_reference,
        unread_cost_of_a_users_own,
        replaced,
        replaced_where_two_branches_meet,
        replaced_but_for_its_parts,
        replaced_where_two_rewards_meet,
        replaced_in_evaluation,
        evaluates_what_never_learns,
        samples_for_an_undeclared_trainer,
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


def called_for_what_it_does(p: Parts) -> Any:
    class Logs(BaseModule):
        @declares(writes=())
        def forward_step(self, data: Any) -> None: ...

    logs = Logs("logs")

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        logs.forward_step(rollout)
        with ControlDependencies(p.plain.forward_step(rollout)):
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


def reads_a_part(p: Parts) -> Any:
    class Mixes(BaseModule):
        @declares(reads={"rewards/score", "rewards/brevity"}, writes={"rewards"}, passes_on=True)
        def forward_step(self, data: Any) -> Any:
            return data

    mixes = Mixes("mixes")

    def env_flow(batch: Any) -> Any:
        scored = p.reward.forward_step(p.policy.forward_step(batch))
        return p.advantage.forward_step(mixes.forward_step(p.brevity.forward_step(scored)))

    return p.engine(env_flow)


def evaluates(p: Parts, eval_flow: Any) -> Any:
    engine = p.engine(lambda batch: p.scored(p.policy.forward_step(batch)))
    return engine.set_evaluator(Evaluator(eval_flow).set_dataset(ROWS))


def judged_by_a_policy(p: Parts) -> Any:
    """What an undeclared trainer samples by itself may be judged by a policy that never learns."""
    learns = Learns("learns")
    env = Environment(lambda batch: p.other.forward_step(learns.forward_step(batch)))
    return Engine(env, Trainer(lambda batch: learns.train_step(batch))).set_dataset(ROWS)


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
    "called for what it does": called_for_what_it_does,
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
    "parts that a step asks for": reads_a_part,
    "an evaluation with a judge": lambda p: evaluates(
        p, lambda batch: p.other.eval_step(p.policy.eval_step(batch))
    ),
    "an evaluation of what nobody knows": lambda p: evaluates(
        p, lambda batch: p.other.eval_step(p.plain.eval_step(batch))
    ),
    "a judge of what is trained": judged_by_a_policy,
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
    grouping = {"num_inference_per_prompt": 2}
    chatlearn.init({"models": {"learner": {"kl_coef": 0.01}}, "runtime": grouping})
    assert engine.check().warnings == []


def test_a_replay_sampler_may_read_anything() -> None:
    chatlearn.init({"runtime": {"max_replay_episode": 2, "num_inference_per_prompt": 2}})
    p = Parts()
    engine = p.engine(
        lambda batch: p.scored(p.reference.forward_step(p.policy.forward_step(batch)))
    )
    assert len(engine.check().warnings) == 1
    assert engine.set_replay_sampler(lambda buffers: buffers[-1].samples).check().warnings == []
