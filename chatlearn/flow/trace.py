# SPDX-License-Identifier: Apache-2.0
"""Learn a flow's graph by executing its function once on a symbolic batch.

Flows are executed, never parsed: while the function runs, a call of a `BaseModule` method on a symbolic value is
recorded as a node (see `module.py` for how the call is noticed); everything else is ordinary Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, cast

from chatlearn.errors import FlowError
from chatlearn.flow.graph import FEED, FlowGraph, Node
from chatlearn.flow.symbol import Symbol, raising_place, user_place
from chatlearn.module import BaseModule, may_be_node
from chatlearn.tracing import ACTIVE_TRACER

Flow = Callable[..., Any]


def trace(flow: Flow, name: str | None = None) -> FlowGraph:
    """Run `flow` on a symbolic batch and return its graph.

    Raises:
        FlowError: the function is no flow (calls no module, returns something that is no node, takes other
            arguments than one batch), or uses symbolic values in a way that needs data.
    """
    name = name or str(getattr(flow, "__name__", type(flow).__name__))
    _check_signature(flow, name)
    tracing = _Trace(name)
    token = ACTIVE_TRACER.set(tracing)
    dependencies = _CONTROL.set(())
    try:
        returned = flow(Symbol(tracing, FEED, f"batch of {name}"))
    except AttributeError as error:
        if isinstance(error, FlowError) or not isinstance(error.obj, BaseModule):
            raise
        raise FlowError(
            f"{error.obj!r} has no method {error.name!r}",
            place=raising_place(error),
            fix=f"define `def {error.name}(self, data)` on {type(error.obj).__name__}",
        ) from error
    finally:
        _CONTROL.reset(dependencies)
        ACTIVE_TRACER.reset(token)
    return tracing.finish(returned, _place_of(flow))


def check_names(graphs: Iterable[FlowGraph]) -> list[BaseModule]:
    """Return the distinct modules of several flows.

    Raises:
        FlowError: two different modules have one name, or a name can be no folder.
    """
    by_name: dict[str, BaseModule] = {}
    places: dict[str, str] = {}
    for graph in graphs:
        for node in graph.nodes:
            other = by_name.setdefault(node.module.name, node.module)
            places.setdefault(node.module.name, node.place)
            if node.module.name in (".", "..") or set(node.module.name) & set("/\\\0"):
                raise FlowError(
                    f"the name {node.module.name!r} of a module can be no folder, which checkpoints make of it",
                    place=node.place,
                    fix="leave slashes out",
                )
            if other is not node.module:
                raise FlowError(
                    f"two modules have the name {node.module.name!r}: {other!r} and {node.module!r}",
                    place=f"{places[node.module.name]} and {node.place}",
                    fix="give each module its own name; configuration and results are kept by name",
                )
    return list(by_name.values())


class ControlDependencies:
    """Order nodes that share no data: nodes inside run a batch only after `values` finished that batch.

    Example:
        >>> def env_flow(batch):
        ...     rollout = policy.forward_step(batch)
        ...     with ControlDependencies(rollout):
        ...         logger.forward_step(batch)
        ...     return rollout
    """

    def __init__(self, values: Any) -> None:
        self._values = values
        self._place = user_place()

    def __enter__(self) -> ControlDependencies:
        if ACTIVE_TRACER.get() is None:
            raise FlowError(
                "ControlDependencies was entered outside a flow",
                place=self._place,
                fix="use it inside env_flow, trainer_flow or eval_flow",
            )
        self._token = _CONTROL.set((*_CONTROL.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        _CONTROL.reset(self._token)

    def nodes(self, trace: _Trace) -> list[int]:
        """Return the nodes waited for; a list is read at the end of the trace, with what was added by then."""
        found: list[int] = []
        for value in _listed(self._values):
            if not isinstance(value, Symbol) or value.trace is not trace:
                raise FlowError(
                    f"ControlDependencies got {value!r}, which is no output of a node of this flow",
                    place=self._place,
                    fix="pass what a module's step method returned in this flow",
                )
            if value.node != FEED:
                found.append(value.node)
        return found


_CONTROL: ContextVar[tuple[ControlDependencies, ...]] = ContextVar("chatlearn_control", default=())


class _Trace:
    """Collect the nodes of one flow while its function runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[Node] = []
        self._waits: list[tuple[ControlDependencies, ...]] = []
        self._calls: dict[str, int] = {}
        self.refused: FlowError | None = None
        """The first use of a symbol that was refused."""

    def is_symbolic(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(_holds_symbol(value) for value in (*args, *kwargs.values()))

    def record(
        self, module: BaseModule, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Symbol:
        place = user_place()
        if "name" not in vars(module):
            raise FlowError(
                f"a {type(module).__name__} has no name",
                place=place,
                fix="call super().__init__(name) in its constructor",
            )
        if not may_be_node(module, method):
            raise FlowError(
                f"`{method}` of {module!r} is a hook or service of modules, not a step",
                place=place,
                fix="call forward_step, train_step, eval_step or a method of your own",
            )
        inputs: list[int] = []
        constants: dict[str, Any] = {}
        for key, value in _named_arguments(module, method, args, kwargs, place):
            if isinstance(value, Symbol):
                if value.trace is not self:
                    raise FlowError(
                        f"{value!r} comes from another flow",
                        place=place,
                        fix="pass values between flows through what the environment flow returns",
                    )
                inputs.append(value.node)
            elif _holds_symbol(value):
                raise FlowError(
                    f"{module.name}.{method} got symbolic values inside a {type(value).__name__}",
                    place=place,
                    fix="pass them as separate arguments; the engine merges them into one batch",
                )
            elif key == "iteration":
                raise FlowError(
                    f"{module.name}.{method} got iteration={value!r}, but the engine counts iterations",
                    place=place,
                    fix="leave it out, or give the parameter another name",
                )
            elif key is None:
                raise FlowError(
                    f"{module.name}.{method} takes no argument for the plain value {value!r}",
                    place=place,
                    fix=f"add a parameter to {type(module).__name__}.{method} or leave the value out",
                )
            else:
                constants[key] = value
        index = len(self._nodes)
        name = f"{module.name}.{method}"
        count = self._calls[name] = self._calls.get(name, 0) + 1
        name = name if count == 1 else f"{name}#{count}"
        node = Node(
            index, name, module, method, tuple(inputs), (), constants, turn=count - 1, place=place
        )
        self._nodes.append(node)
        self._waits.append(_CONTROL.get())
        return Symbol(self, index, f"output of {name}")

    def finish(self, returned: Any, place: str) -> FlowGraph:
        if self.refused is not None:
            raise self.refused
        if not self._nodes:
            raise FlowError(
                f"the flow {self.name} calls no module",
                place=place,
                fix="call a BaseModule's step method with the batch, e.g. policy.forward_step(batch)",
            )
        nodes = [
            replace(node, after=tuple(sorted({i for c in waits for i in c.nodes(self)})))
            for node, waits in zip(self._nodes, self._waits, strict=True)
        ]
        _refuse_cycles(nodes)
        return FlowGraph(self.name, tuple(nodes), self._outputs(returned, place))

    def _outputs(self, returned: Any, place: str) -> tuple[int, ...]:
        if returned is None:
            return ()
        values = _listed(returned)
        for value in values:
            if not isinstance(value, Symbol) or value.trace is not self or value.node == FEED:
                is_foreign = isinstance(value, Symbol) and value.trace is not self
                is_batch = isinstance(value, Symbol) and not is_foreign
                what = (
                    "its own batch" if is_batch else f"{value!r}{' of another flow' * is_foreign}"
                )
                raise FlowError(
                    f"the flow {self.name} returns {what}, which is no output of a node",
                    place=place,
                    fix="return what modules' step methods returned: `return a`, `return a, b` or nothing",
                )
        return tuple(dict.fromkeys(value.node for value in values))


def _listed(value: Any) -> Sequence[Any]:
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else [value]


def _holds_symbol(value: Any) -> bool:
    if isinstance(value, Symbol):
        return True
    if isinstance(value, dict):
        return any(_holds_symbol(v) for v in cast("dict[Any, Any]", value).values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(_holds_symbol(v) for v in cast("Iterable[Any]", value))
    return False


def _named_arguments(
    module: BaseModule, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: str
) -> list[tuple[str | None, Any]]:
    """Pair plain positional values with the parameters that follow `data` (and `iteration`, which is ours)."""
    function = inspect.getattr_static(module, method)
    function = function.__func__ if isinstance(function, staticmethod) else getattr(module, method)
    if isinstance(function, partial):  # a plain function kept on the module, wrapped while tracing
        function = vars(module).get(method, function)
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise FlowError(
            f"{module.name}.{method} takes no `data`",
            place=place,
            fix=f"give it a parameter: def {method}(self, data)",
        )
    free = [
        p.name
        for p in parameters[1:]
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and p.name != "iteration"
    ]
    named: list[tuple[str | None, Any]] = []
    for value in args:
        if _holds_symbol(value):
            named.append(("", value))
        else:
            named.append((free.pop(0) if free else None, value))
    unfilled = [
        p.name
        for p in parameters[1:]
        if p.default is inspect.Parameter.empty
        and p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and p.name not in ("iteration", *kwargs, *(key for key, _ in named))
    ]
    if unfilled:
        raise FlowError(
            f"{module.name}.{method} has parameters that nothing fills: {', '.join(unfilled)}",
            place=place,
            fix=f"take one merged batch: def {method}(self, data); several inputs become one dict of columns",
        )
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters[1:]}
    for key, value in kwargs.items():
        accepted = _holds_symbol(value) or takes_any or key in known
        named.append((key if accepted else None, value))
    return named


def _check_signature(flow: Flow, name: str) -> None:
    if not callable(flow):
        raise FlowError(
            f"a flow must be a function of one batch, not {flow!r}",
            place=user_place(),
            fix=f"write `def {name}(batch): ...` and give the function itself",
        )
    place = _place_of(flow)
    if inspect.iscoroutinefunction(flow) or inspect.isgeneratorfunction(flow):
        raise FlowError(
            f"the flow {name} is a coroutine or generator function",
            place=place,
            fix="make it a plain function; step methods themselves may be `async def`",
        )
    try:
        inspect.signature(flow).bind(object())
    except TypeError:
        raise FlowError(
            f"the flow {name} does not take exactly one batch",
            place=place,
            fix=f"write `def {name}(batch): ...`; modules come from the surrounding scope",
        ) from None


def _refuse_cycles(nodes: list[Node]) -> None:
    """Data edges always point backwards, so a cycle needs a control dependency on a later node."""
    state = dict.fromkeys(range(len(nodes)), 0)

    def visit(index: int, path: list[int]) -> None:
        if state[index] == 2:
            return
        path = [*path, index]
        if state[index] == 1:
            cycle = path[path.index(index) :]
            raise FlowError(
                "nodes wait for each other: " + " -> ".join(nodes[i].name for i in cycle),
                place=nodes[index].place,
                fix="take one of them out of its `with ControlDependencies(...)` block",
            )
        state[index] = 1
        for source in (*nodes[index].inputs, *nodes[index].after):
            if source != FEED:
                visit(source, path)
        state[index] = 2

    for index in range(len(nodes)):
        visit(index, [])


def _place_of(flow: Flow) -> str:
    code = getattr(inspect.unwrap(flow), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(flow)
