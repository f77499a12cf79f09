"""Grouped GEMMs of NVFP4 weights and FP8 activations: for long prefills on sm_89 and sm_90.

The FP8 matrix instruction is twice as fast as the bf16 one, so the weights are rounded to e4m3 in
registers. An element times its block scale reaches 6 x 448, past e4m3's 448, and has up to 5
significant bits. So each row is divided by a power of two
such that its largest scale lies between 32 and 60, its largest weight below 360, and then rounded
to e4m3, nearest even. In units of its row's power of two, what this adds to the error of a weight
is 2^-4 of its magnitude where that is 2^-6 or more, and 2^-10 (half of e4m3's smallest) below.

A product of e4m3 codes is summed over 128 columns at most before it is scaled by the activations'
scale and added in fp32.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels import interpret
from step37_kernels.checks import ceil_div, require
from step37_kernels.experts.activations import GROUP, FP8Rows
from step37_kernels.experts.gemm_arguments import (
    check_device,
    check_down_rows,
    check_limit,
    check_routing,
    tile_options,
)
from step37_kernels.experts.grouped_nvfp4 import (
    check_tile,
    expand_parts,
    finish_down,
    finish_gate_up,
)
from step37_kernels.experts.routing import Routing
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats.nvfp4_tiles import (
    NVFP4Tiles,
    slab_offsets,
    w13_channels,
)
from step37_kernels.launch import launch

# Four bf16 to four e4m3, in units of 2^-16: bf16 numbers of 2^-30 up to 1 have the same upper three
# exponent bits, so without those, and shifted, they are fp16 numbers 2^16 times as large.
_ROUND = tl.constexpr("""{
.reg .b32 low, high;
.reg .b16 bytes01, bytes23;
shl.b32 low, $1, 3;
shl.b32 high, $2, 3;
lop3.b32 low, low, $1, 0x7ff87ff8, 0xac;
lop3.b32 high, high, $2, 0x7ff87ff8, 0xac;
cvt.rn.satfinite.e4m3x2.f16x2 bytes01, low;
cvt.rn.satfinite.e4m3x2.f16x2 bytes23, high;
mov.b32 $0, {bytes01, bytes23};
}""")


@interpret.assembly(_ROUND.value)
def _round_in_numpy(number: np.ndarray) -> tuple[np.ndarray, ...]:
    """What `_ROUND` does, for the interpreter: bytes of e4m3 of a bf16 array."""
    import ml_dtypes

    bits = number.view(np.uint16)
    half = ((bits << 3 & np.uint16(0x7FF8)) | (bits & np.uint16(0x8007))).view(np.float16)
    clipped = np.clip(half.astype(np.float32), -448, 448)
    return (clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8),)


@triton.jit
def round_weights(words, codes, exponent, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """e4m3 [BLOCK_N, BLOCK_K] in `permuted_column_fp8`'s order; its unit is `row_unit(exponent)`.

    exponent [BLOCK_N] int32: the exponent field of each row's largest scale code.
    """
    # An element comes 2^-126 too small. With the exponent field 242, 2^115, for the largest scale
    # its products are 2^-11 to 2^-10 times the element; the smallest of all, with a scale 2^-17 of
    # that, are 2^-29, inside what `_ROUND` takes.
    unit = (242 - exponent) * 0x00800080
    parts = expand_parts(words, codes, unit[:, None], BLOCK_N, BLOCK_K)
    parts = tl.permute(parts, (0, 1, 5, 2, 4, 3))  # step, lane, h, j
    parts = tl.inline_asm_elementwise(
        _ROUND, "=r,r,r", [parts], dtype=tl.float8e4nv, is_pure=True, pack=4
    )
    return tl.reshape(parts, (BLOCK_N, BLOCK_K))


@triton.jit
def row_unit(exponent):
    """The power of two that a row's e4m3 weights are to be multiplied with, fp32."""
    # A largest scale of exponent field f is 2^(f - 10) to 2^(f - 9) and was made 32 to 64.
    return tl.exp2((exponent - 15).to(tl.float32))


