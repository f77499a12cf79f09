"""SGLang's own serving benchmark against stock SGLang and this extension, one after the other.

    python -m benchmarks.serving --gpu h200 --count 4 --quant fp8 [--dry-run]

Runs on the host with the GPUs, in an environment or image with SGLang and this package. See
serving.md for what is compared and how to read it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.harness.hardware import ROOT
from step37_ext.deploy.command import MODELS, serve_command
from step37_ext.deploy.hardware import GPUS
from step37_ext.deploy.memory import Quant
from step37_ext.deploy.plans import Plan, Request, make_plan

OUT = ROOT / "out" / "serving"
SEED = 37
_MARGIN = 64  # of the context: SGLang refuses a request that would fill it
_POLL = 2.0  # seconds between asking whether a server answers
_GRACE = 60.0  # seconds that a server may take to end

_METRICS = {  # SGLang's names: ours, and whether more is better
    "output_throughput": ("output tokens/s", True),
    "median_tpot_ms": ("time per output token, median ms", False),
    "p99_tpot_ms": ("time per output token, p99 ms", False),
    "median_ttft_ms": ("time to first token, median ms", False),
    "p99_ttft_ms": ("time to first token, p99 ms", False),
    "completed": ("requests completed", True),
}


@dataclass(frozen=True)
class Server:
    """One of the two that are compared: its name, command and environment variables."""

    name: str
    command: list[str]
    environment: Mapping[str, str]


def servers(plan: Plan, port: int) -> list[Server]:
    """Stock SGLang as the model's deployment page starts it, and this extension, on the same GPUs.

    Stock is started without this package's plug-in, which SGLang would load otherwise.
    """
    ours = [*serve_command(plan), "--port", str(port)]
    stock = _without(_without(ours, "--model-impl"), "--attention-backend")
    if plan.request.quant == "nvfp4" and plan.gpu.family == "Blackwell":
        stock += ["--moe-runner-backend", "flashinfer_trtllm", "--attention-backend", "trtllm_mha"]
    return [Server("stock", stock, {"SGLANG_PLUGINS": "none"}), Server("step37", ours, {})]


def _without(command: Sequence[str], option: str) -> list[str]:
    place = command.index(option)
    return [*command[:place], *command[place + 2 :]]


def bench_command(
    model: str, port: int, concurrency: int, lengths: tuple[int, int], tag: str, output: Path
) -> list[str]:
    """SGLang's `bench_serving` at one concurrency: the same prompts for every server.

    Args:
        lengths: tokens of each prompt and of each answer, which does not end before.
        tag: kept in the result.
        output: JSONL file that the result is added to.
    """
    prompt, answer = lengths
    return [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"),
        *("--host", "127.0.0.1", "--port", str(port), "--model", model),
        # Integer ids drawn by seed: nothing is downloaded, and no text is shared between runs.
        *("--dataset-name", "random-ids", "--seed", str(SEED), "--random-range-ratio", "1.0"),
        "--tokenize-prompt",
        *("--random-input-len", str(prompt), "--random-output-len", str(answer)),
        *("--num-prompts", str(max(8, 4 * concurrency)), "--max-concurrency", str(concurrency)),
        *("--warmup-requests", str(concurrency), "--flush-cache"),
        *("--tag", tag, "--output-file", str(output)),
    ]


@contextmanager
def running(server: Server, port: int, log: Path, timeout: float) -> Iterator[None]:
    """The server in a process group of its own until the block ends, its output in `log`.

    Raises:
        click.ClickException: something listens on the port already, or the server ended, or it did
            not answer within `timeout` seconds.
    """
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise click.ClickException(f"something listens on port {port} already: give --port")
    with log.open("w") as output:
        process = subprocess.Popen(
            server.command,
            env=os.environ | server.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + timeout
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    words = "ended" if process.poll() is not None else "does not answer"
                    raise click.ClickException(f"the {server.name} server {words}: see {log}")
                time.sleep(_POLL)
            yield
        finally:
            _end(process)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server's process group, which may outlive its first process."""
    for sent, seconds in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def read_results(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The last result of each (server, concurrency) in a JSONL file of SGLang's."""
    found = {}
    for line in path.read_text().splitlines():
        one = json.loads(line)
        found[one["tag"], int(one["max_concurrency"])] = {name: one[name] for name in _METRICS}
    return found


def comparison(results: Mapping[tuple[str, int], Mapping[str, float]]) -> Table:
    """Stock and ours side by side, and how many times better ours is."""
    table = Table(title="SGLang's bench_serving", title_justify="left")
    for column in ("at once", "", "stock", "step37", "better"):
        table.add_column(column)
    for concurrency in sorted({concurrency for _, concurrency in results}):
        stock, ours = (results.get((name, concurrency), {}) for name in ("stock", "step37"))
        for metric, (title, more_is_better) in _METRICS.items():
            a, b = stock.get(metric), ours.get(metric)
            ratio = "not measured"
            if a and b:
                ratio = f"{b / a if more_is_better else a / b:.2f} x"
            shown = ["not measured" if value is None else f"{value:.1f}" for value in (a, b)]
            table.add_row(str(concurrency), title, *shown, ratio)
    return table


@click.command()
@click.option("--gpu", type=click.Choice(tuple(GPUS)), required=True)
@click.option("--count", type=int, required=True, help="GPUs of this host to use.")
@click.option("--quant", type=click.Choice(tuple(MODELS)), required=True)
@click.option("--prompt", default=8192, show_default=True, help="Tokens of each prompt.")
@click.option("--answer", default=1024, show_default=True, help="Tokens of each answer.")
@click.option(
    "--concurrency", default=(1, 8, 64), show_default=True, multiple=True, type=click.IntRange(1)
)
@click.option("--port", default=30037, show_default=True)
@click.option("--start-timeout", default=3600.0, show_default=True, help="Seconds for a start.")
@click.option("--output", type=click.Path(path_type=Path), default=OUT, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print the commands only.")
def main(
    gpu: str,
    count: int,
    quant: Quant,
    prompt: int,
    answer: int,
    concurrency: tuple[int, ...],
    port: int,
    start_timeout: float,
    output: Path,
    dry_run: bool,
) -> None:
    """Measure stock SGLang and this extension with SGLang's bench_serving."""
    try:
        request = Request(
            gpu, count, quant, context=prompt + answer + _MARGIN, concurrency=max(concurrency)
        )
        plan = make_plan(request)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if not plan.fits:
        raise click.ClickException("does not fit: see `step37 command` with the same options")
    results = output.resolve() / f"{quant}-{count}x{gpu}.jsonl"
    for server in servers(plan, port):
        benches = [
            bench_command(MODELS[quant], port, n, (prompt, answer), server.name, results)
            for n in concurrency
        ]
        variables = [f"{name}={value}" for name, value in server.environment.items()]
        click.echo(" ".join([*variables, shlex.join(server.command)]))
        for bench in benches:
            click.echo("  " + shlex.join(bench))
        if not dry_run:
            output.mkdir(parents=True, exist_ok=True)
            with running(server, port, output / f"{server.name}.log", start_timeout):
                for bench in benches:
                    # Not in the checkout: SGLang would take its folder kernels/ for a package.
                    subprocess.run(bench, check=True, cwd=output)
    if not dry_run:
        Console().print(comparison(read_results(results)))


if __name__ == "__main__":
    main()
