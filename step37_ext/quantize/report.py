"""How far the quantised weights are from the source's: a JSON object, and a table of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from step37_ext.quantize.convert import relative_error

REPORT_FILE = "step37-quantize.json"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PROJECTION = re.compile(r"model\.layers\.(\d+)\.moe\.(\w+)\.weight")


def error_report(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Relative L2 error, ||dequantised - source|| / ||source||, per layer, projection and in all.

    Args:
        records: of all shards (see `convert_shard`).
    """
    layers: dict[int, dict[str, Any]] = defaultdict(dict)
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for record in records:
        for name, error in record["errors"].items():
            match = _PROJECTION.fullmatch(name)
            assert match is not None, name
            layer, projection = int(match[1]), match[2]
            layers[layer][projection] = {
                "error": relative_error(error["error"], error["weight"]),
                "worst_expert": error["worst_expert"],
                "worst_expert_error": error["worst"],
            }
            sums[layer][0] += error["error"]
            sums[layer][1] += error["weight"]
    return {
        "measure": "relative L2: ||dequantised - source|| / ||source||, routed experts",
        "all": relative_error(*map(sum, zip(*sums.values(), strict=True))),
        "layers": {
            str(layer): {
                "error": relative_error(*sums[layer]),
                **{projection: layers[layer][projection] for projection in PROJECTIONS},
            }
            for layer in sorted(layers)
        },
    }


def error_table(errors: Mapping[str, Any]) -> Table:
    """`error_report` for a terminal."""
    table = Table(title="relative L2 error of the routed experts' weights")
    for column in ("layer", "all", *PROJECTIONS, "worst expert"):
        table.add_column(column, justify="right")
    for layer, entry in errors["layers"].items():
        worst = max(PROJECTIONS, key=lambda name: entry[name]["worst_expert_error"])
        stack = entry[worst]
        table.add_row(
            layer,
            _percent(entry["error"]),
            *(_percent(entry[name]["error"]) for name in PROJECTIONS),
            f"{_percent(stack['worst_expert_error'])} ({worst} of {stack['worst_expert']})",
        )
    table.add_row("all", _percent(errors["all"]), end_section=True)
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.3f} %"
