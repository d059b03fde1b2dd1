# SPDX-License-Identifier: Apache-2.0
"""What a driver keeps so that samples can be tried again: inputs of calls under way, and what failed on whom."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from chatlearn.columns import CUT, FAILED, OUTCOME, PROMPT, PROMPT_IDS, RETRIED, REWARDS, TIMED_OUT
from chatlearn.errors import ModuleError
from chatlearn.flow.batch import Batch
from chatlearn.flow.batching import isolate, select
from chatlearn.module import BaseModule, resolved_config, state_of
from chatlearn.runtime.lost_rows import LostSample
from chatlearn.runtime.protocol import Call, Lost
from chatlearn.runtime.returned import marks_of, new_marks, refuse_unknown_marks, unusable_rewards


@dataclass(frozen=True)
class Failure:
    """Why a call failed on samples; `outcomes` by uid where the step named them itself."""

    error: ModuleError
    outcome: str = FAILED
    outcomes: Mapping[int, str] | None = None

    def outcome_of(self, uid: int) -> str:
        """Return what became of one of the call's samples."""
        return self.outcome if self.outcomes is None else self.outcomes[uid]


class _Inputs:
    """The inputs of one call, and of how many of its samples nobody knows yet how they end."""

    def __init__(self, call: Call, data: Batch) -> None:
        self.data = data
        self.rows = {uid: row for row, uid in enumerate(call.uids)}
        self.left = len(self.rows)


class Attempts:
    """Keep the inputs of calls until each of their samples is finished or lost.

    Example:
        >>> attempts = Attempts()
        >>> data = attempts.enter(call, data)  # the step may change it
        >>> data = attempts.enter(second, None)  # the same samples again, as they were
        >>> attempts.settle(second, len(second.uids))
    """

    def __init__(self) -> None:
        self._inputs: dict[int, _Inputs] = {}
        self._last: tuple[Call, Failure] | None = None
        """The call that failed last: what follows is said at once, and tracebacks hold on to batches."""
        self._first: dict[str, Failure] = {}
        """The first failure of every module."""
        self.lost: dict[int, LostSample] = {}
        """The samples that were given up, by uid; of several nodes that gave one up, by the first."""

    def enter(self, call: Call, data: Batch | None) -> Batch:
        """Return what a call's step gets: its joined inputs, or those that an earlier try had."""
        if data is not None:
            self._inputs[call.id] = _Inputs(call, data)
            return isolate(data)
        kept = self._inputs[call.origin]
        return isolate(select(kept.data, [kept.rows[uid] for uid in call.uids]))

    def settle(self, call: Call, samples: int) -> None:
        """Take note that `samples` of a call's samples are finished or lost."""
        origin = call.id if call.origin < 0 else call.origin
        kept = self._inputs[origin]
        kept.left -= samples
        if not kept.left:
            del self._inputs[origin]

    def fail(self, call: Call, failure: Failure) -> None:
        """Take note of a failure; whether its samples are lost is still to be decided."""
        self._last = call, failure
        self._first.setdefault(call.node.module, failure)

    def lose(
        self, command: Lost, groups: Mapping[int, int]
    ) -> tuple[Call, Mapping[str, int], Failure]:
        """Take note of samples that were given up; return the call, how many by outcome, and why.

        Args:
            command: names them.
            groups: the prompt's number by uid.
        """
        call, failure = self._failed(command.call)
        kept = self._inputs[call.id if call.origin < 0 else call.origin]
        for uid in command.uids:
            outcome = failure.outcome_of(uid)
            known = _readable({name: column[kept.rows[uid]] for name, column in kept.data.items()})
            self.lost.setdefault(uid, LostSample(uid, groups[uid], outcome, known))
        self.settle(call, len(command.uids))
        return call, Counter(failure.outcome_of(uid) for uid in command.uids), failure

    def ending(self, call: Call) -> ModuleError:
        """Return the error that ends the run after a call that failed."""
        _, failure = self._failed(call.id)
        if call.node.recovery.fate != "stop":
            what = f"{call.node.name} has failed on every sample so far, so it must be broken"
            return _because(what, self._first[call.node.module].error)
        what = f"{call.node.name} failed {call.attempt + 1} times, and models.{call.node.module}.after_retries is stop"
        return _because(what, failure.error)

    def _failed(self, call: int) -> tuple[Call, Failure]:
        assert self._last is not None
        assert self._last[0].id == call
        return self._last

    def nothing_left(self) -> ModuleError:
        """Return the error that ends a run of which no sample is left."""
        first = next(iter(self._first.values()))
        return _because("no sample is left: all have failed, or went with their group", first.error)


