"""The very Triton kernels, interpreted, inside SGLang: the same tokens as the reference's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from step37_ext.checkpoint.spec import TINY
from step37_ext.checkpoint.weight_format import WeightFormat

SCRIPT = Path(__file__).with_name("engine_run.py")
# Longer than the window, and than a block of 64 keys.
PROMPT = [20 + 37 * i % 500 for i in range(TINY.sliding_window + 9)]
INTERPRETED = {"STEP37_IMPL": "interpret", "TRITON_INTERPRET": "1"}


def run_engine(model: Path, environment: dict[str, str]) -> tuple[list[int], list[float], str]:
    """Tokens, their logprobs and the log of SGLang's offline engine in bfloat16."""
    options = {"dtype": "bfloat16", "log_level": "info"}
    run = subprocess.run(
        [sys.executable, SCRIPT, model, json.dumps(PROMPT), json.dumps(options), "3"],
        env=os.environ | {"SGLANG_PLATFORM": "step37_cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    return result["tokens"], result["logprobs"], run.stderr


def test_tokens_of_the_kernels_are_the_reference_s(tiny: Callable[[WeightFormat], Path]) -> None:
    """NVFP4 experts, an FP8 cache with the checkpoint's scales, both attention types."""
    model = tiny("nvfp4")
    expected, logprobs, _ = run_engine(model, {})
    tokens, ours, log = run_engine(model, INTERPRETED)
    assert log.count("forced by STEP37_IMPL; Triton kernel in the interpreter") == 5
    assert tokens == expected
    # Both compute in bf16 between operations: 2^-8 of a hidden state, and its way to the logits.
    assert ours == pytest.approx(logprobs, abs=0.05)
    assert ours != logprobs
