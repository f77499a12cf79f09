"""Which kernels serve which machine, and the reason that the start-up table gives."""

from __future__ import annotations

import pytest
import torch

from step37_kernels import implementations, interpret  # noqa: F401  (makes the kernels known)
from step37_kernels.dispatch import Target, candidates, choose

KERNELS = (
    "linear", "route", "experts", "shared_expert", "activation", "page_tables", "prologue", "attend"
)  # fmt: skip


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEP37_IMPL", raising=False)


@pytest.mark.parametrize("operation", KERNELS)
@pytest.mark.parametrize(
    ("capability", "weights", "chosen"),
    [
        ((9, 0), "nvfp4", "triton"),
        ((10, 0), "fp8", "triton"),
        ((8, 0), "bf16", "triton"),
        ((8, 0), "fp8", "reference"),
        ((7, 5), "bf16", "reference"),
    ],
)
def test_a_gpu_gets_the_kernels_it_can_run(
    operation: str, capability: tuple[int, int], weights: str, chosen: str
) -> None:
    assert choose(operation, Target("cuda", capability, weights)).name == chosen


def test_reasons_say_what_is_missing() -> None:
    def reason(name: str, target: Target) -> str:
        return next(c.reason for c in candidates("experts", target) if c.name == name)

    assert reason("triton", Target("cuda", (8, 0), "fp8")) == (
        "needs sm_89 or later, this is sm_80"
    )
    assert reason("triton", Target("cpu", None, "bf16")) == "needs an NVIDIA GPU"
    assert "the model in torch.float16" in reason(
        "triton", Target("cuda", (9, 0), "bf16", torch.float16)
    )


def test_the_interpreter_runs_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = Target("cpu", None, "bf16")
    assert choose("experts", cpu).name == "reference"
    monkeypatch.setenv("STEP37_IMPL", "interpret")
    if interpret.enabled():
        assert choose("experts", cpu).name == "interpret"
    monkeypatch.setattr(interpret, "enabled", lambda: False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before the start"):
        choose("experts", cpu)
