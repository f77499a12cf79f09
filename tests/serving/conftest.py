"""One live server per format, started when the first test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from rich.console import Console

from step37_ext.chat import connect
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.local_server import LocalServer

# In the checkpoint's own type, bfloat16; the demo serves in float32.
ARGUMENTS: dict[WeightFormat, tuple[str, ...]] = {
    "bf16": (),
    "fp8": (),
    "nvfp4": ("--quantization", "modelopt_fp4", "--kv-cache-dtype", "fp8_e4m3"),
}


@pytest.fixture(scope="session", params=ARGUMENTS)
def server(
    request: pytest.FixtureRequest, tiny: Callable[[WeightFormat], Path]
) -> Iterator[LocalServer]:
    """A server that answers. pytest runs all tests of one format before it starts the next."""
    with LocalServer(tiny(request.param), *ARGUMENTS[request.param]) as server:
        server.wait_ready(Console())
        yield server


@pytest.fixture(scope="session")
def client(server: LocalServer) -> Iterator[OpenAI]:
    with connect(server.url) as client:
        yield client
