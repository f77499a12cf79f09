"""Tables: what would be measured with its floors, what was measured, the code's static figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from benchmarks.harness.cells import GIB, Cell, Subject
from benchmarks.harness.results import UNCHECKED, Result
from step37_ext.deploy.data_sheets import DATA_SHEETS, DataSheet, data_sheet

_PLANNED = ("H100 80GB HBM3", "H200", "B200")


def _table(title: str, columns: Iterable[str], right: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left")
    numbers = set(right)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    return table


def plan_table(cells: Sequence[Cell]) -> Table:
    """The cells in their order, with the work of one call and the floor on three GPUs."""
    sheets = [DATA_SHEETS[name] for name in _PLANNED]
    floors = [f"{sheet.name} floor us" for sheet in sheets]
    numbers = ["MB", "GFLOP", "needs GiB", *floors]
    table = _table("What would be measured (nothing here is)", ["cell", *numbers], numbers)
    for cell in cells:
        work = cell.work
        table.add_row(
            cell.name,
            f"{work.stream_bytes / 1e6:.1f}",
            f"{work.flops / 1e9:.2f}",
            f"{cell.memory / GIB:.1f}",
            *(_floor(cell, sheet) for sheet in sheets),
        )
    return table


def _floor(cell: Cell, sheet: DataSheet) -> str:
    if cell.work.matmul not in sheet.flops:
        return "-"
    return f"{cell.work.floor(sheet.bandwidth, sheet.flops):.1f}"


def subject_table(subjects: Sequence[Subject]) -> Table:
    """Which implementations take part, and why the others do not."""
    table = _table("Implementations", ["name", "takes part", "version or reason"])
    for subject in subjects:
        usable, reason = subject.available()
        table.add_row(subject.name, "yes" if usable else "no", reason)
    return table


def refusal_table(cells: Sequence[Cell], subjects: Sequence[Subject]) -> Table:
    """Which of the cells are not for an implementation that takes part, and why."""
    counts = Counter((s.name, reason) for s in subjects for c in cells if (reason := s.refuses(c)))
    table = _table("Cells left out", ["name", "cells", "reason"], ["cells"])
    for (name, reason), count in counts.items():
        table.add_row(name, str(count), reason)
    return table


def result_table(results: Iterable[Result], title: str) -> Table:
    """One row per result; percentages are of what the same GPU did in the same run."""
    numbers = ["us", "p10-p90", "GB/s", "% read", "% sheet", "TFLOP/s", "% matmul", "x floor"]
    counts = ["launches", "kernels", "rel. L2"]
    columns = ["cell", "by", *numbers, *counts, "note"]
    table = _table(title, columns, [*numbers, *counts])
    for result in results:
        cell = " ".join([result.operation, *(f"{k}={v}" for k, v in result.settings.items())])
        error = result.accuracy["relative_l2"] if result.accuracy else None
        table.add_row(
            cell,
            result.implementation,
            *_speed(result),
            str(len(result.launches)) if result.launches is not None else "",
            str(result.device_kernels or ""),
            f"{error:.2g}" if error is not None else "",
            _note(result),
        )
    return table


def rates(result: Result) -> dict[str, float]:
    """Everything that follows from a measured result's time; empty where there is no time.

    Returns:
        bytes_per_s, flops_per_s, of_read, of_sheet, of_matmul (shares; absent where their yardstick
        is unknown) and times_floor, against the limits measured in the same run; the floor of a
        whole step is the one that its details have, the sum of its operations'.
    """
    if result.time_us is None or result.work is None:
        return {}
    seconds = result.time_us["median"] * 1e-6
    work, limits = result.work, result.limits
    found = {
        "bytes_per_s": work["stream_bytes"] / seconds,
        "flops_per_s": work["flops"] / seconds,
    }
    found["of_read"] = found["bytes_per_s"] / limits["read"]
    sheet = data_sheet(result.machine["device"])
    if sheet is not None:
        found["of_sheet"] = found["bytes_per_s"] / sheet.bandwidth
    floor = work["bytes"] / limits["read"]
    rate = limits["flops"].get(work["matmul"])
    if rate:
        found["of_matmul"] = found["flops_per_s"] / rate
        floor = max(floor, work["flops"] / rate)
    if result.details and "floor_us" in result.details:
        floor = result.details["floor_us"] * 1e-6
    found["times_floor"] = seconds / floor
    return found


def _speed(result: Result) -> list[str]:
    found, time = rates(result), result.time_us
    if time is None:
        return [""] * 8

    def percent(name: str) -> str:
        return f"{found[name]:.0%}" if name in found else "-"

    return [
        f"{time['median']:.1f}",
        f"{time['p10']:.1f}-{time['p90']:.1f}",
        f"{found['bytes_per_s'] / 1e9:.0f}",
        percent("of_read"),
        percent("of_sheet"),
        f"{found['flops_per_s'] / 1e12:.1f}",
        percent("of_matmul"),
        f"{found['times_floor']:.2f}",
    ]


def _note(result: Result) -> str:
    if result.time_us is None:
        return f"{result.status}: {result.reason}" if result.reason else result.status
    notes = [UNCHECKED] if result.status == UNCHECKED else []
    if not result.time_us["graph"]:
        notes.append("no CUDA graph")
    if result.reason:
        notes.append(result.reason)
    return ", ".join(notes)


def static_table(evidence: dict[str, Any], words: Sequence[str]) -> Table:
    """The machine code's figures of the cases whose name holds one of `words`."""
    numbers = ["sm", "regs", "shared", "blocks/SM", "instr/unit", "KiB in flight", "spills"]
    title = f"Machine code, compiled by Triton {evidence['triton']}, not run"
    table = _table(title, ["case", "kernel", *numbers, "unit"], numbers)
    for one in evidence["findings"]:
        figures = one["figures"]
        if any(word in one["case"] for word in words):
            table.add_row(
                one["case"],
                one["kernel"],
                str(one["arch"]),
                str(figures["registers"]),
                str(figures["shared_bytes"]),
                str(figures["blocks_per_sm"]),
                str(figures.get("per_unit", "")),
                str(figures["bytes_in_flight"] // 1024),
                str(figures["spills"]),
                " ".join(figures["tensor_core"]),
            )
    return table
