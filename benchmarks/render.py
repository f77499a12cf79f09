"""docs/performance.md from the results that are kept and from the performance model.

    python -m benchmarks.render

A cell without a measurement says so; nothing is estimated in its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import click

from benchmarks import attention_cells, expert_cells, predictions, step_cells
from benchmarks.harness.cells import COUNTED_ON, Cell
from benchmarks.harness.hardware import ROOT
from benchmarks.harness.results import Result
from benchmarks.measurements import NOT_MEASURED, Measurements
from benchmarks.shapes import TEXT
from benchmarks.static_comparison import MIX, STATIC
from benchmarks.static_limits import CHIPS, LANES, LATENCY, bounds
from step37_ext.deploy.data_sheets import DATA_SHEETS, DataSheet
from step37_ext.deploy.estimate import LAUNCH_US, REACHED
from step37_ext.deploy.hardware import GPUS
from step37_ext.deploy.roofline import Formats, decode_step
from step37_ext.model.parallel import Parallel

PAGE = ROOT / "docs" / "performance.md"
PLOT = PAGE.with_name("performance.png")
SHOWN = tuple(GPUS[name] for name in ("h100", "h200", "b200"))
"""The GPUs with columns of their own: what the benchmarks are made for, and one of Blackwell."""

INTRODUCTION = """\
Made by `python -m benchmarks.render` from `benchmarks/results/` and the performance model,
`step37_ext/deploy/roofline.py`; do not edit it by hand. How to measure is in
[benchmarks/README.md](../benchmarks/README.md)."""

FLOOR = """\
A **floor** is the longer of moving the bytes at the data sheet's bandwidth and multiplying at its
dense rate, each weight and visible key read once, nothing padded; a step's is the sum of its
operations'. No launch, wait or communication is in it. Routing is uniform unless a row says
otherwise: 288 (1 - (280/288)^tokens) distinct experts. "Does not fit" is by the memory that the
benchmark needs, its reference included."""

STATIC_LIMITS = f"""\
Kernels of a decode step and SGLang's Triton kernels for the same shapes, compiled alike. **Issue**
is the bandwidth that the issue slots allow: an SM issues {LANES} lane instructions a clock.
**Little** is what the bytes in flight allow at a latency of {LATENCY * 1e9:.0f} ns, which is
assumed: while a tile is computed, and at the most, which takes blocks that wait in turns. Both are
shares of the data sheet's bandwidth, of what is streamed (weights; keys and values). Below 100% a
kernel cannot reach it at the assumed clock and latency, and it takes about 130% to come near it,
since loads, waits and epilogues want their part. A tile stands at the smallest batch that it is
chosen for; a launch of few blocks fills no GPU, which is in Little's column. SGLang's expert
kernels have the tiles that it takes by default: it has none tuned for this model's experts, and
tuning them may change what is said of them. The last column divides a trip of the inner loop."""

Table = list[str]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def floor_us(cell: Cell, sheet: DataSheet) -> float:
    """The least microseconds by a data sheet; a step's is the sum of its operations'."""
    if cell.suite != "step":
        return cell.work.floor(sheet.bandwidth, sheet.flops)
    settings = step_cells.Settings.of(cell)
    return step_cells.step_of(TEXT, settings).floor(sheet.bandwidth, sheet.flops)


def cell_table(cells: Iterable[Cell], measured: Measurements) -> Table:
    """Cells with floor and measured microseconds on each GPU shown."""
    head = ["operation and settings", "MB"]
    for gpu in SHOWN:
        head += [f"{gpu.sheet.name} floor us", "measured us"]
    rows = []
    for cell in cells:
        row = [label(cell), f"{cell.work.stream_bytes / 1e6:.1f}"]
        for gpu in SHOWN:
            row += [_floor(cell, gpu.sheet, gpu.memory), measured.shown(cell, gpu.sheet.name)]
        rows.append(row)
    return table(head, rows)


def label(cell: Cell | Result) -> str:
    """A cell, or that of a result, in words.

    What a setting's value says by itself stands without the setting.
    """
    words = [
        value if isinstance(value, str) and name != "dense" else f"{name} {value}"
        for name, value in cell.settings.items()
        if (name, value) not in (("routing", "uniform"), ("layers", step_cells.DEPTH))
    ]
    return ", ".join([cell.operation, *words])


def _floor(cell: Cell, sheet: DataSheet, memory: int) -> str:
    if cell.memory > COUNTED_ON * memory:
        return "does not fit"
    return f"{floor_us(cell, sheet):.1f}"


def step_cell(dense: str, batch: int) -> Cell:
    """The cell of an aim: NVFP4 experts on one GPU, 8192 tokens of context."""
    settings = step_cells.Settings(
        "decode", "nvfp4", dense, 1, "uniform", step_cells.DEPTH, batch=batch, context=8192
    )
    return step_cells.cell(TEXT, range(step_cells.DEPTH), settings)


def aims(measured: Measurements) -> Table:
    """The aims of the whole step on an H200, what the floor leaves room for, what was measured."""
    sheet = DATA_SHEETS["H200"]
    rows = []
    for dense, batch, wanted in (("bf16", 1, 200), ("fp8", 1, 330), ("bf16", 64, None)):
        cell = step_cell(dense, batch)
        at_floor = batch / floor_us(cell, sheet) * 1e6
        result = measured.of(cell, sheet.name)
        speed = share = outside = NOT_MEASURED
        if result is not None and result.time_us is not None and result.details is not None:
            speed = f"{result.details['tokens_per_s']:.0f}"
            share = f"{result.details['of_floor']:.0%}"
            if divided := result.details.get("breakdown"):
                lost = sum(row["us"] for row in divided if not row["launches"])
                # Of the profiled step's own period: under the profiler it may be a longer one.
                outside = f"{lost / sum(row['us'] for row in divided):.1%}"
        rows.append([
            f"NVFP4 experts, {dense.upper()} others, batch {batch}", f"{at_floor:.0f}",
            f"{0.7 * at_floor:.0f}" + (f"; at least {wanted}" if wanted else ""), speed, share,
            outside,
        ])  # fmt: skip
    head = ["one GPU, 8192 tokens", "tokens/s at the floor", "aim: 70% of it", "measured",
            "of the measured floor (aim 70%)", "outside kernels (aim under 3%)"]  # fmt: skip
    return table(head, rows)


def operations() -> Table:
    """Where the bytes of a step are, at batch 1 and 64."""
    sheet = DATA_SHEETS["H200"]
    of: dict[str, list[str]] = {}
    for batch in (1, 64):
        step = decode_step(TEXT, Formats("nvfp4"), Parallel(), batch, 8192)
        total = step.floor(sheet.bandwidth, sheet.flops)
        for one in step.operations:
            us = one.floor(sheet.bandwidth, sheet.flops)
            row = of.setdefault(one.name, [one.name, str(one.times)])
            megabytes = one.times * one.work.bytes / 1e6
            row += [f"{megabytes:.1f}", f"{us:.1f}", f"{us / total:.1%}"]
    head = ["operation", "times", "MB, batch 1", "floor us", "share", "MB, batch 64", "floor us",
            "share"]  # fmt: skip
    return table(head, of.values())


def floors_everywhere() -> Table:
    """The floor of a decode step on every GPU, by format, in milliseconds."""
    rows = []
    for experts, dense, tp_size, batch in (
        ("nvfp4", "bf16", 1, 1), ("nvfp4", "fp8", 1, 1), ("nvfp4", "bf16", 4, 1),
        ("nvfp4", "bf16", 4, 64), ("fp8", "bf16", 4, 1), ("fp8", "bf16", 4, 64),
        ("bf16", "bf16", 4, 1), ("bf16", "bf16", 4, 64),
    ):  # fmt: skip
        step = decode_step(TEXT, Formats(experts, dense=dense), Parallel(tp_size), batch, 8192)
        floors = (step.floor(gpu.sheet.bandwidth, gpu.sheet.flops) for gpu in GPUS.values())
        name = f"{experts} experts, {dense} others, {_ranks(tp_size)}, batch {batch}"
        rows.append([name, *(f"{us / 1e3:.2f}" for us in floors)])
    return table(["8192 tokens, FP8 cache", *(gpu.sheet.name for gpu in GPUS.values())], rows)


def _ranks(tp_size: int) -> str:
    return "one GPU" if tp_size == 1 else f"each of {tp_size}"


def predicted_table(measured: Measurements) -> Table:
    """Every measured cell beside the time that the model predicts from the data sheet alone."""
    rows = []
    for one in predictions.predicted(measured, floor_us, all_cells()):
        low, high = one.expected_us
        verdict = "below" if one.us < low else "above" if one.us > high else "inside"
        rows.append([one.name, one.gpu, f"{one.floor_us:.1f}", f"{low:.1f} to {high:.1f}",
                     f"{one.us:.1f}", verdict])  # fmt: skip
    head = ["", "GPU", "floor us", "predicted us", "measured us", "measured is"]
    return table(head, rows or [["any cell", "any", "see above", "see above", NOT_MEASURED, "-"]])


@cache
def cells_of(suite: str) -> tuple[Cell, ...]:
    """A suite's cells: "step", "moe" or "attention"."""
    modules = {"step": step_cells, "moe": expert_cells, "attention": attention_cells}
    return tuple(modules[suite].cells())


