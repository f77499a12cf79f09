"""Compile every shipped configuration and hold it against its limits.

    python -m step37_kernels.evidence [--arch 90] [--quick] [--json FILE] [--jobs 2] [WORD ...]

Words choose the cases whose name contains all of them. The exit status is 1 if a limit is broken.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import triton
from rich.console import Console
from rich.table import Table

from step37_kernels.evidence import attention_cases, expert_cases, linear_cases
from step37_kernels.evidence.limits import Case, Finding, examine, launched


def all_cases() -> list[Case]:
    """Every shipped configuration, both architectures."""
    return [*expert_cases.cases(), *linear_cases.cases(), *attention_cases.cases()]


def quick(cases: list[Case]) -> set[int]:
    """The first case of every kernel on every architecture, by the first word of its name."""
    seen: dict[tuple[int, str, str], int] = {}
    for index, case in enumerate(cases):
        for name in launched(case):
            seen.setdefault((case.arch, name, case.name.split()[0]), index)
    return set(seen.values())


def _examine_at(index: int) -> list[Finding]:
    return examine(all_cases()[index])


@click.command()
@click.option("--arch", type=click.Choice(["90", "100"]), help="Only this architecture.")
@click.option("--quick", "few", is_flag=True, help="Only one case of each kernel.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--jobs", default=2, show_default=True, help="Compile so many cases at a time.")
@click.argument("words", nargs=-1)
def main(arch: str | None, few: bool, path: Path | None, jobs: int, words: tuple[str, ...]) -> None:
    """Compile every shipped configuration and hold it against its limits."""
    cases = all_cases()
    kept = quick(cases) if few else set(range(len(cases)))
    chosen = [
        index
        for index, case in enumerate(cases)
        if index in kept
        and (arch is None or case.arch == int(arch))
        and all(word in case.name for word in words)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        findings = [one for found in pool.map(_examine_at, chosen) for one in found]
    table = Table(title=f"Machine code by Triton {triton.__version__}", title_justify="left")
    for column in ("case", "kernel", "sm", "regs", "shared", "per SM", "unit", "flight", "faults"):
        table.add_column(column)
    for one in findings:
        shown = one.figures
        table.add_row(
            one.case,
            one.kernel,
            str(one.arch),
            str(shown["registers"]),
            str(shown["shared_bytes"]),
            str(shown["blocks_per_sm"]),
            str(shown.get("per_unit", "")),
            f"{shown['bytes_in_flight'] // 1024}K",
            "; ".join(one.faults),
        )
    Console(width=160).print(table)
    if path is not None:
        content = {"triton": triton.__version__, "findings": [vars(one) for one in findings]}
        path.write_text(json.dumps(content, indent=1))
    sys.exit(any(one.faults for one in findings))


if __name__ == "__main__":
    main()
