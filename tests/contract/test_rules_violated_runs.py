# SPDX-License-Identifier: Apache-2.0
"""Every rule of modules, data, sync, evaluation, checkpoints and runs that a user can break, broken once.

See `test_rules_violated.py` for what `before_anything`, `before_steps` and `after` hold an error to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_modules import Batch
from torch import nn
from violations import (
    PROMPTS,
    SEEN,
    Recorded,
    before_anything,
    before_steps,
    run,
    steps,
)

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.errors import (
    BatchError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    FlowError,
    ModuleError,
    OutputError,
    SyncError,
)

HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    SEEN.clear()


def flow_of(module: BaseModule) -> Any:
    return lambda batch: module.forward_step(batch)  # type: ignore[attr-defined]


# ---- Modules: hooks and services -----------------------------------------------------------------------------


class Everything(BaseModule):
    """Stands in all flows; a subclass fails in one method."""

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        return None

    def forward_step(self, data: Batch) -> Batch:
        SEEN.append("forward_step")
        return data

    def eval_step(self, data: Batch) -> Batch:
        SEEN.append("eval_step")
        return data

    def train_step(self, data_list: list[Batch]) -> None:
        SEEN.append("train_step")


def broken_run(where: str, **runtime: Any) -> Any:
    """Run one episode of all three flows, with a checkpoint, over a module that fails in `where`."""
    chatlearn.init({"runtime": {"save_episode_interval": 1, **runtime}})

    class Failing(Everything):
        pass

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        SEEN.append(where)
        raise LookupError(f"no luck in {where}")

    setattr(Failing, where, fails)
    module, other = Failing("failing"), Recorded("other")
    engine = Engine(
        Environment(lambda b: other.forward_step(module.forward_step(b))),
        Trainer(lambda b: module.train_step(b)),
        Evaluator(lambda b: module.eval_step(b)).set_dataset(PROMPTS),
    )
    engine.set_parameter_sync(module, other).set_dataset(PROMPTS)
    return engine.learn


BEFORE_STEPS = [
    "check_config",
    "setup",
    "build_dataset",
    "check_rows",
    "state_dict",
    "before_episode",
]
LATER = [
    "forward_step",
    "train_step",
    "eval_step",
    "save_checkpoint",
    "training_state",
    "after_episode",
    "export_model",
]


@pytest.mark.parametrize("where", BEFORE_STEPS + LATER)
def test_an_exception_in_a_module_names_it_wherever_it_comes_from(where):
    with pytest.raises(ModuleError) as caught:
        broken_run(where)()
    assert isinstance(caught.value.__cause__, LookupError), "the original, with its traceback"
    lines = str(caught.value).splitlines()
    assert (
        lines[0] == f"LookupError: 'no luck in {where}'"
        or lines[0] == f"LookupError: no luck in {where}"
    )
    assert "  module: failing (Failing)" in lines
    assert f"  method: {where}" in lines
    assert "  replica: 0" in lines
    if where.endswith("step"):
        assert lines[-2:] == ["  episode: 1", "  samples: uid 0, 1, 2, 3 (4 in all)"]
    if where in BEFORE_STEPS:
        assert not {"forward_step", "train_step", "eval_step"} & set(SEEN)


def test_an_exception_while_a_checkpoint_is_loaded():
    module = Recorded("m")
    run(flow_of(module), runtime={"output_dir": "run"})
    SEEN.clear()

    class Failing(Recorded):
        def load_checkpoint(self, iteration: int) -> None:
            raise LookupError("no luck")

    again = Failing("m")
    with pytest.raises(ModuleError, match="method: load_checkpoint") as caught:
        run(flow_of(again), runtime={"output_dir": "run", "resume": "auto", "num_episode": 2})
    assert isinstance(caught.value.__cause__, LookupError)
    assert steps() == []


class Asynchronous(BaseModule):
    def __init__(self, name: str, work: Any) -> None:
        super().__init__(name)
        self.work = work

    async def forward_step(self, data: Batch) -> Batch:
        SEEN.append("m.step")
        await self.work()
        return data


async def _raises() -> None:
    await asyncio.sleep(0)
    raise LookupError("no luck")


async def _runs_out_of_time() -> None:
    await asyncio.wait_for(asyncio.Event().wait(), 0.01)


@pytest.mark.parametrize(
    ("work", "cause"), [(_raises, LookupError), (_runs_out_of_time, TimeoutError)]
)
def test_an_exception_in_an_async_step(work, cause):
    with pytest.raises(ModuleError, match="method: forward_step") as caught:
        run(flow_of(Asynchronous("m", work)))
    assert isinstance(caught.value.__cause__, cause)
    assert str(caught.value).endswith("samples: uid 0, 1, 2, 3 (4 in all)")


def test_an_async_step_that_hangs_can_be_interrupted():
    """Nothing can be saved in the middle of a step: the second Ctrl-C ends it, as the message says."""

    def interrupt() -> None:
        while not SEEN:
            time.sleep(0.01)
        for _ in range(2):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as caught:
        run(flow_of(Asynchronous("m", asyncio.Event().wait)))
    assert caught.value.code == 130
    SEEN.clear()
    run(flow_of(Recorded("next")))  # nothing of it is left


def test_replicas_that_cannot_be():
    module = Recorded("m")
    none = {"m": {"num_replica": 0}}
    before_anything(
        ConfigError, lambda: run(flow_of(module), models=none), "num_replica is 0", place="models.m"
    )
    in_code = Recorded("n", num_replica=0)
    before_anything(
        ConfigError, lambda: run(flow_of(in_code)), "num_replica is 0", place="models.n"
    )
    two = {"m": {"num_replica": 2}}
    module.lock = threading.Lock()  # type: ignore[attr-defined]
    before_anything(
        ConfigError,
        lambda: run(flow_of(module), models=two),
        "'m' cannot be copied",
        place="models.m.num_replica",
    )
    policy, learner = Recorded("policy"), Recorded("learner")
    before_anything(
        ConfigError,
        lambda: run(
            flow_of(policy), lambda b: learner.train_step(b), models={"learner": {"num_replica": 2}}
        ),
        "'learner' is in the trainer flow",
        place="models.learner.num_replica",
    )


def test_padding_that_cannot_be():
    module = Recorded("m")
    for value, side, cause in (
        (0, "middle", "'middle'"),
        ("x", "right", "one number"),
        (None, "left", "one number"),
    ):
        before_anything(
            ConfigError,
            lambda v=value, s=side: module.add_padding_config("x", v, s),
            cause,
            place="add_padding_config('x') of module 'm'",
        )


@pytest.mark.parametrize(
    "column", [["a", "bc"], [torch.ones(2, 2), torch.ones(3, 3)], [None, torch.ones(2)], [{}, {}]]
)
def test_a_column_that_cannot_be_padded(column):
    module = Recorded("m")
    module.add_padding_config("x", 0)
    rows = [{"prompt": "p", "x": value} for value in column]
    with pytest.raises(ModuleError, match="column 'x' cannot be padded") as caught:
        run(flow_of(module), data=rows)
    cause = caught.value.__cause__
    assert isinstance(cause, BatchError)
    assert cause.place == "add_padding_config('x', 0, 'right')"
    assert cause.fix
    assert "module: m (Recorded)" in str(caught.value)
    assert steps() == []


def test_values_that_nobody_shared():
    module = Recorded("m")
    assert module.get("missing") is None
    assert module.get("missing", 3) == 3


# ---- Data ------------------------------------------------------------------------------------------------------


class WithDataset(Recorded):
    dataset: Any = None

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        return self.dataset


class NoLength:
    def __getitem__(self, index: int) -> Any:
        return {"x": index}


class Raising(list[Any]):
    def __getitem__(self, index: Any) -> Any:
        raise LookupError("no luck")


def collated(function: Any) -> list[Any]:
    kind = type(
        "Collated",
        (list,),
        {"collate_fn": staticmethod(function) if callable(function) else function},
    )
    return kind([{"x": i} for i in range(4)])


@pytest.mark.parametrize(
    ("dataset", "error", "causes", "place"),
    [
        (3, DataError, ["a int without length"], "WithDataset.build_dataset"),
        (iter([1]), DataError, ["without length or rows"], "WithDataset.build_dataset"),
        (NoLength(), DataError, ["a NoLength without length"], "WithDataset.build_dataset"),
        ([], DataError, ["the dataset of env_flow is empty"], "WithDataset.build_dataset"),
        (Raising([1, 2]), DataError, ["LookupError: no luck"], "Raising, row 0"),
        (
            collated(lambda rows: {"x": [1]}),
            DataError,
            ["1 samples of 4 rows"],
            "Collated.collate_fn",
        ),
        (
            collated(lambda rows: {"x": []}),
            DataError,
            ["0 samples of 4 rows"],
            "Collated.collate_fn",
        ),
        (collated(lambda rows: {}), DataError, ["0 samples of 4 rows"], "Collated.collate_fn"),
        (collated(lambda rows: rows), BatchError, ["must return a dict"], "Collated.collate_fn"),
        (collated(lambda rows: 1 / 0), DataError, ["ZeroDivisionError"], "Collated.collate_fn"),
        (collated(3), DataError, ["not callable"], "Collated.collate_fn"),
        ([{"x": 1}, 2], BatchError, ["must be a dict, not int"], "list"),
        ([{"x": 1}, {"y": 1}], BatchError, ["['x'] and ['y']"], "list"),
        ([{"uid": 1}], DataError, ["columns ['uid']"], "list"),
    ],
)
def test_a_dataset_that_cannot_be_used(dataset, error, causes, place):
    module = WithDataset("m")
    module.dataset = dataset
    before_steps(error, lambda: run(flow_of(module)), *causes, place=place)
    SEEN.clear()
    evaluator = Evaluator(lambda b: module.eval_step(b)).set_dataset(PROMPTS)
    causes = [cause.replace("env_flow", "eval_flow") for cause in causes]
    before_steps(error, evaluator.eval, *causes, place=place)


def test_prompts_that_cannot_be_used():
    module = Recorded("m")
    for data, cause in (
        (3, "not int"),
        (None, "not NoneType"),
        ([], "is empty"),
        ("nowhere.jsonl", "does not exist"),
    ):
        before_anything(DataError, lambda d=data: run(flow_of(module), data=d), cause)
    engine = Engine(Environment(flow_of(module)))
    for data in ("x", 3, []):
        before_anything(
            DataError, lambda d=data: engine.set_multiple_datasets(d), "set_multiple_datasets takes"
        )
    chatlearn.init()
    before_anything(
        DataError, Engine(Environment(flow_of(module))).learn, "the engine has no dataset"
    )
    learner = Recorded("learner")
    alone = Engine(trainer=Trainer(lambda b: learner.train_step(b)))
    before_anything(DataError, alone.learn, "the engine has no dataset")


def test_an_evaluator_without_samples():
    module = Recorded("m")
    evaluator = Evaluator(lambda b: module.eval_step(b))
    before_anything(DataError, evaluator.eval, "the evaluator has no dataset")
    before_anything(
        DataError, lambda: run(flow_of(module), evaluator=evaluator), "the evaluator has no dataset"
    )
    before_anything(DataError, evaluator.set_dataset([]).eval, "the dataset of eval_flow is empty")


def test_an_environment_that_leaves_the_trainer_without_samples():
    policy, learner = Recorded("policy"), Recorded("learner")

    def env_flow(batch):
        policy.forward_step(batch)

    violate = lambda: run(env_flow, lambda b: learner.train_step(b))  # noqa: E731
    before_anything(FlowError, violate, "environment flow returns nothing", place=HERE)


def test_an_episode_that_is_no_whole_number_of_groups():
    sizes = {"sample_per_episode": 7, "num_inference_per_prompt": 2}
    before_anything(
        ConfigError,
        lambda: run(flow_of(Recorded("m")), runtime=sizes),
        "7",
        "2",
        place="runtime.sample_per_episode",
    )


class NoSignature(BaseModule):
    def train_step(self) -> None: ...


class TwoBatches(BaseModule):
    def train_step(self, data_list: Any, second: Any) -> None: ...


def test_a_train_step_with_another_signature():
    policy = Recorded("policy")
    for learner, cause in (
        (NoSignature("learner"), "takes no `data`"),
        (TwoBatches("learner"), "nothing fills: second"),
        (BaseModule("learner"), "no method 'train_step'"),
    ):
        trainer_flow = lambda b, m=learner: m.train_step(b)  # noqa: E731
        before_anything(
            FlowError, lambda t=trainer_flow: run(flow_of(policy), t), "learner", cause, place=HERE
        )


# ---- Parameter sync ----------------------------------------------------------------------------------------------


class Weights(Recorded):
    def __init__(self, name: str, *shape: int, layer: str = "layer") -> None:
        super().__init__(name)
        self.shape, self.layer = shape or (2, 2), layer

    def setup(self) -> None:
        super().setup()
        self.model = nn.ModuleDict({self.layer: nn.Linear(*self.shape)})


def test_sync_pairs_that_cannot_be():
    policy, learner, stranger = Weights("policy"), Weights("learner"), Weights("stranger")

    def synced(source: Any, destination: Any, trained: Any = learner) -> Any:
        chatlearn.init()
        engine = Engine(Environment(flow_of(policy)), Trainer(lambda b: trained.train_step(b)))
        return engine.set_parameter_sync(source, destination).set_dataset(PROMPTS).learn()

    where = "set_parameter_sync"
    before_anything(EngineError, lambda: synced("policy", policy), "two modules, not 'policy'")
    before_anything(
        FlowError, lambda: synced(stranger, policy), "stranger", "in no flow", place=where
    )
    before_anything(
        FlowError, lambda: synced(learner, learner), "learner", "with itself", place=where
    )
    wide, other = Weights("wide", 2, 3), Weights("other", layer="body")
    before_steps(
        SyncError, lambda: synced(wide, policy, wide), "wide -> policy", "[3, 2]", "[2, 2]"
    )
    SEEN.clear()
    before_steps(
        SyncError, lambda: synced(other, policy, other), "body.weight", "layer.weight", "missing"
    )


# ---- Checkpoints and folders ---------------------------------------------------------------------------------------


def damage(text: str) -> str:
    folder = Path("damaged")
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint.json").write_text(text)
    return str(folder)


def test_a_checkpoint_that_is_not_there_or_damaged():
    resumed = lambda path: lambda: run(flow_of(Recorded("m")), runtime={"resume": path})  # noqa: E731
    before_anything(
        CheckpointError, resumed("nowhere"), "'nowhere' names no checkpoint", place="runtime.resume"
    )
    for text in ("", "{", "[]", "3", '{"format": 999}', "{}"):
        before_anything(CheckpointError, resumed(damage(text)), place="checkpoint.json")


def test_a_checkpoint_of_other_modules_or_data():
    policy, learner = Weights("policy"), Weights("learner")
    run(flow_of(policy), lambda b: learner.train_step(b), runtime={"output_dir": "run"})
    SEEN.clear()
    again: dict[str, Any] = {
        "runtime": {"resume": "run/checkpoints/episode-000001", "num_episode": 2}
    }
    other = Weights("someone_else")
    before_steps(
        CheckpointError,
        lambda: run(flow_of(policy), lambda b: other.train_step(b), **again),
        "someone_else",
        place="episode-000001",
    )
    SEEN.clear()
    wide = Weights("learner", 2, 3)
    before_steps(
        CheckpointError,
        lambda: run(flow_of(policy), lambda b: wide.train_step(b), **again),
        "does not fit module 'learner'",
        place="episode-000001",
    )
    SEEN.clear()
    before_anything(
        DataError,
        lambda: run(flow_of(policy), lambda b: learner.train_step(b), data=list("abcde"), **again),
        "5 rows",
        place="episode-000001",
    )


def test_an_output_folder_that_is_a_file():
    Path("taken").write_text("a file")
    for folder in ("taken", "taken/below"):
        before_anything(
            OutputError,
            lambda f=folder: run(flow_of(Recorded("m")), runtime={"output_dir": f}),
            "taken",
            place="runtime.output_dir",
        )


# ---- Engines -------------------------------------------------------------------------------------------------------


def test_setters_given_the_wrong_kind():
    flow = flow_of(Recorded("m"))
    for violate, cause in (
        (lambda: Engine(flow), "set_environment takes Environment"),
        (lambda: Engine(Trainer(flow)), "not Trainer"),  # type: ignore[arg-type]
        (lambda: Engine().set_environment(flow), "set_environment"),
        (lambda: Engine().set_trainer(Environment(flow)), "set_trainer"),  # type: ignore[arg-type]
        (lambda: Engine().set_evaluator(3), "set_evaluator"),  # type: ignore[arg-type]
        (lambda: Engine().set_replay_sampler(3), "set_replay_sampler"),  # type: ignore[arg-type]
        (lambda: Engine().set_parameter_sync(3, 4), "set_parameter_sync"),  # type: ignore[arg-type]
        (lambda: Evaluator(flow).set_post_process_func(3), "set_post_process_func"),  # type: ignore[arg-type]
        (
            lambda: Engine(evaluator=Evaluator(flow)).set_dataset(PROMPTS),
            "neither environment nor trainer",
        ),
        (lambda: Engine(Environment(flow)).eval(), "has no evaluator"),
    ):
        before_anything(EngineError, violate, cause)
    before_anything(FlowError, Engine().learn, "the engine has no flow")


def test_learn_inside_a_module():
    engines: list[Engine] = []

    class Nested(Recorded):
        def forward_step(self, data: Batch) -> Batch:
            engines[0].learn()
            return data

    module = Nested("m")
    chatlearn.init()
    engines.append(Engine(Environment(flow_of(module))).set_dataset(PROMPTS))
    with pytest.raises(ModuleError, match="module: m") as caught:
        engines[0].learn()
    assert isinstance(caught.value.__cause__, EngineError)
    assert "'m' belongs to a learn() that is still under way" in caught.value.__cause__.cause
    assert caught.value.__cause__.fix
    assert SEEN == ["setup"], "the module was not set up again under its own feet"


def test_learn_inside_a_module_that_goes_on_regardless():
    """The run that is under way keeps its replicas and ends as if nobody had asked."""
    engines: list[Engine] = []

    class Nested(Recorded):
        def forward_step(self, data: Batch) -> Batch:
            with contextlib.suppress(EngineError):
                engines[0].learn()
            SEEN.append(f"replica {self.replica_id}")
            return data

    module = Nested("m", num_replica=2, generation_batch_size=1)
    chatlearn.init()
    engines.append(Engine(Environment(flow_of(module))).set_dataset(PROMPTS))
    engines[0].learn()
    assert steps() == ["replica 0", "replica 1"] * 2


def test_two_engines_that_share_a_module_at_once():
    """One after the other they may; at once, each would undo the other's setup."""
    shared = Recorded("shared")
    chatlearn.init()
    second = Engine(Environment(flow_of(shared))).set_dataset(PROMPTS)
    evaluator = Evaluator(lambda b: shared.eval_step(b)).set_dataset(PROMPTS)
    for other in (second.learn, evaluator.eval):
        SEEN.clear()
        starts = Recorded("starts", lambda data, o=other: o())
        first = Engine(Environment(lambda b, m=starts: shared.forward_step(m.forward_step(b))))
        with pytest.raises(ModuleError) as caught:
            first.set_dataset(PROMPTS).learn()
        assert isinstance(caught.value.__cause__, EngineError)
        assert "'shared' belongs to a learn()" in caught.value.__cause__.cause
        assert SEEN == ["setup", "setup", "starts.step"]
    second.learn()
    assert steps()[-1] == "shared.step", "after a failure the module is free again"
