# SPDX-License-Identifier: Apache-2.0
"""What `chatlearn explain` prints: the arithmetic of a program, from the functions that the engine uses.

Example:
    >>> for section in explain(engine.check()):
    ...     print(section.title, section.rows)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from chatlearn.arithmetic import (
    RunPlan,
    count,
    describe_passes,
    episodes_trained_on,
    times_due,
    train_plan,
)
from chatlearn.config import Config, plain
from chatlearn.data.sampler import PromptSampler
from chatlearn.errors import ConfigError, describe_function
from chatlearn.module import BaseModule, resolved_config
from chatlearn.observability.pass_at_k import measured_ks
from chatlearn.program import Executor, Program, name_of, unprobed_ends
from chatlearn.runtime.call_plan import PlannedCalls, planned_calls
from chatlearn.runtime.protocol import node_specs

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console


@dataclass(frozen=True)
class Section:
    """A few lines under a title: what is explained, and the explanation."""

    title: str
    rows: Sequence[tuple[str, str]]


def explain(program: Program) -> list[Section]:
    """Explain a program without problems, section by section."""
    sections: list[Section] = []
    if program.data_owner is not None:
        plan = program.run_plan()
        sections.append(_datasets(program, program.data_owner, plan))
        if "env_flow" in program.graphs:
            episode = [i // plan.episode.group_size for i in range(plan.episode.samples)]
            rows = _calls(program, "env_flow", [episode])
            sections.append(Section("env_flow, per episode", rows))
        if "trainer_flow" in program.graphs:
            sections.append(Section("trainer_flow, per episode", _training(program, plan)))
    if program.evaluator is not None:
        sections.append(_evaluation(program, program.evaluator))
    if program.data_owner is not None:
        sections.append(Section("between episodes", _between(program)))
    return [section for section in sections if section.rows]


def describe_program(program: Program, width: int) -> list[str]:
    """Lay the arithmetic out in lines of `width` columns."""
    lines: list[str] = []
    if program.data_owner is not None:
        for line in program.run_plan().describe_episodes().splitlines():
            lines += wrap(line, width, subsequent_indent="    ")
        if (env := program.graphs.get("env_flow")) and program.trainer is not None:
            for node in (node for node in env.nodes if node.module.filters_samples):
                text = f"{node.name} may keep fewer samples; then there are fewer updates"
                lines += wrap(text, width, subsequent_indent="    ")
    sections = explain(program)
    longest = max((len(label) for section in sections for label, _ in section.rows), default=0)
    column = min(longest, width // 2) + 4
    for section in sections:
        lines += [""] * bool(lines) + wrap(section.title, width, subsequent_indent="    ")
        for label, text in section.rows:
            first = f"  {label}".ljust(column)
            if len(first) > column:  # too long a name has a line of its own
                lines.append(first)
                first = " " * column
            lines += wrap(text, width, initial_indent=first, subsequent_indent=" " * column)
    for number, note in enumerate(program.notes):
        lines += [""] * (number == 0) + wrap(f"note: {note}", width, subsequent_indent="    ")
    return lines


def print_explanation(program: Program, console: Console) -> None:
    """Print the arithmetic, then every value with who set it; of a program with problems, the values alone."""
    if not program.problems:
        for line in describe_program(program, console.width):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print()
    _print_values(program.config, program.modules, console)


# ---- sections -----------------------------------------------------------------------------------------------------


def _datasets(program: Program, owner: Executor, plan: RunPlan) -> Section:
    """Say what an episode and the run take of each dataset."""
    runtime = program.config.runtime
    sizes = [len(rows) for rows in program.training_rows]
    sampler = PromptSampler(sizes, ratio=runtime.data_ratio)
    prompts = plan.episode.prompts
    # After so many episodes a turn begins with an episode again, so further ones repeat these.
    differing = range(max(min(plan.episodes, sum(runtime.data_ratio or [1] * len(sizes))), 1))
    episodes = [sampler.taken(i * prompts, prompts) for i in differing]
    whole = sampler.taken(0, plan.prompts)
    rows: list[tuple[str, str]] = []
    for number, size in enumerate(sizes):
        least, most = (f(taken[number] for taken in episodes) for f in (min, max))
        text = f"{least} of" if least == most else f"{least} to {most} of"
        text = f"{text if len(sizes) > 1 else ''} {count(prompts, 'prompt')} of an episode".lstrip()
        text += f", {whole[number]} of the run = {describe_passes(whole[number], size)} over its {count(size, 'row')}"
        if most > size:
            text += "; it repeats within an episode"
        name = name_of(owner, number)
        rows.append(("dataset" if name == "dataset_0" and len(sizes) == 1 else name, text))
    order = "shuffled anew in every pass" if runtime.data_shuffle else "in order"
    title = f"prompts, {order}"
    if len(sizes) > 1:
        quotas = runtime.data_ratio or [1] * len(sizes)
        title += f", taken in turn {' : '.join(map(str, quotas))}, each dataset wrapping on its own"
    first = program.first_module
    if first is not None and type(first).build_dataset is not BaseModule.build_dataset:
        text = "makes datasets of these prompts; if their sizes differ, so do these numbers"
        rows.append((f"{first.name}.build_dataset", text))
    return Section(title, rows)


def _calls(program: Program, flow: str, runs: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
    """Say how often each node is called when the flow runs over samples of these groups, one run after the other."""
    graph = program.graphs[flow]
    specs = node_specs(graph, program.config.runtime.generation_batch_size)
    group_size = runs[0].count(runs[0][0])
    planned = [planned_calls(specs, groups) for groups in runs]
    rows: list[tuple[str, str]] = []
    for node, of_runs in zip(graph.nodes, zip(*planned, strict=True), strict=True):
        sizes = [size for calls in of_runs for size in calls.sizes]
        text = _describe_calls(of_runs[0], sizes, group_size)
        text += _replicas(resolved_config(node.module).num_replica, len(sizes))
        rows.append((node.name, text))
    return rows


def _describe_calls(planned: PlannedCalls, sizes: Sequence[int], group_size: int) -> str:
    """Say how many calls of which size: `16 calls of 32 samples (4 whole groups of 8)`."""
    full, last = max(sizes), sizes[-1]
    differ = any(size != full for size in sizes[:-1]) or not planned.is_exact
    text = f"{count(len(sizes), 'call')} of {'up to ' if differ else ''}{count(full, 'sample')}"
    if not planned.is_exact:
        text = f"at most {text}"
    if planned.spec.batch_by == "group" and group_size > 1:
        text += f" ({count(full // group_size, 'whole group')} of {group_size})"
    if planned.spec.batch_by == "episode":
        text += " (everything at once)"
    if not differ and last != full:
        text += f", the last of {last}"
    return text


def _replicas(number: int, calls: int) -> str:
    if number == 1:
        return ""
    idle = f", {number - calls} of them idle" if calls < number else ""
    return f", shared by {number} replicas by load{idle}"


def _training(program: Program, plan: RunPlan) -> list[tuple[str, str]]:
    runtime, graph, own = program.config.runtime, program.graphs["trainer_flow"], plan.episode
    env = program.graphs.get("env_flow")
    trained = own.training
    update = f"of {count(trained.step_samples, 'sample')} ({trained.describe_update()})"
    if runtime.max_replay_episode:
        steps = f"1 call per update {update}"
    else:
        steps = f"{count(trained.updates, 'call')}, one per update {update}"
        if env is not None and any(node.module.filters_samples for node in env.nodes):
            steps = f"at most {steps}"
    rows = [(node.name, steps) for node in graph.nodes]
    if runtime.max_replay_episode:
        rows.append(("replay", _replay(program, own.samples)))
    streams = runtime.stream_data_loader_type == "dynamic" and runtime.train_global_batch_size
    if env is None:
        begin = "straight from the dataset"
    elif streams and not runtime.max_replay_episode:
        begin = f"begins as soon as {count(trained.step_samples, 'sample')} are ready (dynamic)"
    else:
        begin = "begins when all samples of the episode are there"
        begin += "" if streams else f" ({runtime.stream_data_loader_type})"
    later = trained.passes - 1
    if later:
        begin += f"; the first pass is in order, {'the second' if later == 1 else f'{later} later ones'} shuffled"
        begin += " by (seed, episode, pass)"
    else:
        begin += "; samples in order"
    return [*rows, ("order", begin)]


def _replay(program: Program, samples: int) -> str:
    """Say what is trained on with replay, and how many updates that makes."""
    runtime, sampler = program.config.runtime, program.replay_sampler
    kept, offset = runtime.max_replay_episode, runtime.replay_episode_offset
    window = "all episodes so far" if kept == -1 else f"the last {count(kept, 'episode')}"
    if offset:
        window += f", from episode {offset + 1} on"
    if sampler is not None:
        return f"{describe_function(sampler)} chooses from {window}; it decides how many updates that makes"
    lengths = {episodes_trained_on(runtime, i) for i in range(runtime.num_episode)} or {1}
    least, most = (train_plan(runtime, n * samples).updates for n in (min(lengths), max(lengths)))
    updates = count(least, "update") if least == most else f"{least} to {count(most, 'update')}"
    return f"all samples of {window}: {updates}"


def _evaluation(program: Program, evaluator: Executor) -> Section:
    runtime = program.config.runtime
    sizes, repeats = [len(rows) for rows in evaluator.rows()], runtime.eval_num_inference_per_prompt
    prompts = sum(sizes)
    text = count(prompts, "prompt")
    if len(sizes) > 1:
        text += f" of {len(sizes)} datasets ({' + '.join(map(str, sizes))})"
    if repeats > 1:
        text += f" x {repeats} = {prompts * repeats} samples"
    rows = [("samples", text)]
    if ks := measured_ks(repeats, runtime.eval_pass_at_k):
        measured = ", ".join([f"avg@{repeats}", *(f"pass@{k}" for k in ks)])
        text = f"{measured}; a reward from {runtime.eval_pass_threshold:g} on passes"
        rows.append(("measured", text))
    if program.data_owner is not None:
        rows.append(("when", _evaluated_when(program)))
    runs = [[i // repeats for i in range(size * repeats)] for size in sizes]
    calls = _calls(program, evaluator.flow_name, runs)
    return Section("eval_flow, per evaluation", [*rows, *calls])


def _evaluated_when(program: Program) -> str:
    runtime = program.config.runtime
    after = times_due(runtime.num_episode, runtime.eval_episode_interval)
    times = after + runtime.enable_eval_before_training
    first = "before the first episode and " if runtime.enable_eval_before_training else ""
    return f"{first}after every {_nth(runtime.eval_episode_interval)}episode: {_times(times)}"


def _between(program: Program) -> list[tuple[str, str]]:
    """Say how often weights travel and checkpoints are written."""
    runtime = program.config.runtime
    rows: list[tuple[str, str]] = []
    for pair in program.sync_pairs:
        source, destination = pair
        every = resolved_config(destination).sync_frequency
        times = 1 + times_due(runtime.num_episode, every)
        when = f"before the first and after every {_nth(every)}episode: {_times(times)}"
        rows.append((f"sync {source.name} -> {destination.name}", when))
        if runtime.verify_every:
            probe = f"with every {_nth(runtime.verify_every)}sync, the first included"
            if ends := unprobed_ends(pair):
                probe = f"none, since {' and '.join(ends)} cannot tell: no probe_logprobs()"
            rows.append(("probe", probe))
    when = "when the run ends or is interrupted"
    if (interval := runtime.save_episode_interval) is not None:
        saves = times_due(runtime.num_episode, interval)
        saves += runtime.num_episode % interval != 0
        when = f"after every {_nth(interval)}episode and {when}: {_times(saves)}"
    rows.append(("checkpoint", when))
    if runtime.record:
        kept = f"the newest {runtime.record_last}" if runtime.record_last else "all of them"
        rows.append(("record", f"every node's inputs and outputs, of every episode; {kept} kept"))
    return rows


def _nth(number: int) -> str:
    """Write `2nd` and a space for 2, nothing for 1: `every 2nd episode`, `every episode`."""
    if number == 1:
        return ""
    last = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else last} "


def _times(number: int) -> str:
    return {0: "never", 1: "once"}.get(number, f"{number} times")


# ---- values -------------------------------------------------------------------------------------------------------


def _print_values(config: Config, modules: Sequence[BaseModule], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    sections: dict[str, BaseModel] = {"runtime": config.runtime}
    for module in modules:
        # A module whose configuration is refused stands among the problems already.
        with suppress(ConfigError):
            sections[f"models.{module.name}"] = resolved_config(module)
    table = Table("key", "value", "set by", box=None, pad_edge=False, header_style="bold")
    for section, values in sections.items():
        for field in type(values).model_fields:
            key = f"{section}.{field}"
            origin = config.provenance(key)
            value = Text(str(plain(getattr(values, field))), overflow="fold")
            style = "dim" if origin == "default" else ""
            table.add_row(Text(key, overflow="fold"), value, Text(origin), style=style)
    console.print(table)
