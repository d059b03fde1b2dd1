# SPDX-License-Identifier: Apache-2.0
"""`BaseModule`: what a user implements, and how a call of it inside a flow becomes a node.

A public method that is called with a symbolic value while a flow is being traced is recorded instead of run. That
is decided when the bound method is *called*, so a method that was bound earlier, in a closure or a `partial`, is
recorded too, and `super().forward_step(...)` inside a method never is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeGuard, cast

from chatlearn.config import Config as RunConfig
from chatlearn.config import ModuleConfig, active
from chatlearn.errors import ChatLearnError, ConfigError, EngineError, ModuleError
from chatlearn.tracing import ACTIVE_TRACER, traceable, traceable_static

if TYPE_CHECKING:
    from torch import Tensor, nn

    from chatlearn.flow.declaration import Declaration

BatchBy = Literal["sample", "group", "episode"]


@dataclass
class ModuleState:
    """What the engine keeps about a module, in one attribute so that no name of a user's class can collide."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    config: ModuleConfig | None = None
    padding: dict[str, tuple[float, Literal["left", "right"]]] = field(
        default_factory=dict[str, tuple[float, Literal["left", "right"]]]
    )
    shared: dict[str, Any] = field(default_factory=dict[str, Any])
    """Values that all modules of an engine share."""
    metrics: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """What the current call has logged."""
    failure: str = ""
    """Why the current call marks samples as failed in its `outcome` column."""
    recorded: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What the current train step tells the run's record per micro-batch, columns of it; no flow sees them."""
    turn: int = 0
    """Which call of its method in the flow the current one is: part of the key of a sample's random numbers."""
    own_columns: frozenset[str] = frozenset()
    """Columns of the current call that came from the module's namespace, as the module calls them."""
    is_set_up: bool = False
    """Whether `setup()` has run since the module was last released."""
    was_ever_set_up: bool = False
    """Whether `setup()` has ever run: what it made may still be there, of a configuration that is no more."""
    has_lost_weights: bool = False
    """Whether weights that it had received were released since: a further `setup()` makes others."""
    is_running: bool = False
    """Whether a `learn()` under way uses the module."""


def state_of(module: BaseModule) -> ModuleState:
    """Return what the engine keeps about a module; made late, for classes that never call `super().__init__`."""
    state = module.__dict__.get("_chatlearn")
    if state is None:
        state = module.__dict__["_chatlearn"] = ModuleState()
    return state


