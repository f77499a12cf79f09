"""The measurements that are kept in benchmarks/results/, found by cell and GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.cells import Cell, Setting
from benchmarks.harness.hardware import ROOT
from benchmarks.harness.results import MEASURED, Result, Store
from step37_ext.deploy.data_sheets import data_sheet

RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "not measured"


class Measurements:
    """Every result in a folder's files; of two of the same cell on the same GPU the later file's.

    Raises:
        ValueError: a file is not one of results.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        self._found: dict[str, Result] = {}
        self.files = tuple(sorted(path.name for path in folder.glob("*.json")))
        for name in self.files:
            for result in Store(folder / name):
                key = _key(result.suite, result.operation, result.settings)
                self._found[json.dumps([key, result.implementation, self.gpu(result)])] = result

    def __iter__(self) -> Iterator[Result]:
        return iter(self._found.values())

    @staticmethod
    def gpu(result: Result) -> str:
        """The name of its GPU's data sheet, or of the GPU where there is none."""
        sheet = data_sheet(result.machine["device"])
        return sheet.name if sheet else result.machine["device"]

    def same(self, result: Result, implementation: str) -> Result | None:
        """The result of another implementation for the same cell on the same GPU."""
        key = _key(result.suite, result.operation, result.settings)
        return self._found.get(json.dumps([key, implementation, self.gpu(result)]))

    def of(self, cell: Cell, gpu: str, implementation: str = "step37") -> Result | None:
        """The result of a cell on the GPU of that data sheet."""
        key = _key(cell.suite, cell.operation, cell.settings)
        return self._found.get(json.dumps([key, implementation, gpu]))

    def shown(self, cell: Cell, gpu: str) -> str:
        """Microseconds, or why there are none."""
        result = self.of(cell, gpu)
        if result is None:
            return NOT_MEASURED
        if result.time_us is None:
            return result.status
        note = "" if result.status == MEASURED else " (not checked)"
        return f"{result.time_us['median']:.1f}{note}"


def _key(suite: str, operation: str, settings: dict[str, Setting]) -> str:
    return json.dumps([suite, operation, settings], sort_keys=True)
