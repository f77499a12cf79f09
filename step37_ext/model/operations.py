"""Which implementation computes each operation of the model: chosen once, logged as one table."""

from __future__ import annotations

import dataclasses
import io
import logging
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from step37_kernels import dispatch, implementations  # noqa: F401  (makes the kernels known)

logger = logging.getLogger(__name__)


@dataclass
class OperationTable:
    """Chooses implementations for one model on one device, and remembers what was chosen.

    Attributes:
        target: device type, compute capability and format of the experts' weights.
        dense: format of the weights beside them that may be chosen, "bf16" or "fp8".
    """

    target: dispatch.Target
    dense: str = "bf16"
    _rows: dict[tuple[str, str, str, str], list[int]] = field(default_factory=dict)

    def choose(self, operation: str, layer: int, weights: str) -> dispatch.Implementation:
        """The implementation of `operation` for a layer whose weights are in format `weights`."""
        target = dataclasses.replace(self.target, weight_format=weights)
        chosen = dispatch.choose(operation, target)
        key = (operation, weights, chosen.name, chosen.reason)
        self._rows.setdefault(key, []).append(layer)
        return chosen

    def note(self, operation: str, layer: int, weights: str, name: str, reason: str) -> None:
        """Enter an operation that something outside `step37_kernels` computes."""
        self._rows.setdefault((operation, weights, name, reason), []).append(layer)

    def chosen(self) -> dict[str, str]:
        """The implementations' names by operation."""
        names: dict[str, list[str]] = {}
        for operation, _, name, _ in self._rows:
            if name not in names.setdefault(operation, []):
                names[operation].append(name)
        return {operation: ", ".join(several) for operation, several in names.items()}

    def log(self) -> None:
        """Log the table: operation, layers, format, implementation, why."""
        table = Table(title="step37: operations of Step-3.7-Flash", title_justify="left")
        for column in ("operation", "layers", "format", "implementation", "why"):
            table.add_column(column)
        for (operation, weights, name, reason), layers in self._rows.items():
            table.add_row(operation, layer_ranges(layers), weights, name, reason)
        text = io.StringIO()
        Console(file=text, width=110, color_system=None).print(table)
        logger.info("\n%s", text.getvalue())


def layer_ranges(layers: list[int]) -> str:
    """Layer numbers in short: [0, 1, 2, 5] is "0-2,5"."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