def all_cells() -> list[Cell]:
    """Every cell of every suite."""
    return [*cells_of("step"), *cells_of("moe"), *cells_of("attention")]


def static_tables(folder: Path = STATIC) -> Iterator[str]:
    """What the machine code of our kernels and SGLang's allows, by architecture."""
    found = json.loads((folder / "comparison.json").read_text())
    yield f"Compiled by Triton {found['triton']}; SGLang {found['sglang']}. Not run.\n"
    for arch, chip in CHIPS.items():
        yield (
            f"### sm_{arch}, shares of {chip.sheet.name}'s {chip.sheet.bandwidth / 1e12:g} TB/s "
            f"({chip.sms} SMs, {chip.clock / 1e9:g} GHz assumed)\n"
        )
        rows = [row for row in found["rows"] if row["arch"] == arch]
        head = ["", "by", "registers", "shared KB", "blocks/SM", "instructions/byte", "issue",
                "KiB in flight", "Little", "bound by", ", ".join(MIX)]  # fmt: skip
        yield from table(head, map(_static_row, sorted(rows, key=lambda row: row["name"])))
        yield ""


def _static_row(row: dict) -> list[str]:
    allowed = bounds(row)
    spilled = f", {row['spills']} spills" if row["spills"] else ""
    total = sum(row["mix"].values())
    return [
        row["name"],
        row["by"],
        f"{row['registers']}{spilled}",
        f"{row['shared_bytes'] / 1024:.0f}",
        str(row["blocks_per_sm"]),
        f"{row['instructions']:.2f}",
        f"{allowed.issue:.0%}",
        " to ".join(f"{kib:.0f}" for kib in allowed.kib_in_flight),
        " to ".join(f"{share:.0%}" for share in allowed.in_flight),
        allowed.verdict,
        " ".join(f"{count / total:.0%}" for count in row["mix"].values()),
    ]


