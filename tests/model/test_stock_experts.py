"""Another MoE runner of SGLang's: its expert layer between our router and shared expert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from expected import Subject, check, noise
from harness import Request, Worker

from step37_ext.checkpoint.make import random_checkpoint
from step37_ext.checkpoint.spec import TINY


def test_the_chosen_runner_computes_the_experts(worker: Worker, tmp_path: Path) -> None:
    """Without limits, which SGLang's path for a CPU leaves out."""
    folder = tmp_path / "unclamped"
    random_checkpoint(folder, "bf16", replace(TINY, clamped_layers=0))
    subject = Subject(worker, folder, "--moe-runner-backend triton")
    for answer in subject.served().ask(*map(Request, (noise(20, 1), noise(150, 3)))):
        check(subject.model, answer)
    names = subject.served().stored_types()
    assert any(name.endswith("experts.fused.w13_weight") for name in names)


def test_quantised_experts_go_where_the_runner_reads_them(worker: Worker, tmp_path: Path) -> None:
    """FP8 as far as a CPU goes: SGLang's own kernels for it need a GPU."""
    random_checkpoint(tmp_path / "fp8", "fp8", TINY)
    worker.load(tmp_path / "fp8", "--moe-runner-backend triton --dtype bfloat16")
    types = worker.stored_types()
    layer = f"model.layers.{TINY.layers - 1}.moe.experts.fused"
    assert types[f"{layer}.w13_weight"] == torch.float8_e4m3fn
    assert types[f"{layer}.w2_weight_scale_inv"] == torch.float32
