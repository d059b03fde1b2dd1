# SPDX-License-Identifier: Apache-2.0
"""Tracing: which graph a flow function has, and what is refused with the user's line."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from chatlearn import BaseModule, ControlDependencies
from chatlearn.errors import FlowError
from chatlearn.flow.graph import FEED
from chatlearn.flow.trace import check_names, trace


class Module(BaseModule):
    def forward_step(self, data: Any, iteration: int) -> Any:
        raise AssertionError("tracing never runs a step")

    def score(self, data: Any, scale: float = 1.0, *, mode: str = "x") -> Any: ...

    def needs(self, data: Any, other: Any) -> Any: ...

    def no_data(self) -> Any: ...

    def only_keywords(self, *, data: Any) -> Any: ...

    alias = forward_step


A, B, C = Module("a"), Module("b"), Module("c")


def shape(flow: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return [(node.name, node.inputs, node.after) for node in trace(flow).nodes]


def test_chain_fan_out_and_diamond() -> None:
    def flow(batch: Any) -> Any:
        a = A.forward_step(batch)
        return C.forward_step(B.forward_step(a), A.score(a), batch)

    assert shape(flow) == [
        ("a.forward_step", (FEED,), ()),
        ("b.forward_step", (0,), ()),
        ("a.score", (0,), ()),
        ("c.forward_step", (1, 2, FEED), ()),
    ]
    graph = trace(flow)
    assert graph.outputs == (3,)
    assert graph.modules == [A, B, C]
    assert [source for source, target, _ in graph.edges() if target == 3] == [1, 2, FEED]


def test_later_calls_are_numbered_and_aliases_keep_their_names() -> None:
    def flow(batch: Any) -> Any:
        return A.alias(A.forward_step(A.forward_step(batch)))

    assert [name for name, _, _ in shape(flow)] == ["a.forward_step", "a.forward_step#2", "a.alias"]


@pytest.mark.parametrize(
    ("flow", "outputs"),
    [
        (lambda b: print(A.score(b)), ()),
        (lambda b: A.score(b), (0,)),
        (lambda b: (A.score(b), B.score(b)), (0, 1)),
        (lambda b: [B.score(A.score(b))], (1,)),
        (lambda b: (A.score(b),) * 2, (0,)),
    ],
)
def test_what_a_flow_returns(flow: Any, outputs: tuple[int, ...]) -> None:
    assert trace(flow).outputs == outputs


def test_constants_by_position_and_keyword() -> None:
    def flow(batch: Any) -> Any:
        A.score(batch, 2.0, mode="y")
        A.score(scale=3.0, data=batch)

    first, second = trace(flow).nodes
    assert first.constants == {"scale": 2.0, "mode": "y"}
    assert second.constants == {"scale": 3.0}
    assert second.inputs == (FEED,)


def test_calls_without_symbols_are_ordinary() -> None:
    class Plain(Module):
        def double(self, x: int) -> int:
            return 2 * x

    plain = Plain("plain")
    seen: list[int] = []

    def flow(batch: Any) -> Any:
        seen.append(plain.double(21))
        return plain.score(batch)

    assert len(trace(flow).nodes) == 1
    assert seen == [42]


def test_places_are_the_users_lines() -> None:
    def flow(batch: Any) -> Any:
        return A.score(batch)

    (node,) = trace(flow).nodes
    line = flow.__code__.co_firstlineno + 1
    assert node.place == f"{__file__}:{line} in flow"


def test_control_dependencies_nest_and_lists_may_grow() -> None:
    def flow(batch: Any) -> Any:
        waits = [A.score(batch)]
        with ControlDependencies(waits):
            b = B.score(batch)
            with ControlDependencies(b):
                C.score(batch)
        A.forward_step(batch)

    assert [after for _, _, after in shape(flow)] == [(), (0,), (0, 1), ()]


def test_a_flow_that_fails_leaves_no_trace_behind() -> None:
    def broken(batch: Any) -> Any:
        with ControlDependencies(A.score(batch)):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trace(broken)
    assert A.alias.__self__ is A
    with pytest.raises(AssertionError, match="never runs"):
        A.forward_step({}, 0)
    assert shape(lambda b: A.score(b)) == [("a.score", (FEED,), ())]


def test_flows_as_partials_callables_and_with_defaults() -> None:
    class Callable:
        def __call__(self, batch: Any, times: int = 2) -> Any:
            for _ in range(times):
                batch = A.score(batch)
            return batch

    assert len(trace(Callable()).nodes) == 2
    assert len(trace(functools.partial(Callable(), times=3)).nodes) == 3


def no_module(batch: Any) -> Any: ...
def returns_batch(batch: Any) -> Any:
    A.score(batch)
    return batch


def returns_number(batch: Any) -> Any:
    A.score(batch)
    return 3


def branches(batch: Any) -> Any:
    while A.score(batch):
        batch = A.score(batch)


def unknown_method(batch: Any) -> Any:
    return A.forwards(batch)


def hook(batch: Any) -> Any:
    return A.build_dataset(batch)


def service(batch: Any) -> Any:
    return A.put("x", batch)


def inside_a_list(batch: Any) -> Any:
    return A.score([batch, {"x": A.score(batch)}])


def too_many_constants(batch: Any) -> Any:
    return A.score(batch, 1.0, 2.0)


def unknown_keyword(batch: Any) -> Any:
    return A.score(batch, colour="red")


def unfilled(batch: Any) -> Any:
    return A.needs(A.score(batch), B.score(batch))


def no_data(batch: Any) -> Any:
    return A.no_data(batch)


def keyword_data(batch: Any) -> Any:
    return A.only_keywords(data=batch)


def cycle(batch: Any) -> Any:
    waits = [A.score(batch)]
    with ControlDependencies(waits):
        waits.append(B.score(batch))


def waits_for_number(batch: Any) -> Any:
    with ControlDependencies(3):
        return A.score(batch)


def nameless(batch: Any) -> Any:
    return Module.__new__(Module).score(batch)


def two_arguments(batch: Any, other: Any) -> Any:
    return A.score(batch)


async def coroutine(batch: Any) -> Any:
    return A.score(batch)


def generator(batch: Any) -> Any:
    yield A.score(batch)


REFUSED = [
    (no_module, "calls no module"),
    (returns_batch, "returns its own batch"),
    (returns_number, "returns 3, which is no output"),
    (branches, "cannot branch on"),
    (unknown_method, "has no method 'forwards'"),
    (hook, "`build_dataset` of .* is a hook or service"),
    (service, "`put` of .* is a hook or service"),
    (inside_a_list, "symbolic values inside a list"),
    (too_many_constants, "takes no argument for the plain value 2.0"),
    (unknown_keyword, "takes no argument for the plain value 'red'"),
    (unfilled, "parameters that nothing fills: other"),
    (no_data, "takes no `data`"),
    (keyword_data, "takes no `data`"),
    (cycle, "nodes wait for each other: b.score -> b.score"),
    (waits_for_number, "ControlDependencies got 3"),
    (nameless, "has no name"),
    (two_arguments, "does not take exactly one batch"),
    (coroutine, "coroutine or generator"),
    (generator, "coroutine or generator"),
    (3, "must be a function"),
]


@pytest.mark.parametrize(("flow", "what"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_refused(flow: Any, what: str) -> None:
    with pytest.raises(FlowError, match=what) as raised:
        trace(flow)
    if callable(flow):
        file, line = raised.value.place.split(" ")[0].rsplit(":", 1)
        first = flow.__code__.co_firstlineno
        assert file == __file__
        assert first <= int(line) <= first + 4


def test_values_of_another_flow_are_refused() -> None:
    kept: list[Any] = []
    trace(lambda b: kept.append(A.score(b)))
    with pytest.raises(FlowError, match="comes from another flow"):
        trace(lambda b: A.score(b, kept[0]))
    with pytest.raises(FlowError, match="no output of a node of this flow"):
        trace(lambda b: ControlDependencies(kept[0]).__enter__() and A.score(b))


def test_control_dependencies_outside_a_flow() -> None:
    with pytest.raises(FlowError, match="outside a flow"):
        ControlDependencies([]).__enter__()


def test_names_are_unique_over_flows() -> None:
    one, two = trace(lambda b: A.score(b)), trace(lambda b: B.score(A.score(b)))
    assert check_names([one, two]) == [A, B]
    with pytest.raises(FlowError, match="two modules have the name 'a'") as raised:
        check_names([one, trace(lambda b: Module("a").score(b))])
    assert raised.value.place.count(__file__) == 2
