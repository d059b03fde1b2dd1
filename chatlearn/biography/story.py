# SPDX-License-Identifier: Apache-2.0
"""What became of one sample: from its prompt to every update it was in, out of the record of its run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from chatlearn import columns
from chatlearn.biography.advantage import Advantage, explain_advantage
from chatlearn.biography.response import Response, add_pieces, make_response, plain
from chatlearn.errors import RecordError
from chatlearn.record.nodes import ABSENT, NodeRecord
from chatlearn.record.reading import (
    EpisodeRecord,
    FlowRecord,
    Loss,
    RunRecord,
    describe_numbers,
)


@dataclass
class Reward:
    """What one node scored."""

    node: str
    column: str
    value: Any
    parts: dict[str, float] = field(default_factory=dict[str, float])
    weights: dict[str, float] = field(default_factory=dict[str, float])


@dataclass
class Update:
    """One train step that the sample was in."""

    node: str
    episode: int
    update: int
    """Number in the run, from 1."""
    update_of_episode: int
    training_pass: int
    micro_batch: int
    position: int
    """In the episode's delivered samples."""
    loss_weight: float | None
    """Of each trained token in the update's loss."""
    ratio: list[float]
    """Per response token; empty where the trainer reported none."""
    clipped: list[int]
    numbers: dict[str, float]
    """What the update logged."""

    @property
    def trained(self) -> int:
        """Tokens trained on."""
        return sum(not math.isnan(value) for value in self.ratio)


@dataclass
class Biography:
    """A sample, from its prompt to every update that it was in."""

    uid: int
    episode: int
    is_evaluation: bool
    prompt_uid: int
    group: list[int]
    prompt: Any
    responses: list[Response] = field(default_factory=list[Response])
    rewards: list[Reward] = field(default_factory=list[Reward])
    advantages: list[Advantage] = field(default_factory=list[Advantage])
    outcome: str | None = None
    losses: dict[int, Loss] = field(default_factory=dict[int, Loss])
    """Samples of its group, itself included, that were given up, by uid."""
    remarks: list[str] = field(default_factory=list[str])
    """Why it, or some of its tokens, did not count."""
    updates: list[Update] = field(default_factory=list[Update])
    missing: list[str] = field(default_factory=list[str])
    """What was not recorded."""


def find_episode(
    record: RunRecord, uid: int, *, evaluation: bool = False, episode: int | None = None
) -> EpisodeRecord:
    """Return the episode that made a sample; of evaluations, which number samples anew, the newest.

    Raises:
        RecordError: no recorded episode has it.
    """
    name = "eval_flow" if evaluation else "env_flow"
    numbers = record.episodes if episode is None else [episode]
    known: dict[int, list[int]] = {}
    for number in reversed(numbers):
        found = record.episode(number)
        uids = _uids_of(found, name)
        if uid in uids:
            return found
        if uids:
            known[number] = uids
    if not known:
        what, other = "samples of an evaluation", "--eval off"
        if not evaluation:
            what, other = (
                "samples of training",
                "--eval: samples of evaluations have numbers of their own",
            )
        raise RecordError(
            f"no {what} are recorded (episodes: {describe_numbers(numbers)})",
            place=str(record.root),
            fix=f"look with {other}",
        )
    nearest = min(known, key=lambda n: min(abs(uid - known[n][0]), abs(uid - known[n][-1])))
    whole = [u for uids in known.values() for u in uids]
    raise RecordError(
        f"no recorded {'evaluation' if evaluation else 'episode'} has a sample uid {uid}; "
        f"recorded are uids {describe_numbers(sorted(set(whole)))}",
        place=str(record.root),
        fix=f"the nearest are those of episode {nearest}: {describe_numbers(known[nearest])}"
        + ("" if evaluation else "; samples of an evaluation are found with --eval"),
    )


def _uids_of(episode: EpisodeRecord, name: str) -> list[int]:
    if name in episode.flows:
        return episode.flow(name).uids
    trains_alone = "env_flow" not in episode.flows and "trainer_flow" in episode.flows
    if name == "env_flow" and trains_alone:
        return [u for u in episode.flow("trainer_flow").delivered_uids if u is not None]
    return []


