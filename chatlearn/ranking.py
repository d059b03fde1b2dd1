# SPDX-License-Identifier: Apache-2.0
"""By which metric checkpoints are ranked (`runtime.keep_best`), and what can be wrong with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from chatlearn.config_problems import closest
from chatlearn.errors import ConfigError
from chatlearn.observability.headline import ACCURACY, EVAL, REWARD, find_key
from chatlearn.program import Program

_KEY = "runtime.best_metric"


def score(program: Program, metrics: Mapping[str, float]) -> float | None:
    """Return by what a checkpoint is ranked, the higher the better.

    Args:
        program: whose `runtime.best_metric` counts; None takes what the evaluation is for.
        metrics: of the checkpoint's episode.

    Returns:
        None if that episode did not measure it.
    """
    given = program.config.runtime.best_metric
    if given is None:
        measured = [name for name in metrics if name.startswith(EVAL)]
        given = find_key(measured, ACCURACY) or find_key(measured, REWARD)
    value = metrics.get((given or "").removeprefix("-"))
    return -value if value is not None and given and given.startswith("-") else value


def needs_evaluation(program: Program) -> bool:
    """Tell whether the metric is one of evaluations, which not every episode has."""
    return (program.config.runtime.best_metric or EVAL).removeprefix("-").startswith(EVAL)


def unknown_metric(program: Program, names: Collection[str]) -> ConfigError:
    """Return the error for a metric that is none of `names`."""
    given, shown = program.config.runtime.best_metric, sorted(names)
    what = (
        "runtime.keep_best finds no accuracy and no reward in the evaluation"
        if given is None
        else f"runtime.best_metric={given!r} is no metric of this run"
    )
    near = closest((given or "").removeprefix("-"), shown)
    return ConfigError(
        f"{what}; there are: {', '.join(shown) or 'none'}",
        place=program.place_of(_KEY),
        fix=f"did you mean {near!r}?" if near else "set runtime.best_metric to one of them",
    )


def check_best_metric(program: Program) -> None:
    """Refuse a metric for `runtime.keep_best` of which it is known now that nothing measures it."""
    runtime = program.config.runtime
    if runtime.keep_best is None or program.data_owner is None:
        return
    name = (runtime.best_metric or EVAL).removeprefix("-")
    if not needs_evaluation(program):
        known = [module.name for module in program.modules]
        owner = name.split("/", 1)[0].split(".", 1)[0]
        if owner not in known and (near := closest(owner, known)):
            _refuse(program, f"no module is called {owner!r}", f"did you mean {near!r}?")
        return
    if program.evaluator is None:
        _refuse(
            program,
            "it is measured by evaluations, and there is no evaluator",
            "give the engine an Evaluator, or name a metric of training, e.g. "
            "runtime.best_metric=reward/rewards",
        )
        return
    graph = program.graphs.get(program.evaluator.flow_name)
    makes_its_own = getattr(program.evaluator, "post_process", None) is not None
    owner = name.removeprefix(EVAL).split("/", 1)[0]
    if graph is None or makes_its_own or runtime.best_metric is None:
        return
    known = [module.name for module in graph.modules]
    known += program.evaluator.names if len(program.evaluator.names) > 1 else []
    if owner.split(".", 1)[0] not in known and owner not in known:
        near = closest(owner, known)
        _refuse(
            program,
            f"the evaluation measures nothing of {owner!r}; there are: {', '.join(known)}",
            f"did you mean {near!r}?" if near else f"name a metric {EVAL}<one of them>/...",
        )


def _refuse(program: Program, why: str, fix: str) -> None:
    given = program.config.runtime.best_metric
    what = "runtime.keep_best ranks by what the evaluation is for" if given is None else ""
    program.problems.append(
        ConfigError(
            f"{what or f'runtime.best_metric={given!r} cannot rank checkpoints'}: {why}",
            place=program.place_of(_KEY if given is not None else "runtime.keep_best"),
            fix=fix,
        )
    )