def counted(call: Call) -> dict[str, int]:
    """Return what the samples of a call count as, zeros included; nothing where the first failure ends the run."""
    recovery = call.node.recovery
    if recovery.stops_at_once:
        return {}
    is_retry = 0 < call.attempt <= recovery.retries
    return {FAILED: 0, TIMED_OUT: 0, RETRIED: len(call.uids) if is_retry else 0}


class Signs:
    """What the inputs of a call say of its samples; what else its output says is the step's.

    Args:
        call: under way.
        data: its inputs.
        module: its module.
    """

    def __init__(self, call: Call, data: Batch, module: BaseModule) -> None:
        space = resolved_config(module).namespace
        start = "" if space is None else f"{space}/"
        self._outcome, self._rewards = f"{start}{OUTCOME}", f"{start}{REWARDS}"
        self._call, self._module = call, module
        self._marks = marks_of(data)
        self._given = isolate({n: data[n] for n in (self._rewards,) if n in data})
        """The rewards that came in, which the step may overwrite."""

    def new_in(
        self, output: Batch, kept: Sequence[int] | None, place: str
    ) -> tuple[dict[str, int], dict[int, str]]:
        """Return what the call's samples count as, and with which outcome the step failed on which rows of `output`.

        Args:
            output: what the step returned.
            kept: of a filter, which of its samples the rows are.
            place: the step.

        Raises:
            BatchError: what it says in its `outcome` column is no outcome.
        """
        outcomes, rows = counted(self._call), dict[int, str]()
        before, after = self._marks, marks_of(output)
        if after and after != before:
            refuse_unknown_marks(self._call, before, after, self._outcome, kept, place)
            marks = new_marks(before, after, kept)
            rows = {row: mark for row, mark in marks.items() if mark != CUT}
            if after.keys() - before.keys():
                outcomes[CUT] = len(marks) - len(rows)
        self._add_unusable(rows, output, kept)
        return outcomes, rows

    def _add_unusable(
        self, rows: dict[int, str], output: Batch, kept: Sequence[int] | None
    ) -> None:
        """Count samples with rewards that nobody can train on among those that the step failed on."""
        found = unusable_rewards(output, self._rewards)
        before = unusable_rewards(self._given, self._rewards) if found else {}
        state = state_of(self._module)
        for row, value in found.items():
            at = row if kept is None else kept[row]
            if row not in rows and at not in before:
                rows[row] = FAILED
                what = f"{self._call.node.name} returned {value!r} in its column {self._rewards!r}"
                state.failure = state.failure or f"{what} for uid {self._call.uids[at]}"


def _because(what: str, error: ModuleError) -> ModuleError:
    made = type(error)(f"{what}:\n{error}")
    made.__cause__ = error.__cause__
    return made


def _readable(sample: dict[str, Any]) -> dict[str, Any]:
    """Return what of a sample stays when it is lost: texts, and its prompt."""
    return {
        name: value
        for name, value in sample.items()
        if isinstance(value, str) or name.rpartition("/")[2] in (PROMPT, PROMPT_IDS)
    }


class Draws:
    """The states of torch's, Python's and numpy's generators, so that a further try draws what the first one drew."""

    def __init__(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy: Any = np.random.get_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put_back(self) -> None:
        """Bring the generators to these states."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
