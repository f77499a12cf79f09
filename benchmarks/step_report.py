"""The step benchmark's tables: tokens/s beside the floor, and where the time went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from benchmarks.harness.results import Result
from benchmarks.step_breakdown import OUTSIDE

_MOST_ROWS = 12  # of a breakdown; the shorter kernels are one row


def tables(results: Sequence[Result]) -> list[Table]:
    """Of the results that have a time: one table of all, and a breakdown of each."""
    timed = [one for one in results if one.time_us is not None and one.details is not None]
    divided = [one for one in timed if "breakdown" in (one.details or {})]
    return [speed_table(timed), *(breakdown_table(one) for one in divided)] if timed else []


def speed_table(results: Iterable[Result]) -> Table:
    """Milliseconds and tokens/s; a model of fewer layers has a row of its scaled figure besides."""
    table = Table(title="Whole steps", title_justify="left")
    numbers = ("ms", "tokens/s", "% of floor", "distinct experts")
    for column in ("cell", "layers", *numbers, "how"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for result in results:
        details, time = result.details or {}, result.time_us or {}
        cell = " ".join([result.operation, *(f"{k}={v}" for k, v in result.settings.items())])
        distinct = f"{details['distinct_experts']:.1f}"
        speed = _speed(time["median"], details)
        how = f"{result.status}, without {details['not_in_it']}"
        table.add_row(cell, details["layers"], *speed, distinct, how)
        if scaled := details.get("scaled"):
            table.add_row(cell, "all", *_speed(scaled["us"], scaled), distinct, scaled["how"])
    return table


def _speed(us: float, details: dict) -> tuple[str, str, str]:
    return f"{us / 1e3:.3f}", f"{details['tokens_per_s']:.1f}", f"{details['of_floor']:.0%}"


def breakdown_table(result: Result) -> Table:
    """Device time of one step by kernel, with what is outside of all: the rows add up."""
    settings = " ".join(f"{k}={v}" for k, v in result.settings.items())
    table = Table(title=f"One {result.operation} step, {settings}", title_justify="left")
    for column in ("kernel", "launches", "us", "%"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    rows = [
        (one["name"], one["launches"], one["us"]) for one in (result.details or {})["breakdown"]
    ]
    total = sum(us for *_, us in rows)
    kernels = [row for row in rows if row[0] != OUTSIDE]
    shown, rest = kernels[:_MOST_ROWS], kernels[_MOST_ROWS:]
    if rest:
        shown.append(
            (f"{len(rest)} others", sum(row[1] for row in rest), sum(row[2] for row in rest))
        )
    shown += [row for row in rows if row[0] == OUTSIDE]
    for name, launches, us in [*shown, ("step", sum(row[1] for row in rows), total)]:
        table.add_row(name, str(launches or ""), f"{us:.1f}", f"{us / total:.1%}")
    return table
