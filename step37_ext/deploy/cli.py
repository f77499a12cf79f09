"""`step37 command` and `step37 serve`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from typing import Any, get_args

import click

from step37_ext.deploy.command import (
    IMAGE_NOTE,
    docker_command,
    environment,
    in_shell,
    serve_command,
)
from step37_ext.deploy.hardware import GPUS
from step37_ext.deploy.memory import Quant
from step37_ext.deploy.plans import DEFAULT_CONCURRENCY, DEFAULT_CONTEXT, Plan, Request, make_plan
from step37_ext.deploy.report import as_json, no_fit, print_plan
from step37_ext.model.dense_format import DENSE_FORMATS, DENSE_VARIABLE
from step37_kernels.attention.pages import MAX_BATCH

_OPTIONS = (
    click.option("--gpu", type=click.Choice(tuple(GPUS)), required=True),
    click.option("--count", type=int, required=True, help="GPUs in each node."),
    click.option("--nodes", type=int, default=1, show_default=True, help="Nodes."),
    click.option(
        "--quant",
        type=click.Choice(get_args(Quant)),
        required=True,
        help="Which release: its routed experts' number format.",
    ),
    click.option(
        "--context",
        type=int,
        help=f"Tokens of a request with its answer [planned for: {DEFAULT_CONTEXT}].",
    ),
    click.option(
        "--concurrency",
        type=click.IntRange(1, MAX_BATCH),
        help=f"Requests of that length at once [planned for: {DEFAULT_CONCURRENCY}].",
    ),
    click.option("--reasoning", is_flag=True, help="Reasoning in a field of its own."),
    click.option("--tools", is_flag=True, help="Tool calls in a field of their own."),
    click.option("--mtp", is_flag=True, help="Speculative decoding with the MTP layers."),
    click.option(
        "--dense-weights",
        type=click.Choice(DENSE_FORMATS),
        default=DENSE_FORMATS[0],
        show_default=True,
        envvar=DENSE_VARIABLE,  # a server would follow it, whatever the plan says
        show_envvar=True,
        help="What the weights beside the routed experts are served in.",
    ),
)


def _plan_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _plan(options: dict[str, Any]) -> Plan:
    try:
        return make_plan(Request(**options))
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@click.command("command")
@_plan_options
@click.option("--docker", is_flag=True, help="Print the `docker run` of it too.")
@click.option("--json", "as_json_", is_flag=True, help="Everything as JSON, sizes in bytes.")
def command_command(docker: bool, as_json_: bool, **options: Any) -> None:
    """Print the `sglang serve` command for some GPUs, and how their memory will be used.

    The exit status is 1 where it does not fit; the nearest plans that do are named.

    \b
    Examples:
      step37 command --gpu h200 --count 4 --quant fp8 --reasoning --tools
      step37 command --gpu h200 --count 1 --quant nvfp4 --context 65536
      step37 command --gpu b200 --count 4 --quant nvfp4 --docker
      step37 command --gpu gb200 --count 4 --nodes 2 --quant bf16 --json
    """
    plan = _plan(options)
    serve = [serve_command(plan, rank) for rank in range(plan.request.nodes if plan.fits else 0)]
    try:
        containers = [docker_command(one, environment(plan)) for one in serve] if docker else []
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if as_json_:
        note = {"docker": containers, "docker_note": IMAGE_NOTE} if docker else {}
        click.echo(json.dumps(as_json(plan, serve) | note, indent=2))
    else:
        texts = [in_shell(one, environment(plan)) for one in serve]
        print_plan(plan, texts + [in_shell(one) for one in containers])
        if containers:
            click.echo(f"\n{IMAGE_NOTE}")
    if not plan.fits:
        raise SystemExit(1)


@click.command("serve")
@_plan_options
def serve_command_(**options: Any) -> None:
    """Serve: the command that `step37 command` prints for the same options, run.

    \b
    Examples:
      step37 serve --gpu h200 --count 4 --quant fp8 --reasoning --tools
      step37 serve --gpu h200 --count 1 --quant nvfp4 --context 65536 --concurrency 4
    """
    plan = _plan(options)
    if plan.request.nodes > 1:
        raise click.ClickException(
            f"--nodes {plan.request.nodes}: serve starts one node; start each node with its own "
            "command from `step37 command`"
        )
    if not plan.fits:
        raise click.ClickException(f"does not fit. {no_fit(plan)}")
    command = serve_command(plan)
    variables = environment(plan)
    settings = [f"{name}={value}" for name, value in variables.items()]
    click.echo(shlex.join(settings + command), err=True)
    try:
        os.execvpe(command[0], command, os.environ | variables)
    except FileNotFoundError:
        raise click.ClickException(
            "sglang is not on the PATH; run this in an environment or image with SGLang"
        ) from None
