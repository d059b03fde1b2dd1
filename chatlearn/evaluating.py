# SPDX-License-Identifier: Apache-2.0
"""Run an evaluator's flow over its datasets: alone, with a bar of its own, or as part of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from chatlearn.data.feed import Dataset
from chatlearn.errors import ChatLearnError, HookError, describe_function
from chatlearn.flow.batch import Batch
from chatlearn.flow.batching import is_number, numbers
from chatlearn.flow.graph import FlowGraph
from chatlearn.module import state_of
from chatlearn.observability.evaluation import EvaluationMetrics
from chatlearn.observability.evaluation_progress import EvaluationProgress
from chatlearn.program import Program
from chatlearn.result import EvalInfo
from chatlearn.runtime.work import CallReport, Observer, Starting, Tap
from chatlearn.stage import Results, Stage, numbers_of_its_own

if TYPE_CHECKING:
    from chatlearn.executors import Evaluator


def evaluate_alone(evaluator: Evaluator, program: Program) -> Results:
    """Evaluate a program that was checked, on the evaluator's stage; without one, the modules are set up."""
    graph, runtime = program.graphs[evaluator.flow_name], program.config.runtime
    if evaluator.stage is None:
        stage = Stage(program.modules, runtime)
        with numbers_of_its_own(runtime.seed):
            stage.set_up()
        evaluator.stage = stage
        lost = [m.name for m in program.modules if state_of(m).has_lost_weights]
    else:
        lost = []
    stage = evaluator.stage
    stage.config = runtime  # of now, whatever it was when the modules were set up
    prompts = sum(map(len, _datasets(evaluator, stage, graph).values()))
    samples = prompts * runtime.eval_num_inference_per_prompt
    with EvaluationProgress(samples, len(graph.nodes)) as display:
        _say_once(evaluator, [f"warning: {warning}" for warning in program.warnings], display.note)
        if lost:
            display.note(
                f"{', '.join(lost)}: measured with the weights that setup() makes; what a parameter sync "
                "brought was released when its engine was stopped"
            )
        with stage.showing_tokens(display.tick):
            results = evaluate(
                evaluator,
                stage,
                graph,
                EvalInfo.of(stage.episode - 1, stage.train_iteration),
                starting=partial(_show_call, display),
                observer=display.advance,
                note=display.note,
            )
        display.evaluated(evaluator.metrics)
    return results


def evaluate(
    evaluator: Evaluator,
    stage: Stage,
    graph: FlowGraph,
    info: EvalInfo,
    *,
    starting: Starting | None = None,
    observer: Observer | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda _: None,
    tap: Tap | None = None,
) -> Results:
    """Evaluate on a stage whose modules are set up; leaves what was measured in the evaluator's `metrics`.

    `note` is told, once each, what could not be measured or logged; `tap` sees every call.
    """
    runtime = stage.config
    measured = EvaluationMetrics(
        graph,
        evaluator.names,
        runtime.eval_num_inference_per_prompt,
        runtime.eval_pass_at_k,
        runtime.eval_pass_threshold,
    )

    def observe(call: CallReport) -> None:
        measured.call(call)
        if observer is not None:
            observer(call)

    results: Results = {}
    first_prompt = 0
    datasets = _datasets(evaluator, stage, graph)
    with numbers_of_its_own(runtime.seed):
        for name, dataset in datasets.items():
            measured.begin(name)
            batches = stage.evaluate(
                graph,
                dataset,
                first_prompt=first_prompt,
                episode=info.episode_iteration + 1,
                starting=starting,
                observer=observe,
                interrupted=interrupted,
                tap=tap,
            )
            measured.returned(batches, prompts=len(dataset))
            info.datasets[name] = _by_module(graph, batches)
            for module, parts in info.datasets[name].items():
                results.setdefault(module, []).extend(parts)
            first_prompt += len(dataset)
        evaluator.metrics = measured.summary()
        notes = [*measured.notes, *_post_processed(evaluator, results, info)]
    _say_once(evaluator, notes, note)
    return results


def _say_once(evaluator: Evaluator, texts: Sequence[str], note: Callable[[str], None]) -> None:
    for text in texts:
        if text not in evaluator.said:
            evaluator.said.add(text)
            note(text)


def _datasets(evaluator: Evaluator, stage: Stage, graph: FlowGraph) -> dict[str, Dataset]:
    """Return the datasets that the flow's first module makes, by name; they are made once."""
    names = evaluator.names if len(evaluator.names) > 1 else ()
    datasets = stage.eval_datasets(graph, evaluator.rows(), names)
    return dict(zip(evaluator.names, datasets, strict=True))


def _post_processed(evaluator: Evaluator, results: Results, info: EvalInfo) -> list[str]:
    """Call the hook, take its numbers over, and return what of its answer cannot be logged."""
    hook = evaluator.post_process
    if hook is None:
        return []
    try:
        returned = hook(results, info)
    except Exception as error:
        text = (
            str(error) if isinstance(error, ChatLearnError) else f"{type(error).__name__}: {error}"
        )
        raise HookError(
            f"{text}\n  hook: {describe_function(hook)}, set by set_post_process_func\n"
            f"  episode: {info.episode_iteration + 1 or 'none yet'}"
        ) from error
    if returned is None:
        return []
    who = f"the post-process function {describe_function(hook)}"
    if not isinstance(returned, Mapping):
        kind = type(returned).__name__
        return [f"{who} returned a {kind}, of which nothing is logged: return a dict of numbers"]
    given = cast("Mapping[Any, Any]", returned)
    evaluator.metrics.update(numbers(given))
    others = [f"{k} ({type(v).__name__})" for k, v in given.items() if not is_number(v)]
    return (
        [f"{who} returned no numbers for, and not logged are: {', '.join(others)}"]
        if others
        else []
    )


def _show_call(
    display: EvaluationProgress, module: str, method: str, _: bool, uids: Sequence[int]
) -> None:
    display.phase(name := f"{module}.{method}", name, uids)


def _by_module(graph: FlowGraph, batches: Mapping[int, list[Batch]]) -> Results:
    """Return `{model_name: [batch, ...]}`; two returned nodes of one module follow each other."""
    results: Results = {}
    for node, parts in batches.items():
        results.setdefault(graph.nodes[node].module.name, []).extend(parts)
    return results
