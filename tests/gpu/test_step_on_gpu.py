"""The whole step on a GPU: checked, recorded, timed and divided, tiny and in four full layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import limits
from benchmarks.harness.timing import time_calls
from benchmarks.shapes import TEXT
from benchmarks.step_breakdown import OUTSIDE
from benchmarks.step_cells import Settings
from benchmarks.step_step37 import made, trial
from benchmarks.step_weights import Spec
from step37_ext.checkpoint.spec import TINY
from step37_ext.model.config import TextShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
TINY_TEXT = TextShape.from_config(SimpleNamespace(**TINY.text_config([1])))
FULL_SIZE = (TEXT, (0, 3, 4, 44))  # dense, sliding, full, clamped: 8.5 GB in NVFP4


@pytest.mark.parametrize("dense", ["bf16", "fp8"])
@pytest.mark.parametrize("new", [0, 2048])
@pytest.mark.parametrize("text, chosen", [(TINY_TEXT, range(TINY.layers)), FULL_SIZE])
def test_step_is_right_timed_and_divided(text: TextShape, chosen, dense: str, new: int):
    sizes = {"new": new} if new else {"batch": 5, "context": 1000}
    operation = "prefill" if new else "decode"
    settings = Settings(operation, "nvfp4", dense, 1, "uniform", len(chosen), **sizes)
    prepared = made(Spec(text, tuple(chosen), 1, "nvfp4", dense, torch.device("cuda")))
    ready = trial(prepared, settings)
    found = ready.check()
    assert found.holds, found
    time = time_calls(ready.calls, ready.graph)
    assert ready.details is not None
    details = ready.details(time, limits.measure())
    assert 0 < details["of_floor"] < 1.05
    assert "breakdown" in details, details.get("no_breakdown")
    rows = details["breakdown"]
    assert rows[-1]["name"] == OUTSIDE
    # Under the profiler a step may be a little longer, never much shorter.
    assert sum(row["us"] for row in rows) > 0.9 * time.least