def biography(
    run: str | Path, uid: int, *, evaluation: bool = False, episode: int | None = None
) -> Biography:
    """Gather all that the record of a run says of one sample.

    Args:
        run: the run's folder.
        uid: number of the sample.
        evaluation: whether it is a sample of an evaluation.
        episode: which one's evaluation; None takes the newest that has the sample.

    Raises:
        RecordError: the run was not recorded, or has no such sample.
    """
    record = RunRecord(run)
    home = find_episode(record, uid, evaluation=evaluation, episode=episode)
    name = "eval_flow" if evaluation else "env_flow"
    flow = home.flow(name) if name in home.flows else None
    life = Biography(uid, home.number, evaluation, uid, [uid], None)
    models: Mapping[str, Any] = home.start["config"].get("models", {})
    sample: dict[str, Any] = {}
    if flow is not None:
        _place(life, flow)
        made = [(node, _made_of(node, uid)) for node in flow.nodes]
        for _, cells in made:
            sample |= cells
        for node, cells in made:
            # What later nodes add to a response (log-probs, masks) counts, what they replace does not.
            _add_node(life, node, cells, sample | cells, models)
        for advantage in life.advantages:
            if advantage.rewards:
                advantage.absent = [u for u in life.group if u not in advantage.rewards]
        life.prompt = sample.get(columns.PROMPT, _entered(flow, columns.PROMPT, uid))
        _explain_absence(life, flow)
    else:
        trained = home.flow("trainer_flow")
        row = trained.positions[trained.delivered_uids.index(uid)]
        cell = trained.batch_cells(columns.PROMPT)[row]
        life.prompt = None if cell is ABSENT else plain(cell)
        life.missing.append("how it was made: the run trained on a dataset of samples")
    if not evaluation:
        for number in record.episodes:
            life.updates += _updates(record.episode(number), home, uid)
        _remark_on_training(life, home)
    _remark_on_tokens(life)
    _remark_on_equal_rewards(life, models)
    life.missing += add_pieces(life.responses, record.run, models)
    return life


def _place(life: Biography, flow: FlowRecord) -> None:
    group_of = dict(zip(flow.uids, flow.groups, strict=True))
    life.prompt_uid = group_of[life.uid]
    life.group = [uid for uid, group in group_of.items() if group == life.prompt_uid]
    life.losses = {uid: flow.losses[uid] for uid in life.group if uid in flow.losses}


def _entered(flow: FlowRecord, name: str, uid: int) -> Any:
    row = flow.batch_rows(range(len(flow.batch.calls))).get(uid)
    cell = ABSENT if row is None else flow.batch_cells(name)[row]
    return None if cell is ABSENT else cell


def _cells_at(node: NodeRecord, row: int) -> dict[str, Any]:
    cells = {name: node.output(name)[row] for name in node.made}
    return {name: cell for name, cell in cells.items() if cell is not ABSENT}


def _made_of(node: NodeRecord, uid: int) -> dict[str, Any]:
    """Return the columns that a node made of a sample."""
    return _cells_at(node, node.row_of[uid]) if uid in node.row_of else {}


def _add_node(
    life: Biography,
    node: NodeRecord,
    made: Mapping[str, Any],
    sample: Mapping[str, Any],
    models: Mapping[str, Any],
) -> None:
    settings: Mapping[str, Any] = models.get(node.module, {})
    for name, cell in made.items():
        space, last = _split(name)
        if last == columns.RESPONSE_IDS:
            life.responses.append(make_response(node, space, sample, settings, life.is_evaluation))
        elif last == columns.REWARDS:
            life.rewards.append(_reward(node, name, cell, made, settings))
        elif last == columns.ADVANTAGES:
            life.advantages.append(explain_advantage(node, life.uid, name, plain(cell), settings))
        elif last == columns.OUTCOME:
            life.outcome = str(cell)


def _split(name: str) -> tuple[str, str]:
    """Return a column's namespace, with its slash, and the name within."""
    space, slash, last = name.rpartition("/")
    return space + slash, last


def _reward(
    node: NodeRecord, column: str, cell: Any, made: Mapping[str, Any], settings: Mapping[str, Any]
) -> Reward:
    start = f"{column}/"
    parts = {
        name.removeprefix(start): plain(value)
        for name, value in made.items()
        if name.startswith(start)
    }
    given = settings.get("weights")
    weights: dict[str, float] = {}
    if parts and isinstance(given, dict):
        named = cast("dict[str, float]", given)
        weights = {name: float(named[name]) for name in parts if name in named}
    elif parts and isinstance(given, list):
        weights = dict(zip(parts, cast("list[float]", given), strict=False))
    elif parts and given is None and "weights" in settings:
        weights = dict.fromkeys(parts, 1.0)
    return Reward(node.name, column, plain(cell), parts, weights)


