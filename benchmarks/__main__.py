"""All benchmarks from one command.

    python -m benchmarks [--suite smoke|kernels|step|all] [--budget 8m] [--json FILE] [--plot FILE]

Without a GPU it prints what would be measured with its floors, compiles the kernels for their
static figures, and runs a tiny model through the step's code in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks import attention, moe, step
from benchmarks.harness.cells import Cell
from benchmarks.harness.command import OUT, Suite, run_together, shared_options

SMOKE_LAYERS = 4  # of the step: 18 GB, a full layer and three sliding ones


def smoke(suite: Suite) -> Suite:
    """The suite with only the first cell of each of its operations, and nothing compiled."""

    def first() -> list[Cell]:
        cells = sorted(suite.cells(), key=lambda cell: cell.priority)
        by_operation: dict[str, Cell] = {}
        for cell in cells:
            by_operation.setdefault(cell.operation, cell)
        return list(by_operation.values())

    return replace(suite, cells=first, case_words=())


SUITES: dict[str, Callable[[int | None], Sequence[Suite]]] = {
    "smoke": lambda layers: [
        smoke(one) for one in (step.suite(layers or SMOKE_LAYERS), moe.SUITE, attention.SUITE)
    ],
    "kernels": lambda layers: [moe.SUITE, attention.SUITE],
    "step": lambda layers: [step.suite(layers)],
    "all": lambda layers: [step.suite(layers), moe.SUITE, attention.SUITE],
}
"""By name, each of a step of so many layers; None is as many as fit."""


@click.command()
@click.option(
    "--suite",
    type=click.Choice(tuple(SUITES)),
    default="all",
    show_default=True,
    help="smoke: one cell of each operation, of a step of few layers.",
)
@shared_options
@step.layers_option
def main(suite: str, layers: int | None, results: Path | None, **options: Any) -> None:
    """Measure the kernels and the whole step, or without a GPU say what would be measured."""
    if layers is not None and suite == "kernels":
        raise click.UsageError("--layers is of a step, which --suite kernels leaves out")
    run_together(SUITES[suite](layers), results or OUT / "results.json", **options)


if __name__ == "__main__":
    main()
