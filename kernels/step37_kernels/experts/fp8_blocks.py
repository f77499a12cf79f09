"""FP8 experts as the kernels take them: where a row's block scales are, and what is allowed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from step37_kernels.checks import require
from step37_kernels.expert_weights import FP8Experts
from step37_kernels.experts.gemm_arguments import check_device, check_sizes

BLOCK = 128
"""Rows and columns of a checkpoint's block, and channels of an activation's group."""
OFFSET_MULTIPLE = 16
"""Where shards may begin: blocks are then cut at whole 16-byte vectors of w2's rows."""


@triton.jit
def w13_scale_rows(
    w13_scale,
    expert,
    half,
    channel,
    OFFSET: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pointers [rows, 1] to the first block scale of each row of gate (half 0) or up (half 1)."""
    GROUPS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = (OFFSET + N + BLOCK - 1) // BLOCK
    row = half * BLOCKS + (channel + OFFSET) // BLOCK
    return (w13_scale + expert * (2 * BLOCKS * GROUPS) + row * GROUPS)[:, None]


@triton.jit
def w2_scale_rows(
    w2_scale,
    expert,
    tile_index,
    channels,
    OFFSET: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pointers to the first block scale of each of w2's rows, or one where they share it."""
    BLOCKS: tl.constexpr = (OFFSET + N + BLOCK - 1) // BLOCK
    BLOCKS_OF_ROWS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    first = w2_scale + expert * (BLOCKS_OF_ROWS * BLOCKS)
    if BLOCK % BLOCK_N == 0:  # all rows of the tile are in one row of blocks
        rows = first + tile_index * BLOCK_N // BLOCK * BLOCKS
    else:
        rows = first + tl.minimum(channels, K - 1)[:, None] // BLOCK * BLOCKS
    return rows


def check_fp8(weights: FP8Experts, device: torch.device) -> None:
    """Check that the FP8 kernels can read `weights` as they are.

    Raises:
        ValueError: another block size, a size or offset that is not a multiple of 16, memory that
            is not contiguous, or another device.
    """
    if weights.block_size != (BLOCK, BLOCK):
        raise ValueError(f"block_size is {weights.block_size}, expected {(BLOCK, BLOCK)}")
    check_sizes(weights.hidden_size, weights.intermediate_size)
    if weights.intermediate_offset % OFFSET_MULTIPLE:
        raise ValueError(
            f"intermediate_offset is {weights.intermediate_offset}, expected a multiple of "
            f"{OFFSET_MULTIPLE}"
        )
    for name in ("w13", "w13_scale", "w2", "w2_scale"):
        tensor = getattr(weights, name)
        require(name, tensor, tensor.shape, contiguous=True)
        check_device(name, tensor, device)


def refuse_nan(weights: FP8Experts) -> None:
    """Refuse e4m3 codes that are NaN, which `e4m3_words` would read as 480. Waits for the device.

    Once at load, expert by expert, so that no second copy of the weights is needed.

    Raises:
        ValueError: a code is 0x7f or 0xff; the message names the tensor and the expert.
    """
    for name in ("w13", "w2"):
        codes = getattr(weights, name).view(torch.uint8)
        for expert, part in enumerate(codes):
            if bool((part & 0x7F == 0x7F).any()):
                raise ValueError(f"{name} of expert {expert} holds NaN, expected finite e4m3 codes")
