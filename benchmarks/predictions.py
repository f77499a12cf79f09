"""Measured times beside those that the performance model predicts from a data sheet alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import step_cells
from benchmarks.harness.cells import Cell
from benchmarks.harness.results import Result
from benchmarks.measurements import Measurements
from benchmarks.shapes import TEXT
from step37_ext.deploy.data_sheets import DATA_SHEETS, DataSheet
from step37_ext.deploy.estimate import LAUNCH_US, REACHED


@dataclass(frozen=True)
class Predicted:
    """One of this project's measurements, in microseconds, and what its time is predicted from.

    Attributes:
        floor_us: the cell's.
        launches: kernels of one call; 0 where they are not known.
    """

    name: str
    suite: str
    gpu: str
    floor_us: float
    launches: int
    us: float

    @property
    def expected_us(self) -> tuple[float, float]:
        """(low, high), by the shares of a floor and the launch latency that are assumed."""
        slow, fast = (
            self.floor_us / share + self.launches * each
            for share, each in zip(REACHED, LAUNCH_US, strict=True)
        )
        return fast, slow


def predicted(
    measured: Measurements, floor_us: Callable[[Cell, DataSheet], float], cells: Iterable[Cell]
) -> Iterator[Predicted]:
    """Every timed result of one of `cells`, in their order."""
    for cell in cells:
        for sheet in DATA_SHEETS.values():
            result = measured.of(cell, sheet.name)
            if result is not None and result.time_us is not None:
                floor, launches = floor_us(cell, sheet), _launches(cell, result)
                us = result.time_us["median"]
                yield Predicted(cell.name, cell.suite, sheet.name, floor, launches, us)


def _launches(cell: Cell, result: Result) -> int:
    """A step's by the performance model, since not all are ours; a kernel's as counted."""
    if cell.suite == "step":
        return step_cells.step_of(TEXT, step_cells.Settings.of(cell)).launches
    return len(result.launches or ())


def plot(points: Sequence[Predicted], path: Path) -> None:
    """Measured over predicted microseconds on logarithmic axes; on the line the floor is reached.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axis = figure.subplots()
    for group in sorted({(one.gpu, one.suite) for one in points}):
        of = [one for one in points if (one.gpu, one.suite) == group]
        axis.plot([x.floor_us for x in of], [x.us for x in of], "o", label=" ".join(group))
    ends = [min(one.floor_us for one in points), max(one.us for one in points)]
    axis.plot(ends, ends, "--", color="grey", label="the floor")
    axis.set(
        xscale="log", yscale="log", xlabel="floor by the data sheet, us", ylabel="measured, us"
    )
    axis.legend(fontsize=7)
    figure.savefig(path)