# ---- training -----------------------------------------------------------------------------------------------------


def _updates(episode: EpisodeRecord, home: EpisodeRecord, uid: int) -> Iterator[Update]:
    """Yield the updates of an episode that a sample was in; samples of other episodes come with replay only."""
    if "trainer_flow" not in episode.flows:
        return
    flow = episode.flow("trainer_flow")
    if episode.number != home.number and not flow.is_given:
        return
    passes = max(int(episode.start["config"]["runtime"]["num_training_epoch"]), 1)
    for node in flow.nodes:
        per_pass = max(len(node.calls) // passes, 1)
        for row in [row for row, other in enumerate(node.uids) if other == uid]:
            call = node.calls[cast("int", node.table.meta("call")[row])]
            step = int(call.entry.step or 0)
            found = {_split(n)[1]: plain(c) for n, c in _cells_at(node, row).items()}
            yield Update(
                node.name,
                episode.number,
                int(episode.meta["train_iteration"]) + step + 1,
                step + 1,
                step // per_pass + 1,
                node.table.meta("micro_batch")[row] + 1,
                node.table.meta("position")[row],
                found.get(columns.LOSS_WEIGHT),
                found.get(columns.RATIO) or [],
                found.get(columns.CLIPPED) or [],
                dict(call.entry.numbers),
            )


def _explain_absence(life: Biography, flow: FlowRecord) -> None:
    """Say which node dropped the sample or failed on it, and what took its group along."""
    for node in flow.nodes:
        came_in, came_out = life.uid in node.row_of, life.uid in node.came_out
        if came_in and not came_out and node.output_names and life.uid not in life.losses:
            life.remarks.append(f"{node.name} dropped it")
    if (own := life.losses.get(life.uid)) is not None:
        life.outcome = own.outcome
        life.remarks.append(f"no later node of {flow.name} got it")
    culprits = [loss for loss in life.losses.values() if loss.drops_group]
    if culprits:
        first = culprits[0]
        others = "".join(f", and uid {loss.uid} ({loss.node})" for loss in culprits[1:])
        happened = first.outcome.replace("_", " ")
        life.remarks.append(
            f"its group left training because uid {first.uid} {happened} ({first.node}){others}"
        )


def _remark_on_training(life: Biography, home: EpisodeRecord) -> None:
    if "trainer_flow" not in home.flows:
        life.missing.append("training: the run has no trainer flow")
        return
    flow = home.flow("trainer_flow")
    if life.uid not in flow.delivered_uids:
        if not any(loss.drops_group for loss in life.losses.values()):
            life.remarks.append("it was not delivered to the trainer in its episode")
    elif not life.updates:
        life.remarks.append("no update took it: it was left over (runtime.incomplete_step)")
    else:
        row = flow.positions[flow.delivered_uids.index(life.uid)]
        outcome = flow.batch_cells(columns.OUTCOME)[row] if flow.batch.rows else ABSENT
        life.outcome = str(outcome) if outcome is not ABSENT else life.outcome
    is_lost = life.uid in life.losses
    if life.updates and not is_lost and not any(update.ratio for update in life.updates):
        life.missing.append("ratio and clip per token: the trainer does not report them")


def _remark_on_tokens(life: Biography) -> None:
    has_left = any(loss.drops_group for loss in life.losses.values())
    if life.outcome in (columns.FAILED, columns.TIMED_OUT) and not has_left:
        life.remarks.append(f"none of its tokens is trained on: its outcome is {life.outcome}")
    for response in life.responses:
        mask = response.per_token.get(columns.LOSS_MASK)
        if mask is not None and not all(mask):
            kept = sum(map(bool, mask))
            life.remarks.append(
                f"loss_mask of {response.node} leaves {kept} of {len(mask)} tokens to train on"
            )


def _remark_on_equal_rewards(life: Biography, models: Mapping[str, Any]) -> None:
    trainers = {update.node.rpartition(".")[0] for update in life.updates}
    terms = [
        text
        for name, text in (("kl_coef", "the KL term"), ("entropy_coef", "the entropy term"))
        if any(models.get(trainer, {}).get(name) for trainer in trainers)
    ]
    taught = f"it teaches only through {' and '.join(terms)}" if terms else "it teaches nothing"
    for advantage in life.advantages:
        if advantage.is_flat:
            life.remarks.append(
                f"{advantage.node}: all rewards of the group are equal, so {taught}"
            )