def breakdowns(measured: Measurements) -> Iterator[str]:
    """What the profile of each measured step of an aim says, kernel by kernel."""
    for dense, batch in (("bf16", 1), ("bf16", 64), ("fp8", 1)):
        for gpu in SHOWN:
            result = measured.of(step_cell(dense, batch), gpu.sheet.name)
            if result is None or result.time_us is None:
                continue
            details = result.details or {}
            title = f"{gpu.sheet.name}, {dense} others, batch {batch}"
            if "breakdown" not in details:
                yield f"{title}: not divided, {details.get('no_breakdown') or result.reason}\n"
                continue
            rows = details["breakdown"]
            total = sum(row["us"] for row in rows)
            yield f"{title}:\n"
            yield from table(
                ["kernel", "launches", "us", "share"],
                [
                    [
                        row["name"],
                        str(row["launches"]),
                        f"{row['us']:.1f}",
                        f"{row['us'] / total:.1%}",
                    ]
                    for row in rows
                ],
            )
            yield ""


def scaled(measured: Measurements) -> Table:
    """Whole steps whose figure comes from fewer layers, with what was run for it."""
    rows = []
    for one in measured:
        if found := (one.details or {}).get("scaled"):
            assert one.time_us is not None
            rows.append([label(one), measured.gpu(one), f"{one.time_us['median']:.1f}",
                         f"{found['us']:.1f}", f"{found['tokens_per_s']:.0f}",
                         f"{found['of_floor']:.0%}", found["how"]])  # fmt: skip
    head = ["run", "GPU", "measured us", "scaled us", "tokens/s", "of the measured floor", "how"]
    return table(head, rows) if rows else []


