"""The dense layers' activation, which stands between two GEMMs of torch's: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.experts.epilogue import swiglu_step
from step37_kernels.experts.gemm_arguments import check_limit
from step37_kernels.launch import launch

BLOCK_N = 1024


@triton.jit
def activation_kernel(gate_up, out, limit, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_N channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    gate = tl.load(gate_up + token * (2 * N) + n, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * (2 * N) + N + n, mask=inside, other=0.0).to(tl.float32)
    activated = swiglu_step(gate, up, limit)
    tl.store(out + token * N + n, activated.to(tl.bfloat16), mask=inside)


def activation(gate_up: Tensor, limit: float | None) -> Tensor:
    """min(silu(gate), limit) * clamp(up, -limit, limit), computed in fp32 and rounded once.

    Args:
        gate_up: bf16 [T, 2N], contiguous, the gate in the first N columns; T may be 0.
        limit: None or 0 is none.

    Returns:
        bf16 [T, N].

    Raises:
        ValueError: a shape, dtype or layout does not fit, or limit is negative.
    """
    require("gate_up", gate_up, (None, None), (torch.bfloat16,), contiguous=True)
    clamp = check_limit(limit)
    tokens, columns = gate_up.shape
    if columns % 2:
        raise ValueError(f"gate_up has {columns} columns, expected an even number")
    out = gate_up.new_empty((tokens, columns // 2))
    launch(
        activation_kernel, (tokens, ceil_div(columns // 2, BLOCK_N)), gate_up, out, clamp,
        N=columns // 2, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    return out
