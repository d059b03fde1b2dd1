# SPDX-License-Identifier: Apache-2.0
"""Wrong flows of the ready-made modules: what the checker says of each, and at which of the user's lines."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chatlearn
from chatlearn import (
    BaseModule,
    ControlDependencies,
    DPOEngine,
    Engine,
    Environment,
    EvalEngine,
    Evaluator,
    GRPOEngine,
    Trainer,
    declares,
)
from chatlearn.errors import ChatLearnError, DataError, FlowError
from chatlearn.models import (
    FunctionReward,
    GroupAdvantage,
    PolicyInference,
    PolicyReference,
    PolicyTrainer,
)

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]


def score(completions: list[str], answer: list[str]) -> list[float]:
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def typo(completions: list[str], anwser: list[str]) -> list[float]:
    return [0.0] * len(completions)


def optional(completions: list[str], hint: Any = None, **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def no_model() -> Any:
    raise AssertionError("a model was loaded, though checking needs none")


class Plain(BaseModule):
    """A module of a user's own that says nothing of its columns."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return data

    eval_step = forward_step

    def train_step(self, data_list: list[dict[str, Any]]) -> None: ...


class Keeps(BaseModule):
    """A filter that declares what it does."""

    filters_samples = True

    @declares(reads={"rewards": "number", "uid": "any"}, writes=(), passes_on=True)
    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return data


class Overridden(PolicyTrainer):
    """A trainer whose step is one of a user's own: it may take whatever it likes."""

    def train_step(self, data: Any) -> Any:
        return data


class Parts:
    """The usual modules, made anew for every program."""

    def __init__(self, reward: Any = score, **trainer: Any) -> None:
        self.policy = PolicyInference("policy", model=no_model)
        self.other = PolicyInference("other", model=no_model)
        self.reference = PolicyReference("reference", model=no_model)
        self.reward = FunctionReward("reward", reward)
        self.advantage = GroupAdvantage("advantage")
        self.learner = PolicyTrainer("learner", model=no_model, **trainer)
        self.plain = Plain("plain")

    def engine(self, env_flow: Any, evaluator: Any = None, *, sync: bool = True) -> Engine:
        def trainer_flow(batch: Any) -> None:
            self.learner.train_step(batch)  # line: train

        engine = Engine(Environment(env_flow), Trainer(trainer_flow), evaluator)
        if sync:
            engine.set_parameter_sync(self.learner, self.policy)
        return engine.set_dataset(ROWS)


def grpo(p: Parts, batch: Any) -> Any:
    """Do it right."""
    return p.advantage.forward_step(p.reward.forward_step(p.policy.forward_step(batch)))


@pytest.fixture(autouse=True)
def grouped() -> None:
    chatlearn.init({"runtime": {"num_inference_per_prompt": 2}})