@triton.jit
def _product(
    x,
    x_scale,
    row,
    valid,
    words,
    codes,
    exponents,
    tile_index,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """fp32 [BLOCK_N, BLOCK_ROWS]: a tile of an expert's matrix times rows of x [.., K].

    words, codes and exponents point at the expert's. In units of element times block scale.
    """
    n = tile_index * BLOCK_N + tl.arange(0, BLOCK_N)
    word, code, k = tl.arange(0, BLOCK_K // 8), tl.arange(0, BLOCK_K // 16), tl.arange(0, BLOCK_K)
    words += slab_offsets(n[:, None], word[None, :], K, 8)
    codes += slab_offsets(n[:, None], code[None, :], K, 4)
    exponent = tl.load(exponents + n).to(tl.int32)
    row = row.to(tl.int64)
    x += row[:, None] * K + k[None, :]
    # Scales are loaded twice over because fewer than one a thread are not spread over the threads:
    # each thread would load all 32 of its accumulator's columns.
    x_scale += row[:, None] * ((K + GROUP - 1) // GROUP) + tl.zeros((1, 2), tl.int32)
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    zeros = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    for step in range(0, K // BLOCK_K):
        weights = round_weights(tl.load(words), tl.load(codes), exponent, BLOCK_N, BLOCK_K)
        tokens = tl.load(x, mask=valid[:, None], other=0.0)
        scales = tl.load(x_scale + step * BLOCK_K // GROUP, mask=valid[:, None], other=0.0)
        scale = tl.max(scales, axis=1)
        acc += tl.dot(weights, tl.trans(tokens), zeros) * scale[None, :]
        words += 64 * BLOCK_K // 8
        codes += 64 * BLOCK_K // 16
        x += BLOCK_K
    return acc * row_unit(exponent)[:, None]


@triton.jit
def nvfp4_fp8_gate_up_kernel(
    x,
    x_scale,
    w13,
    w13_scale,
    w13_exponent,
    w13_global_scale,
    intermediate,
    pair_of_slot,
    expert_of_block,
    limit,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
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
    acc = _product(
        x, x_scale, pair // TOP_K, valid,
        w13 + expert * (2 * CHANNELS * K // 8), w13_scale + expert * (2 * CHANNELS * K // 16),
        w13_exponent + expert * (2 * CHANNELS), tile_index, K, BLOCK_ROWS, BLOCK_N, BLOCK_K, GROUP,
    )  # fmt: skip
    finish_gate_up(
        acc, w13_global_scale + expert * 2, intermediate, pair, tile_index, limit,
        CHANNELS, PADDED, True, BLOCK_ROWS, BLOCK_N,
    )  # fmt: skip


@triton.jit
def nvfp4_fp8_down_kernel(
    intermediate,
    intermediate_scale,
    w2,
    w2_scale,
    w2_exponent,
    w2_global_scale,
    topk_weights,
    partial,
    pair_of_slot,
    expert_of_block,
    PADDED: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
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
    valid = pair >= 0
    acc = _product(
        intermediate, intermediate_scale, pair, valid,
        w2 + expert * (K * PADDED // 8), w2_scale + expert * (K * PADDED // 16),
        w2_exponent + expert * K, tile_index, PADDED, BLOCK_ROWS, BLOCK_N, BLOCK_K, GROUP,
    )  # fmt: skip
    finish_down(
        acc, tl.load(w2_global_scale + expert), topk_weights, partial, pair, tile_index,
        K, BLOCK_N,
    )  # fmt: skip


def gate_up(
    x: FP8Rows, weights: NVFP4Tiles, routing: Routing, limit: float | None, tile: GemmTile
) -> Tensor:
    """swiglu_step of the gate and up projections of every pair, in one launch.

    Args:
        x: T rows of K channels, their columns in the order of `hidden_permutation_fp8`.
        weights, routing, limit, tile: as in `grouped_nvfp4.gate_up`.

    Returns:
        bf16 [T * top_k, N rounded up to 64] in the column order that this file's `down` takes, once
        quantised: groups of 128 columns hold the same channels as unpermuted ones. Rows of pairs
        that no expert of this rank has stay unwritten.

    Raises:
        ValueError: a shape, dtype, layout or the tile does not fit.
    """
    hidden = weights.hidden_size
    _check_rows("x", x, hidden)
    check_device("weights.w13", weights.w13, x.q.device)
    check_routing(routing, tile, x.q.device)
    limit = check_limit(limit)
    check_tile(tile, weights.w13_rows, hidden)
    pairs = x.q.shape[0] * routing.top_k
    intermediate = x.q.new_empty((pairs, weights.intermediate_padded), dtype=torch.bfloat16)
    launch(
        nvfp4_fp8_gate_up_kernel,
        (weights.w13_rows // tile.block_n, routing.max_blocks),
        x.q,
        x.scale,
        weights.w13,
        weights.w13_scale,
        weights.w13_exponent,
        weights.w13_global_scale,
        intermediate,
        routing.pair_of_slot,
        routing.expert_of_block,
        limit,
        CHANNELS=w13_channels(weights.intermediate_size),
        PADDED=weights.intermediate_padded,
        K=hidden,
        TOP_K=routing.top_k,
        GROUP=GROUP,
        **tile_options(tile),
    )
    return intermediate


def down(
    intermediate: FP8Rows,
    weights: NVFP4Tiles,
    routing: Routing,
    topk_weights: Tensor,
    tile: GemmTile,
) -> Tensor:
    """Router weight times down projection of every pair, in one launch.

    Args:
        intermediate: what `gate_up` returned, quantised: T * top_k rows.
        weights, routing, topk_weights, tile: as in `grouped_nvfp4.down`.

    Returns:
        bf16 [T * top_k, K], rounded once; rows of pairs that no expert has stay unwritten.

    Raises:
        ValueError: a shape, dtype, layout or the tile does not fit.
    """
    hidden, padded = weights.hidden_size, weights.intermediate_padded
    _check_rows("intermediate", intermediate, padded)
    pairs, device = intermediate.q.shape[0], intermediate.q.device
    check_down_rows(pairs, routing, topk_weights)
    check_device("weights.w2", weights.w2, device)
    check_device("topk_weights", topk_weights, device)
    check_routing(routing, tile, device)
    check_tile(tile, hidden, padded)
    partial = intermediate.q.new_empty((pairs, hidden), dtype=torch.bfloat16)
    launch(
        nvfp4_fp8_down_kernel,
        (hidden // tile.block_n, routing.max_blocks),
        intermediate.q,
        intermediate.scale,
        weights.w2,
        weights.w2_scale,
        weights.w2_exponent,
        weights.w2_global_scale,
        topk_weights,
        partial,
        routing.pair_of_slot,
        routing.expert_of_block,
        PADDED=padded,
        K=hidden,
        GROUP=GROUP,
        **tile_options(tile),
    )
    return partial


def _check_rows(name: str, rows: FP8Rows, columns: int) -> None:
    require(f"{name}.q", rows.q, (None, columns), (torch.float8_e4m3fn,), contiguous=True)
    scale = (rows.q.shape[0], ceil_div(columns, GROUP))
    require(f"{name}.scale", rows.scale, scale, (torch.float32,), contiguous=True)
