"""Grouped GEMMs of unquantised experts: BF16 weights, BF16 activations.

The weights are the left operand (64 of their rows fill a wgmma, 16 token rows suffice on the other
side). A program owns one tile of weight rows and one block of token rows of one expert and goes
over the whole of the summed dimension or, where tiles are few, one of its parts (`split_k`); so a
row's bits do not depend on its batch-mates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.expert_weights import BF16Experts
from step37_kernels.experts.e4m3_words import weight_tile
from step37_kernels.experts.epilogue import store_activated, store_weighted
from step37_kernels.experts.gemm_arguments import (
    check_device,
    check_down_rows,
    check_limit,
    check_routing,
    check_sizes,
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
def sum_over_columns(
    weight_rows,
    token_rows,
    valid,
    acc,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr = False,
):
    """acc [BLOCK_N, BLOCK_ROWS] plus the product over SIZE columns.

    weight_rows [BLOCK_N] point at column 0 as `weight_tile` takes them, token_rows [BLOCK_ROWS] at
    rows of bf16; tokens where `valid` is false count as zeros.
    """
    k = tl.arange(0, BLOCK_K)
    for step in range(0, tl.cdiv(SIZE, BLOCK_K)):
        at = step * BLOCK_K + k
        w = weight_tile(weight_rows, step, SIZE, acc.shape[0], BLOCK_K, WORDS)
        if SIZE % BLOCK_K == 0:
            x = tl.load(token_rows[:, None] + at[None, :], mask=valid[:, None], other=0.0)
        else:
            inside = valid[:, None] & (at < SIZE)[None, :]
            x = tl.load(token_rows[:, None] + at[None, :], mask=inside, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc)
    return acc


@triton.jit
def gate_up_bf16_kernel(
    x,
    w13,
    intermediate,
    pair_of_slot,
    expert_of_block,
    limit,
    parts,
    arrived,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """intermediate[pair] = swiglu_step of w13[expert] @ x[token]."""
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_of_slot + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    valid = pair >= 0
    channels, half, channel = gate_up_rows(tl.program_id(0), N, BLOCK_N)
    first = tl.program_id(2) * (K // SPLITS)
    weight_rows = w13 + expert * (2 * N * K) + (half * N + channel) * K + first
    token_rows = x + (pair // TOP_K).to(tl.int64) * K + first
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_columns(weight_rows, token_rows, valid, acc, K // SPLITS, BLOCK_K)
    if SPLITS > 1:
        acc, last = sum_of_tile(acc, parts, arrived, valid, SPLITS)
        if not last:
            return
    gate, up = split_gate_up(acc, BLOCK_N, BLOCK_ROWS)
    store_activated(gate, up, limit, intermediate, pair, channels, N)


@triton.jit
def down_bf16_kernel(
    intermediate,
    w2,
    partial,
    topk_weights,
    pair_of_slot,
    expert_of_block,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[pair] = router weight * w2[expert] @ intermediate[pair]."""
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_of_slot + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    valid = pair >= 0
    channels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows = w2 + expert * (K * N) + tl.minimum(channels, K - 1) * N
    token_rows = intermediate + pair.to(tl.int64) * N
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_columns(weight_rows, token_rows, valid, acc, N, BLOCK_K)
    store_weighted(acc, topk_weights, partial, pair, channels, K)


def gate_up(
    x: Tensor, weights: BF16Experts, routing: Routing, limit: float | None, tile: GemmTile
) -> Tensor:
    """swiglu_step(gate(x), up(x)) of every pair, one launch.

    Args:
        x: bf16 [T, K]; pair p reads row p // top_k.
        weights: in bf16, K and N multiples of 16.
        routing: the batch's pairs by expert, in blocks of tile.block_rows.
        limit: the clamp of `swiglu_step`; None or 0 is none.
        tile: block_n counts rows of w13, so half as many channels; a multiple of 16. With splits,
            block_k divides K / splits, and `routing` has a counter for each tile.

    Returns:
        intermediate bf16 [T * top_k, N], rounded once; rows of pairs that are in no block are not
        written.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    hidden_size, size = weights.hidden_size, weights.intermediate_size
    check_sizes(hidden_size, size)
    require("x", x, (None, hidden_size), _BF16, contiguous=True)
    require("w13", weights.w13, weights.w13.shape, _BF16, contiguous=True)
    check_device("w13", weights.w13, x.device)
    check_routing(routing, tile, x.device)
    clamp = check_limit(limit)
    intermediate = x.new_empty((x.shape[0] * routing.top_k, size))
    tiles = ceil_div(2 * size, tile.block_n)
    launch(
        gate_up_bf16_kernel,
        (tiles, routing.max_blocks, tile.splits),
        x,
        weights.w13,
        intermediate,
        routing.pair_of_slot,
        routing.expert_of_block,
        clamp,
        *split_buffers(tile, tiles, hidden_size, tile.block_k, routing),
        TOP_K=routing.top_k,
        SPLITS=tile.splits,
        N=size,
        K=hidden_size,
        **tile_options(tile),
    )
    return intermediate


def down(
    intermediate: Tensor,
    weights: BF16Experts,
    routing: Routing,
    topk_weights: Tensor,
    tile: GemmTile,
) -> Tensor:
    """Router weight times the down projection of every pair, one launch.

    Args:
        intermediate: bf16 [T * top_k, N], as `gate_up` returns it.
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
    check_sizes(hidden_size, size)
    require("intermediate", intermediate, (None, size), _BF16, contiguous=True)
    require("w2", weights.w2, weights.w2.shape, _BF16, contiguous=True)
    check_device("w2", weights.w2, intermediate.device)
    check_routing(routing, tile, intermediate.device)
    check_down_rows(intermediate.shape[0], routing, topk_weights)
    partial = intermediate.new_empty((intermediate.shape[0], hidden_size))
    launch(
        down_bf16_kernel,
        (ceil_div(hidden_size, tile.block_n), routing.max_blocks),
        intermediate,
        weights.w2,
        partial,
        topk_weights,
        routing.pair_of_slot,
        routing.expert_of_block,
        N=size,
        K=hidden_size,
        **tile_options(tile),
    )
    return partial
