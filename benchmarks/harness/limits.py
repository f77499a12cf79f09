"""What this GPU does at best, measured in the same run: read stream, copy, matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.harness.timing import ROTATED_BYTES, time_calls
from step37_kernels.launch import launch

_MATMUL = 8192  # rows, columns and depth of the products that are timed


@dataclass(frozen=True)
class Measured:
    """Measured limits of one GPU.

    Attributes:
        read: bytes/s of reading 4 GiB once.
        copy: bytes/s of copying 2 GiB, read and written bytes together.
        flops: FLOP/s of a square matrix product of 8192, by type; a type that PyTorch cannot
            multiply here is absent.
    """

    read: float
    copy: float
    flops: dict[str, float]


@triton.jit
def read_stream_kernel(source, out, PER_PROGRAM: tl.constexpr, BLOCK: tl.constexpr):
    """out [programs] int32: the xor of this program's PER_PROGRAM elements of source (int32)."""
    first = tl.program_id(0).to(tl.int64) * PER_PROGRAM
    column = tl.arange(0, BLOCK)
    accumulator = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, PER_PROGRAM, BLOCK):
        accumulator ^= tl.load(source + first + start + column)
    tl.store(out + tl.program_id(0), tl.xor_sum(accumulator, 0))


def read_stream(source: Tensor, per_program: int = 1 << 17, block: int = 4096) -> Tensor:
    """Read every element of `source` (int32 [n], n a multiple of per_program) once.

    Returns:
        int32 [n / per_program], the xor of each part: something that depends on every element.
    """
    out = torch.empty(source.numel() // per_program, dtype=torch.int32, device=source.device)
    launch(read_stream_kernel, out.shape, source, out, per_program, block, num_warps=8)
    return out


def measure() -> Measured:
    """Measure the current CUDA device; takes a few seconds and 4 GiB."""
    source = torch.empty(ROTATED_BYTES // 4, dtype=torch.int32, device="cuda").random_()
    # The better of two readers, so that the yardstick is not one kernel's weakness.
    read = min(
        time_calls([lambda: read_stream(source)]).median,
        time_calls([lambda: torch.sum(source.view(torch.float32))]).median,
    )
    half = source.numel() // 2
    copy = time_calls([lambda: source[:half].copy_(source[half:])]).median
    return Measured(ROTATED_BYTES / read * 1e6, ROTATED_BYTES / copy * 1e6, _matmul_rates())


def _matmul_rates() -> dict[str, float]:
    shape = (_MATMUL, _MATMUL)
    a = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    operations = 2 * _MATMUL**3
    rates = {"bf16": operations / time_calls([lambda: a @ b]).median * 1e6}
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device="cuda")
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

        def fp8() -> Tensor:
            return torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        rates["fp8"] = operations / time_calls([fp8]).median * 1e6
    return rates
