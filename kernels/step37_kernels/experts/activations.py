"""Activations in the form a grouped GEMM takes them: FP8 with a scale per token and 128 channels.

The row helpers are used twice: on hidden states, by the programs that the sort launch has left
over, and on the intermediate, by a launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.launch import launch

GROUP = 128


@dataclass(frozen=True)
class FP8Rows:
    """Rows in e4m3 with a scale per group of 128 channels.

    Args:
        q: e4m3 [R, K].
        scale: fp32 [R, ceil((offset + K) / 128)], offset as `quantize_per_token_group` has it.
    """

    q: Tensor
    scale: Tensor


@triton.jit
def fp8_row(
    x,
    q,
    scale,
    row,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Quantise one row [K] of x: amax / 448 per group (1 for zeros), nearest even, saturating."""
    group = tl.arange(0, PADDED_GROUPS)
    k = group[:, None] * GROUP - OFFSET + tl.arange(0, GROUP)[None, :]
    inside = (k >= 0) & (k < K)
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    # Divisions rounded to nearest, so that the codes are the reference's, bit for bit.
    amax = tl.max(tl.abs(value), axis=1)
    factor = tl.div_rn(amax, tl.full((PADDED_GROUPS,), 448.0, tl.float32))
    factor = tl.where(factor > 0.0, factor, 1.0)
    scaled = tl.div_rn(value, tl.broadcast_to(factor[:, None], (PADDED_GROUPS, GROUP)))
    keep: tl.constexpr = tl.PropagateNan.ALL
    scaled = tl.minimum(tl.maximum(scaled, -448.0, propagate_nan=keep), 448.0, propagate_nan=keep)
    tl.store(q + row * K + k, scaled.to(q.dtype.element_ty), mask=inside)
    tl.store(scale + row * GROUPS + group, factor, mask=group < GROUPS)


@triton.jit
def quantize_fp8_kernel(
    x,
    q,
    scale,
    ids,
    first_expert,
    E: tl.constexpr,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One pair's intermediate; pairs of experts that are elsewhere were never written."""
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(ids + row).to(tl.int32) - first_expert
    if (local >= 0) & (local < E):
        fp8_row(x, q, scale, row, K, OFFSET, GROUPS, PADDED_GROUPS, GROUP)


def new_fp8_rows(rows: int, size: int, like: Tensor, offset: int = 0) -> FP8Rows:
    """Uninitialised rows of `size` channels on the device of `like`."""
    groups = ceil_div(offset + size, GROUP)
    return FP8Rows(
        like.new_empty((rows, size), dtype=torch.float8_e4m3fn),
        like.new_empty((rows, groups), dtype=torch.float32),
    )


def quantize_fp8(
    intermediate: Tensor, topk_ids: Tensor, num_experts: int, first_expert: int, offset: int
) -> FP8Rows:
    """The intermediate in e4m3, in one launch; rows of experts that are elsewhere stay unwritten.

    Args:
        intermediate: bf16 [P, N], a row per pair.
        topk_ids: int32 or int64 [T, top_k], P = T * top_k of them.
        num_experts, first_expert: the experts of this rank.
        offset: where in its first group of 128 the rank's channel 0 stands.
    """
    require("intermediate", intermediate, (topk_ids.numel(), None), (torch.bfloat16,))
    rows = new_fp8_rows(*intermediate.shape, like=intermediate, offset=offset)
    groups = rows.scale.shape[1]
    launch(
        quantize_fp8_kernel,
        (intermediate.shape[0],),
        intermediate,
        rows.q,
        rows.scale,
        topk_ids,
        first_expert,
        E=num_experts,
        K=intermediate.shape[1],
        OFFSET=offset,
        GROUPS=groups,
        PADDED_GROUPS=triton.next_power_of_2(groups),
        GROUP=GROUP,
        num_warps=4,
    )
    return rows
