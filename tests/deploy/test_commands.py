"""Every printed command, read by SGLang's own argument handling and by this package's start."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step37_ext.deploy.command import IMAGE, MODELS, docker_command, in_shell, serve_command
from step37_ext.deploy.hardware import static_fraction
from step37_ext.deploy.memory import release_config
from step37_ext.deploy.plans import Plan, Request, make_plan
from step37_kernels.attention.pages import MAX_BATCH

QUANTIZATION_CONFIG = {
    "bf16": None,
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "nvfp4": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": {"weights": {"group_size": 16}}},
        "kv_cache_scheme": {"type": "float", "num_bits": 8},
    },
}
PAGE = [
    Request(gpu, 4, quant, reasoning=reasoning, tools=tools)
    for gpu, quant, (reasoning, tools) in itertools.product(
        ("h200", "b200", "b300", "gb200", "gb300"),
        ("bf16", "fp8", "nvfp4"),
        itertools.product((False, True), repeat=2),
    )
]
ARCHITECTURES = {"Hopper": 90, "Blackwell": 100}
ON_A_GPU = {
    "device": "cuda",
    "attention_backend": "step37",
    "moe_runner_backend": "step37",
    "disable_flashinfer_autotune": True,
    "decode_graphs": "full",
    "prefill_graphs": "disabled",
}
"""What every start of ours gets there."""
DRAFTING = 48
"""SGLang's default of --max-running-requests with drafts."""
OTHERS = [
    Request("h200", 1, "nvfp4"),
    Request("h200", 1, "nvfp4", context=131072),
    Request("h100", 2, "nvfp4", context=262144, concurrency=2),
    Request("h100", 8, "bf16"),
    Request("h100", 8, "fp8", concurrency=16),
    Request("h100", 8, "nvfp4", nodes=2),
    Request("gb200", 4, "fp8", nodes=2, context=65536),
    *(Request("h200", 4, quant, mtp=True) for quant in ("bf16", "fp8", "nvfp4")),
    Request("b200", 4, "nvfp4", concurrency=64, mtp=True),
]


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict | str]:
    """What SGLang makes of each command for a checkpoint with the release's config.

    Of a plan's by its request, of a bare one by its name in BARE and the architecture.
    """
    folder = tmp_path_factory.mktemp("configs")
    for quant, quantization in QUANTIZATION_CONFIG.items():
        (folder / quant).mkdir()
        config = release_config() | ({"quantization_config": quantization} if quantization else {})
        (folder / quant / "config.json").write_text(json.dumps(config))
    made = {request: make_plan(request) for request in (*PAGE, *OTHERS)}
    work = [
        (local(plan, folder), plan.gpu.memory_mib, ARCHITECTURES[plan.gpu.family])
        for plan in made.values()
    ]
    start = ["--model-path", str(folder / "nvfp4"), "--model-impl", "step37", "--tp", "4"]
    bare = [(name, arch) for name in BARE for arch in ARCHITECTURES.values()]
    work += [([*start, *BARE[name]], 143771, arch) for name, arch in bare]
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("resolve.py"))],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(zip((*made, *bare), json.loads(run.stdout.splitlines()[-1]), strict=True))


BARE = {
    "no device": [],
    "a device with its index": ["--device", "cuda:0"],
    "drafts": ["--speculative-algorithm", "EAGLE"],
    "own names": ["--attention-backend", "step37", "--moe-runner-backend", "step37"],
}
"""Flags beside `--model-impl step37`, of users who do not copy a printed command."""


def local(plan: Plan, folder: Path) -> list[str]:
    """A plan's arguments of `sglang serve`, for a local folder."""
    arguments = serve_command(plan)
    assert arguments[:4] == ["sglang", "serve", "--model-path", MODELS[plan.request.quant]]
    return ["--model-path", str(folder / plan.request.quant), *arguments[4:]]


@pytest.mark.parametrize("request_", [*PAGE, *OTHERS], ids=str)
def test_sglang_reads_what_was_planned(resolved, request_):
    plan, read = make_plan(request_), resolved[request_]
    assert isinstance(read, dict), read
    settings = plan.memory.settings
    expected = {
        "tp_size": request_.gpus,
        "ep_size": plan.parallel.ep_size,
        "nnodes": request_.nodes,
        "model_impl": "step37",
        **ON_A_GPU,
        "trust_remote_code": True,
        "context_length": request_.context,
        "max_running_requests": request_.concurrency or (DRAFTING if request_.mtp else MAX_BATCH),
        "speculative_algorithm": "EAGLE" if request_.mtp else None,
        "enable_multi_layer_eagle": request_.mtp,
        "chunked_prefill_size": settings.prefill_chunk,
        "swa_full_tokens_ratio": settings.sliding_ratio,
        "reasoning_parser": "step3p5" if request_.reasoning else None,
        "tool_call_parser": "step3p5" if request_.tools else None,
        "quantization": "modelopt_fp4" if request_.quant == "nvfp4" else None,
        "kv_cache_dtype": "fp8_e4m3" if request_.quant == "nvfp4" else "auto",
    }
    assert {name: read[name] for name in expected} == expected


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("start", BARE)
def test_a_bare_start_gets_our_backends_and_graphs(resolved, start, arch):
    read = resolved[start, arch]
    assert isinstance(read, dict), read
    expected = {
        **ON_A_GPU,
        "max_running_requests": DRAFTING if start == "drafts" else MAX_BATCH,
    }
    assert {name: read[name] for name in expected} == expected


@pytest.mark.parametrize("request_", [*PAGE, *OTHERS], ids=str)
def test_sglang_reserves_what_was_planned(resolved, request_):
    plan = make_plan(request_)
    settings = plan.memory.settings
    graphs = min(plan.gpu.graph_batch(request_.gpus), request_.concurrency or MAX_BATCH)
    planned = static_fraction(plan.gpu, request_.gpus, settings.prefill_chunk, graphs)
    assert resolved[request_]["mem_fraction_static"] == pytest.approx(planned, abs=1e-9)


def test_docker_runs_the_same_command():
    plan = make_plan(replace(PAGE[0], quant="nvfp4"))
    serve = serve_command(plan)
    docker = docker_command(serve, {"STEP37_DENSE_WEIGHTS": "fp8"})
    assert docker[:2] == ["docker", "run"] and IMAGE in docker
    assert "--gpus all --shm-size=32g --ipc=host --network=host" in " ".join(docker)
    assert docker[-2] == "-c" and docker[-1].endswith("exec " + " ".join(serve))
    assert "STEP37_DENSE_WEIGHTS=fp8" in [docker[i + 1] for i, w in enumerate(docker) if w == "-e"]
    mounts = [docker[i + 1] for i, word in enumerate(docker) if word == "-v"]
    source = next(m.split(":")[0] for m in mounts if m.endswith(":/step37-ext"))
    assert (Path(source) / "pyproject.toml").exists()


def test_shell_text_is_the_command():
    command = docker_command(serve_command(make_plan(PAGE[-1])), {})
    read = subprocess.run(
        ["bash", "-c", "printf '%s\\0' " + in_shell(command)], capture_output=True, check=True
    )
    assert read.stdout.decode().split("\0")[:-1] == command
    shown = in_shell(["printenv", "SOME"], {"SOME": "a value"})
    assert subprocess.check_output(["bash", "-c", shown], text=True) == "a value\n"
