# SPDX-License-Identifier: Apache-2.0
"""Modules and the workers that call them: what a step gets, what it logs, what an error says."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
import torch

import chatlearn
from chatlearn import BaseModule, ConfigError, ModuleError
from chatlearn.module import may_be_node, resolve_config, state_of
from chatlearn.runtime.local import LocalRuntime
from chatlearn.runtime.worker import EventLoop, Where, Worker, describe_uids, reduce_metrics


class Module(BaseModule):
    def forward_step(self, data: Any, iteration: int) -> Any:
        return data, iteration

    def plain(self, data: Any, **constants: Any) -> Any:
        return data, constants

    async def wait(self, data: Any) -> Any:
        await asyncio.sleep(0)
        return data

    def fail(self, data: Any) -> Any:
        raise ValueError("original\nof two lines")

    def own_error(self, data: Any) -> Any:
        raise ConfigError("cause", place="place", fix="fix")


def worker(module: BaseModule | None = None) -> Worker:
    return Worker(module or Module("m"), EventLoop())


def step(method: str, data: Any, /, **constants: Any) -> Any:
    return worker().step(method, data, 7, constants, Where(3, [4, 5]))


def test_a_step_gets_data_and_iteration_if_it_asks() -> None:
    assert step("forward_step", {"x": [1]}).value == ({"x": [1]}, 7)
    assert step("plain", {"x": [1]}, method="a", where="b", function="c").value[1] == {
        "method": "a",
        "where": "b",
        "function": "c",
    }


def test_a_coroutine_is_waited_for() -> None:
    assert step("wait", {"x": [1]}).value == {"x": [1]}


def test_padding_reaches_every_micro_batch() -> None:
    module = Module("m")
    module.add_padding_config("x", -1, "left")
    data = [{"x": [torch.tensor([1]), torch.tensor([1, 2])]}, {"x": [torch.tensor([3])]}]
    worker(module).step("forward_step", data, 0, {}, Where())
    assert data[0]["x"].tolist() == [[-1, 1], [1, 2]]  # type: ignore[attr-defined]
    assert data[1]["x"].tolist() == [[3]]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="'left' or 'right', not 'both'"):
        module.add_padding_config("x", 0, "both")  # type: ignore[arg-type]


def test_errors_end_with_everything() -> None:
    with pytest.raises(ModuleError) as raised:
        step("fail", {})
    assert str(raised.value).splitlines() == [
        "ValueError: original",
        "of two lines",
        "  module: m (Module)",
        "  method: fail",
        "  replica: 0",
        "  episode: 3",
        "  samples: uid 4, 5 (2 in all)",
    ]
    with pytest.raises(ModuleError, match="cause\n  at: place\n  fix: fix\n  module: m"):
        step("own_error", {})
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value)


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit(3), asyncio.CancelledError()])
@pytest.mark.parametrize("is_async", [False, True])
def test_leaving_the_script_from_a_step_or_hook_is_an_error(
    error: BaseException, is_async: bool
) -> None:
    class Leaves(BaseModule):
        def forward_step(self, data: Any) -> Any:
            return self.later() if is_async else self.setup()

        def setup(self) -> None:
            raise error

        async def later(self) -> None:
            raise error

    using = worker(Leaves("judge"))
    with pytest.raises(ModuleError) as raised:
        using.step("forward_step", {}, 0, {}, Where(2, [7]))
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{type(error).__name__}: {error}"
    assert lines[1:] == [
        "  module: judge (Leaves)",
        "  method: forward_step",
        "  replica: 0",
        "  episode: 2",
        "  samples: uid 7",
    ]
    assert isinstance(raised.value.__cause__, type(error))
    with pytest.raises(ModuleError, match="method: setup"):
        using.hook("setup")
    using._loop.close()


def test_an_exception_that_cannot_be_printed_is_still_placed() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    class Bad(Module):
        def fail(self, data: Any) -> Any:
            raise Mute

    with pytest.raises(ModuleError, match=r"Mute \(its message cannot be printed\)\n  module: m"):
        worker(Bad("m")).step("fail", {}, 0, {}, Where())


def test_uids_for_people() -> None:
    assert describe_uids([3]) == "uid 3"
    assert describe_uids(range(40)).startswith("uid 0, 1, 2")
    assert describe_uids(range(40)).endswith("15, ..., 39 (40 in all)")


def test_what_a_call_logs_several_times_becomes_one() -> None:
    logged = [
        {"a": 1.0, "n_tokens": 2, "x_max": 1, "x_min": 1},
        {"a": 3.0, "n_tokens": 5, "x_max": 4, "x_min": 4},
    ]
    assert reduce_metrics(logged) == {"a": 2.0, "n_tokens": 7, "x_max": 4, "x_min": 1}


# ---- modules --------------------------------------------------------------------------------------


def test_names_are_non_empty_strings() -> None:
    for name in ("", None, 3):
        with pytest.raises(ConfigError, match="non-empty string"):
            Module(name)  # type: ignore[arg-type]


def test_hooks_and_services_are_no_nodes_unless_redefined() -> None:
    class Redefining(Module):
        def put(self, data: Any) -> Any: ...  # type: ignore[override]

    assert may_be_node(Module("m"), "forward_step")
    assert not may_be_node(Module("m"), "setup")
    assert not may_be_node(Module("m"), "put")
    assert may_be_node(Redefining("m"), "put")


def test_configuration_is_typed_and_resolved() -> None:
    config = chatlearn.init({"models": {"m": {"generation_batch_size": 4}}})
    module = Module("m", num_cpu=2)
    assert (module.config.generation_batch_size, module.config.num_cpu) == (4, 2)
    with pytest.raises(ConfigError, match="generation_batch_sise"):
        resolve_config(Module("m", generation_batch_sise=1), config)


def test_own_attributes_never_collide() -> None:
    module = Module("m")
    module.config = {"mine": 1}
    module.model = "a path"  # type: ignore[assignment]
    assert module.config == {"mine": 1}
    assert module.state_dict() == {}
    module.load_state_dict({})
    assert resolve_config(module, chatlearn.init()).num_replica == 1
    assert [name for name in vars(module) if name.startswith("_")] == ["_chatlearn"]


def test_replicas_are_copies_that_share_values() -> None:
    chatlearn.init({"models": {"m": {"num_replica": 3}}})
    module, other = Module("m"), Module("other")
    lock = object()
    module.put("lock", lock)
    runtime = LocalRuntime([module, other])
    replicas = [w.module for w in runtime.workers["m"]]
    assert [r.replica_id for r in replicas] == [0, 1, 2]
    assert replicas[0] is module
    replicas[2].put("late", 1)
    assert all(m.get("lock") is lock and m.get("late") == 1 for m in [*replicas, other])
    runtime.close()
    runtime.close()


def test_a_module_that_cannot_be_copied() -> None:
    import threading

    chatlearn.init({"models": {"m": {"num_replica": 2}}})
    module = Module("m")
    module.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"cannot be copied for num_replica > 1(.*\n)*.*setup\(\)"
    ):
        LocalRuntime([module])


def test_set_up_once_until_released() -> None:
    calls: list[str] = []

    class Counted(Module):
        def setup(self) -> None:
            calls.append("setup")

    one = worker(Counted("m"))
    one.set_up(anew=False)
    one.set_up(anew=False)
    one.module.policy_version = 5
    one.release()
    assert one.module.policy_version == 0
    one.set_up(anew=False)
    assert calls == ["setup"] * 2


def test_a_setup_that_fails_is_tried_again() -> None:
    class Flaky(Module):
        tries = 0

        def setup(self) -> None:
            self.tries += 1
            if self.tries == 1:
                raise OSError("once")

    flaky = worker(Flaky("m"))
    with pytest.raises(ModuleError, match="method: setup\n  replica: 0\n  episode: none yet"):
        flaky.set_up()
    assert not state_of(flaky.module).is_set_up
    flaky.set_up()
