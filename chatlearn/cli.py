# SPDX-License-Identifier: Apache-2.0
"""The command line: run | check | graph | explain | eval | report | replay | why.

What is heavy is imported inside the command that needs it, so that `chatlearn --help` is instant.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from chatlearn import __version__
from chatlearn.errors import ChatLearnError, ConfigError, FlowError, ModuleError
from chatlearn.script import execute, inspect

if TYPE_CHECKING:
    from rich.console import Console

    from chatlearn.config import Config
    from chatlearn.flow.graph import FlowGraph
    from chatlearn.program import Program

app = typer.Typer(
    help="Post-train language models by reinforcement learning, written as three plain functions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Target = Annotated[Path, typer.Argument(help="A script, or a YAML recipe that names one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="For example runtime.num_episode=3."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what follows `--` goes to the script."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    app(args=given[:end], prog_name="chatlearn", obj=tuple(given[end + 1 :]))


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Post-train language models by reinforcement learning, written as three plain functions."""
    if version:
        typer.echo(f"chatlearn {__version__}")
        raise typer.Exit


@app.command()
def run(context: typer.Context, target: Target, overrides: Overrides = None) -> None:
    """Run a script or recipe; `-- ARGS` go to the script."""
    with _command(target, overrides) as script:
        execute(script, context.obj or ())


@app.command()
def check(
    context: typer.Context,
    target: Target,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings, too.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Call steps that declare no columns once, on made-up samples; side effects happen.",
        ),
    ] = False,
) -> None:
    """Trace the flows and validate everything, without loading weights."""
    with _command(target, overrides) as script:
        start = time.perf_counter()
        action = _timed(_dry_run if dry_run else _check)
        found: tuple[Program, float] = inspect(script, context.obj or (), action)
        program, seconds = found
        others = time.perf_counter() - start - seconds
        took = f"(checked in {seconds:.2g} s; the script took {others:.2g} s)"
        out = _console()
        for name, graph in program.graphs.items():
            calls = " -> ".join(node.name for node in graph.nodes)
            out.print(f"{name}: {calls}", markup=False, highlight=False, soft_wrap=True)
        for warning in program.warnings:
            _print_finding("warning", "yellow", str(warning))
        _stop_at(program.problems)
        if program.data_owner is not None:  # evaluation alone has no episodes
            typer.echo(program.run_plan().describe())
        for note in program.notes:
            out.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        if program.warnings:
            from chatlearn.arithmetic import count

            number = count(len(program.warnings), "warning")
            out.print(f"it would run, with {number} {took}", style="yellow", highlight=False)
            raise typer.Exit(1 if strict else 0)
        out.print(f"everything fits together {took}", style="green", highlight=False)


@app.command()
def graph(
    context: typer.Context,
    target: Target,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for the Mermaid and SVG files.")] = Path(
        "flows"
    ),
) -> None:
    """Draw the flows in the terminal; write them as Mermaid and SVG."""
    with _command(target, overrides) as script:
        program: Program = inspect(script, context.obj or (), _check)
        written: list[Path] = []
        for name, flow in program.graphs.items():
            written += _draw(name, flow, program.graphs, out)
        if written:
            typer.echo(f"wrote {', '.join(map(str, written))}")
        _stop_at([problem for problem in program.problems if isinstance(problem, FlowError)])


@app.command()
def explain(context: typer.Context, target: Target, overrides: Overrides = None) -> None:
    """Print the arithmetic of the episodes, what runs when, and who set each value."""
    with _command(target, overrides) as script:
        program: Program = inspect(script, context.obj or (), _check)
        from chatlearn.explain import print_explanation

        print_explanation(program, _console())
        _stop_at(program.problems)


@app.command("eval")
def evaluate(context: typer.Context, target: Target, overrides: Overrides = None) -> None:
    """Evaluate instead of training."""
    with _command(target, overrides) as script:
        results, metrics = inspect(script, context.obj or (), _evaluate)
        for name, batches in results.items():
            count = sum(max((len(column) for column in b.values()), default=0) for b in batches)
            typer.echo(f"{name}: {count} samples")
        for name, value in metrics.items():
            typer.echo(f"{name} {value:.6g}")


@app.command()
def report(run_folder: RunFolder) -> None:
    """Render report.html of a run folder again."""
    with _errors_reported(run_folder):
        if not run_folder.is_dir():
            raise ConfigError(
                f"there is no run folder {run_folder}", fix="give the `runtime.output_dir` of a run"
            )
        from chatlearn.observability.report import write_report

        typer.echo(f"wrote {write_report(run_folder)}")


@app.command()
def replay(
    context: typer.Context,
    run_folder: RunFolder,
    overrides: Overrides = None,
    episode: Annotated[
        int | None, typer.Option(help="Number of the episode; the newest recorded one.")
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Node to run again; all behind the rollouts, if not given.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Further node to take from the record.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(metavar="UID,...", help="Run the node for these samples only.")
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--eval", help="Look in the evaluation after the episode.")
    ] = False,
    script: Annotated[
        Path | None, typer.Option(help="Where the run's script is now, if it was moved.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Parquet file for what the node returns.")
    ] = None,
) -> None:
    """Run part of a recorded episode again, with the code of now, and compare."""
    with _errors_reported(run_folder):
        from chatlearn.rerun import replay as rerun
        from chatlearn.rerun.table import print_replay

        path = rerun.script_of(run_folder, episode, script)
        with _errors_reported(path):
            replayed = rerun.replay(
                run_folder,
                episode=episode,
                node=node,
                keep=keep or (),
                samples=_uids(samples),
                evaluation=evaluation,
                script=path,
                arguments=context.obj or None,
                overrides=overrides or (),
                out=out,
            )
        print_replay(replayed, _console())
        if out is not None:
            typer.echo(f"wrote {out}")