class BaseModule:
    """One participant of a flow: a policy, a reference, a reward, a trainer, or anything with step methods.

    Construct it cheaply, anywhere; make weights and other heavy state in `setup()`, which runs once per replica
    where the module lives. A step method takes `data` (a dict of columns, batch first; its own copy, free to change)
    and, if its signature has it, `iteration`; it returns a dict of columns, or nothing.

    Example:
        >>> class Doubler(BaseModule):
        ...     def forward_step(self, data):
        ...         data["twice"] = [2 * x for x in data["prompt"]]
        ...         return data
        >>> doubler = Doubler("doubler")
    """

    Config: ClassVar[type[ModuleConfig]] = ModuleConfig
    """The pydantic model of `models.<name>`; a subclass may declare its own, derived from `ModuleConfig`."""
    batch_by: ClassVar[BatchBy] = "sample"
    """On what granularity a step may be called: any micro-batch, whole groups, or the whole episode."""
    filters_samples: ClassVar[bool] = False
    """Whether a step may return fewer samples than it got; the kept ones must bring their `uid` column."""
    writes: ClassVar[Collection[str] | None] = None
    """The columns that steps add or replace; a name stands for its parts, too (`rewards` for `rewards/<function>`).
    Needed by modules with a `namespace`: these columns leave as `<namespace>/<column>`."""
    reads: ClassVar[Collection[str] | None] = None
    """The columns that steps cannot do without, for the flow checker; None says nothing. A mapping of either gives
    kinds (`chatlearn.columns.KINDS`). `@declares` says it of one method, `describe_columns` where it depends."""
    shares_weights: ClassVar[bool] = False
    """Whether a sync within one process may let this class share storage instead of copying: as a source it changes
    its weights in train steps only, as a destination never. Subclasses do not inherit it; they declare it anew."""

    model: nn.Module | None = None
    """Where parameter sync and checkpoints find the weights, unless `state_dict` is overridden."""
    replica_id: int = 0
    """Which copy of the module this is; given by the engine."""
    policy_version: int = 0
    """Parameter syncs received; counted by the engine."""

    progress: Callable[[int], None] | None = None
    """Set by the engine: a step that takes long may call it with the tokens it has just produced."""

    def __init__(self, name: str, **settings: Any) -> None:
        """Name the module; `settings` are fields of `Config`, overruled by `models.<name>` of the configuration."""
        if not isinstance(name, str) or not name:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"a module's name must be a non-empty string, not {name!r}",
                fix=f'write {type(self).__name__}("some_name")',
            )
        self.name = name
        state_of(self).settings = settings

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self).get('name')!r})"

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if type(value) is MethodType and value.__self__ is self and not name.startswith("__"):
            return MethodType(traceable(value.__func__, name), self)
        if type(value) is FunctionType and ACTIVE_TRACER.get() is not None:  # a static method
            return functools.partial(traceable_static(value, name), self)
        return value

    # ---- configuration -------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The resolved, typed configuration: defaults < constructor settings < YAML < overrides."""
        own = vars(self)
        return own["config"] if "config" in own else resolved_config(self)

    @config.setter
    def config(self, value: Any) -> None:
        vars(self)["config"] = value  # a user's own attribute; the engine reads `resolved_config`

    # ---- hooks a user may override -------------------------------------------------------------------------------

    def check_config(self) -> list[ChatLearnError]:
        """Return what can be found wrong without loading weights; called before anything expensive starts."""
        return []

    def setup(self) -> None:
        """Make weights and other heavy state; runs once per replica, where the module lives."""

    def build_dataset(self, prompts: Sequence[Any], is_eval: bool = False) -> Any:
        """Return a torch-style dataset (optionally with `collate_fn`) over `prompts`, or None for the default one."""
        return None

    def check_rows(self, rows: Sequence[Any]) -> None:
        """Refuse rows of the dataset that this module, as the first of a flow, cannot use.

        Called after `setup()` and before the first episode, if `build_dataset` returned nothing; raise a `DataError`.
        """

    def before_episode(self) -> None:
        """Run before every episode."""

    def after_episode(self) -> None:
        """Run after every episode."""

    def save_checkpoint(self, iteration: int) -> None:
        """Save what the engine cannot see, after `iteration` train steps."""

    def load_checkpoint(self, iteration: int) -> None:
        """Load what `save_checkpoint(iteration)` saved."""

    def onload(self) -> None:
        """Bring weights and state to the device."""

    def offload(self) -> None:
        """Take weights and state off the device."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the named tensors that parameter sync and checkpoints carry (of `self.model`, if there is one)."""
        if has_model(self):
            return self.model.state_dict()
        inherited = getattr(super(), "state_dict", None)  # of a class that is a torch module itself
        return inherited() if inherited is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over named tensors, in place."""
        if has_model(self):
            self.model.load_state_dict(state)
        elif (inherited := getattr(super(), "load_state_dict", None)) is not None:
            inherited(state)

    def training_state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides `state_dict()` (optimiser, schedule); tensors and plain values."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what `training_state()` returned."""

    def describe_columns(self, method: str) -> Declaration | None:
        """Return what the step `method` reads and writes, where that depends on the configuration.

        Called before `setup()`, once per call in a flow. None says that the class attributes hold.
        """
        return None

    def describe_parameters(self) -> Mapping[str, Tensor] | None:
        """Return what `state_dict()` will hold, as tensors without data (device `meta`), before `setup()` has run.

        None, or nothing in it, says that it is not known; it must load no weights. `chatlearn check` compares both
        ends of a sync.
        """
        return None

    def probe_logprobs(self, token_ids: Tensor) -> Tensor | None:
        """Return the log-probs of `token_ids[1:]` given what stands before each, with the weights as they are now.

        The engine asks both ends of a parameter sync and compares them. None says that the module cannot tell.

        Args:
            token_ids: int64 `[T]`, on the CPU, T of 2 or more: tokens that both ends have, as far as
                `self.model.get_input_embeddings()` or an `nn.Embedding` in it tells.

        Returns:
            float32 `[T - 1]`, nats, at temperature 1, made by the computation that the module's steps use.
        """
        return None

    def export_model(self, folder: Path) -> bool:
        """Write the model to `folder` in a format others can load; tell whether there was anything to write."""
        return False

    # ---- services for the user's methods ---------------------------------------------------------------------------

    def put(self, key: str, value: Any) -> None:
        """Share a value with all modules of the engine."""
        state_of(self).shared[key] = value

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value that some module shared under `key`, else `default`."""
        return state_of(self).shared.get(key, default)

    def log(self, metrics: Mapping[str, float] | None = None, /, **more: float) -> None:
        """Report numbers of this call; the engine averages them over the episode's calls and logs them.

        Names that end in `_tokens` are summed, those in `_max` and `_min` take the extreme.
        """
        given = {**(metrics or {}), **more}
        state_of(self).metrics.append({name: _as_float(value) for name, value in given.items()})

    def add_padding_config(
        self, key: str, value: float, side: Literal["left", "right"] = "right"
    ) -> None:
        """Have column `key` of ragged tensors padded with `value` on `side` whenever this module receives it."""
        place = f"add_padding_config({key!r}) of module {self.name!r}"
        if side not in ("left", "right"):
            raise ConfigError(
                f"padding side must be 'left' or 'right', not {side!r}",
                place=place,
                fix="say which end of a sequence is filled up",
            )
        if not isinstance(value, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"a padding value is one number, not {value!r}",
                place=place,
                fix="give the number to fill up with, e.g. the tokenizer's pad_token_id",
            )
        state_of(self).padding[key] = (value, side)


_SERVICES = frozenset({"put", "get", "log", "add_padding_config"})
_HOOKS = frozenset(
    name for name, value in vars(BaseModule).items() if callable(value) and not name.startswith("_")
)


def has_model(module: BaseModule) -> TypeGuard[_WithModel]:
    """Tell whether `self.model` is a torch module (a user may keep a path, or an engine of another kind there)."""
    return hasattr(module.model, "state_dict") and hasattr(module.model, "named_parameters")


def may_have_weights(module: BaseModule) -> bool:
    """Tell whether a module has parameters, or may have some after `setup()`."""
    kind = type(module)
    overrides = any(
        getattr(kind, name) is not getattr(BaseModule, name) for name in ("setup", "state_dict")
    )
    return overrides or has_model(module)


def call_hook(module: BaseModule, name: str, *args: Any) -> Any:
    """Call a hook where no worker does (weights, checks); what it raises names the module."""
    try:
        return getattr(module, name)(*args)
    except ChatLearnError:
        raise
    except Exception as error:
        raise ModuleError(
            f"{type(error).__name__}: {error}\n  module: {module.name} ({type(module).__name__})\n"
            f"  method: {name}\n  replica: {module.replica_id}"
        ) from error


def mark_running(modules: Iterable[BaseModule], is_running: bool) -> None:
    """Say of modules that a `learn()` uses them, or no longer."""
    for module in modules:
        state_of(module).is_running = is_running


def refuse_running(modules: Iterable[BaseModule]) -> None:
    """Refuse modules that a `learn()` under way uses: it would find them set up anew under its feet."""
    for module in modules:
        if state_of(module).is_running:
            raise EngineError(
                f"module {module.name!r} belongs to a learn() that is still under way",
                fix="let it end first, or give the other engine modules of its own",
            )


def _as_float(value: Any) -> float:
    return float(value.detach() if hasattr(value, "detach") else value)


class _WithModel(Protocol):
    model: nn.Module


def resolve_config(module: BaseModule, config: RunConfig) -> ModuleConfig:
    """Resolve a module's configuration anew.

    Raises:
        ConfigError: fields are unknown or mistyped, or a class whose columns are unknown is given a namespace.
    """
    state = state_of(module)
    resolved = config.module(module.name, type(module).Config, state.settings)
    if resolved.namespace is not None:
        _check_namespace(module, resolved.namespace, config)
    state.config = resolved
    return resolved


def written_columns(module: BaseModule) -> frozenset[str]:
    """Return the columns that a module's class declares as written."""
    return frozenset(module.writes or ())


