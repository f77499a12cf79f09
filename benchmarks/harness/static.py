"""Static figures of every shipped kernel, from `step37_kernels.evidence` in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton

from benchmarks.harness.hardware import ROOT, source_hash


def static_figures(cache: Path) -> dict[str, Any]:
    """Compile every shipped configuration, or read what an earlier run of the same source kept.

    Compiling takes minutes and needs no GPU. A child process does it because the figures are
    compiled with Triton's compiler, and this process may run Triton's interpreter.

    Args:
        cache: the folder that keeps the figures.

    Raises:
        RuntimeError: the child wrote no figures; its last words are in the message.
    """
    source = source_hash(("kernels/step37_kernels",), without=())
    path = cache / f"static-{source}-{triton.__version__}.json"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), *_path()])
        }
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "step37_kernels.evidence", "--json", str(unfinished)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        # A broken limit is exit status 1 with figures written; anything else wrote none.
        if not unfinished.exists():
            raise RuntimeError(f"no static figures: {done.stderr.strip()[-500:]}")
        unfinished.replace(path)
    return json.loads(path.read_text())


def _path() -> list[str]:
    return [found for found in [os.environ.get("PYTHONPATH")] if found]
