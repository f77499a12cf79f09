"""The `step37` command."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import get_args

import click

from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.deploy.cli import command_command, serve_command_
from step37_ext.doctor.command import doctor_command
from step37_ext.quantize.command import quantize_command


@click.group()
@click.version_option(package_name="step37-ext")
def main() -> None:
    """Step-3.7-Flash in SGLang."""


main.add_command(command_command)
main.add_command(serve_command_)
main.add_command(quantize_command)
main.add_command(doctor_command)


@main.command("make-tiny")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "weight_format",
    type=click.Choice(get_args(WeightFormat)),
    required=True,
    help="Number format of the routed experts.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def make_tiny_command(out: Path, weight_format: WeightFormat, quiet: bool) -> None:
    """Write the small trained model to the folder OUT.

    The first call trains it for two to three minutes on two cores and caches the weights under
    ${XDG_CACHE_HOME:-~/.cache}/step37_ext.
    """
    from step37_ext.checkpoint.make import make_tiny

    try:
        make_tiny(out, weight_format, quiet=quiet)
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


@main.command("demo")
def demo_command() -> None:
    """Serve the small model in BF16, FP8 and NVFP4 on this machine's CPU and check its answers."""
    # Libraries tell what they would miss on a GPU, among the answers that a person wants to read.
    warnings.filterwarnings("ignore", module="torchvision")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from step37_ext.demo import run_demo

    if not run_demo():
        raise SystemExit(1)
