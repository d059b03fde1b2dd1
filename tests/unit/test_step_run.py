# SPDX-License-Identifier: Apache-2.0
"""Train steps through the trainer flow: in order, one at a time, dependencies first."""

from __future__ import annotations

from chatlearn.flow.graph import FEED
from chatlearn.flow.steps import Step
from chatlearn.runtime.protocol import NodeSpec, Piece
from chatlearn.runtime.step_run import StepRun


def node(index: int, *inputs: int, after: tuple[int, ...] = ()) -> NodeSpec:
    return NodeSpec(index, f"n{index}", f"m{index}", "train_step", inputs or (FEED,), after)


def steps(*indices: int) -> list[Step]:
    return [Step(i, ((2 * i,), (2 * i + 1,))) for i in indices]


def test_a_trainer_takes_its_steps_one_after_the_other() -> None:
    run = StepRun([node(0)])
    (first,) = run.extend(steps(0, 1))
    assert first.step.index == 0
    assert run.inputs(first) == ((Piece(FEED, 0, 2),),)
    (second,) = run.finish(first, 10)
    assert second.step.index == 1
    assert list(run.finish(second, 11)) == []
    assert not run.complete
    assert next(iter(run.extend(steps(2)))).step.index == 2
    run.close()
    assert not run.complete


def test_two_trainers_advance_on_their_own_unless_ordered() -> None:
    free = StepRun([node(0), node(1)])
    a, b = free.extend(steps(0, 1))
    assert (a.node, b.node) == (0, 1)
    (next_a,) = free.finish(a, 0)
    assert (next_a.node, next_a.step.index) == (0, 1)

    ordered = StepRun([node(0), node(1, after=(0,))])
    (a,) = ordered.extend(steps(0, 1))
    assert [(t.node, t.step.index) for t in ordered.finish(a, 0)] == [(0, 1), (1, 0)]


def test_a_node_takes_what_another_returned_for_the_step() -> None:
    run = StepRun([node(0), node(1, FEED, 0)])
    (a,) = run.extend(steps(0))
    (b,) = run.finish(a, 7)
    assert run.inputs(b) == ((Piece(FEED, 0, 2),), (Piece(7, 0, 2),))
    run.close()
    assert run.steps == 0
    list(run.finish(b, 8))
    assert (run.steps, run.complete) == (1, True)
