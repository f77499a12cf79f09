"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from step37_ext.checkpoint.weight_format import WeightFormat
from step37_kernels import interpret

if not torch.cuda.is_available():
    interpret.enable()  # before anything imports triton

# Begun first where several workers share the tests: what takes longest to set up.
_FIRST = (
    "tests/checkpoint/test_trained.py",  # trains the small model, while the next ones need none
    "tests/serving/test_engine.py",
    "tests/serving/",
    "tests/evidence/",
)


@pytest.hookimpl(wrapper=True)  # xdist reads the groups, and pytest orders by session fixture
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """For `pytest -n`: a worker takes whole files, or all tests of one live server."""
    if not hasattr(config, "workerinput"):
        return (yield)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_worker_group(item)))
    yield
    items.sort(key=lambda item: [not item.nodeid.startswith(first) for first in _FIRST])


def _worker_group(item: pytest.Item) -> str:
    file = item.nodeid.split("::")[0]
    parameters = getattr(item, "callspec", None)
    if parameters is not None and "server" in parameters.params:
        return f"server {parameters.params['server']}"
    # Tests that start SGLang themselves have nothing in common.
    return item.nodeid if file.startswith("tests/serving/") else file


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel runs: in the interpreter on the CPU, and on the GPU where there is one."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return torch.device("cuda")
    if not interpret.enabled():
        pytest.skip("the interpreter is off where there is a GPU")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[WeightFormat], Path]:
    """Weight format -> folder of the trained small model, made once a session.

    The first session on a machine trains the model, for up to three minutes; later ones find it
    in the user's cache.
    """
    from step37_ext.checkpoint.make import make_tiny

    folders: dict[WeightFormat, Path] = {}

    def folder(weight_format: WeightFormat) -> Path:
        if weight_format not in folders:
            out = tmp_path_factory.mktemp("tiny") / weight_format
            with _one_core():
                make_tiny(out, weight_format, quiet=True)
            folders[weight_format] = out
        return folders[weight_format]

    return folder


@contextmanager
def _one_core() -> Iterator[None]:
    """Threads of one training that share their cores with another worker's tests hardly advance."""
    before = os.sched_getaffinity(0)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[WeightFormat, Path]:
    """Weight format -> folder of the small model before training, for tests of files and names."""
    from step37_ext.checkpoint.make import random_checkpoint
    from step37_ext.checkpoint.spec import TINY

    root = tmp_path_factory.mktemp("untrained")
    folders: dict[WeightFormat, Path] = {name: root / name for name in ("bf16", "fp8", "nvfp4")}
    for name, folder in folders.items():
        random_checkpoint(folder, name, TINY)
    return folders
