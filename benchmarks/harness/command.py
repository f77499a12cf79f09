"""The command line that all benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.harness import limits, plot, report
from benchmarks.harness.cells import Cell, Subject, selected
from benchmarks.harness.hardware import ROOT, data_sheet, describe
from benchmarks.harness.results import Store
from benchmarks.harness.run import Run, ordered, parse_budget
from benchmarks.harness.static import static_figures

OUT = ROOT / "out" / "benchmarks"


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    Attributes:
        name: also the results file's.
        cells: all of its cells.
        subjects: ours first, then the peers.
        plotted_over: the setting on the x axis.
        case_words: words of the evidence cases that belong to it.
    """

    name: str
    cells: Callable[[], list[Cell]]
    subjects: Callable[[], list[Subject]]
    plotted_over: str
    case_words: tuple[str, ...]


def command(suite: Suite) -> click.Command:
    """The suite's command."""

    @click.command(help=f"Measure the {suite.name} kernels, or without a GPU say what would be.")
    @click.option("--budget", default="8m", show_default=True, help="Stop after this time.")
    @click.option(
        "--only", multiple=True, metavar="KEY=VALUE,...", help="Choose cells; repeatable."
    )
    @click.option("--peers/--no-peers", default=True, show_default=True)
    @click.option("--refcheck/--no-refcheck", default=True, show_default=True)
    @click.option("--static/--no-static", default=True, help="Compiled figures, without a GPU.")
    @click.option("--results", type=click.Path(path_type=Path), help="Results file to go on with.")
    @click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw a plot here.")
    def main(
        budget: str,
        only: tuple[str, ...],
        peers: bool,
        refcheck: bool,
        static: bool,
        results: Path | None,
        plot_path: Path | None,
    ) -> None:
        path = results or OUT / f"{suite.name}.json"
        console = Console(width=None if Console().is_terminal else 200)
        try:
            seconds = parse_budget(budget)
            cells = selected(suite.cells(), _choices(only))
            store = Store(path)
            if plot_path is not None:
                plot.require_matplotlib()
        except (ValueError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        cells.sort(key=lambda cell: cell.priority)
        subjects = suite.subjects() if peers else suite.subjects()[:1]
        console.print(report.subject_table(subjects))
        if torch.cuda.is_available():
            usable = [subject for subject in subjects if subject.available()[0]]
            _measure(console, suite, cells, usable, store, seconds, refcheck)
            console.print(f"Results: {path}")
        else:
            _plan(console, suite, cells, static)
        if plot_path is not None:
            try:
                plot.plot(store, suite.plotted_over, plot_path)
            except ValueError as error:
                raise click.ClickException(str(error)) from error

    return main


def _choices(only: Sequence[str]) -> dict[str, list[str]]:
    chosen = {}
    for text in only:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"--only is {text!r}, expected KEY=VALUE or KEY=VALUE,VALUE")
        chosen[key] = values.split(",")
    return chosen


def _measure(
    console: Console,
    suite: Suite,
    cells: list[Cell],
    subjects: list[Subject],
    store: Store,
    seconds: float,
    refcheck: bool,
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
    console.print(report.refusal_table(cells, subjects))
    run = Run(store, machine, measured, begun + seconds, refcheck)
    jobs = ordered(cells, subjects)
    left = 0
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(suite.name, total=len(jobs))
        for job, result in run.over(jobs):
            left += result is None
            progress.update(task, advance=1, description=job.cell.name)
    wanted = {cell.name for cell in cells}
    shown = [one for one in store if _shown(one, wanted, machine.source)]
    console.print(report.result_table(shown, f"{suite.name} on {machine.device}"))
    if left:
        console.print(f"{left} of {len(jobs)} left when the budget ended: run again to go on")


def _shown(result: Any, wanted: set[str], source: str) -> bool:
    settings = (f"{k}={v}" for k, v in result.settings.items())
    name = " ".join([result.operation, *settings])
    return name in wanted and result.machine["source"] == source


def _plan(console: Console, suite: Suite, cells: list[Cell], static: bool) -> None:
    console.print("No GPU: nothing is measured.")
    console.print(report.plan_table(cells))
    if static:
        with console.status("compiling every shipped configuration"):
            evidence = static_figures(OUT)
        console.print(report.static_table(evidence, suite.case_words))
