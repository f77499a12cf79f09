"""Grouped GEMMs of FP8 experts with BF16 activations: nothing is rounded but the results.

e4m3 weights become bf16 in registers, exactly (`e4m3_words`), four columns of one 32-bit word in
each lane. That puts the columns of every 16 into `word_column` order, in which the activations have
to be as well: whoever prepares hidden writes it so, and gate-up writes the intermediate so, at no
cost. (Reading hidden through permuted addresses instead costs copies of 4 bytes, 0.6 instructions a
weight at 16 token rows and 2.3 at 128.) Sums of one 128x128 block are scaled and added in fp32.

Weights are the left operand, as in `grouped_bf16`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.expert_weights import FP8Experts
from step37_kernels.experts.e4m3_words import widen, word_column
from step37_kernels.experts.epilogue import store_activated, store_weighted
from step37_kernels.experts.fp8_blocks import BLOCK, check_fp8, w2_scale_rows, w13_scale_rows
from step37_kernels.experts.gemm_arguments import (
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

_BF16 = (torch.bfloat16,)


@triton.jit
def sum_over_words(
    weight_words,
    weight_scales,
    token_rows,
    valid,
    acc,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_ROWS] plus the product over SIZE columns, scaled block by block.

    weight_words [BLOCK_N] point at column 0 of rows of e4m3, as int32; weight_scales [BLOCK_N, 1]
    or one at the scale of their first block; token_rows [BLOCK_ROWS] at rows of bf16 in
    `word_column` order. Column 0 stands at OFFSET in its block. BLOCK_K divides BLOCK.
    """
    # Steps are cut as the blocks are, so that each has one scale a row.
    SKIPPED: tl.constexpr = OFFSET // BLOCK_K
    STEPS: tl.constexpr = (OFFSET + SIZE + BLOCK_K - 1) // BLOCK_K - SKIPPED
    word = tl.arange(0, BLOCK_K // 4)
    k = tl.arange(0, BLOCK_K)
    zeros = tl.zeros(acc.shape, tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        first = step * BLOCK_K + SKIPPED * BLOCK_K - OFFSET
        at_word = first // 4 + word
        at = first + k
        if OFFSET % BLOCK_K == 0 and SIZE % BLOCK_K == 0:
            words = tl.load(weight_words[:, None] + at_word[None, :])
            x = tl.load(token_rows[:, None] + at[None, :], mask=valid[:, None], other=0.0)
        else:
            held = (at_word >= 0) & (at_word < SIZE // 4)
            words = tl.load(weight_words[:, None] + at_word[None, :], mask=held[None, :], other=0)
            inside = valid[:, None] & ((at >= 0) & (at < SIZE))[None, :]
            x = tl.load(token_rows[:, None] + at[None, :], mask=inside, other=0.0)
        scale = tl.load(weight_scales + (step + SKIPPED) // (BLOCK // BLOCK_K))
        acc += tl.dot(widen(words, acc.shape[0], BLOCK_K), tl.trans(x), zeros) * scale
    return acc


@triton.jit
def gate_up_fp8_bf16_kernel(
    x,
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
    """intermediate[pair], in `word_column` order = swiglu_step of w13[expert] @ x[token]."""
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_of_slot + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    valid = pair >= 0
    position, half, at = gate_up_rows(tl.program_id(0), N, BLOCK_N)
    channel = word_column(at)  # the rows' order is free, so the result is stored as it comes
    SLICE: tl.constexpr = K // SPLITS
    split = tl.program_id(2)
    weight_words = w13 + expert * (2 * N * K // 4) + (half * N + channel) * (K // 4)
    weight_scales = w13_scale_rows(w13_scale, expert, half, channel, OFFSET, N, K, BLOCK)
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_words(
        weight_words + split * (SLICE // 4), weight_scales + split * (SLICE // BLOCK),
        x + (pair // TOP_K).to(tl.int64) * K + split * SLICE, valid, acc,
        0, SLICE, BLOCK_K, BLOCK, STAGES,
    )  # fmt: skip
    if SPLITS > 1:
        acc, last = sum_of_tile(acc, parts, arrived, valid, SPLITS)
        if not last:
            return
    gate, up = split_gate_up(acc, BLOCK_N, BLOCK_ROWS)
    store_activated(gate, up, limit, intermediate, pair, position, N)


@triton.jit
def down_fp8_bf16_kernel(
    intermediate,
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
    """partial[pair] = router weight * w2[expert] @ intermediate[pair], its columns as written."""
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_of_slot + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    valid = pair >= 0
    row = pair.to(tl.int64)
    channels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_scales = w2_scale_rows(
        w2_scale, expert, tl.program_id(0), channels, OFFSET, N, K, BLOCK, BLOCK_N
    )
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_words(
        w2 + expert * (K * N // 4) + tl.minimum(channels, K - 1) * (N // 4), weight_scales,
        intermediate + row * N, valid, acc, OFFSET, N, BLOCK_K, BLOCK, STAGES,
    )  # fmt: skip
    store_weighted(acc, topk_weights, partial, pair, channels, K)


def gate_up(
    x: Tensor, weights: FP8Experts, routing: Routing, limit: float | None, tile: GemmTile
) -> Tensor:
    """swiglu_step(gate(x), up(x)) of every pair, one launch.

    Args:
        x: bf16 [T, K], each 16 of its columns in `word_column` order (`e4m3_words.word_order`);
            pair p reads row p // top_k.
        weights: K, N and intermediate_offset multiples of 16, blocks of 128 x 128, no NaN code
            (`fp8_blocks.refuse_nan`).
        routing: the batch's pairs by expert, in blocks of tile.block_rows.
        limit: the clamp of `swiglu_step`; None or 0 is none.
        tile: block_n counts rows of w13, so half as many channels; at least 32. block_k divides
            128. With splits, 128 divides K / splits, and `routing` has a counter for each tile.

    Returns:
        intermediate bf16 [T * top_k, N], rounded once, each 16 of its columns in `word_column`
        order: for `down` alone. Rows of pairs that are in no block are not written.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    hidden_size, size = weights.hidden_size, weights.intermediate_size
    require("x", x, (None, hidden_size), _BF16, contiguous=True)
    check_fp8(weights, x.device)
    check_routing(routing, tile, x.device)
    clamp = check_limit(limit)
    intermediate = x.new_empty((x.shape[0] * routing.top_k, size))
    tiles = ceil_div(2 * size, tile.block_n)
    launch(
        gate_up_fp8_bf16_kernel,
        (tiles, routing.max_blocks, tile.splits),
        x,
        weights.w13.view(torch.int32),
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
    intermediate: Tensor,
    weights: FP8Experts,
    routing: Routing,
    topk_weights: Tensor,
    tile: GemmTile,
) -> Tensor:
    """Router weight times the down projection of every pair, one launch.

    Args:
        intermediate: bf16 [T * top_k, N], as `gate_up` returns it, in its order of columns.
        weights, routing: as there.
        topk_weights: fp32 [T, top_k].
        tile: block_n counts rows of w2.

    Returns:
        partial bf16 [T * top_k, K]: summed and multiplied in fp32, rounded once; rows of pairs
        that are in no block are not written.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    hidden_size, size = weights.hidden_size, weights.intermediate_size
    require("intermediate", intermediate, (None, size), _BF16, contiguous=True)
    check_fp8(weights, intermediate.device)
    check_routing(routing, tile, intermediate.device)
    check_down_rows(intermediate.shape[0], routing, topk_weights)
    partial = intermediate.new_empty((intermediate.shape[0], hidden_size))
    launch(
        down_fp8_bf16_kernel,
        (ceil_div(hidden_size, tile.block_n), routing.max_blocks),
        intermediate,
        weights.w2.view(torch.int32),
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
