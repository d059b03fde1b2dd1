# SPDX-License-Identifier: Apache-2.0
"""Print a sample's biography, for people and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, cast

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from chatlearn import columns
from chatlearn.biography.advantage import Advantage
from chatlearn.biography.response import Response
from chatlearn.biography.story import Biography, Update
from chatlearn.observability.jsonl import json_safe

if TYPE_CHECKING:
    from rich.console import Console

_HEAD, _TAIL = 24, 8
"""Tokens shown of a long response."""
_FIXED, _WIDTH = 28, 13
"""Characters that a token's number, id and text take, and each column of numbers."""
_HEADINGS: Final = {
    columns.ROLLOUT_LOGPROBS: "rollout",
    columns.OLD_LOGPROBS: "old",
    columns.REF_LOGPROBS: "ref",
    columns.LOSS_MASK: "trained",
    columns.ADVANTAGES: "advantage",
    columns.RETURNS: "return",
    columns.VALUES: "value",
    columns.POLICY_VERSION: "version",
}


def to_json(life: Biography) -> str:
    """Return a biography as JSON; numbers that are not finite are null."""
    return json.dumps(json_safe(asdict(life)), indent=2)


def print_biography(life: Biography, console: Console, *, all_tokens: bool = False) -> None:
    """Print a biography, section by section."""
    kind = "sample of an evaluation, uid" if life.is_evaluation else "sample uid"
    when = f"after episode {life.episode}" if life.is_evaluation else f"episode {life.episode}"
    siblings = f"group of {len(life.group)}: uid {_numbers(life.group)}"
    console.print(Text(f"{kind} {life.uid}", style="bold"))
    _line(console, "made in" if not life.is_evaluation else "made", when)
    _line(console, "prompt", f"uid {life.prompt_uid}, {siblings}")
    if (loss := life.losses.get(life.uid)) is not None:
        _line(console, "outcome", f"{loss.what}: {loss.cause}")
    elif life.outcome is not None:
        _line(console, "outcome", life.outcome)
    _heading(console, "prompt")
    for line in _prompt_lines(life.prompt):
        console.print(Text(f"  {line}"))
    for response in life.responses:
        _print_response(response, life.updates, console, all_tokens)
    if life.rewards:
        _heading(console, "reward")
    for reward in life.rewards:
        console.print(Text(f"  {reward.node}: {reward.column} = {_value(reward.value)}"))
        terms = [
            f"{_value(reward.weights[name])} x {name} ({_value(value)})"
            if name in reward.weights
            else f"{name} {_value(value)}"
            for name, value in reward.parts.items()
        ]
        if terms:
            joined = " + ".join(terms) if len(reward.weights) == len(terms) else ", ".join(terms)
            console.print(Text(f"    = {joined}" if reward.weights else f"    parts: {joined}"))
    if life.advantages:
        _heading(console, "advantage")
    for advantage in life.advantages:
        _print_advantage(advantage, life, console)
    _print_updates(life, console)
    for title, lines in (("remarks", life.remarks), ("not recorded", life.missing)):
        if lines:
            _heading(console, title)
        for line in lines:
            text = Text(line, style="yellow" if title == "remarks" else "dim")
            console.print(Padding(text, (0, 0, 0, 2), expand=False))