def line_of(marker: str) -> str:
    """Return `file:line` of the only line of this file that ends with a marker."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, text in enumerate(lines, 1) if text.endswith(f"# line: {marker}"))
    return f"{__file__}:{number} "


Wrong = tuple[Callable[[], Any], list[tuple[str, str, str]]]
"""A program, and of each problem its cause, its line and its fix."""
WRONG: dict[str, Callable[[], Wrong]] = {}


def wrong(make: Callable[[], Wrong]) -> Callable[[], Wrong]:
    WRONG[make.__name__] = make
    return make


@wrong
def reward_before_completion() -> Wrong:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        scored = p.reward.forward_step(batch)  # line: early reward
        return p.advantage.forward_step(p.policy.forward_step(batch), scored)

    cause = r"reward.forward_step reads 'completion', which its input does not have; there are .*'answer', 'prompt'"
    fix = r"policy.forward_step \(.*\) makes it: call it before this step, and pass its output on"
    return lambda: p.engine(env_flow), [(cause, "early reward", fix)]


@wrong
def typo_of_a_parameter() -> Wrong:
    p = Parts(typo)

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        scored = p.reward.forward_step(rollout)  # line: typo
        return p.advantage.forward_step(scored)

    cause = rf"reward function 'typo' \({re.escape(__file__)}:\d+ in typo\) asks for 'anwser'.*'completions'"
    return lambda: p.engine(env_flow), [(cause, "typo", r"did you mean 'answer'\?")]


@wrong
def nothing_to_compare() -> Wrong:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        return p.advantage.forward_step(p.policy.forward_step(batch))  # line: no rewards

    fix = "FunctionReward.forward_step usually makes it: call it before this step"
    return lambda: p.engine(env_flow), [("reads 'rewards'", "no rewards", fix)]


@wrong
def pairs_without_tokens() -> Wrong:
    """Nobody samples in DPO: what is missing is the dataset's."""

    def dpo() -> Any:
        p = Parts()
        return DPOEngine(p.reference, p.learner).set_dataset(ROWS)  # line: dpo

    fix = "add the column to the dataset, or call PolicyInference.forward_step before this step"
    return dpo, [
        ("reference.forward_step reads 'prompt_ids' and 'response_ids'", "dpo", fix),
        ("learner.train_step reads 'prompt_ids'", "dpo", "return its output from env_flow"),
        ("learner.train_step reads 'advantages'", "dpo", "return its output from env_flow"),
    ]


@wrong
def advantages_not_returned() -> Wrong:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        scored = p.reward.forward_step(p.policy.forward_step(batch))
        p.advantage.forward_step(scored)
        return scored

    cause = r"learner.train_step reads 'advantages', which env_flow does not return; it returns \["
    fix = r"advantage.forward_step \(.*\) makes it: return its output from env_flow, too"
    return lambda: p.engine(env_flow), [(cause, "train", fix)]


@wrong
def no_advantages() -> Wrong:
    p = Parts()
    fix = "GroupAdvantage.forward_step usually makes it: call it .* return its output from env_flow"
    return (
        lambda: p.engine(lambda batch: p.reward.forward_step(p.policy.forward_step(batch))),
        [("reads 'advantages'", "train", fix)],
    )


@wrong
def nothing_sampled() -> Wrong:
    """A trainer that gets nothing it needs: one error per way out."""
    p = Parts()

    class Scores(BaseModule):
        @declares(reads={"prompt"}, writes={"rewards": "number"}, passes_on=True)
        def forward_step(self, data: Any) -> Any:
            return data

    scores = Scores("scores")

    def env_flow(batch: Any) -> Any:
        return p.advantage.forward_step(scores.forward_step(batch))

    cause = r"reads 'prompt_ids' and 'response_ids' and \('rollout_logprobs' or 'old_logprobs'\)"
    fix = "PolicyInference.forward_step usually makes it"
    engine = Engine(
        Environment(env_flow),
        Trainer(lambda batch: p.learner.train_step(batch)),  # line: unsampled
    )
    return lambda: engine.set_dataset(ROWS), [(cause, "unsampled", fix)]


@wrong
def no_reference() -> Wrong:
    p = Parts(kl_coef=0.1)
    cause = r"reads 'ref_logprobs' \(needed because kl_coef > 0\), which env_flow does not return"
    fix = "PolicyReference.forward_step .*, or set kl_coef to 0"
    return lambda: p.engine(lambda batch: grpo(p, batch)), [(cause, "train", fix)]


