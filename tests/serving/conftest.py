"""One live server per format, started when the first test asks for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from rich.console import Console

from step37_ext.chat import connect
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.local_server import PLATFORM, LocalServer

DRAFTS = (
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4 --enable-multi-layer-eagle"
)
# In the checkpoint's own type, bfloat16; the demo serves in float32. One of them drafts.
ARGUMENTS: dict[WeightFormat, tuple[str, ...]] = {
    "bf16": (),
    "fp8": tuple(DRAFTS.split()),
    "nvfp4": ("--quantization", "modelopt_fp4", "--kv-cache-dtype", "fp8_e4m3"),
}

# What is free goes back to the system, and oneDNN does not keep a primitive for each of the first
# 1024 shapes: resident memory is then what is in use.
MEMORY_IN_USE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}


@pytest.fixture(scope="session", params=ARGUMENTS)
def server(
    request: pytest.FixtureRequest, tiny: Callable[[WeightFormat], Path]
) -> Iterator[LocalServer]:
    """A server that answers. pytest runs all tests of one format before it starts the next."""
    checkpoint, arguments = tiny(request.param), ARGUMENTS[request.param]
    with LocalServer(checkpoint, *arguments, environment=PLATFORM | MEMORY_IN_USE) as server:
        server.wait_ready(Console())
        yield server


@pytest.fixture(scope="session")
def client(server: LocalServer) -> Iterator[OpenAI]:
    with connect(server.url) as client:
        yield client


@pytest.fixture
def with_auto_map(tiny: Callable[[WeightFormat], Path], tmp_path: Path) -> Path:
    """A checkpoint that brings code of its own, which says so when it is run."""
    folder = Path(shutil.copytree(tiny("bf16"), tmp_path / "with_auto_map"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_step3p7.Step3p7Config",
        "AutoModelForCausalLM": "modeling_step3p7.Step3p7ForConditionalGeneration",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for module in ("configuration_step3p7", "modeling_step3p7"):
        (folder / f"{module}.py").write_text("raise RuntimeError('remote code was run')\n")
    return folder
