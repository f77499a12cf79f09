"""The commands of a plan: `sglang serve`, and `docker run` around it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import step37_ext
from step37_ext.deploy.memory import DEFAULT_SLIDING_RATIO, release
from step37_ext.deploy.plans import Plan
from step37_ext.model.dense_format import DENSE_VARIABLE, has_to_be_named

MODELS = {
    "bf16": "stepfun-ai/Step-3.7-Flash",
    "fp8": "stepfun-ai/Step-3.7-Flash-FP8",
    "nvfp4": "stepfun-ai/Step-3.7-Flash-NVFP4",
}
IMAGE = "lmsysorg/sglang:v0.5.23"
"""SGLang's image of the version that this package is run with."""

IMAGE_NOTE = (
    f"{IMAGE} stands for SGLang's image of the version that this package is run with; whether its "
    "registry has that tag was not checked. Any image with SGLang 0.5.20 or later will do; an "
    "older SGLang is refused."
)
HEAD_NODE = "HEAD_NODE:20000"
"""Where the nodes meet; a user puts the first node's address in its place."""

_WEIGHTS_AT = "/huggingface"
_MOUNTED_AT = "/step37-ext"


def environment(plan: Plan) -> dict[str, str]:
    """Environment variables that every node's server needs."""
    dense = plan.request.dense_weights
    return {DENSE_VARIABLE: dense} if has_to_be_named(dense) else {}


def serve_command(plan: Plan, node_rank: int = 0) -> list[str]:
    """Arguments of `sglang serve` on one node.

    The deployment page's flags of the format are there, but for its two backends of NVFP4
    (flashinfer_trtllm, trtllm_mha): naming them would put this package's kernels out of use.
    """
    request, parallel = plan.request, plan.parallel
    command = ["sglang", "serve", "--model-path", MODELS[request.quant]]
    command += ["--model-impl", "step37", "--trust-remote-code"]
    command += ["--attention-backend", "step37", "--tp", str(parallel.tp_size)]
    if parallel.ep_size > 1:
        command += ["--ep-size", str(parallel.ep_size)]
    if request.nodes > 1:
        command += ["--nnodes", str(request.nodes), "--node-rank", str(node_rank)]
        command += ["--dist-init-addr", HEAD_NODE]
    if request.quant == "nvfp4":
        command += ["--quantization", "modelopt_fp4", "--kv-cache-dtype", plan.cache]
    command += _limits(plan)
    if request.reasoning:
        command += ["--reasoning-parser", "step3p5"]
    if request.tools:
        command += ["--tool-call-parser", "step3p5"]
    return command + (_speculative() if request.mtp else [])


def _speculative() -> list[str]:
    """A draft of every MTP layer, and the token before them."""
    drafts = release().text.num_mtp_layers
    return (
        f"--speculative-algorithm EAGLE --speculative-num-steps {drafts} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {drafts + 1} "
        "--enable-multi-layer-eagle"
    ).split()


def _limits(plan: Plan) -> list[str]:
    """What the user limits, and what the memory plan needs beyond SGLang's defaults."""
    request, settings = plan.request, plan.memory.settings
    flags: list[str] = []
    if request.context is not None:
        flags += ["--context-length", str(request.context)]
    if request.concurrency is not None:
        flags += ["--max-running-requests", str(request.concurrency)]
    if settings.prefill_chunk != plan.gpu.prefill_chunk:
        flags += ["--chunked-prefill-size", str(settings.prefill_chunk)]
    if settings.sliding_ratio != DEFAULT_SLIDING_RATIO:
        flags += ["--swa-full-tokens-ratio", f"{settings.sliding_ratio:g}"]
    return flags


def docker_command(serve: list[str], variables: Mapping[str, str]) -> list[str]:
    """Arguments of `docker run` that install this package in SGLang's image and serve.

    Args:
        serve: of `serve_command`.
        variables: of `environment`.

    Raises:
        ValueError: this package is not installed from its source folder, which is mounted.
    """
    source = Path(step37_ext.__file__).parents[1]
    if not (source / "pyproject.toml").exists():
        raise ValueError(
            f"--docker: the container installs this package from its source, and {source} has no "
            "pyproject.toml; install it with pip install -e from a checkout"
        )
    weights = Path.home() / ".cache" / "huggingface"
    inside = f"pip install -e {_MOUNTED_AT} && exec {shlex.join(serve)}"
    return [
        *"docker run -it --gpus all --shm-size=32g --ipc=host --network=host".split(),
        *("-v", f"{weights}:{_WEIGHTS_AT}", "-e", f"HF_HOME={_WEIGHTS_AT}"),
        *("-v", f"{source}:{_MOUNTED_AT}"),
        *(word for name, value in variables.items() for word in ("-e", f"{name}={value}")),
        *(IMAGE, "bash", "-c", inside),
    ]


def in_shell(command: list[str], variables: Mapping[str, str] | None = None) -> str:
    """A command as a shell reads it, variables and each option with its value on their lines."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in (variables or {}).items()]
    lines.append(shlex.quote(command[0]))
    for word in map(shlex.quote, command[1:]):
        if word.startswith("-"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n    ".join(lines)
