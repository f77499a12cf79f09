"""Grouped GEMMs of FP8 experts: e4m3 weights with 128x128 block scales, e4m3 activations.

Products of e4m3 codes are summed by the tensor core over at most 128 columns, inside one block of
the weights and one group of the activations; the sum is then scaled and added in fp32. So the
checkpoint's own scales are used wherever a shard begins, and what the tensor core's narrower sums
lose stays inside 128 columns.

Weights are the left operand, as in `grouped_bf16`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.expert_weights import FP8Experts
from step37_kernels.experts.activations import FP8Rows
from step37_kernels.experts.epilogue import store_activated, store_weighted
from step37_kernels.experts.fp8_blocks import BLOCK, check_fp8, w2_scale_rows, w13_scale_rows
from step37_kernels.experts.gemm_arguments import (
    check_device,
    check_down_rows,
    check_limit,
    check_routing,
    split_buffers,
    tile_options,
)
from step37_kernels.experts.routing import Routing
from step37_kernels.experts.rows import gate_up_rows, split_gate_up
from step37_kernels.experts.split_k import sum_of_tile
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.launch import launch


@triton.jit
def _token_scale(scales, valid, group, GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The scale of one group in each of BLOCK_ROWS rows; `scales` points at their first groups."""
    if BLOCK_ROWS < 64:
        return tl.load(scales + group, mask=valid, other=0.0)
    # Triton 3.6 gives a load of fewer elements than threads the layout of the accumulator, in which
    # every thread loads many rows, and spills; so a few groups more are loaded and left out.
    ahead = tl.arange(0, 256 // BLOCK_ROWS)
    held = valid[:, None] & (group + ahead < GROUPS)[None, :]
    window = tl.load(scales[:, None] + (group + ahead)[None, :], mask=held, other=0.0)
    return tl.sum(tl.where(ahead[None, :] == 0, window, 0.0), axis=1)


@triton.jit
def sum_over_blocks(
    weight_rows,
    weight_scales,
    token_rows,
    token_scales,
    valid,
    acc,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_ROWS] plus the product over SIZE columns, scaled block by block.

    weight_rows [BLOCK_N] and token_rows [BLOCK_ROWS] point at column 0 of rows of e4m3;
    weight_scales ([BLOCK_N, 1] or one) and token_scales [BLOCK_ROWS] at the scale of their first
    block. Column 0 stands at OFFSET in its block. BLOCK_K divides BLOCK.
    """
    # Steps are cut as the blocks are, so that each has one scale a row.
    SKIPPED: tl.constexpr = OFFSET // BLOCK_K
    STEPS: tl.constexpr = (OFFSET + SIZE + BLOCK_K - 1) // BLOCK_K - SKIPPED
    k = tl.arange(0, BLOCK_K)
    zeros = tl.zeros(acc.shape, tl.float32)
    GROUPS: tl.constexpr = (OFFSET + SIZE + BLOCK - 1) // BLOCK
    for step in tl.range(0, STEPS, num_stages=STAGES):
        at = step * BLOCK_K + SKIPPED * BLOCK_K - OFFSET + k
        block = (step + SKIPPED) // (BLOCK // BLOCK_K)
        if OFFSET % BLOCK_K == 0 and SIZE % BLOCK_K == 0:
            w = tl.load(weight_rows[:, None] + at[None, :])
            x = tl.load(token_rows[:, None] + at[None, :], mask=valid[:, None], other=0.0)
        else:
            inside = ((at >= 0) & (at < SIZE))[None, :]
            w = tl.load(weight_rows[:, None] + at[None, :], mask=inside, other=0.0)
            x = tl.load(token_rows[:, None] + at[None, :], mask=valid[:, None] & inside, other=0.0)
        weight_scale = tl.load(weight_scales + block)
        token_scale = _token_scale(token_scales, valid, block, GROUPS, acc.shape[1])
        part = tl.dot(w, tl.trans(x), zeros)
        acc += part * (weight_scale * token_scale[None, :])
    return acc


@triton.jit
def gate_up_fp8_kernel(
    x,
    x_scale,
    w13,
    w13_scale,
    intermediate,
    pair_of_slot,
    expert_of_block,
    limit,
    parts,
    arrived,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    OFFSET: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """intermediate[pair] = swiglu_step of w13[expert] @ x[token]."""
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_of_slot + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    valid = pair >= 0
    channels, half, channel = gate_up_rows(tl.program_id(0), N, BLOCK_N)
    GROUPS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    SLICE: tl.constexpr = K // SPLITS
    first, block_of_k = tl.program_id(2) * SLICE, tl.program_id(2) * (SLICE // BLOCK)
    weight_rows = w13 + expert * (2 * N * K) + (half * N + channel) * K + first
    weight_scales = w13_scale_rows(w13_scale, expert, half, channel, OFFSET, N, K, BLOCK)
    token = (pair // TOP_K).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_blocks(
        weight_rows, weight_scales + block_of_k,
        x + token * K + first, x_scale + token * GROUPS + block_of_k,
        valid, acc, 0, SLICE, BLOCK_K, BLOCK, STAGES,
    )  # fmt: skip
    if SPLITS > 1:
        acc, last = sum_of_tile(acc, parts, arrived, valid, SPLITS)
        if not last:
            return
    gate, up = split_gate_up(acc, BLOCK_N, BLOCK_ROWS)
    store_activated(gate, up, limit, intermediate, pair, channels, N)


@triton.jit
def down_fp8_kernel(
    intermediate,
    intermediate_scale,
    w2,
    w2_scale,
    partial,
    topk_weights,
    pair_of_slot,
    expert_of_block,
    OFFSET: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial[pair] = router weight * w2[expert] @ intermediate[pair]."""
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_of_slot + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    valid = pair >= 0
    row = pair.to(tl.int64)
    channels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    BLOCKS: tl.constexpr = (OFFSET + N + BLOCK - 1) // BLOCK
    weight_scales = w2_scale_rows(
        w2_scale, expert, tl.program_id(0), channels, OFFSET, N, K, BLOCK, BLOCK_N
    )
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_blocks(
        w2 + expert * (K * N) + tl.minimum(channels, K - 1) * N, weight_scales,
        intermediate + row * N, intermediate_scale + row * BLOCKS,
        valid, acc, OFFSET, N, BLOCK_K, BLOCK, STAGES,
    )  # fmt: skip
    store_weighted(acc, topk_weights, partial, pair, channels, K)


def gate_up(
    x: FP8Rows, weights: FP8Experts, routing: Routing, limit: float | None, tile: GemmTile
) -> Tensor:
    """swiglu_step(gate(x), up(x)) of every pair, one launch.

    Args:
        x: e4m3 [T, K] with fp32 scales [T, ceil(K / 128)]; pair p reads row p // top_k.
        weights: K, N and intermediate_offset multiples of 16, blocks of 128 x 128.
        routing: the batch's pairs by expert, in blocks of tile.block_rows.
        limit: the clamp of `swiglu_step`; None or 0 is none.
        tile: block_n counts rows of w13, so half as many channels; block_k divides 128. With
            splits, 128 divides K / splits, and `routing` has a counter for each tile.

    Returns:
        intermediate bf16 [T * top_k, N], rounded once; rows of pairs that are in no block are not
        written.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    hidden_size, size = weights.hidden_size, weights.intermediate_size
    check_fp8(weights, x.q.device)
    check_rows("x", x, hidden_size, 0)
    check_routing(routing, tile, x.q.device)
    clamp = check_limit(limit)
    intermediate = x.q.new_empty((x.q.shape[0] * routing.top_k, size), dtype=torch.bfloat16)
    tiles = ceil_div(2 * size, tile.block_n)
    launch(
        gate_up_fp8_kernel,
        (tiles, routing.max_blocks, tile.splits),
        x.q,
        x.scale,
        weights.w13,
        weights.w13_scale,
        intermediate,
        routing.pair_of_slot,
        routing.expert_of_block,
        clamp,
        *split_buffers(tile, tiles, hidden_size, BLOCK, routing),
        TOP_K=routing.top_k,
        SPLITS=tile.splits,
        OFFSET=weights.intermediate_offset,
        N=size,
        K=hidden_size,
        BLOCK=BLOCK,
        STAGES=tile.num_stages,
        **tile_options(tile),
    )
    return intermediate


def down(
    intermediate: FP8Rows,
    weights: FP8Experts,
    routing: Routing,
    topk_weights: Tensor,
    tile: GemmTile,
) -> Tensor:
    """Router weight times the down projection of every pair, one launch.

    Args:
        intermediate: e4m3 [T * top_k, N] with fp32 scales [T * top_k, ceil((offset + N) / 128)]:
            its groups are the blocks of w2, cut by the shard alike.
        weights, routing: as in `gate_up`.
        topk_weights: fp32 [T, top_k].
        tile: block_n counts rows of w2.

    Returns:
        partial bf16 [T * top_k, K]: summed and multiplied in fp32, rounded once; rows of pairs
        that are in no block are not written.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    hidden_size, size = weights.hidden_size, weights.intermediate_size
    check_fp8(weights, intermediate.q.device)
    check_rows("intermediate", intermediate, size, weights.intermediate_offset)
    check_routing(routing, tile, intermediate.q.device)
    check_down_rows(intermediate.q.shape[0], routing, topk_weights)
    partial = intermediate.q.new_empty((intermediate.q.shape[0], hidden_size), dtype=torch.bfloat16)
    launch(
        down_fp8_kernel,
        (ceil_div(hidden_size, tile.block_n), routing.max_blocks),
        intermediate.q,
        intermediate.scale,
        weights.w2,
        weights.w2_scale,
        partial,
        topk_weights,
        routing.pair_of_slot,
        routing.expert_of_block,
        OFFSET=weights.intermediate_offset,
        N=size,
        K=hidden_size,
        BLOCK=BLOCK,
        STAGES=tile.num_stages,
        **tile_options(tile),
    )
    return partial


def check_rows(name: str, rows: FP8Rows, size: int, offset: int) -> None:
    """Check quantised activations of `size` channels whose channel 0 stands at `offset`.

    Raises:
        ValueError: a shape, dtype or layout does not fit.
    """
    require(f"{name}.q", rows.q, (None, size), (torch.float8_e4m3fn,), contiguous=True)
    groups = ceil_div(offset + size, BLOCK)
    shape = (rows.q.shape[0], groups)
    require(f"{name}.scale", rows.scale, shape, (torch.float32,), contiguous=True)
    check_device(f"{name}.scale", rows.scale, rows.q.device)