def _heading(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _line(console: Console, label: str, text: str) -> None:
    console.print(Text(f"  {label:<9}{text}"))


def _prompt_lines(prompt: Any) -> list[str]:
    if isinstance(prompt, list):
        messages = cast("list[Any]", prompt)
        lines: list[str] = []
        for message in messages:
            if isinstance(message, dict):
                given = cast("dict[str, Any]", message)
                lines += f"{given.get('role', '?')}: {given.get('content', '')}".splitlines()
            else:
                lines.append(str(message))
        return lines
    return str(prompt).splitlines() if prompt is not None else ["(no prompt column)"]


def _print_response(
    response: Response, updates: Sequence[Update], console: Console, all_tokens: bool
) -> None:
    where = f", namespace {response.namespace}" if response.namespace else ""
    _heading(console, f"response of {response.node}{where}")
    settings = ", ".join(f"{name} {value}" for name, value in response.settings.items())
    if settings:
        _line(console, "sampled", settings)
    if response.policy_version is not None:
        _line(
            console,
            "policy",
            f"version {response.policy_version:g}: parameter syncs it had received",
        )
    if response.finish_reason is not None:
        _line(
            console, "ended by", f"{response.finish_reason}, after {len(response.token_ids)} tokens"
        )
    if response.completion is not None:
        for line in response.completion.splitlines() or [""]:
            console.print(Text(f"  {line}", style="cyan"))
    _print_tokens(response, updates, console, all_tokens)


def _print_tokens(
    response: Response, updates: Sequence[Update], console: Console, all_tokens: bool
) -> None:
    count = len(response.token_ids)
    shown = list(range(count))
    if not all_tokens and count > _HEAD + _TAIL + 1:
        shown = [*range(_HEAD), -1, *range(count - _TAIL, count)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("  token", justify="right")
    table.add_column("id", justify="right")
    if response.pieces is not None:
        table.add_column("text")
    names = list(response.per_token)
    for name in names:
        table.add_column(_HEADINGS[name], justify="right")
    followed = [update for update in updates if len(update.ratio) == count]
    room = max((console.width - _FIXED - _WIDTH * len(names)) // _WIDTH, 1)
    hidden, followed = followed[room:], followed[:room]
    for update in followed:
        table.add_column(f"ratio in {update.update}", justify="right")
    for token in shown:
        if token < 0:
            table.add_row("  ...", f"{count - _HEAD - _TAIL} more")
            continue
        cells = [f"  {token}", str(response.token_ids[token])]
        if response.pieces is not None:
            cells.append(repr(response.pieces[token])[1:-1])
        cells += [_value(response.per_token[name][token]) for name in names]
        cells += [_ratio(update, token) for update in followed]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    if hidden:
        numbers = ", ".join(str(update.update) for update in hidden)
        console.print(Text(f"  ratio in {numbers}: see --json", style="dim"))


def _ratio(update: Update, token: int) -> str:
    ratio = update.ratio[token]
    if math.isnan(ratio):
        return "-"
    clip = {1: " high", -1: " low"}
    held = clip.get(update.clipped[token], "") if token < len(update.clipped) else ""
    return f"{ratio:.4f}{held}"


def _print_advantage(advantage: Advantage, life: Biography, console: Console) -> None:
    result = _value(advantage.result)
    console.print(Text(f"  {advantage.node}: {advantage.column} = {result}"))
    if advantage.computed is None:
        if advantage.inputs:
            given = ", ".join(f"{n} {_value(v)}" for n, v in advantage.inputs.items())
            console.print(Text(f"    its module is not one of ours; it got {given}"))
        return
    rewards = ", ".join(f"{other}: {_value(value)}" for other, value in advantage.rewards.items())
    console.print(Text(f"    rewards of the group, by uid: {rewards}"))
    for absent in advantage.absent:
        why = life.losses[absent].what if absent in life.losses else "it did not get there"
        console.print(Text(f"    without uid {absent}: {why}"))
    if len(advantage.rewards) == 1:
        console.print(Text("    a group of one has nothing to compare with and keeps its reward"))
    elif advantage.is_flat:
        console.print(Text("    all of them are equal: 0"))
    else:
        own, size = advantage.rewards[life.uid], len(advantage.rewards)
        text = f"({_value(own)} - mean {_value(advantage.mean)})"
        if advantage.leave_one_out:
            text += f" x {size}/{size - 1} (compared with the others only)"
        if advantage.normalise_std:
            text += f" / (std {_value(advantage.std)} + eps {advantage.eps:g})"
        console.print(Text(f"    {text} = {_value(advantage.computed)}"))
    if not advantage.agrees:
        warning = f"    recorded is {result}: the module computed otherwise"
        console.print(Text(warning, style="bold yellow"))


def _print_updates(life: Biography, console: Console) -> None:
    if life.is_evaluation:
        return
    _heading(console, "training")
    if not life.updates:
        console.print(Text("  it was in no update"))
        return
    for update in life.updates:
        order = f"its {update.update_of_episode}., pass {update.training_pass}"
        where = f"episode {update.episode} ({order}), micro-batch {update.micro_batch}"
        console.print(Text(f"  update {update.update}: {where}"))
        parts: list[str] = []
        if update.ratio:
            parts.append(f"{update.trained} tokens trained on")
            ratios = [ratio for ratio in update.ratio if not math.isnan(ratio)]
            clipped = sum(value != 0 for value in update.clipped)
            if ratios:
                parts.append(f"ratio {min(ratios):.4f} to {max(ratios):.4f}, {clipped} clipped")
        if update.loss_weight is not None:
            parts.append(f"weight {_value(update.loss_weight)} each")
        if parts:
            console.print(Text(f"    {', '.join(parts)}"))
        shown = [name for name in ("loss", "grad_norm", "lr") if name in update.numbers]
        if shown:
            numbers = ", ".join(f"{name} {_value(update.numbers[name])}" for name in shown)
            console.print(Text(f"    of the whole update: {numbers}"))


def _numbers(uids: Sequence[int]) -> str:
    shown = [str(uid) for uid in uids[:16]]
    return ", ".join([*shown, "..."] if len(uids) > 16 else shown)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return f"{len(cast('list[Any]', value))} values, one per token"
    return str(value)
