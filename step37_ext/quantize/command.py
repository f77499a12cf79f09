"""`step37 quantize` on the command line."""

from __future__ import annotations

import warnings
from pathlib import Path

import click


@click.command("quantize")
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "target",
    type=click.Choice(["nvfp4", "fp8"]),
    required=True,
    help="Number format of the routed experts; all else stays as it is.",
)
@click.option(
    "--calibrate",
    "calibration_text",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to take the KV cache's scales and NVFP4's input_scale from.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
def quantize_command(
    src: str, dst: Path, target: str, calibration_text: Path | None, jobs: int
) -> None:
    """Quantise the release SRC, a folder or a repository in the hub's cache, to the new folder DST.

    BF16 becomes FP8 or NVFP4, FP8 becomes NVFP4, in the release's own layout. A run that was
    stopped goes on when the same command is given again. Nothing is ever overwritten. The error of
    every layer stands in DST/step37-quantize.json.

    \b
    Examples:
      step37 quantize stepfun-ai/Step-3.7-Flash /models/step37-fp8 --format fp8 --jobs 4
      step37 quantize /models/step37-fp8 /models/step37-nvfp4 --format nvfp4 --calibrate chats.txt
    """
    from rich.console import Console

    from step37_ext.quantize.report import error_table
    from step37_ext.quantize.run import quantize

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries about hardware that quantising does not use
        try:
            report = quantize(
                src,
                dst,
                target,  # type: ignore[arg-type]
                calibration_text=calibration_text,
                jobs=jobs,
                console=Console(stderr=True),
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise click.ClickException(str(error)) from error
    Console().print(error_table(report["errors"]))
    click.echo(f"{dst}: finished")
