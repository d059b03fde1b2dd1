# SPDX-License-Identifier: Apache-2.0
"""Print what running recorded nodes again gave: a table per node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from chatlearn.record.sameness import Difference
from chatlearn.rerun.comparison import NodeComparison

_SHOWN = 5
"""Updates with other samples that are named."""

if TYPE_CHECKING:
    from rich.console import Console

    from chatlearn.rerun.replay import Replay


def print_replay(replay: Replay, console: Console) -> None:
    """Print what was changed, every node that ran, and whether all of it is as it was."""
    for line in replay.changes:
        console.print(Text(f"changed since the run: {line}", style="cyan"))
    for line in replay.notes:
        console.print(Text(f"note: {line}", style="dim"))
    if replay.changes or replay.notes:
        console.print()
    told: set[str] = set()
    for comparison in replay.nodes:
        print_comparison(comparison, console, told)
    differing = [node.node for node in replay.nodes if not node.is_equal]
    verdict = f"differs from the record: {', '.join(differing)}"
    if not differing:
        verdict = "equal to the record, bit for bit"
        if replay.left_out:
            verdict = f"what ran is {verdict}"
    if replay.left_out:
        verdict += f"; left out: {', '.join(replay.left_out)}"
    style = "bold yellow" if differing or replay.left_out else "bold green"
    console.print(Text(f"episode {replay.episode}: {verdict}", style=style))


def print_comparison(comparison: NodeComparison, console: Console, told: set[str]) -> None:
    """Print one node's table; `told` are the modules whose failure has been printed, in full as a run does."""
    what = "update" if comparison.trains else "sample"
    plural = "s" * (comparison.samples != 1)
    title = f"{comparison.node}  {comparison.samples} {what}{plural} compared"
    if comparison.is_equal:
        title += ": equal, bit for bit"
    console.print(Text(title, style="bold green" if comparison.is_equal else "bold"))
    for remark in comparison.remarks:
        _print_line(remark, console)
    for update in comparison.updates[:_SHOWN]:
        _print_line(str(update), console)
    if (more := len(comparison.updates) - _SHOWN) > 0:
        _print_line(f"{more} more update{'s' * (more != 1)} with other samples", console)
    _print_causes(comparison, console, told)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("column", "result", "largest difference", "where"):
        table.add_column(heading, overflow="fold")
    for item in comparison.numbers:
        result = "equal" if not item.differing else f"{item.differing} of {item.steps} differ"
        values = f"update {item.update}: {_shown(item.recorded)} then, {_shown(item.made)} now"
        where = values if item.differing else ""
        largest = item.largest if item.differing else None
        _add_row(table, item.name, not item.differing, result, largest, where)
    for column in comparison.columns:
        name = f"{column.column} (column)" if comparison.trains else column.column
        where = f"uid {', '.join(map(str, column.uids))}" if column.uids else ""
        where += ", ..." if column.differing > len(column.uids) else ""
        _add_row(table, name, column.is_equal, _result(column), column.largest, where)
    if table.row_count:
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
    console.print()


def _print_line(text: str, console: Console) -> None:
    console.print(Padding(Text(text, style="yellow"), (0, 0, 0, 2), expand=False))


def _print_causes(comparison: NodeComparison, console: Console, told: set[str]) -> None:
    """Print why the node fails now, and why it did then: of the first sample, once per module."""
    for losses, when in ((comparison.failures, "now"), (comparison.recoveries, "then")):
        module = f"{comparison.node.partition('.')[0]} {when}"
        if losses and module not in told:
            told.add(module)
            cause = losses[0].cause.replace("\n", "\n  ")
            _print_line(f"uid {losses[0].uid} {losses[0].what}, {when}:\n  {cause}", console)


def _add_row(
    table: Table, name: str, is_equal: bool, result: str, largest: float | None, where: str
) -> None:
    gap = "" if largest is None or is_equal else f"{largest:.3g}"
    style = "green" if is_equal else "yellow"
    cells = (Text(name), Text(result, style=style), Text(gap), Text(where))
    table.add_row(*cells)


def _result(column: Difference) -> str:
    if column.is_equal:
        return "equal"
    counted = f"{column.differing} of {column.samples} differ" if column.differing else ""
    return "; ".join(part for part in (counted, column.note) if part)


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.9g}"
