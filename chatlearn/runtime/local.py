# SPDX-License-Identifier: Apache-2.0
"""The in-process driver: carries the scheduler's commands out, one call at a time. It is the reference backend."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from chatlearn.errors import ConfigError
from chatlearn.module import BaseModule, resolved_config, state_of
from chatlearn.runtime.local_pass import Pass
from chatlearn.runtime.scheduler import Iterations
from chatlearn.runtime.work import FlowWork, Observer, Outcome, Starting, Tap, TrainWork
from chatlearn.runtime.worker import EventLoop, Where, Worker


class LocalRuntime:
    """Hold every replica of every module in this process and run flows over them.

    Replica 0 of a module is the user's own object; further ones are deep copies, made before `setup()`.
    """

    def __init__(self, modules: Sequence[BaseModule]) -> None:
        self._loop = EventLoop()
        self.has_trained = False
        """Whether the run of flows under way, or the last one, has made a train step."""
        shared: dict[str, Any] = {}
        self.workers: dict[str, list[Worker]] = {}
        for module in modules:
            shared.update(state_of(module).shared)
        for module in modules:
            state_of(module).shared = shared
            count = resolved_config(module).num_replica
            replicas = [module, *(_copy_of(module) for _ in range(1, count))]
            for replica_id, replica in enumerate(replicas):
                replica.replica_id = replica_id
            self.workers[module.name] = [Worker(replica, self._loop) for replica in replicas]

    def set_up(self, *, anew: bool) -> None:
        """Run `setup()` of every replica (if not `anew`, of those that are not set up yet).

        Replicas of a module draw the same random numbers in it.
        """
        for workers in self.workers.values():
            drawn = torch.get_rng_state(), random.getstate()
            for worker in workers:
                torch.set_rng_state(drawn[0])
                random.setstate(drawn[1])
                worker.set_up(anew=anew)

    def hook(self, name: str, *args: Any, episode: int = 0) -> None:
        """Call a hook on every replica of all modules."""
        for workers in self.workers.values():
            for worker in workers:
                worker.hook(name, *args, where=Where(episode))

    def close(self) -> None:
        """Let go of the replicas; in one process nothing else is held."""
        for workers in self.workers.values():
            workers[0].release()
        self.workers = {name: workers[:1] for name, workers in self.workers.items()}
        self._loop.close()

    def run(
        self,
        episode: int,
        iterations: Iterations,
        *,
        flow: FlowWork | None = None,
        trainer: TrainWork | None = None,
        batch_size: int | None = None,
        starting: Starting | None = None,
        observer: Observer | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        tap: Tap | None = None,
    ) -> Outcome:
        """Run a flow, a trainer flow, or one feeding the other, to their end.

        Args:
            episode: number from 1, for errors.
            iterations: call counts; go on over episodes.
            flow: what samples, or evaluates.
            trainer: what learns.
            batch_size: samples per call of modules that set none of their own.
            starting: told of every call before it is made: module, method, whether it trains.
            observer: told of every call when it is finished.
            interrupted: asked before every call whether to stop.
            tap: sees what goes into and comes out of every call.

        Raises:
            ModuleError: a module's method raised.
            BatchError: a module returned something that breaks the rules of batches.
            KeyboardInterrupt: `interrupted()` was true before a train step had changed anything.
        """
        self.has_trained = False
        flows = Pass(self, episode, flow, trainer, starting, observer, interrupted, tap, batch_size)
        return flows.run(iterations)


def _copy_of(module: BaseModule) -> BaseModule:
    shared, progress = state_of(module).shared, module.progress
    memo: dict[int, Any] = {id(kept): kept for kept in (shared, progress) if kept is not None}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ConfigError(
            f"module {module.name!r} cannot be copied for num_replica > 1: {error}",
            place=f"models.{module.name}.num_replica",
            fix="make heavy or unique state (locks, files, connections) in setup(), not in the constructor",
        ) from error
