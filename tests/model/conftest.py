"""The process that holds the model under test, and checkpoints for it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from expected import Subject
from harness import Worker

from step37_ext.checkpoint.weight_format import WeightFormat


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def tiny_with_plain_cache(
    tiny: Callable[[WeightFormat], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[WeightFormat], Path]:
    """Weight format -> folder of the trained small model that asks for no FP8 KV cache.

    SGLang has no flag for a float32 cache: "auto" means the checkpoint's wish, else the dtype.
    """

    @functools.cache  # the worker keeps what is loaded, which it knows by its folder
    def folder(weight_format: WeightFormat) -> Path:
        out = tmp_path_factory.mktemp(weight_format)
        for file in tiny(weight_format).iterdir():
            if "config" in file.name:
                config = json.loads(file.read_text())
                config.get("quantization_config", {}).pop("kv_cache_scheme", None)
                config.get("quantization", {}).pop("kv_cache_quant_algo", None)
                (out / file.name).write_text(json.dumps(config))
            else:
                (out / file.name).symlink_to(file)
        return out

    return folder


@pytest.fixture(scope="session")
def nvfp4_with_fp8_cache(worker: Worker, tiny: Callable[[WeightFormat], Path]) -> Subject:
    return Subject(worker, tiny("nvfp4"), "--quantization modelopt_fp4 --kv-cache-dtype fp8_e4m3")