@wrong
def several_at_once() -> Wrong:
    """Each at its own line, in a helper, a lambda and a loop."""
    p = Parts(typo, kl_coef=0.1)

    def scored(rollout: Any) -> Any:
        return p.reward.forward_step(rollout)  # line: helper

    compare = lambda batch: p.advantage.forward_step(batch)  # noqa: E731 # line: lambda

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        for _ in range(2):
            p.reference.forward_step(batch)  # line: loop
        compare(batch)
        return scored(rollout)

    return lambda: p.engine(env_flow), [
        ("reference.forward_step reads 'prompt_ids' and 'response_ids'", "loop", "policy.forward"),
        ("advantage.forward_step reads 'rewards'", "lambda", "reward.forward_step"),
        ("asks for 'anwser'", "helper", "did you mean 'answer'"),
        ("learner.train_step reads 'advantages'", "train", "return its output from env_flow"),
        ("learner.train_step reads 'ref_logprobs'", "train", "return its output from env_flow"),
    ]


@wrong
def evaluated_on_other_columns() -> Wrong:
    p = Parts()

    def eval_flow(batch: Any) -> Any:
        sampled = p.policy.eval_step(batch)
        return p.reward.eval_step(sampled)  # line: evaluated

    datasets = {"easy": ROWS, "hard": [{"prompt": "1+1=", "solution": "2"}]}
    evaluator = Evaluator(eval_flow).set_multiple_datasets(datasets)
    cause = r"reward.eval_step: .* asks for 'answer', .* there are .*'solution'.* on hard"
    return (
        lambda: p.engine(lambda batch: grpo(p, batch), evaluator),
        [(cause, "evaluated", "add the column to the dataset")],
    )


@wrong
def through_a_preset() -> Wrong:
    p = Parts(typo)

    def make() -> Engine:
        engine = GRPOEngine(p.policy, p.reference, p.reward, p.learner)  # line: preset
        return engine.set_dataset(ROWS)

    return make, [("asks for 'anwser'", "preset", "did you mean 'answer'")]


@wrong
def pairs_that_nobody_sampled() -> Wrong:
    p = Parts()

    def make() -> Engine:
        return DPOEngine(p.reference, p.learner).set_dataset(ROWS)  # line: pairs

    return make, [
        (
            "reference.forward_step reads 'prompt_ids' and 'response_ids'",
            "pairs",
            "PolicyInference",
        ),
        (
            "learner.train_step reads 'prompt_ids' and 'response_ids' and",
            "pairs",
            "PolicyInference",
        ),
        ("learner.train_step reads 'advantages'", "pairs", "GroupAdvantage"),
    ]


@wrong
def in_a_namespace() -> Wrong:
    p = Parts()
    solver = PolicyInference("solver", model=no_model, namespace="solver")
    judge = FunctionReward("judge", lambda solver_completions, completions: [])  # line: function
    trainer = PolicyTrainer("trainer", model=no_model, namespace="solver")

    def env_flow(batch: Any) -> Any:
        sampled = solver.forward_step(batch)
        p.policy.forward_step(batch)
        return judge.forward_step(sampled)  # line: judge

    engine = Engine(
        Environment(env_flow),
        Trainer(lambda batch: trainer.train_step(batch)),  # line: solver
    )
    return lambda: engine.set_dataset(ROWS), [
        ("asks for 'completions', .*'solver_completions'", "judge", "did you mean 'solver_comp"),
        ("trainer.train_step reads 'advantages'", "solver", "GroupAdvantage"),
    ]


@wrong
def not_passed_on() -> Wrong:
    p = Parts()

    class Shortens(BaseModule):
        @declares(reads={"completion": "text"}, writes={"rewards": "number"}, passes_on=False)
        def forward_step(self, data: Any) -> Any:
            return {"rewards": [0.0] * len(data["completion"])}

    shortens = Shortens("shortens")

    def env_flow(batch: Any) -> Any:
        scored = shortens.forward_step(p.policy.forward_step(batch))
        p.advantage.forward_step(scored)  # line: dropped
        return p.advantage.forward_step(p.policy.forward_step(batch), scored)

    cause = r"advantage.forward_step reads 'prompt_uid', .* there are \['rewards'\]"
    return lambda: p.engine(env_flow), [(cause, "dropped", "")]


