# SPDX-License-Identifier: Apache-2.0
"""The parameter syncs of a program: which pairs there are, and which are due."""

from __future__ import annotations

from dataclasses import dataclass

from chatlearn.arithmetic import is_due
from chatlearn.config import RuntimeConfig
from chatlearn.module import resolved_config
from chatlearn.observability.recorder import Recorder
from chatlearn.program import Program
from chatlearn.stage import Stage
from chatlearn.weights.local import ParameterSync, may_share


@dataclass(frozen=True)
class _Pair:
    sync: ParameterSync
    frequency: int


class Syncs:
    """Carry weights along every pair of `set_parameter_sync`, when it is due."""

    def __init__(self, program: Program, stage: Stage, config: RuntimeConfig) -> None:
        self._stage = stage
        trainer = program.graphs.get("trainer_flow")
        trained = set(map(id, trainer.modules)) if trainer else set[int]()
        receivers = [id(destination) for _, destination in program.sync_pairs]
        self._pairs: list[_Pair] = []
        for source, destination in program.sync_pairs:
            replicas = [worker.module for worker in stage.runtime.workers[destination.name]]
            frequency = resolved_config(destination).sync_frequency
            share = may_share(
                frequency=frequency,
                replicas=len(replicas),
                streams=config.stream_data_loader_type == "dynamic",
                destination_trains=id(destination) in trained,
                destination_syncs=receivers.count(id(destination)),
            )
            self._pairs.append(_Pair(ParameterSync(source, replicas, share=share), frequency))

    def run_first(self, recorder: Recorder, *, resumed: bool) -> None:
        """Sync before the first episode; a resumed destination that is synced rarely keeps what it was saved with."""
        workers = [worker for name in self._stage.runtime.workers.values() for worker in name]
        versions = [worker.module.policy_version for worker in workers]
        for pair in self._pairs:
            if pair.sync.moves_nothing:
                recorder.note(f"nothing to sync: {pair.sync.pair} have no parameters")
            if not resumed or pair.frequency == 1:
                self._run(pair, recorder)
        if resumed:  # this sync repeats one that was counted before
            for worker, version in zip(workers, versions, strict=True):
                worker.module.policy_version = version

    def run_due(self, recorder: Recorder, episodes: int) -> None:
        """Sync what is due after `episodes` episodes."""
        for pair in self._pairs:
            if is_due(episodes, pair.frequency):
                self._run(pair, recorder)

    def release(self) -> None:
        """Give destinations storage of their own: a later engine may train with either side."""
        for pair in self._pairs:
            pair.sync.release()

    @staticmethod
    def _run(pair: _Pair, recorder: Recorder) -> None:
        report = pair.sync.run()
        recorder.synced(report.pair, report.seconds, report.bytes)
