"""The command `step37 doctor`."""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "triton", "sglang", "transformers", "flashinfer-python")


@click.command("doctor")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Also check this folder: its config, and the headers of its files.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def doctor_command(checkpoint: Path | None, as_json: bool) -> None:
    """Say what is here, which kernels would serve, and whether they are right on this machine.

    Without a GPU the kernels run in Triton's interpreter, on a CPU. The exit status is 1 if
    anything is wrong.

    \b
    step37 doctor
    step37 doctor --checkpoint /models/Step-3.7-Flash-NVFP4
    """
    if not torch.cuda.is_available():
        # Before anything imports triton. A server without a GPU runs the reference instead.
        from step37_kernels import interpret

        try:
            interpret.enable()
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
    warnings.filterwarnings("ignore")  # libraries tell what they would miss
    found = examine(checkpoint)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        show(found)
    sys.exit(bool(found["problems"]))


def examine(checkpoint: Path | None) -> dict[str, Any]:
    """Everything the command prints; "problems" is empty if nothing is wrong."""
    from step37_ext.doctor.self_test import run_checks
    from step37_kernels.dispatch import Target

    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if gpu else None
    packages = {name: _version(name) for name in PACKAGES}
    problems = _version_problems(packages["sglang"])
    with _interpreted(not gpu):
        checks = run_checks(Target("cuda" if gpu else "cpu", capability, "-"))
    problems += [f"{c.operation} ({c.weights}): {c.problem}" for c in checks if c.problem]
    found = {
        "machine": {
            "python": platform.python_version(),
            "gpu": torch.cuda.get_device_name() if gpu else None,
            "gpus": torch.cuda.device_count(),
            "capability": None if capability is None else f"sm_{capability[0]}{capability[1]}",
            "memory_gib": _memory() if gpu else None,
        },
        "packages": packages,
        "kernels": _kernels(capability),
        "self_test": [vars(check) | {"passed": check.passed} for check in checks],
        "checkpoint": None,
        "problems": problems,
    }
    if checkpoint is not None:
        found["checkpoint"] = _checkpoint(checkpoint, problems)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _version_problems(sglang: str | None) -> list[str]:
    from step37_ext.compat import supported_version

    if sglang is None:
        return ["SGLang is not installed"]
    refusal = supported_version(sglang)
    return [] if refusal is None else [refusal]


def _memory() -> list[float]:
    count = torch.cuda.device_count()
    return [
        round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1)
        for index in range(count)
    ]


def _kernels(capability: tuple[int, int] | None) -> list[dict[str, str]]:
    """What a server on this machine would run for each operation, and why."""
    from step37_kernels import dispatch
    from step37_kernels.dispatch import Target

    device = "cpu" if capability is None else "cuda"
    rows = []
    for operation in dispatch.OPERATIONS:
        for weights in ("bf16", "fp8", "nvfp4") if operation == "experts" else ("-",):
            chosen = dispatch.choose(operation, Target(device, capability, weights))
            rows.append(
                {
                    "operation": operation,
                    "weights": weights,
                    "implementation": chosen.name,
                    "why": chosen.reason,
                }
            )
    return rows


@contextmanager
def _interpreted(wanted: bool) -> Iterator[None]:
    """Choose the interpreted kernels inside the block, unless STEP37_IMPL says something else."""
    from step37_kernels.dispatch import ENVIRONMENT_VARIABLE

    ours = wanted and ENVIRONMENT_VARIABLE not in os.environ
    if ours:
        os.environ[ENVIRONMENT_VARIABLE] = "interpret"
    try:
        yield
    finally:
        if ours:
            del os.environ[ENVIRONMENT_VARIABLE]


def _checkpoint(folder: Path, problems: list[str]) -> dict[str, Any]:
    from step37_ext.model.parallel import Parallel
    from step37_ext.start_checks import check_config, check_tensors

    try:
        checked = check_config(folder, Parallel(1, 1), None)
        check_tensors(folder, checked)
    except (ValueError, OSError) as error:
        problems.append(f"checkpoint: {error}")
        return {"folder": str(folder), "whole": False, "format": None}
    return {"folder": str(folder), "whole": True, "format": checked.checkpoint.weights}


def show(found: dict[str, Any]) -> None:
    """Print the findings as tables."""
    console = Console()
    machine = found["machine"]
    console.print(
        f"GPU: {machine['gpus']} x {machine['gpu']} ({machine['capability']})"
        if machine["gpu"]
        else "GPU: none; the kernels below were run in Triton's interpreter"
    )
    console.print(", ".join(f"{n} {v or 'not installed'}" for n, v in found["packages"].items()))
    table = Table(title="What a server here would run", title_justify="left")
    for column in ("operation", "weights", "implementation", "why"):
        table.add_column(column)
    for row in found["kernels"]:
        table.add_row(*row.values())
    console.print(table)
    table = Table(title="Self-test against the references", title_justify="left")
    for column in ("operation", "on", "implementation", "error", "seconds", ""):
        table.add_column(column)
    for check in found["self_test"]:
        error = "-" if check["error"] is None else f"{check['error']:.1e}"
        table.add_row(
            check["operation"],
            check["weights"],
            check["implementation"],
            error,
            f"{check['seconds']:.1f}",
            "ok" if check["passed"] else "FAILED",
        )
    console.print(table)
    if found["checkpoint"] is not None:
        kind = found["checkpoint"]["format"]
        console.print(f"checkpoint: {'whole, ' + kind if kind else 'not usable'}")
    for problem in found["problems"]:
        console.print(f"problem: {problem}")