@wrong
def behind_a_filter_and_a_control_dependency() -> Wrong:
    p = Parts()
    keeps = Keeps("keeps")

    def env_flow(batch: Any) -> Any:
        rollout = p.policy.forward_step(batch)
        with ControlDependencies(rollout):
            kept = keeps.forward_step(rollout)  # line: filter
        return p.advantage.forward_step(kept)  # line: behind

    return lambda: p.engine(env_flow), [
        ("keeps.forward_step reads 'rewards'", "filter", "FunctionReward"),
        ("advantage.forward_step reads 'rewards'", "behind", "FunctionReward"),
    ]


@wrong
def text_for_a_number() -> Wrong:
    p = Parts()

    class Verdict(BaseModule):
        writes = {"rewards": "text"}  # noqa: RUF012
        reads = {"completion": "text"}  # noqa: RUF012

        def forward_step(self, data: Any) -> Any:
            return data

    verdict = Verdict("verdict")

    def env_flow(batch: Any) -> Any:
        judged = verdict.forward_step(p.policy.forward_step(batch))
        return p.advantage.forward_step(judged)  # line: text

    cause = r"reads 'rewards' as number, but verdict.forward_step \(.*\) makes it text"
    return lambda: p.engine(env_flow), [(cause, "text", "have Verdict make number of it")]


@wrong
def trained_in_the_environment_flow() -> Wrong:
    p = Parts()

    def env_flow(batch: Any) -> Any:
        scored = p.plain.forward_step(p.policy.forward_step(batch))
        return p.learner.train_step(scored)  # line: trained early

    engine = Engine(Environment(env_flow)).set_parameter_sync(p.learner, p.policy)
    cause = "learner.train_step is an update on a global batch, and env_flow has none"
    fix = r"call it in the trainer flow, Trainer\(lambda batch: learner.train_step\(batch\)\), and return"
    return lambda: engine.set_dataset(ROWS), [(cause, "trained early", fix)]


@wrong
def trained_in_the_evaluation_flow() -> Wrong:
    p = Parts()

    def eval_flow(batch: Any) -> Any:
        return p.learner.train_step(p.policy.eval_step(batch))  # line: trained on held-out data

    evaluator = Evaluator(eval_flow).set_dataset(ROWS)
    cause = "learner.train_step is an update on a global batch, and eval_flow has none"
    return lambda: p.engine(lambda batch: grpo(p, batch), evaluator), [
        (cause, "trained on held-out data", "call it in the trainer flow")
    ]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_flow_is_refused_at_the_users_line(name: str) -> None:
    make, expected = WRONG[name]()
    program = make()
    problems = program.check().problems
    assert [problem.cause for problem in problems] == [
        problem.cause
        for problem, (cause, *_) in zip(problems, expected, strict=True)
        if re.search(cause, problem.cause, re.DOTALL)
    ]
    for problem, (_, marker, fix) in zip(problems, expected, strict=True):
        assert isinstance(problem, FlowError)
        assert problem.place.startswith(line_of(marker)), problem
        assert re.search(fix, problem.fix), problem
    with pytest.raises(ChatLearnError) as caught:
        program.learn()
    for problem in problems:
        assert str(problem) in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ([{"prompt": 3, "answer": "1"}, {"prompt": 4, "answer": "2"}], "'prompt' as text or mess"),
        ([{"prompt_ids": "1+1=", "answer": "1"}], "'prompt_ids' as tokens, but .* it is text"),
    ],
)
def test_a_dataset_of_the_wrong_kind(rows: Any, cause: str) -> None:
    p = Parts()
    (problem,) = p.engine(lambda batch: grpo(p, batch)).set_dataset(rows).check().problems
    assert isinstance(problem, DataError)
    assert re.search(cause, problem.cause)
    assert f"{__file__}:" in problem.place


