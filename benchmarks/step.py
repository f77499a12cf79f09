"""The whole step: decode and prefill of the full-size text model with random weights on one GPU.

    python -m benchmarks.step [--layers 24] [--budget 8m] [--only format=nvfp4] [--only batch=1,64]

All 45 layers in the NVFP4 layout need about 126 GB with a short context, which one H200 or B200
has; on a smaller GPU, or with `--layers`, fewer are run, and the figure of all is scaled from them
and says so. Without a GPU it prints what it would measure and the floors, and runs a tiny model in
the interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import torch

from benchmarks import step_cells, step_report, step_tiny
from benchmarks.harness.cells import Cell, Subject
from benchmarks.harness.command import Suite, run, shared_options
from benchmarks.step_step37 import Step37Step


def subjects() -> list[Subject]:
    """This project alone: a peer's whole step is a server's, see benchmarks/serving.md."""
    return [Step37Step()]


def cells(layers: int | None) -> list[Cell]:
    """The cells of that many layers; None is as many of each model as the GPU here can hold."""
    if layers is not None or not torch.cuda.is_available():
        return step_cells.cells(layers or step_cells.DEPTH)
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return step_cells.cells_within(device.total_memory)


def suite(layers: int | None = None) -> Suite:
    """The suite of a model of that many layers, see `cells`."""
    return Suite(
        name="step",
        cells=partial(cells, layers),
        subjects=subjects,
        plotted_over="batch",
        case_words=(),
        tables=step_report.tables,
        without_gpu=lambda: step_tiny.table(),
    )


layers_option = click.option(
    "--layers",
    type=click.IntRange(1, step_cells.DEPTH),
    help="Of a step: run only so many of the layers and scale the figure. By default all of them, "
    "or as many as the GPU has memory for.",
)


@click.command(help="Measure whole steps, or without a GPU say what would be measured.")
@shared_options
@layers_option
def main(layers: int | None, **options: Any) -> None:
    run(suite(layers), **options)


if __name__ == "__main__":
    main()
