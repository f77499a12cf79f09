"""What is measured: cells with their work and floors, and the implementations that do them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from benchmarks.harness.limits import Measured
from benchmarks.harness.timing import Call, Timing
from step37_ext.deploy.work import Work

Setting = str | int | float
GIB = 1 << 30
COUNTED_ON = 0.95
"""Share of a GPU's memory that a cell may need where it is not known how much will be free."""


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        suite, operation: for example "moe" and "experts".
        settings: what distinguishes it, in the order in which it is shown.
        priority: cells with lower numbers are measured first.
        group: cells of one group share an implementation's prepared data.
        work: expected; what a trial really did is in its result.
        memory: bytes on the device, estimated.
    """

    suite: str
    operation: str
    settings: dict[str, Setting]
    priority: int
    group: str
    work: Work
    memory: float

    @property
    def name(self) -> str:
        """Operation and settings as one line."""
        return " ".join([self.operation, *(f"{k}={v}" for k, v in self.settings.items())])


@dataclass(frozen=True)
class Accuracy:
    """Relative L2 distance from the fp32 reference, and the most that counts as the same."""

    relative_l2: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the result may be timed; NaN may not."""
        return self.relative_l2 <= self.allowed


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`; 0 where both are zero."""
    difference = (found.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return difference / norm if norm else difference


@dataclass(frozen=True)
class Trial:
    """One implementation ready to run one cell.

    Attributes:
        calls: runs of the operation on distinct data, together one sample.
        check: compares the first call's result with the reference.
        work: of one call, the mean over calls.
        graph: whether the calls can be captured in a CUDA graph.
        details: what else there is to say once the time and the GPU's limits are known.
    """

    calls: Sequence[Call]
    check: Callable[[], Accuracy]
    work: Work
    graph: bool = True
    details: Callable[[Timing, Measured], dict[str, Any]] | None = None


class Subject(Protocol):
    """One implementation: ours or a peer."""

    name: str

    def version(self) -> str:
        """The version of the library it is in, or why it cannot be used (see `available`)."""

    def available(self) -> tuple[bool, str]:
        """Whether it can run here at all, and the reason."""

    def refuses(self, cell: Cell) -> str | None:
        """Why this cell is not for it; None if it is."""

    def prepare(self, cell: Cell) -> Any:
        """The data that all cells of the cell's group share, on the device."""

    def trial(self, prepared: Any, cell: Cell) -> Trial:
        """The calls of one cell."""


def selected(cells: Iterable[Cell], only: Mapping[str, Sequence[str]]) -> list[Cell]:
    """The cells whose settings (or operation) are among the values named.

    Args:
        only: setting -> values as text, for example {"tokens": ["1", "64"]}.

    Raises:
        ValueError: no cell has such a setting, or none that value.
    """
    chosen = list(cells)
    for key, values in only.items():
        known = {str(value) for cell in chosen if (value := _value(cell, key)) is not None}
        unknown = [value for value in values if value not in known]
        if unknown:
            allowed = ", ".join(sorted(known)) or "nothing"
            raise ValueError(f"--only {key}={','.join(unknown)}: {key} can be {allowed}")
        chosen = [cell for cell in chosen if str(_value(cell, key)) in values]
    return chosen


def _value(cell: Cell, key: str) -> Setting | None:
    return cell.operation if key == "operation" else cell.settings.get(key)
