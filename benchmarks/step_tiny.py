"""The step's own code on a CPU: a tiny model, the kernels in Triton's interpreter. Not a speed.

    python -m benchmarks.step_tiny

A process of its own, since Triton decides before its first import whether it interprets. Prints
one JSON object per case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, Literal

from rich.table import Table

_CASES: tuple[tuple[Literal["fp8", "nvfp4"], str, int, str, str], ...] = (
    ("nvfp4", "bf16", 1, "decode", "zipf"),
    ("fp8", "fp8", 2, "decode", "uniform"),
    ("nvfp4", "bf16", 1, "prefill", "uniform"),
)
_BATCH, _CONTEXT, _NEW = 2, 150, 70  # a context and a prompt that are longer than the window


def table() -> Table:
    """Run the cases in a child process.

    Raises:
        RuntimeError: it failed; its last words are in the message.
    """
    command = [sys.executable, "-m", "benchmarks.step_tiny"]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"no tiny model: {done.stderr.strip()[-500:]}")
    found = Table(
        title="A tiny random model through the same code, its kernels in the interpreter: "
        "right or wrong, no speed",
        title_justify="left",
    )
    for column in ("case", "rel. L2", "at most", "launches", "kernels", "right"):
        found.add_column(column)
    for one in map(json.loads, done.stdout.splitlines()):
        right = "yes" if one["relative_l2"] <= one["allowed"] else "NO"
        numbers = f"{one['relative_l2']:.2g}", f"{one['allowed']:.2g}"
        launches = str(sum(one["launches"].values()))
        found.add_row(one["case"], *numbers, launches, str(len(one["launches"])), right)
    return found


def _run() -> None:
    from step37_kernels import interpret

    interpret.enable()
    os.environ["STEP37_IMPL"] = "interpret"
    import torch

    from benchmarks.step_cells import Settings
    from benchmarks.step_check import check
    from benchmarks.step_step37 import inputs, made
    from benchmarks.step_weights import Spec
    from step37_ext.checkpoint.spec import TINY
    from step37_ext.model.config import TextShape
    from step37_kernels.launch import counted

    text = TextShape.from_config(SimpleNamespace(**TINY.text_config([1])))
    layers = tuple(range(len(text.layers)))
    for weights, dense, ranks, operation, routing in _CASES:
        sizes = {"new": _NEW} if operation == "prefill" else {"batch": _BATCH, "context": _CONTEXT}
        settings = Settings(operation, weights, dense, ranks, routing, len(layers), **sizes)
        prepared = made(Spec(text, layers, ranks, weights, dense, torch.device("cpu")))
        batch = inputs(prepared.spec, prepared.model, settings)
        with counted() as names:
            found = check(prepared.spec, prepared.model, batch)
        case = " ".join([operation, *(f"{k}={v}" for k, v in settings.shown().items())])
        launches: dict[str, Any] = {"launches": Counter(names), "case": case}
        print(json.dumps(asdict(found) | launches), flush=True)


if __name__ == "__main__":
    _run()
