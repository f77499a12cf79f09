"""Grouped GEMMs of NVFP4 weights and NVFP4 activations by the scaled FP4 product (sm_100 up).

The matrix instruction reads e2m1 pairs and an e4m3 scale per 16 as the checkpoint has them and sums
in fp32, so there is nothing to lay out anew and nothing to expand. Activations are quantised to the
same format while the model runs: block scales dynamic, the global scale the checkpoint's
`input_scale`.

Weights are the left operand, so that few tokens fill the instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.expert_weights import NVFP4Experts
from step37_kernels.experts.epilogue import store_activated
from step37_kernels.experts.gemm_arguments import (
    check_device,
    check_down_rows,
    check_limit,
    check_routing,
    split_buffers,
    tile_options,
)
from step37_kernels.experts.grouped_nvfp4 import finish_down
from step37_kernels.experts.routing import Routing
from step37_kernels.experts.rows import gate_up_rows, split_gate_up
from step37_kernels.experts.split_k import sum_of_tile
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats.nvfp4 import GROUP_SIZE, NVFP4Tensor
from step37_kernels.launch import launch


@triton.jit
def quantize_nvfp4_row(
    x, packed, scale, row, global_scale, K: tl.constexpr, PADDED_GROUPS: tl.constexpr
):
    """Quantise one row [K] of x, bit for bit as `formats.nvfp4.quantize` with this global scale.

    A group with NaN or infinity, which e2m1 has not, gets the scale NaN: it stays in its row.
    PADDED_GROUPS is K / 16 rounded up to a power of two.
    """
    group, within = tl.arange(0, PADDED_GROUPS), tl.arange(0, 16)
    inside = group < K // 16
    k = group[:, None] * 16 + within[None, :]
    value = tl.load(x + row * K + k, mask=inside[:, None], other=0.0).to(tl.float32)
    infinity: tl.constexpr = float("inf")
    finite = tl.min((tl.abs(value) < infinity).to(tl.int32), axis=1) == 1
    amax = tl.max(tl.abs(value), axis=1)
    # Divisions rounded to nearest, as torch's.
    divisor = tl.full((PADDED_GROUPS,), 6.0, tl.float32) * global_scale
    ratio = tl.div_rn(amax, divisor)
    ratio = tl.where(ratio > 0.0, ratio, 1.0)
    ratio = tl.minimum(tl.maximum(ratio, 0.001953125), 448.0)  # 2^-9, e4m3's smallest
    block_scale = tl.where(finite, ratio, float("nan")).to(tl.float8e4nv)
    step = block_scale.to(tl.float32) * global_scale
    quotient = tl.div_rn(value, tl.broadcast_to(step[:, None], (PADDED_GROUPS, 16)))
    magnitude = tl.minimum(tl.abs(quotient), 6.0)
    # The spacing is 0.5 up to 2, then 1 up to 4, then 2. Adding 2^23 rounds to nearest even.
    whole: tl.constexpr = 8388608.0
    small = (magnitude * 2.0 + whole) - whole
    middle = (magnitude + whole) - whole + 2.0
    large = (magnitude * 0.5 + whole) - whole + 4.0
    code = tl.where(magnitude < 2.0, small, tl.where(magnitude < 4.0, middle, large))
    nibble = code.to(tl.int32) + tl.where(quotient < 0.0, 8, 0)
    low, high = tl.split(tl.reshape(nibble, (PADDED_GROUPS, 8, 2)))
    at = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(packed + row * (K // 2) + at, (low + high * 16).to(tl.uint8), mask=inside[:, None])
    tl.store(scale + row * (K // 16) + group, block_scale, mask=inside)


@triton.jit
def _product(
    weights,
    weight_scale,
    weight_row,
    x,
    x_scale,
    row,
    valid,
    split,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [BLOCK_N, BLOCK_ROWS]: rows of an expert's matrix [.., K] times rows of x [.., K].

    weights and weight_scale point at the expert's. Over part `split` of K's SPLITS. Without the
    global scales.
    """
    SLICE: tl.constexpr = K // SPLITS
    byte, group = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 16)
    row = row.to(tl.int64)
    byte_of_row, group_of_row = split * (SLICE // 2) + byte, split * (SLICE // 16) + group
    weights += weight_row[:, None] * (K // 2) + byte_of_row[None, :]
    weight_scale += weight_row[:, None] * (K // 16) + group_of_row[None, :]
    x += row[:, None] * (K // 2) + byte_of_row[None, :]
    x_scale += row[:, None] * (K // 16) + group_of_row[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    for step in range(0, tl.cdiv(SLICE, BLOCK_K)):
        if SLICE % BLOCK_K == 0:
            a, b = tl.load(weights), tl.load(x, mask=valid[:, None], other=0)
            a_scale = tl.load(weight_scale)
            b_scale = tl.load(x_scale, mask=valid[:, None], other=0.0)
        else:
            bytes_left = (byte < SLICE // 2 - step * (BLOCK_K // 2))[None, :]
            groups_left = (group < SLICE // 16 - step * (BLOCK_K // 16))[None, :]
            a = tl.load(weights, mask=bytes_left, other=0)
            b = tl.load(x, mask=valid[:, None] & bytes_left, other=0)
            a_scale = tl.load(weight_scale, mask=groups_left, other=0.0)
            b_scale = tl.load(x_scale, mask=valid[:, None] & groups_left, other=0.0)
        acc = tl.dot_scaled(a, a_scale, "e2m1", tl.trans(b), b_scale, "e2m1", acc)
        weights += BLOCK_K // 2
        weight_scale += BLOCK_K // 16
        x += BLOCK_K // 2
        x_scale += BLOCK_K // 16
    return acc


@triton.jit
def nvfp4_nvfp4_gate_up_kernel(
    x,
    x_scale,
    x_global_scale,
    w13,
    w13_scale,
    w13_global_scale,
    intermediate,
    pair_of_slot,
    expert_of_block,
    limit,
    parts,
    arrived,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """swiglu_step(gate, up) of one block of pairs and BLOCK_N // 2 channels."""
    tile_index, block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_of_slot + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    valid = pair >= 0
    channels, half, channel = gate_up_rows(tile_index, N, BLOCK_N)
    acc = _product(
        w13 + expert * (N * K), w13_scale + expert * (2 * N * K // 16), half * N + channel,
        x, x_scale, pair // TOP_K, valid, tl.program_id(2),
        K, SPLITS, BLOCK_ROWS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLITS > 1:
        acc, last = sum_of_tile(acc, parts, arrived, valid, SPLITS)
        if not last:
            return
    gate, up = split_gate_up(acc, BLOCK_N, BLOCK_ROWS)
    x_unit = tl.load(x_global_scale)
    gate *= x_unit * tl.load(w13_global_scale + expert * 2)
    up *= x_unit * tl.load(w13_global_scale + expert * 2 + 1)
    store_activated(gate, up, limit, intermediate, pair, channels, N)


@triton.jit
def nvfp4_nvfp4_down_kernel(
    intermediate,
    intermediate_scale,
    intermediate_global_scale,
    w2,
    w2_scale,
    w2_global_scale,
    topk_weights,
    partial,
    pair_of_slot,
    expert_of_block,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Router weight times down projection of one block of pairs, for BLOCK_N hidden channels."""
    tile_index, block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_of_slot + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    channel = tile_index * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _product(
        w2 + expert * (K * N // 2), w2_scale + expert * (K * N // 16), channel,
        intermediate, intermediate_scale, pair, pair >= 0, 0,
        N, 1, BLOCK_ROWS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    unit = tl.load(intermediate_global_scale) * tl.load(w2_global_scale + expert)
    finish_down(acc, unit, topk_weights, partial, pair, tile_index, K, BLOCK_N)


def gate_up(
    x: NVFP4Tensor, weights: NVFP4Experts, routing: Routing, limit: float | None, tile: GemmTile
) -> Tensor:
    """swiglu_step of the gate and up projections of every pair, in one launch.

    Args:
        x: [T, K] with one global scale, contiguous.
        weights: this rank's experts, contiguous.
        routing: the pairs sorted by expert.
        limit: the clamp of `swiglu_step`; None or 0 is no clamp.
        tile: block_k a multiple of 64. With splits, block_k divides K / splits, and `routing` has a
            counter for each tile.

    Returns:
        bf16 [T * top_k, N]; rows of pairs that no expert of this rank has stay unwritten.

    Raises:
        ValueError: a shape, layout, device or the tile does not fit.
    """
    size, hidden = weights.intermediate_size, weights.hidden_size
    _check_rows("x", x, hidden)
    _check_weights("w13", weights.w13, weights.w13_scale, x.packed.device)
    check_routing(routing, tile, x.packed.device)
    _check_block_k(tile)
    limit = check_limit(limit)
    pairs = x.packed.shape[0] * routing.top_k
    intermediate = x.packed.new_empty((pairs, size), dtype=torch.bfloat16)
    tiles = ceil_div(2 * size, tile.block_n)
    launch(
        nvfp4_nvfp4_gate_up_kernel,
        (tiles, routing.max_blocks, tile.splits),
        x.packed,
        x.block_scale,
        x.global_scale,
        weights.w13,
        weights.w13_scale,
        weights.w13_global_scale,
        intermediate,
        routing.pair_of_slot,
        routing.expert_of_block,
        limit,
        *split_buffers(tile, tiles, hidden, tile.block_k, routing),
        N=size,
        K=hidden,
        TOP_K=routing.top_k,
        SPLITS=tile.splits,
        **tile_options(tile),
    )
    return intermediate


def down(
    intermediate: NVFP4Tensor,
    weights: NVFP4Experts,
    routing: Routing,
    topk_weights: Tensor,
    tile: GemmTile,
) -> Tensor:
    """Router weight times down projection of every pair, in one launch.

    Args:
        intermediate: [T * top_k, N] with one global scale, contiguous.
        weights, routing: as in `gate_up`.
        topk_weights: fp32 [T, top_k], contiguous.
        tile: block_rows as in gate_up; block_n divides K, block_k a multiple of 64.

    Returns:
        bf16 [T * top_k, K], rounded once; rows of pairs that no expert has stay unwritten.

    Raises:
        ValueError: a shape, layout, device or the tile does not fit.
    """
    size, hidden = weights.intermediate_size, weights.hidden_size
    _check_rows("intermediate", intermediate, size)
    pairs, device = intermediate.packed.shape[0], intermediate.packed.device
    _check_weights("w2", weights.w2, weights.w2_scale, device)
    check_down_rows(pairs, routing, topk_weights)
    check_device("topk_weights", topk_weights, device)
    check_routing(routing, tile, device)
    _check_block_k(tile)
    if hidden % tile.block_n:
        raise ValueError(f"tile.block_n is {tile.block_n}, expected a divisor of {hidden}")
    partial = intermediate.packed.new_empty((pairs, hidden), dtype=torch.bfloat16)
    launch(
        nvfp4_nvfp4_down_kernel,
        (hidden // tile.block_n, routing.max_blocks),
        intermediate.packed,
        intermediate.block_scale,
        intermediate.global_scale,
        weights.w2,
        weights.w2_scale,
        weights.w2_global_scale,
        topk_weights,
        partial,
        routing.pair_of_slot,
        routing.expert_of_block,
        N=size,
        K=hidden,
        **tile_options(tile),
    )
    return partial


def _check_rows(name: str, rows: NVFP4Tensor, columns: int) -> None:
    """The rows' dtypes are checked by their class."""
    require(f"{name}.packed", rows.packed, (None, columns // 2), contiguous=True)
    scale = (rows.packed.shape[0], columns // GROUP_SIZE)
    require(f"{name}.block_scale", rows.block_scale, scale, contiguous=True)
    check_device(f"{name}.global_scale", rows.global_scale, rows.packed.device)


def _check_weights(name: str, packed: Tensor, scale: Tensor, device: torch.device) -> None:
    require(f"weights.{name}", packed, (None, None, None), contiguous=True)
    require(f"weights.{name}_scale", scale, (None, None, None), contiguous=True)
    check_device(f"weights.{name}", packed, device)


def _check_block_k(tile: GemmTile) -> None:
    if tile.block_k % 64:
        raise ValueError(f"tile.block_k is {tile.block_k}, expected a multiple of 64")