def peers(measured: Measurements) -> Table:
    """What other implementations took for the same cells in the same runs."""
    rows = []
    for one in measured:
        if one.implementation == "step37" or one.time_us is None:
            continue
        own = measured.same(one, "step37")
        median = one.time_us["median"]
        of_ours = NOT_MEASURED, NOT_MEASURED
        if own is not None and own.time_us is not None:
            of_ours = f"{own.time_us['median']:.1f}", f"{median / own.time_us['median']:.2f}"
        rows.append([label(one), measured.gpu(one), f"{one.implementation} {one.version}",
                     f"{median:.1f}", *of_ours])  # fmt: skip
    head = ["operation and settings", "GPU", "peer", "its us", "our us", "times ours"]
    return table(head, rows or [["any cell", "any", "any", *[NOT_MEASURED] * 3]])


def machines(measured: Measurements) -> str:
    """Which hardware the measurements are of, one line each."""
    lines = set()
    for one in measured:
        of, versions = one.machine, one.machine["versions"]
        lines.add(
            f"- {of['device']}, driver {of['clocks'].get('driver_version', '?')}, torch "
            f"{versions['torch']}, Triton {versions['triton']}, commit {of['commit']}; read stream "
            f"{one.limits['read'] / 1e9:.0f} GB/s"
        )
    if not lines:
        return 'No GPU has run any of this yet: where a time would stand is "not measured".'
    return "\n".join(["Measured on:", "", *sorted(lines)])


def first(suite: str, most: int) -> list[Cell]:
    """A suite's cells that are measured first, up to a priority."""
    return [cell for cell in cells_of(suite) if cell.priority <= most]


def page(measured: Measurements) -> str:
    """The page as text."""
    low, high = REACHED
    sections: list[str | Table] = [
        "# Performance",
        INTRODUCTION,
        machines(measured),
        FLOOR,
        "## Aims",
        aims(measured),
        "## The whole step",
        "`TP4-rank` is one rank of four without what it exchanges.",
        cell_table(first("step", 1), measured),
        scaled(measured),
        "Floors of a decode step on each GPU, in ms:",
        floors_everywhere(),
        "Where they come from: NVFP4 experts, BF16 others, one H200, 8192 tokens of context.",
        operations(),
        "\n".join(breakdowns(measured)),
        "## The expert layer",
        cell_table(first("moe", 0), measured),
        "## Attention",
        cell_table(first("attention", 1), measured),
        "## Peers",
        peers(measured),
        "## Predicted and measured",
        f"Before anything is measured a kernel or step is predicted to take its floor divided by "
        f"{high} to {low}, and {LAUNCH_US[1]:g} to {LAUNCH_US[0]:g} us for each launch: what "
        "`step37 command` assumes too.",
        predicted_table(measured),
        f"![measured over predicted]({PLOT.name})" if list(measured) else "",
        "## What the machine code allows",
        STATIC_LIMITS,
        "\n".join(static_tables()),
    ]
    text = "\n\n".join("\n".join(one) if isinstance(one, list) else one for one in sections if one)
    return text.rstrip() + "\n"


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=PAGE, help="The page.")
def main(output: Path) -> None:
    """Write docs/performance.md, and its plot where something was measured."""
    try:
        measured = Measurements()
        output.write_text(page(measured))
        points = list(predictions.predicted(measured, floor_us, all_cells()))
        if points:
            predictions.plot(points, output.with_name(PLOT.name))
    except (ValueError, ImportError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
