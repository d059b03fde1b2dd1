# SPDX-License-Identifier: Apache-2.0
"""What one episode runs: the environment flow, the choice of what is trained on, the trainer flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from chatlearn.checkpointing import refuse_unkeepable
from chatlearn.config import RuntimeConfig
from chatlearn.data.feed import Dataset, Feed
from chatlearn.data.replay import Replay
from chatlearn.data.sampler import PromptSampler
from chatlearn.data.stream import StreamDataset
from chatlearn.errors import BatchError, describe_function
from chatlearn.flow.batch import Batch, size
from chatlearn.flow.graph import FlowGraph
from chatlearn.observability.recorder import Recorder
from chatlearn.program import Program
from chatlearn.runtime.work import FlowWork, Outcome, Tap, TrainWork
from chatlearn.stage import Stage


class EpisodeFlows:
    """Run the flows of episodes: streaming from one into the other, or with replay between them.

    Replay chooses among whole episodes, so the environment flow ends before the first train step, whatever the
    loader type.
    """

    def __init__(
        self,
        program: Program,
        stage: Stage,
        recorder: Recorder,
        replay: Replay | None,
        interrupted: Callable[[], bool],
        tap: Tap | None = None,
    ) -> None:
        self._config = program.config.runtime
        self._graphs = program.graphs
        self._sampler = program.replay_sampler
        self._stage = stage
        self._recorder = recorder
        self._replay = replay
        self._interrupted = interrupted
        self._tap = tap

    def run(self, episode: int, feed: Feed) -> Outcome:
        """Run episode `episode` (from 0) on the samples of `feed`."""
        if self._replay is not None and self._replay.keeps(episode):
            return self._run_with_replay(self._replay, episode, feed)
        graphs = self._graphs
        if "env_flow" not in graphs:
            return self._run(episode, trainer=self._training(episode, feed.batch(0, len(feed))))
        trainer = self._training(episode) if "trainer_flow" in graphs else None
        flow = FlowWork(graphs["env_flow"], feed, needs_output=trainer is not None)
        return self._run(episode, flow=flow, trainer=trainer)

    def _run_with_replay(self, replay: Replay, episode: int, feed: Feed) -> Outcome:
        outcome = Outcome()
        if "env_flow" in self._graphs:
            outcome = self._run(episode, flow=FlowWork(self._graphs["env_flow"], feed))
        else:
            outcome.samples.append(feed.batch(0, len(feed)))
        new = outcome.samples.everything()
        refuse_unkeepable(new, episode)
        window = replay.window(episode, new)
        with self._recorder.phase("replay"):
            chosen = replay.choose(window)
        self._refuse_too_few(episode, chosen)
        trained = self._run(episode, trainer=self._training(episode, chosen))
        replay.kept = window
        self._recorder.replayed(len(window), size(chosen), oldest=window[0][0] + 1)
        seconds = outcome.module_seconds + trained.module_seconds
        return replace(
            trained,
            samples=outcome.samples,
            uids=outcome.uids,
            module_seconds=seconds,
            losses=outcome.losses,
        )

    def _run(
        self, episode: int, *, flow: FlowWork | None = None, trainer: TrainWork | None = None
    ) -> Outcome:
        return self._stage.runtime.run(
            episode + 1,
            self._stage.iterations,
            flow=flow,
            trainer=trainer,
            batch_size=self._config.generation_batch_size,
            starting=self._recorder.starting,
            observer=self._recorder.call,
            interrupted=self._interrupted,
            tap=self._tap,
        )

    def _training(self, episode: int, samples: Batch | None = None) -> TrainWork:
        return training_work(self._config, self._graphs["trainer_flow"], episode, samples)

    def _refuse_too_few(self, episode: int, chosen: Batch) -> None:
        """A sampler whose whole choice is dropped as an incomplete step would train on nothing, unnoticed."""
        needed, drops = self._config.train_global_batch_size, self._config.incomplete_step
        if self._sampler is None or drops != "drop_last" or not needed:
            return
        if 0 < size(chosen) < needed:
            raise BatchError(
                f"the replay sampler chose {size(chosen)} samples, fewer than one global batch of {needed}, "
                "and runtime.incomplete_step=drop_last drops them all",
                place=f"{describe_function(self._sampler)}, episode {episode + 1}",
                fix=f"choose {needed} samples or more, or set runtime.incomplete_step to fill or keep",
            )


def training_work(
    config: RuntimeConfig, graph: FlowGraph, episode: int, samples: Batch | None = None
) -> TrainWork:
    """Return the train steps of episode `episode` (from 0), on `samples` or on what a flow delivers."""
    stream = StreamDataset(
        config.stream_data_loader_type,
        global_batch_size=config.train_global_batch_size,
        micro_batch_size=config.train_micro_batch_size,
        epochs=config.num_training_epoch,
        incomplete_step=config.incomplete_step,
        seed=f"{config.seed}/{episode}",
    )
    return TrainWork(graph, stream, samples)


def sampler_over_datasets(program: Program, stage: Stage) -> tuple[PromptSampler, list[Dataset]]:
    """Build the datasets of a run, and what draws prompts from them."""
    rows, config = program.training_rows, program.config.runtime
    if not rows:
        return PromptSampler([1]), []
    graph = program.graphs.get("env_flow") or program.graphs["trainer_flow"]
    datasets = stage.build_datasets(graph, rows, is_eval=False)
    sizes = [len(dataset) for dataset in datasets]
    ratio, shuffle, seed = config.data_ratio, config.data_shuffle, config.seed
    return PromptSampler(sizes, ratio=ratio, shuffle=shuffle, seed=seed), datasets
