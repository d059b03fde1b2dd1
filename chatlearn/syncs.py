# SPDX-License-Identifier: Apache-2.0
"""The parameter syncs of a program: which pairs there are, and which are due."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from chatlearn.arithmetic import is_due
from chatlearn.config import RuntimeConfig
from chatlearn.module import resolved_config
from chatlearn.observability.recorder import Recorder
from chatlearn.program import Program
from chatlearn.stage import Stage, numbers_of_its_own
from chatlearn.weights.local import ParameterSync, SyncReport
from chatlearn.weights.sharing import may_share

_DIGITS = 12
"""Hexadecimal digits of a digest that become a metric: 48 bits, which a float holds exactly."""
_SHOWN = 4
"""Names that a note lists."""


@dataclass(frozen=True)
class _Pair:
    sync: ParameterSync
    frequency: int
    destination: str


class Syncs:
    """Carry weights along every pair of `set_parameter_sync`, when it is due."""

    def __init__(self, program: Program, stage: Stage, config: RuntimeConfig) -> None:
        self._stage = stage
        self._config = config
        self._noted: set[tuple[str, str]] = set()
        trainer = program.graphs.get("trainer_flow")
        trained = set(map(id, trainer.modules)) if trainer else set[int]()
        receivers = [id(destination) for _, destination in program.sync_pairs]
        self._pairs: list[_Pair] = []
        for pair in program.sync_pairs:
            source, destination = pair
            replicas = [worker.module for worker in stage.runtime.workers[destination.name]]
            frequency = resolved_config(destination).sync_frequency
            share = may_share(
                frequency=frequency,
                replicas=len(replicas),
                streams=config.stream_data_loader_type == "dynamic",
                destination_trains=id(destination) in trained,
                destination_syncs=receivers.count(id(destination)),
            )
            sync = ParameterSync(
                source,
                replicas,
                share=share,
                place=pair.said_at,
                source_trains=id(source) in trained,
            )
            self._pairs.append(_Pair(sync, frequency, destination.name))

    def run_first(self, recorder: Recorder, *, resumed: bool, settled: Collection[str]) -> None:
        """Sync before the first episode; destinations named in `settled` have what they were saved with, and keep it.

        The first sync of a process is probed, whatever its number.
        """
        workers = [worker for name in self._stage.runtime.workers.values() for worker in name]
        versions = [worker.module.policy_version for worker in workers]
        for pair in self._pairs:
            if pair.sync.moves_nothing:
                recorder.note(f"nothing to sync: {pair.sync.pair} have no parameters")
            if pair.destination in settled:
                pair.sync.go_on()
            else:
                self._run(pair, recorder, probes=self._config.verify_every > 0)
        if resumed:  # this sync repeats one that was counted before
            for worker, version in zip(workers, versions, strict=True):
                worker.module.policy_version = version

    def run_due(self, recorder: Recorder, episodes: int) -> None:
        """Sync what is due after `episodes` episodes."""
        for pair in self._pairs:
            if is_due(episodes, pair.frequency):
                every = self._config.verify_every
                probes = every > 0 and (episodes // pair.frequency) % every == 0
                self._run(pair, recorder, probes=probes)

    def release(self) -> None:
        """Give destinations storage of their own: a later engine may train with either side."""
        for pair in self._pairs:
            pair.sync.release()

    def _run(self, pair: _Pair, recorder: Recorder, *, probes: bool) -> None:
        report = pair.sync.run()
        numbers: dict[str, float] = {
            "seconds": report.seconds,
            "bytes": report.bytes,
            "skipped": report.skipped,
            "proof_seconds": report.proof_seconds,
            "digest": float(int(report.digest[:_DIGITS], 16)),
        }
        if probes:
            with numbers_of_its_own(self._config.seed):
                probed = pair.sync.probe()
            if probed is not None:
                numbers["seconds"] += probed.seconds
                numbers["probe_seconds"] = probed.seconds
                numbers["probe_difference"] = probed.difference
        recorder.synced(report.pair, numbers)
        for kind, note in _notes(report).items():
            if (report.pair, kind) not in self._noted:
                self._noted.add((report.pair, kind))
                recorder.note(note)


def _notes(report: SyncReport) -> dict[str, str]:
    """Say what a sync could not prove, by kind."""
    notes: dict[str, str] = {}
    if report.unproven:
        notes["unproven"] = (
            f"{report.pair}: load_state_dict() makes {_some(report.unproven)} of what it gets; "
            "these have no digest in the source to compare with"
        )
    if report.lost and not report.proved:
        notes["nothing"] = (
            f"{report.pair}: nothing could be compared after the sync: no tensor of the destination holds one of the "
            "source's; show them in its state_dict() to have them proved"
        )
    elif report.lost:
        notes["lost"] = (
            f"{report.pair}: {_some(report.lost)} of the source arrived under no name; load_state_dict() may have "
            "merged or left them out"
        )
    return notes


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - _SHOWN
    return f"{', '.join(names[:_SHOWN])}{f' and {more} more' if more > 0 else ''}"
