"""Results on disk: one JSON file, always whole, which a later run goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.cells import Cell, Setting
from benchmarks.harness.hardware import Machine

SCHEMA = 1

MEASURED, UNCHECKED = "measured", "measured, not checked"
TOO_BIG, WRONG, FAILED = "does not fit", "wrong result", "failed"
OUT_OF_MEMORY = "out of memory"
"""Unlike TOO_BIG it was estimated to fit."""


@dataclass(frozen=True)
class Result:
    """One cell by one implementation.

    Attributes:
        suite, operation, settings: of the cell.
        implementation, version: "step37" or a peer, and its library's version.
        status: one of the words above; reason says more where it was not measured, or what could
            not be said beside the time.
        time_us: `Timing` as a dict; None if there is no time.
        work: `Work` of one call as a dict.
        accuracy: `Accuracy` as a dict; None if it was not checked.
        launches: names of our kernels in one call; None for peers.
        device_kernels: kernels of one call as PyTorch's profiler counts them.
        limits: `Measured` as a dict: what the same GPU did at best in the same run.
        machine: `Machine` as a dict.
        details: what the suite says besides, None where it says nothing.
    """

    suite: str
    operation: str
    settings: dict[str, Setting]
    implementation: str
    version: str
    status: str
    machine: dict[str, Any]
    limits: dict[str, Any]
    reason: str = ""
    time_us: dict[str, Any] | None = None
    work: dict[str, Any] | None = None
    accuracy: dict[str, Any] | None = None
    launches: list[str] | None = None
    device_kernels: int | None = None
    details: dict[str, Any] | None = None
    schema: int = field(default=SCHEMA)

    @property
    def key(self) -> str:
        """What makes two results the same measurement."""
        machine = self.machine
        return _key(
            self.suite, self.operation, self.settings, self.implementation, self.version, machine
        )


def key_of(cell: Cell, implementation: str, version: str, machine: Machine) -> str:
    """The key that a result of this cell will have."""
    return _key(
        cell.suite, cell.operation, cell.settings, implementation, version, asdict(machine)
    )  # fmt: skip


def _key(
    suite: str,
    operation: str,
    settings: dict[str, Setting],
    implementation: str,
    version: str,
    machine: dict[str, Any],
) -> str:
    where = [machine[name] for name in ("device", "source", "versions")]
    what = [suite, operation, settings, implementation, version]
    return json.dumps([*what, *where], sort_keys=True)


class Store:
    """The results in one file, in the order they came; a repeated measurement takes its place."""

    def __init__(self, path: Path) -> None:
        """Read `path` if it is there.

        Raises:
            ValueError: it is not a results file of this schema.
        """
        self._path = path
        self._results: dict[str, Result] = {}
        if path.exists():
            for result in _read(path):
                self._results[result.key] = result

    def __iter__(self) -> Iterator[Result]:
        return iter(self._results.values())

    def status(self, key: str) -> str | None:
        """How this measurement ended; None if it is not here."""
        return self._results[key].status if key in self._results else None

    def add(self, result: Result) -> None:
        """Take a result in and write the file anew; a reader sees the old file or the new one."""
        self._results[result.key] = result
        content = {"schema": SCHEMA, "results": [asdict(one) for one in self]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with beside.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path)


def _read(path: Path) -> list[Result]:
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        return [Result(**one) for one in content["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file of schema {SCHEMA}: {error}") from error
