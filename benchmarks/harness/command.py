"""The command line that all benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.harness import limits, plot, report
from benchmarks.harness.cells import Cell, Subject, selected
from benchmarks.harness.hardware import ROOT, describe
from benchmarks.harness.results import Result, Store
from benchmarks.harness.run import DeviceLostError, Run, merged, ordered, parse_budget
from benchmarks.harness.static import static_figures
from step37_ext.deploy.data_sheets import data_sheet

OUT = ROOT / "out" / "benchmarks"


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    Attributes:
        name: also the results file's.
        cells: all of its cells.
        subjects: ours first, then the peers.
        plotted_over: the setting on the x axis.
        case_words: words of the evidence cases that belong to it; none has no figures compiled.
        tables: of the measured results, besides the one that all suites have.
        without_gpu: what the suite can run on a CPU, as a table.
    """

    name: str
    cells: Callable[[], list[Cell]]
    subjects: Callable[[], list[Subject]]
    plotted_over: str
    case_words: tuple[str, ...]
    tables: Callable[[Sequence[Result]], list[Table]] = lambda results: []
    without_gpu: Callable[[], Table] | None = None


def command(suite: Suite) -> click.Command:
    """The suite's command."""

    @click.command(help=f"Measure the {suite.name} kernels, or without a GPU say what would be.")
    @shared_options
    def main(**options: Any) -> None:
        run(suite, **options)

    return main


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command's function with the options that `run` takes."""
    path = click.Path(path_type=Path)
    for option in (
        click.option("--plot", "plot_path", type=path, help="Draw a plot here."),
        click.option(
            "--results", "--json", "results", type=path, help="Results file to go on with."
        ),
        click.option("--static/--no-static", default=True, help="Compiled figures, without a GPU."),
        click.option("--refcheck/--no-refcheck", default=True, show_default=True),
        click.option("--peers/--no-peers", default=True, show_default=True),
        click.option(
            "--only", multiple=True, metavar="KEY=VALUE,...", help="Choose cells; repeatable."
        ),
        click.option("--budget", default="8m", show_default=True, help="Stop after this time."),
    ):
        function = option(function)
    return function


def run(suite: Suite, results: Path | None, **options: Any) -> None:
    """`run_together` of one suite, whose results file has its name."""
    run_together([suite], results or OUT / f"{suite.name}.json", **options)


@dataclass(frozen=True)
class Part:
    """What is asked of a suite: its chosen cells in their order, and who takes part."""

    suite: Suite
    cells: list[Cell]
    subjects: list[Subject]


def run_together(
    suites: Sequence[Suite],
    results: Path,
    budget: str,
    only: tuple[str, ...],
    peers: bool,
    refcheck: bool,
    static: bool,
    plot_path: Path | None,
) -> None:
    """Measure suites on the GPU, or without one print what would be measured.

    Args:
        results: the file that all suites' results go to; what is in it is not measured again.
        budget: for all of them: the most telling cells of each come first.

    Raises:
        click.ClickException: an option or the results file is not as it has to be.
    """
    console = Console(width=None if Console().is_terminal else 200)
    try:
        seconds = parse_budget(budget)
        parts = _parts(suites, _choices(only), peers)
        store = Store(results)
        if plot_path is not None:
            plot.require_matplotlib()
    except (ValueError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    for part in parts:
        console.print(report.subject_table(part.subjects))
    if torch.cuda.is_available():
        _measure(console, parts, store, seconds, refcheck)
        console.print(f"Results: {results}")
    else:
        console.print("No GPU: nothing is measured.")
        for part in parts:
            _plan(console, part, static)
    for part in parts if plot_path is not None else ():
        assert plot_path is not None
        several = plot_path.with_stem(f"{plot_path.stem}-{part.suite.name}")
        of_suite = [one for one in store if one.suite == part.suite.name]
        try:
            plot.plot(of_suite, part.suite.plotted_over, several if parts[1:] else plot_path)
        except ValueError as error:
            raise click.ClickException(f"--plot, {part.suite.name}: {error}") from error


def _parts(suites: Sequence[Suite], only: Mapping[str, Sequence[str]], peers: bool) -> list[Part]:
    """The suites that have such cells.

    Raises:
        ValueError: none has.
    """
    parts, refusals = [], []
    for suite in suites:
        try:
            cells = sorted(selected(suite.cells(), only), key=lambda cell: cell.priority)
        except ValueError as error:
            refusals.append(error)
        else:
            parts.append(Part(suite, cells, suite.subjects() if peers else suite.subjects()[:1]))
    if not parts:
        raise refusals[0]
    return parts


def _choices(only: Sequence[str]) -> dict[str, list[str]]:
    chosen = {}
    for text in only:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"--only is {text!r}, expected KEY=VALUE or KEY=VALUE,VALUE")
        chosen[key] = values.split(",")
    return chosen


def _measure(
    console: Console, parts: Sequence[Part], store: Store, seconds: float, refcheck: bool
) -> None:
    begun = time.monotonic()
    machine = describe()
    measured = limits.measure()
    sheet = data_sheet(machine.device)
    known = f"data sheet {sheet.name}" if sheet else "not in the list of data sheets"
    rates = ", ".join(f"{k} {v / 1e12:.0f} TFLOP/s" for k, v in measured.flops.items())
    console.print(
        f"{machine.device} ({known}): read {measured.read / 1e9:.0f} GB/s, "
        f"copy {measured.copy / 1e9:.0f} GB/s, {rates}"
    )
    jobs = []
    for part in parts:
        usable = [subject for subject in part.subjects if subject.available()[0]]
        console.print(report.refusal_table(part.cells, usable))
        jobs += ordered(part.cells, usable)
    left, lost = 0, None
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(jobs))
        run = Run(store, machine, measured, begun + seconds, refcheck)
        try:
            for job, result in run.over(merged(jobs)):
                left += result is None
                progress.update(task, advance=1, description=f"{job.cell.suite} {job.cell.name}")
        except DeviceLostError as error:
            lost = error
    for part in parts:
        wanted = {cell.name for cell in part.cells}
        shown = [one for one in store if _shown(one, wanted, machine.source)]
        console.print(report.result_table(shown, f"{part.suite.name} on {machine.device}"))
        for table in part.suite.tables(shown):
            console.print(table)
    if lost is not None:
        raise click.ClickException(str(lost))
    if left:
        console.print(f"{left} of {len(jobs)} left when the budget ended: run again to go on")


def _shown(result: Result, wanted: set[str], source: str) -> bool:
    settings = (f"{k}={v}" for k, v in result.settings.items())
    name = " ".join([result.operation, *settings])
    return name in wanted and result.machine["source"] == source


def _plan(console: Console, part: Part, static: bool) -> None:
    suite = part.suite
    console.print(f"\n[bold]{suite.name}[/bold]")
    console.print(report.plan_table(part.cells))
    if suite.without_gpu is not None:
        console.print(suite.without_gpu())
    if static and suite.case_words:
        console.print(
            "Compiling every shipped configuration: ten minutes or so, kept for the next time; "
            "--no-static leaves it out."
        )
        evidence = static_figures(OUT)
        console.print(report.static_table(evidence, suite.case_words))
