"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from step37_ext.checkpoint.weight_format import WeightFormat
from step37_kernels import interpret

if not torch.cuda.is_available():
    interpret.enable()  # before anything imports triton

# The order in which workers take the files: the small model is trained while the other worker has
# those that need none, the live servers follow, and many short files end it at the same time.
_FIRST = (
    "tests/checkpoint/test_trained.py",
    "tests/evidence/",
    "tests/benchmarks/",
    "tests/model/test_ranks.py",
    "tests/test_packaging.py",
    "tests/test_plugin.py",
    "tests/test_doctor.py",
    "tests/serving/test_engine.py",
    "tests/serving/",
    "tests/model/",
)
_FORKS = ("test_engine.py", "test_interpreted.py", "test_chosen_model.py")
"""Tests that share the process of tests/preloaded.py."""
_OWN_STARTS = "test_starts.py"
"""Tests of live servers that have nothing in common; the others share one for each format."""


@pytest.hookimpl(trylast=True)  # after pytest has brought the items of one session fixture together
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [not item.nodeid.startswith(first) for first in _FIRST])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n`: a worker takes whole files, or all tests of one live server."""
    # By marks (`--dist loadgroup`) xdist 3.8 groups nothing with pytest 9.2.
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _worker_group(nodeid)

    return Scheduling(config, log)


def _worker_group(nodeid: str) -> str:
    file, _, test = nodeid.partition("::")
    if not file.startswith("tests/serving/"):
        return file
    if file.endswith(_FORKS):
        return "forks"
    if file.endswith(_OWN_STARTS):
        return nodeid
    (weight_format,) = re.findall(r"(?<=[-\[])(?:bf16|fp8|nvfp4)(?=[-\]])", test)
    return f"server {weight_format}"


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


@pytest.fixture
def parts_interleave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's programs with all tiles of part 0 first, then those of part 1, ...

    By itself it finishes one tile's parts before it begins the next tile, which would hide tiles
    that share memory or counters.
    """
    from triton.runtime import interpreter

    builder, grid = interpreter.interpreter_builder, [1, 1, 1]
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

    def dim(*size: int) -> None:
        grid[:] = size
        set_grid_dim(*size)

    def index(x: int, y: int, z: int) -> None:
        turn, tile = divmod((x * grid[1] + y) * grid[2] + z, grid[0])
        split, block = divmod(turn, grid[1])
        set_grid_idx(tile, block, split)

    monkeypatch.setattr(builder, "set_grid_dim", dim)
    monkeypatch.setattr(builder, "set_grid_idx", index)