@app.command()
def why(
    run_folder: RunFolder,
    uid: Annotated[int, typer.Argument(help="Number of the sample.")],
    episode: Annotated[
        int | None, typer.Option(help="Look in this episode only; the newest that has it.")
    ] = None,
    evaluation: Annotated[bool, typer.Option("--eval", help="A sample of an evaluation.")] = False,
    all_tokens: Annotated[bool, typer.Option("--all", help="Show every token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell a recorded sample's story: tokens, rewards, advantage, and every update it was in."""
    with _errors_reported(run_folder):
        from chatlearn.biography.story import biography
        from chatlearn.biography.text import print_biography, to_json

        life = biography(run_folder, uid, evaluation=evaluation, episode=episode)
        if as_json:
            typer.echo(to_json(life))
        else:
            print_biography(life, _console(), all_tokens=all_tokens)


def _uids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--samples takes numbers, not {text!r}", fix="write --samples 96,97"
        ) from None


# Running the user's script


@contextmanager
def _command(target: Path, overrides: Sequence[str] | None) -> Generator[Path]:
    """Apply the command line's configuration to all that runs within; yield the script."""
    from chatlearn.config import command_line, init

    recipe = target if target.suffix in (".yaml", ".yml") else None
    with _errors_reported(target), command_line(overrides or (), recipe):
        config = init()  # what is malformed is refused before the script does anything
        script = target if recipe is None else _script_of(config, recipe)
        with _errors_reported(script):
            yield script


def _script_of(config: Config, recipe: Path) -> Path:
    if config.script is None:
        raise ConfigError(
            "the recipe names no script to run",
            place=str(recipe),
            fix="add `script: train.py`, relative to the recipe",
        )
    return config.script


def _timed(action: Callable[[Any], Program]) -> Callable[[Any], tuple[Program, float]]:
    """Have an action return what it took, too, in seconds."""

    def timed(subject: Any) -> tuple[Program, float]:
        start = time.perf_counter()
        return action(subject), time.perf_counter() - start

    return timed


def _check(subject: Any) -> Program:
    return subject.check()


def _dry_run(subject: Any) -> Program:
    return subject.check(dry_run=True)


def _evaluate(subject: Any) -> tuple[Mapping[str, Sequence[Mapping[str, Any]]], dict[str, float]]:
    """Evaluate with the modules as `setup()` makes them; return the results and what was measured."""
    from chatlearn.config import active
    from chatlearn.program import raise_problems

    if active().runtime.resume != "never":
        raise ConfigError(
            "`chatlearn eval` measures the models that the script names and does not resume a run",
            place=active().provenance("runtime.resume"),
            fix="name the trained model: models.<policy>.model=<run folder>/model",
        )
    raise_problems(subject.check().problems)
    evaluator = getattr(subject, "evaluator", subject)
    try:
        return subject.eval(), evaluator.metrics
    finally:
        subject.stop()


# Saying what was found


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


@contextmanager
def _errors_reported(script: Path) -> Generator[None]:
    """Turn an error into a message and exit code 1; where a module raised, show its traceback."""
    try:
        yield
    except ModuleError as error:
        _fail_with_traceback(error, script)
    except ChatLearnError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:  # noqa: BLE001 - the script's own error, shown as Python shows it
        _fail_with_traceback(error, script)


def _fail_with_traceback(error: Exception, script: Path) -> NoReturn:
    """Print the traceback from the script's own first line on."""
    import traceback

    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != str(script):
        frames = frames.tb_next
    traceback.print_exception(error.with_traceback(frames or error.__traceback__))
    raise typer.Exit(1) from None


def _print_error(error: ChatLearnError) -> None:
    _print_finding("error", "red", str(error))


def _print_finding(kind: str, colour: str, text: str) -> None:
    from rich.text import Text

    lines = text.splitlines()
    first = ((f"{kind}: ", f"bold {colour}"), (lines[0], colour))
    found = Text.assemble(*first, *(f"\n{line}" for line in lines[1:]))
    _console(stderr=True).print(found, soft_wrap=True)


def _stop_at(problems: Sequence[ChatLearnError]) -> None:
    for problem in problems:
        _print_error(problem)
    if problems:
        raise typer.Exit(1)


def _draw(name: str, graph: FlowGraph, graphs: Mapping[str, FlowGraph], folder: Path) -> list[Path]:
    """Print a flow and write its two files."""
    from chatlearn.errors import OutputError
    from chatlearn.flow.draw import sink_of, to_mermaid, to_svg, to_text

    sink = sink_of(name, graphs)
    typer.echo(f"{name}\n{to_text(graph, sink=sink)}\n")
    files = {
        folder / f"{name}.mmd": to_mermaid(graph, sink=sink),
        folder / f"{name}.svg": to_svg(graph, sink=sink),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write the drawings: {error.strerror}",
            place=str(folder),
            fix="give a folder that can be written with --out",
        ) from error
    return list(files)


if __name__ == "__main__":
    main()