def _check_namespace(module: BaseModule, namespace: str, config: RunConfig) -> None:
    key = f"models.{module.name}.namespace"
    place, kind = f"{config.provenance(key)} {key}", type(module).__name__
    if not namespace.strip("."):
        raise ConfigError(f"{namespace!r} is no name", place=place, fix="use letters, e.g. solver")
    declared: Any = module.writes
    fix = f"declare them in class {kind}, e.g. writes = frozenset({{'rewards'}}); frozenset() if there are none"
    if declared is None:
        raise ConfigError(
            f"module {module.name!r} has the namespace {namespace!r}, but {kind} does not say which columns it writes",
            place=place,
            fix=fix,
        )
    is_set = isinstance(declared, Collection) and not isinstance(declared, str | bytes)
    if not is_set or not all(isinstance(name, str) for name in cast("Collection[Any]", declared)):
        raise ConfigError(
            f"{kind}.writes is {declared!r}, no set of column names", place=place, fix=fix
        )


def resolved_config(module: BaseModule) -> ModuleConfig:
    """Return a module's configuration, whatever its class does with the attribute `config`."""
    return state_of(module).config or resolve_config(module, active())


def may_be_node(module: BaseModule, method: str) -> bool:
    """Tell whether a method is a step: no hook, and no service of `BaseModule` unless the user redefined it."""
    if method in _SERVICES:
        return getattr(type(module), method) is not getattr(BaseModule, method)
    return method not in _HOOKS
