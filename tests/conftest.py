"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from step37_kernels import interpret

if not torch.cuda.is_available():
    interpret.enable()  # before anything imports triton

from step37_ext.checkpoint.make import make_tiny, random_checkpoint  # noqa: E402
from step37_ext.checkpoint.spec import TINY  # noqa: E402
from step37_ext.checkpoint.weight_format import WeightFormat  # noqa: E402


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
    folders: dict[WeightFormat, Path] = {}

    def folder(weight_format: WeightFormat) -> Path:
        if weight_format not in folders:
            out = tmp_path_factory.mktemp("tiny") / weight_format
            make_tiny(out, weight_format, quiet=True)
            folders[weight_format] = out
        return folders[weight_format]

    return folder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[WeightFormat, Path]:
    """Weight format -> folder of the small model before training, for tests of files and names."""
    root = tmp_path_factory.mktemp("untrained")
    folders: dict[WeightFormat, Path] = {name: root / name for name in ("bf16", "fp8", "nvfp4")}
    for name, folder in folders.items():
        random_checkpoint(folder, name, TINY)
    return folders
