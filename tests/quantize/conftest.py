"""Fixtures of the tests of `step37 quantize`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from step37_ext.checkpoint.headers import INDEX_FILE
from step37_ext.quantize import plan
from step37_ext.quantize.run import quantize

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 3 MB at most, so that the small model needs several."""
    monkeypatch.setattr(plan, "SHARD_BYTES", 3_000_000)


@pytest.fixture
def run() -> Run:
    """`quantize` with its arguments; returns what it says."""

    def call(src: Path | str, out: Path, target: str, **options: Any) -> str:
        console = Console(file=io.StringIO(), width=200)
        quantize(str(src), out, target, console=console, **options)
        return console.file.getvalue()

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text to calibrate on, in words that the small model's tokenizer has."""
    path = tmp_path / "text.txt"
    path.write_text("What is 3 + 4? The answer is 7. " * 8, encoding="utf-8")
    return path


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, from the files that the index names."""
    index = json.loads((folder / INDEX_FILE).read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / file)
    assert tensors.keys() == index["weight_map"].keys()
    assert sum(tensor.nbytes for tensor in tensors.values()) == index["metadata"]["total_size"]
    return tensors


@pytest.fixture(name="read")
def read_fixture() -> Callable[[Path], dict[str, torch.Tensor]]:
    return read


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit."""
    as_bytes = [tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


@pytest.fixture(name="same")
def same_fixture() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    return same
