# SPDX-License-Identifier: Apache-2.0
"""The engine's contract, flows to episodes, sentence by sentence, through the public API alone."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest
import torch
from contract_modules import Batch, Learner, Step, generate, plain, train

import chatlearn
from chatlearn import (
    BaseModule,
    ChatLearnError,
    ControlDependencies,
    Engine,
    Environment,
    EvalEngine,
    Evaluator,
    FlowError,
    Trainer,
)

PROMPTS = [f"p{i}" for i in range(8)]


def runtime(**values: Any) -> None:
    chatlearn.init({"runtime": values})


def collect(flow: Any, prompts: Any = PROMPTS) -> dict[str, list[Batch]]:
    return EvalEngine(flow).set_dataset(prompts).eval()


# ---- flows ----------------------------------------------------------------------------------------


def test_nodes_are_methods_of_any_name_and_the_rest_is_python() -> None:
    class Module(BaseModule):
        def polish(self, data: Batch) -> Batch:
            return {**data, "polished": [p.upper() for p in data["prompt"]]}

    module, seen = Module("module"), []

    def helper(batch: Any) -> Any:
        return module.polish(batch)

    def flow(batch: Any) -> Any:
        """A docstring."""
        count: int = 3
        print("tracing", batch, f"{batch}", count)
        seen.append(count)
        for _ in range(2):
            batch = helper(batch)
        out: Any = batch
        return out

    (batch,) = collect(flow)["module"]
    assert batch["polished"] == [p.upper() for p in PROMPTS]
    assert seen == [3]


def test_flows_may_be_lambdas_closures_methods_partials_and_callables() -> None:
    class Holder:
        def __init__(self, step: Step) -> None:
            self.policy = step
            self.by_name = {"policy": step}

        def flow(self, batch: Any) -> Any:
            return self.by_name["policy"].forward_step(self.policy.forward_step(batch))

        def __call__(self, batch: Any) -> Any:
            return self.policy.forward_step(batch)

    step = Step("step")
    holder = Holder(step)
    bound = step.forward_step

    def two(which: Any, batch: Any) -> Any:
        return which(batch)

    flows = [lambda b: step.forward_step(b), holder.flow, holder, functools.partial(two, bound)]
    for flow in flows:
        assert plain(collect(flow)["step"][0]["prompt"]) == PROMPTS


def test_inputs_merge_in_argument_order_and_the_later_wins() -> None:
    a = Step("a", lambda d: {"x": ["a"] * len(d["prompt"]), "a": [1] * len(d["prompt"])})
    b = Step("b", lambda d: {"x": ["b"] * len(d["prompt"])})
    c = Step("c")

    def first(batch: Any) -> Any:
        return c.forward_step(batch, a.forward_step(batch), b.forward_step(batch))

    assert collect(first)["c"][0]["x"] == ["b"] * 8
    assert {"prompt", "x", "a"} <= collect(first)["c"][0].keys()

    renamed = Step("a", lambda d: {"prompt": ["new"] * len(d["prompt"])})

    def batch_last(batch: Any) -> Any:
        return c.forward_step(renamed.forward_step(batch), batch)

    assert plain(collect(batch_last)["c"][0]["prompt"]) == PROMPTS


def test_the_same_input_twice() -> None:
    a, b = Step("a"), Step("b")

    def flow(batch: Any) -> Any:
        out = a.forward_step(batch)
        return b.forward_step(out, out)

    assert plain(collect(flow)["b"][0]["prompt"]) == PROMPTS


def test_inputs_that_disagree_in_their_number_of_samples_are_an_error() -> None:
    half = Step("half", lambda d: {"x": d["prompt"][::2]})
    both = Step("both")
    with pytest.raises(ChatLearnError, match="samples"):
        collect(lambda batch: both.forward_step(batch, half.forward_step(batch)))


def test_samples_that_come_back_in_another_order_are_an_error() -> None:
    def sort(data: Batch) -> Batch:
        return {
            key: column[::-1] if isinstance(column, list) else column.flip(0)
            for key, column in data.items()
        }

    by_length, a = Step("by_length", sort), Step("a")
    with pytest.raises(ChatLearnError, match="position 0 uid 7 instead of 0"):
        collect(lambda batch: a.forward_step(batch, by_length.forward_step(batch)))


def test_the_trainer_sees_the_returned_nodes_and_nothing_else() -> None:
    a = Step("a", lambda d: {"a": d["prompt"], "both": d["prompt"]})
    b = Step("b", lambda d: {"b": d["prompt"], "both": [0] * len(d["prompt"])})
    unseen = Step("unseen", lambda d: {"unseen": d["prompt"]})
    learner = Learner(column="both")

    def flow(batch: Any) -> Any:
        unseen.forward_step(batch)
        return a.forward_step(batch), b.forward_step(batch)

    engine = Engine(Environment(flow), Trainer(lambda batch: learner.train_step(batch)))
    engine.set_dataset(PROMPTS).learn()
    assert learner.columns == {"a", "b", "both"}
    assert learner.trained == [[0] * 8]
    assert unseen.prompts == PROMPTS


def test_eval_returns_the_returned_nodes_only() -> None:
    a, b = Step("a"), Step("b")

    def nothing(batch: Any) -> None:
        b.forward_step(a.forward_step(batch))

    def last(batch: Any) -> Any:
        return b.forward_step(a.forward_step(batch))

    def both(batch: Any) -> Any:
        out = a.forward_step(batch)
        return out, b.forward_step(out)

    assert collect(nothing) == {}
    assert collect(last).keys() == {"b"}
    assert collect(both).keys() == {"a", "b"}
    assert a.prompts == PROMPTS * 3


def test_a_module_several_times_and_in_several_flows() -> None:
    class Two(BaseModule):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.seen: list[tuple[str, int]] = []

        def forward_step(self, data: Batch, iteration: int) -> Batch:
            self.seen.append(("forward", iteration))
            return data

        def score(self, data: Batch, iteration: int) -> Batch:
            self.seen.append(("score", iteration))
            return data

        def train_step(self, data_list: list[Batch], iteration: int) -> None:
            self.seen.append(("train", iteration))

    two = Two("two")

    def flow(batch: Any) -> Any:
        return two.score(two.forward_step(two.forward_step(batch)))

    engine = Engine(Environment(flow), Trainer(lambda b: two.train_step(b)))
    engine.set_dataset(PROMPTS).learn()
    assert two.seen == [("forward", 0), ("forward", 1), ("score", 0), ("train", 0)]


def test_nodes_without_output_or_without_takers_run_for_every_sample() -> None:
    runtime(generation_batch_size=3)
    logger, unused, last = Step("logger", lambda d: None), Step("unused"), Step("last")

    def flow(batch: Any) -> Any:
        logger.forward_step(batch)
        unused.forward_step(batch)
        return last.forward_step(batch)

    generate(flow, PROMPTS)
    assert logger.prompts == unused.prompts == last.prompts == PROMPTS
    assert logger.sizes == [3, 3, 2]


def test_a_missing_output_that_somebody_takes_is_an_error() -> None:
    silent, taker = Step("silent", lambda d: None), Step("taker")
    with pytest.raises(ChatLearnError, match=r"silent.forward_step returned nothing"):
        collect(lambda batch: taker.forward_step(silent.forward_step(batch)))


def test_control_dependencies_order_nodes_batch_by_batch() -> None:
    runtime(generation_batch_size=2)
    order: list[str] = []

    def note(name: str) -> Any:
        return lambda d: order.append(f"{name}{d['prompt'][0]}") or d

    a, b, c = (Step(name, note(name)) for name in "abc")

    def flow(batch: Any) -> Any:
        x = a.forward_step(batch)
        y = b.forward_step(batch)
        with ControlDependencies([x, y]):
            return c.forward_step(batch)

    generate(flow, PROMPTS)
    for prompt in PROMPTS[::2]:
        assert order.index(f"c{prompt}") > order.index(f"a{prompt}")
        assert order.index(f"c{prompt}") > order.index(f"b{prompt}")
    assert len(order) == 12


def test_iteration_goes_on_over_episodes_and_counts_each_method() -> None:
    runtime(num_episode=3, generation_batch_size=4, train_global_batch_size=4)
    learner, echo = Learner(), Step("echo")
    train(PROMPTS, learner, echo=echo)
    assert echo.iterations == list(range(6))
    assert learner.iterations == list(range(6))


def test_two_modules_of_one_class_count_on_their_own() -> None:
    runtime(num_episode=2)
    a, b = Step("a"), Step("b")
    generate(lambda batch: b.forward_step(a.forward_step(batch)), PROMPTS)
    assert a.iterations == b.iterations == [0, 1]


def test_steps_get_iteration_only_if_they_ask() -> None:
    class Module(BaseModule):
        def forward_step(self, data: Batch) -> Batch:
            return data

        def eval_step(self, data: Batch, iteration: int = -1) -> Batch:
            return {**data, "iteration": [iteration] * len(data["prompt"])}

    module = Module("module")

    def flow(batch: Any) -> Any:
        return module.eval_step(module.forward_step(batch))

    assert collect(flow)["module"][0]["iteration"] == [0] * 8


def test_constants_reach_the_step_by_position_and_keyword() -> None:
    class Module(BaseModule):
        def forward_step(
            self, data: Batch, iteration: int, scale: int, *, method: str = "", where: int = 0
        ) -> Batch:
            return {"made": [(scale, method, where)] * len(data["prompt"])}

        def anything(self, data: Batch, **kwargs: Any) -> Batch:
            return {"made": [kwargs] * len(data["prompt"])}

    module = Module("module")

    def named(batch: Any) -> Any:
        return module.forward_step(batch, 3, method="x", where=7)

    def free(batch: Any) -> Any:
        return module.anything(batch, name="n", data_list=[1])

    assert collect(named)["module"][0]["made"][0] == (3, "x", 7)
    assert collect(free)["module"][0]["made"][0] == {"name": "n", "data_list": [1]}


def test_the_dict_is_the_modules_own() -> None:
    rows = [{"prompt": f"p{i}", "meta": {"list": [i]}, "ids": torch.tensor([i])} for i in range(4)]

    def spoil(data: Batch) -> Batch:
        for meta in data["meta"]:
            meta["list"].append("spoilt")
        data["ids"] += 100
        data["extra"] = data.pop("prompt")
        return data

    spoiler, sibling = Step("spoiler", spoil), Step("sibling")

    def flow(batch: Any) -> Any:
        copy = sibling.forward_step(batch)
        spoiler.forward_step(batch)
        spoiler.forward_step(copy)
        return sibling.forward_step(copy), sibling.forward_step(batch)

    for batch in collect(flow, rows)["sibling"]:
        assert batch["meta"] == [{"list": [i]} for i in range(4)]
        assert batch["ids"].flatten().tolist() == [0, 1, 2, 3]
        assert batch["prompt"] == [f"p{i}" for i in range(4)]
    assert rows[0]["meta"] == {"list": [0]}
    assert rows[1]["ids"].tolist() == [1]


def test_two_modules_with_one_name_are_an_error() -> None:
    a, b = Step("same"), Step("same")
    with pytest.raises(FlowError, match="same"):
        generate(lambda batch: b.forward_step(a.forward_step(batch)), PROMPTS)
    learner = Learner("same")
    with pytest.raises(FlowError, match="same"):
        train(PROMPTS, learner, echo=a)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "."])
def test_a_name_that_can_be_no_folder_is_an_error(name: str) -> None:
    with pytest.raises(FlowError, match="can be no folder"):
        generate(lambda batch: Step(name).forward_step(batch), PROMPTS)


# ---- modules --------------------------------------------------------------------------------------


def test_hooks_run_once_per_episode_and_setup_once() -> None:
    runtime(num_episode=2, train_global_batch_size=4)
    order: list[str] = []

    class Hooked(Step):
        def setup(self) -> None:
            order.append("setup")

        def before_episode(self) -> None:
            order.append("before")

        def after_episode(self) -> None:
            order.append("after")

        def save_checkpoint(self, iteration: int) -> None:
            order.append(f"save {iteration}")

    echo = Hooked("echo", lambda d: order.append("forward") or d)
    train(PROMPTS, echo=echo)
    per_episode = ["before", "forward", "after"]
    assert order == ["setup", *per_episode, *per_episode, "save 4"]


def test_build_dataset_of_the_first_module_is_asked() -> None:
    class Data(list[Any]):
        def collate_fn(self, rows: list[Any]) -> Batch:
            return {"prompt": [f"<{row}>" for row in rows]}

    class First(Step):
        def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
            self.asked = (list(prompts), is_eval)
            return Data(prompts)

    class Second(Step):
        def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
            raise AssertionError("only the first module is asked")

    first, second = First("first"), Second("second")

    def flow(batch: Any) -> Any:
        return second.forward_step(first.forward_step(batch))

    generate(flow, PROMPTS)
    assert first.asked == (PROMPTS, False)
    assert second.prompts == [f"<{p}>" for p in PROMPTS]
    collect(flow)
    assert first.asked == (PROMPTS, True)


def test_build_dataset_may_return_a_plain_list() -> None:
    class Upper(Step):
        def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
            return [prompt.upper() for prompt in prompts]

    upper = Upper("upper")
    (batch,) = collect(lambda batch: upper.forward_step(batch))["upper"]
    assert batch["prompt"] == [prompt.upper() for prompt in PROMPTS]


def test_prompts_pass_as_prompt_or_as_their_columns() -> None:
    step = Step("step")
    flow = step.forward_step
    (batch,) = collect(lambda b: flow(b), ["x", "y"])["step"]
    assert batch["prompt"] == ["x", "y"]
    (batch,) = collect(lambda b: flow(b), [{"question": "q", "answer": 1}] * 2)["step"]
    assert batch["question"] == ["q", "q"]
    assert plain(batch["answer"]) == [1, 1]
    assert "prompt" not in batch


def test_put_and_get_are_shared_by_all_modules() -> None:
    class Putter(Step):
        def setup(self) -> None:
            self.put("answer", 42)

    class Getter(Step):
        def before_episode(self) -> None:
            self.got = self.get("answer"), self.get("nothing", "default")

    putter, getter = Putter("putter"), Getter("getter")
    generate(lambda batch: getter.forward_step(putter.forward_step(batch)), PROMPTS)
    assert getter.got == (42, "default")


@pytest.mark.parametrize(
    ("side", "expected"), [("right", [[1, 0], [2, 3]]), ("left", [[0, 1], [2, 3]])]
)
def test_padding(side: Any, expected: list[list[int]]) -> None:
    rows = [{"ids": torch.tensor([1])}, {"ids": torch.tensor([2, 3])}]
    seen: list[Any] = []
    padded = Step("padded", lambda d: seen.append(d["ids"]) or d)
    ragged = Step("ragged", lambda d: seen.append(d["ids"]) or d)
    padded.add_padding_config("ids", 0, side)

    def flow(batch: Any) -> None:
        padded.forward_step(batch)
        ragged.forward_step(batch)

    collect(flow, rows)
    tensor, kept = sorted(seen, key=lambda column: isinstance(column, list))
    assert tensor.tolist() == expected
    assert [t.tolist() for t in kept] == [[1], [2, 3]]


def test_steps_may_be_async() -> None:
    class Async(BaseModule):
        async def forward_step(self, data: Batch, iteration: int) -> Batch:
            await asyncio.sleep(0)
            self.loops = {*getattr(self, "loops", ()), id(asyncio.get_running_loop())}
            return {"made": [iteration] * len(data["prompt"])}

    runtime(generation_batch_size=4)
    module = Async("module")
    results = collect(lambda batch: module.forward_step(batch))
    assert [b["made"] for b in results["module"]] == [[0] * 4, [1] * 4]
    assert len(module.loops) == 1  # a client made in one call serves the next

    async def in_a_notebook() -> Any:
        return collect(lambda batch: module.forward_step(batch))

    assert len(asyncio.run(in_a_notebook())["module"]) == 2


def test_modules_that_do_unusual_things() -> None:
    class NeverInitialised(BaseModule):
        def __init__(self) -> None:
            self.name = "bare"
            self.config = {"mine": 1}
            self.model = "a path"
            self._metrics = self._config = self._settings = self._shared = None

        def forward_step(self, data: Batch) -> Batch:
            self.log(number=1)
            self.put("x", self.config["mine"])
            return data

        def release(self) -> None:
            raise AssertionError("a user's own method")

    module, learner = NeverInitialised(), Learner()
    env = Environment(lambda batch: module.forward_step(batch))
    engine = Engine(env, Trainer(lambda batch: learner.train_step(batch))).set_dataset(PROMPTS)
    result = engine.learn()
    engine.stop()
    assert result.metrics["bare/number"] == 1
    assert module.config == {"mine": 1}


def test_decorated_and_inherited_steps() -> None:
    def bare_decorator(function: Any) -> Any:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs)

        return wrapper

    class Base(BaseModule):
        def forward_step(self, data: Batch, iteration: int) -> Batch:
            return {**data, "iteration": [iteration] * len(data["prompt"])}

        @torch.no_grad()
        def graded(self, data: Batch) -> Batch:
            return {**data, "grad": [torch.is_grad_enabled()] * len(data["prompt"])}

        @bare_decorator
        def decorated(self, data: Batch) -> Batch:
            return data

    class Derived(Base):
        def forward_step(self, data: Batch, iteration: int) -> Batch:
            return super().forward_step(self.decorated(data), iteration)

    base, derived = Base("base"), Derived("derived")

    def flow(batch: Any) -> Any:
        return base.graded(base.decorated(derived.forward_step(base.forward_step(batch))))

    (batch,) = collect(flow)["base"]
    assert batch["grad"] == [False] * 8
    assert batch["iteration"] == [0] * 8


# ---- batches --------------------------------------------------------------------------------------


def test_default_collation() -> None:
    marker = object()
    row = {"i": 1, "f": 0.5, "b": True, "t": torch.ones(2), "s": "x", "o": marker, "n": None}
    rows = [{**row, "ragged": torch.ones(n)} for n in (1, 2)]
    step = Step("step")
    (batch,) = collect(lambda b: step.forward_step(b), rows)["step"]
    assert batch["i"].dtype == torch.long
    assert batch["f"].dtype.is_floating_point
    assert batch["b"].dtype == torch.bool
    assert batch["t"].shape == (2, 2)
    assert batch["s"] == ["x", "x"]
    assert batch["o"] == [marker, marker]
    assert batch["n"] == [None, None]
    assert [len(t) for t in batch["ragged"]] == [1, 2]


def test_each_call_gets_at_most_its_models_batch_size() -> None:
    chatlearn.init(
        {
            "runtime": {"generation_batch_size": 3},
            "models": {"b": {"generation_batch_size": 4}},
        }
    )
    a, b, c, d = (Step(name) for name in "abcd")
    d = Step("d")

    def flow(batch: Any) -> Any:
        return d.forward_step(c.forward_step(b.forward_step(a.forward_step(batch))))

    generate(flow, [f"p{i}" for i in range(10)])
    assert a.sizes == c.sizes == d.sizes == [3, 3, 3, 1]
    assert sorted(b.sizes) == [2, 4, 4]
    for step in (a, b, c, d):
        assert step.prompts == [f"p{i}" for i in range(10)]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 5, None])
def test_order_is_the_datasets_order(replicas: int, size: int | None) -> None:
    chatlearn.init(
        {"runtime": {"generation_batch_size": size}, "models": {"a": {"num_replica": replicas}}}
    )
    a, b = Step("a"), Step("b")
    prompts = [f"p{i}" for i in range(14)]
    results = collect(lambda batch: b.forward_step(a.forward_step(batch)), prompts)
    assert [p for batch in results["b"] for p in batch["prompt"]] == prompts


# ---- episodes -------------------------------------------------------------------------------------


def test_no_configuration_is_one_pass_and_one_train_step() -> None:
    learner = train(PROMPTS)
    assert learner.steps == [[PROMPTS]]


def test_episodes_walk_through_the_dataset_and_wrap_around() -> None:
    runtime(num_episode=3, sample_per_episode=3)
    assert train(PROMPTS).trained == [
        ["p0", "p1", "p2"],
        ["p3", "p4", "p5"],
        ["p6", "p7", "p0"],
    ]


def test_a_short_dataset_repeats_within_an_episode() -> None:
    runtime(num_episode=2, sample_per_episode=5)
    assert train(["a", "b"]).trained == [["a", "b", "a", "b", "a"], ["b", "a", "b", "a", "b"]]


def test_groups_are_adjacent_and_numbered() -> None:
    runtime(num_episode=2, sample_per_episode=6, num_inference_per_prompt=3)
    seen: list[tuple[list[Any], list[int], list[int]]] = []

    def note(data: Batch) -> Batch:
        seen.append((data["prompt"], plain(data["uid"]), plain(data["prompt_uid"])))
        return data

    train(PROMPTS, echo=Step("echo", note))
    first, second = seen
    assert first[0] == ["p0"] * 3 + ["p1"] * 3
    assert second[0] == ["p2"] * 3 + ["p3"] * 3
    assert first[1] + second[1] == list(range(12))
    for _, uids, groups in seen:
        assert [groups.count(g) for g in dict.fromkeys(groups)] == [3, 3]
        assert len(set(uids)) == 6


def test_with_no_sample_per_episode_a_pass_is_every_prompt_as_a_group() -> None:
    runtime(num_inference_per_prompt=2)
    assert train(["a", "b"]).trained == [["a", "a", "b", "b"]]


def test_the_order_of_an_episode() -> None:
    runtime(num_episode=2, save_episode_interval=1, enable_eval_before_training=True)
    order: list[str] = []

    class Noting(BaseModule):
        def setup(self) -> None:
            order.append(f"{self.name}.setup")
            self.model = torch.nn.Linear(1, 1)

        def load_state_dict(self, state: Any) -> None:
            order.append("sync")
            super().load_state_dict(state)

        def before_episode(self) -> None:
            order.append(f"{self.name}.before")

        def after_episode(self) -> None:
            order.append(f"{self.name}.after")

        def save_checkpoint(self, iteration: int) -> None:
            order.append(f"{self.name}.save")

        def forward_step(self, data: Batch) -> Batch:
            order.append("env")
            return data

        def eval_step(self, data: Batch) -> Batch:
            order.append("eval")
            return data

        def train_step(self, data_list: Any, iteration: int) -> None:
            order.append("train")

    a, b = Noting("a"), Noting("b")
    env, trainer = Environment(lambda x: a.forward_step(x)), Trainer(lambda x: b.train_step(x))
    evaluator = Evaluator(lambda x: a.eval_step(x)).set_dataset(["e"])
    engine = Engine(env, trainer, evaluator).set_parameter_sync(b, a).set_dataset(PROMPTS)
    engine.learn()
    episode = ["a.before", "b.before", "env", "train", "sync", "eval", "a.save", "b.save"]
    episode += ["a.after", "b.after"]
    assert order == ["a.setup", "b.setup", "sync", "eval", *episode, *episode]


def test_data_shuffle_reshuffles_every_pass_by_seed() -> None:
    def passes(seed: int) -> list[list[str]]:
        runtime(num_episode=3, data_shuffle=True, seed=seed)
        return train(PROMPTS).trained

    first = passes(1)
    assert all(sorted(order) == PROMPTS for order in first)
    assert first[0] != first[1] != first[2]
    assert passes(1) == first
    assert passes(2) != first


def test_several_datasets_are_taken_in_turn() -> None:
    runtime(num_episode=2, sample_per_episode=6, data_ratio=[1, 3])
    learner, echo = Learner(), Step("echo")
    env = Environment(lambda b: echo.forward_step(b))
    engine = Engine(env, Trainer(lambda b: learner.train_step(b)))
    engine.set_multiple_datasets([["a0", "a1"], ["b0", "b1", "b2", "b3"]]).learn()
    assert learner.trained == [
        ["a0", "b0", "b1", "b2", "a1", "b3"],
        ["b0", "b1", "a0", "b2", "b3", "b0"],
    ]


def test_an_engine_without_trainer_generates() -> None:
    step = Step("step")
    result = Engine(Environment(lambda b: step.forward_step(b))).set_dataset(PROMPTS).learn()
    assert step.prompts == PROMPTS
    assert (result.episodes, result.train_iteration) == (1, 0)


def test_an_engine_without_environment_trains_on_the_dataset() -> None:
    runtime(train_global_batch_size=4, train_micro_batch_size=2)
    learner = Learner()
    Engine(None, Trainer(lambda b: learner.train_step(b))).set_dataset(PROMPTS).learn()
    assert learner.steps == [[["p0", "p1"], ["p2", "p3"]], [["p4", "p5"], ["p6", "p7"]]]


def test_an_engine_with_an_evaluator_alone_evaluates() -> None:
    step = Step("step")
    evaluator = Evaluator(lambda b: step.eval_step(b)).set_dataset(PROMPTS)
    Engine(evaluator=evaluator).learn()
    assert step.prompts == PROMPTS


def test_replay_trains_on_the_last_episodes() -> None:
    runtime(num_episode=4, sample_per_episode=2, max_replay_episode=2, replay_episode_offset=1)
    assert train(PROMPTS).trained == [
        ["p0", "p1"],
        ["p2", "p3"],
        ["p2", "p3", "p4", "p5"],
        ["p4", "p5", "p6", "p7"],
    ]
