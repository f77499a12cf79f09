"""The norm of the step benchmark: SGLang's kernel where it is installed, else one like it.

In a server the norm is SGLang's, one launch with the residual's addition in it. Composed of
PyTorch's operations it would be eight, 91 times in a step: more than half a millisecond of a step
of three at batch 1, which no server spends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.launch import launch


@triton.jit
def add_rms_norm_kernel(
    x, residual, weight, out, eps, K: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """out = norm of a row of x [T, K] (bf16); with ADD of x + residual, which residual becomes."""
    row = tl.program_id(0).to(tl.int64) * K
    column = tl.arange(0, BLOCK)
    inside = column < K
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + row + column, value.to(tl.bfloat16), mask=inside)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / K + eps)
    scale = 1.0 + tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (value * inverse_rms * scale).to(tl.bfloat16), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.norm.gemma_rms_norm` of bf16 x [T, K], contiguous, in one launch."""
    out = torch.empty_like(x)
    _run(x, x, weight, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """residual += x, then x = norm of the sum, in place and in one launch; both bf16 [T, K]."""
    _run(x, residual, weight, x, eps, add=True)


def _run(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool) -> None:
    tokens, size = x.shape
    block = triton.next_power_of_2(size)
    launch(
        add_rms_norm_kernel, (tokens,), x, residual, weight, out, eps,
        K=size, BLOCK=block, ADD=add, num_warps=8,
    )  # fmt: skip


class Norm:
    """Gemma's RMSNorm as SGLang's module is called: with a residual it adds it first, in place."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self.norm, self.add_norm, _ = chosen(weight.device)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x `[T, K]`, or that of x + residual and the sum."""
        if residual is None:
            return self.norm(x, self.weight, self.eps)
        self.add_norm(x, residual, self.weight, self.eps)
        return x, residual


def chosen(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., None], str]:
    """Norm, norm with addition, and whose they are."""
    if device.type == "cuda":
        try:
            from sgl_kernel import gemma_fused_add_rmsnorm, gemma_rmsnorm
        except ImportError:  # a bare checkout, or an installation for another GPU
            pass
        else:
            return gemma_rmsnorm, gemma_fused_add_rmsnorm, "sgl_kernel"
    return rms_norm, add_rms_norm, "benchmarks/step_norm.py"