RIGHT: dict[str, Callable[[], Any]] = {
    "the usual": lambda: (p := Parts()).engine(lambda batch: grpo(p, batch)),
    "log-probs of the trainer": lambda: (p := Parts()).engine(
        lambda batch: p.learner.forward_step(grpo(p, batch))
    ),
    "whatever a plain module may add": lambda: (p := Parts(typo, kl_coef=0.1)).engine(
        lambda batch: p.advantage.forward_step(
            p.reward.forward_step(p.plain.forward_step(p.policy.forward_step(batch)))
        )
    ),
    "a function with defaults and all columns": lambda: (p := Parts(optional)).engine(
        lambda batch: grpo(p, batch)
    ),
    "a completion of the dataset": lambda: Evaluator(
        lambda batch: FunctionReward("reward", score).eval_step(batch)
    ).set_dataset([{"completion": "2", "answer": "2"}]),
    "tokens of the dataset": lambda: (
        (p := Parts())
        .engine(lambda batch: grpo(p, batch))
        .set_dataset([{"prompt_ids": [1, 2, 3], "answer": "2"}])
    ),
    "chat messages": lambda: (
        (p := Parts())
        .engine(lambda batch: grpo(p, batch))
        .set_dataset([{"prompt": [{"role": "user", "content": "1+1="}], "answer": None}])
    ),
    "a class of ours without a step of its own": lambda: (p := Parts()).engine(
        lambda batch: type("Grouped", (FunctionReward,), {"batch_by": "group"})(
            "grouped", score
        ).forward_step(grpo(p, batch))
    ),
    "a step of a user's own that is called train_step": lambda: Engine(
        Environment(lambda batch: Plain("plain").train_step(batch))
    ).set_dataset(ROWS),
    "a train step of ours that somebody changed": lambda: Engine(
        Environment(
            lambda batch: Overridden("learner", model=no_model).train_step(batch),
        )
    ).set_dataset(ROWS),
    "an evaluation alone": lambda: EvalEngine(
        lambda batch: Parts().policy.eval_step(batch)
    ).set_dataset(["1+1="]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_flow_is_not_refused(name: str) -> None:
    assert RIGHT[name]().check().problems == []


class Corrected(FunctionReward):
    """A subclass that changes what the declared class does: nothing is certain of it any more."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        data.setdefault("anwser", data["answer"])
        data["advantages"] = data["rewards"]
        return super().forward_step(data)


def test_a_declaration_is_not_stretched_over_a_subclass_that_overrides_the_step() -> None:
    p = Parts()
    p.reward = Corrected("reward", typo)
    engine = p.engine(lambda batch: p.reward.forward_step(p.policy.forward_step(batch)))
    assert engine.check().problems == []


def test_a_dataset_that_makes_its_items_when_asked_shows_nothing() -> None:
    class Lazy:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("an item was made, though checking needs none")

    p = Parts(typo)
    assert p.engine(lambda batch: grpo(p, batch)).set_dataset(Lazy()).check().problems == []


class Builds(PolicyInference):
    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        return [{"prompt": prompt["prompt"], "anwser": "1"} for prompt in prompts]


def test_a_dataset_of_the_users_own_making_shows_nothing() -> None:
    p = Parts(typo)
    p.policy = Builds("policy", model=no_model)
    assert p.engine(lambda batch: grpo(p, batch)).check().problems == []


def test_a_replay_sampler_may_give_any_column() -> None:
    chatlearn.init({"runtime": {"num_inference_per_prompt": 2, "max_replay_episode": 2}})
    p = Parts()
    engine = p.engine(lambda batch: p.reward.forward_step(p.policy.forward_step(batch)))
    assert engine.set_replay_sampler(lambda buffers: buffers[-1].samples).check().problems == []


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hugging face", "rows", "texts", "none"])
def test_datasets_of_every_kind_show_their_columns(kind: str, tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": "1", "answer": None}, {"prompt": "2", "answer": "4"}]
    sources: dict[str, Callable[[], Any]] = {
        "jsonl": lambda: tmp_path / "rows.jsonl",
        "parquet": lambda: tmp_path / "rows.parquet",
        "hugging face": lambda: datasets.Dataset.from_list(rows),
        "rows": lambda: rows,
        "texts": lambda: ["1", "2"],
        "none": lambda: [{"prompt": "1", "answer": None}],
    }
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "1", "answer": null}\n{"prompt": "2", "answer": "4"}\n'
    )
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for function, is_right in ((score, kind != "texts"), (typo, False)):
        p = Parts(function)
        problems = p.engine(lambda b, p=p: grpo(p, b)).set_dataset(sources[kind]()).check().problems
        assert bool(problems) != is_right, problems


def test_a_changed_hugging_face_dataset_shows_nothing() -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "1"}]).with_transform(
        lambda batch: {"prompt": batch["text"], "anwser": batch["text"]}
    )
    p = Parts(typo)
    assert p.engine(lambda batch: grpo(p, batch)).set_dataset(rows).check().problems == []


SCRIPT = """
    from chatlearn import BaseModule, Engine, Environment, Trainer, declares
    from chatlearn.models import FunctionReward, GroupAdvantage, PolicyInference, PolicyTrainer

    def no_model():
        raise AssertionError("a model was loaded")

    class Length(BaseModule):
        def forward_step(self, data):
            data["length"] = [len(text) for text in data[{column!r}]]
            return data

    def brief(completions, length):
        return [-float(x) for x in length]

    policy, length = PolicyInference("policy", model=no_model), Length("length")
    reward, advantage = FunctionReward("reward", brief), GroupAdvantage("advantage")
    learner = PolicyTrainer("learner", model=no_model)

    def env_flow(batch):
        measured = length.forward_step(policy.forward_step(batch))
        return advantage.forward_step(reward.forward_step(measured))

    engine = Engine(Environment(env_flow), Trainer(lambda batch: learner.train_step(batch)))
    engine.set_dataset(["1+1="]).learn()
"""


@pytest.mark.parametrize(
    ("column", "options", "code", "said"),
    [
        ("completion", [], 0, "it would run, with 1 warning (checked in "),
        ("completion", ["--strict"], 1, "engine.set_parameter_sync(learner, policy)"),
        ("completion", ["--dry-run"], 0, "tried in a dry run: length.forward_step"),
        ("completions", [], 0, "it would run, with 1 warning (checked in "),
        ("completions", ["--dry-run"], 1, "did you mean 'completion'?"),
    ],
)
def test_the_command_line(
    column: str, options: list[str], code: int, said: str, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("{column!r}", repr(column)))
    command = [sys.executable, "-m", "chatlearn.cli", "check", str(script), *options]
    done = subprocess.run(
        [*command, "runtime.num_inference_per_prompt=2"], capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert said in output
    assert "warning: policy samples for learner, but no parameter sync" in output


def test_warnings_are_said_when_a_run_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chatlearn.init({"runtime": {"output_dir": tmp_path / "run"}})

    class Adds(BaseModule):
        @declares(reads=(), writes={"length"}, passes_on=True)
        def forward_step(self, data: Any) -> Any:
            return {**data, "length": [0] * len(data["uid"])}

    adds, plain = Adds("adds"), Plain("plain")

    def env_flow(batch: Any) -> Any:
        adds.forward_step(batch)
        return plain.forward_step(batch)

    Engine(Environment(env_flow)).set_dataset(["p"]).learn()
    said = "warning: nothing takes the output of adds.forward_step, which makes 'length'"
    assert capfd.readouterr().out.count(said) == 1
    evaluator = Evaluator(env_flow).set_dataset(["p"])
    for times in (1, 0):  # said once
        evaluator.eval()
        assert capfd.readouterr().err.count("nothing takes the output") == times
    with contextlib.suppress(ChatLearnError):
        evaluator.stop()
