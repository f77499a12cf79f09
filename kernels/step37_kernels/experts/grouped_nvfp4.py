"""Grouped GEMMs of NVFP4 weights and bf16 activations, for tensor cores without FP4 (sm_80 up).

The product of an e2m1 element and its e4m3 block scale has at most 5 significant bits, so bf16
holds it exactly: the weights are expanded in registers to exact bf16 pairs and multiplied with the
activations by the bf16 matrix instruction, weights on the left (64 of their rows fill an m64
instruction however few tokens there are). Byte-wise expansion would take 8 instructions a weight,
twice what the memory's bandwidth leaves time for; here one word of 8 weights takes 13 instructions
(see `NVFP4Tiles` for its layout).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels import interpret
from step37_kernels.checks import require
from step37_kernels.experts.epilogue import swiglu_step
from step37_kernels.experts.gemm_arguments import (
    check_device,
    check_down_rows,
    check_limit,
    check_routing,
    split_buffers,
    tile_options,
)
from step37_kernels.experts.routing import Routing
from step37_kernels.experts.rows import split_gate_up
from step37_kernels.experts.split_k import sum_of_tile
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats.nvfp4_tiles import (
    SLAB,
    NVFP4Tiles,
    position_fp8,
    slab_offsets,
    w13_channels,
)
from step37_kernels.launch import launch

# Four pairs: a word's bits moved to bf16's sign, two lowest exponent bits and top mantissa bit
# (an e2m1 element times 2^-126, elements of 0.5 being bf16 subnormals), times the pair of scales.
_EXPAND = tl.constexpr("""{
.reg .b32 pair<4>, turned, raised, upper, lower, zero;
mov.b32 zero, 0x80008000;
lop3.b32 pair0, $8, 0x81c081c0, 0, 0xc0;
shf.r.wrap.b32 turned, $8, $8, 6;
lop3.b32 pair1, turned, 0x81c081c0, 0, 0xc0;
shl.b32 raised, $8, 4;
lop3.b32 pair2, raised, 0x81c081c0, 0, 0xc0;
shl.b32 upper, $8, 6;
shr.u32 lower, $8, 2;
lop3.b32 upper, upper, 0x80c080c0, 0, 0xc0;
lop3.b32 pair3, lower, 0x01000100, upper, 0xea;
fma.rn.bf16x2 pair0, pair0, $9, zero;
fma.rn.bf16x2 pair1, pair1, $9, zero;
fma.rn.bf16x2 pair2, pair2, $9, zero;
fma.rn.bf16x2 pair3, pair3, $9, zero;
mov.b32 {$0, $1}, pair0;
mov.b32 {$2, $3}, pair1;
mov.b32 {$4, $5}, pair2;
mov.b32 {$6, $7}, pair3;
}""")

_EIGHT_BF16 = tl.constexpr((tl.bfloat16,) * 8)

WEIGHT_UNIT = tl.constexpr(2.0**19)
"""An expanded weight times this is element times block scale: 2^126 of the elements, 2^-107."""


@interpret.assembly(_EXPAND.value)
def _expand_in_numpy(word: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, ...]:
    """What `_EXPAND` does, for the interpreter: eight bf16 arrays."""
    import ml_dtypes

    word, scale = word.view(np.uint32), scale.view(np.uint32)
    mask = np.uint32(0x81C081C0)
    upper, lower = word << 6 & np.uint32(0x80C080C0), word >> 2 & np.uint32(0x01000100)
    pairs = (word & mask, (word >> 6 | word << 26) & mask, word << 4 & mask, upper | lower)
    halves = [(pair >> shift, scale >> shift) for pair in pairs for shift in (0, 16)]
    numbers = [[x.astype(np.uint16).view(ml_dtypes.bfloat16) for x in both] for both in halves]
    return tuple(element * factor for element, factor in numbers)


@triton.jit
def expand_parts(words, codes, unit, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """bf16 [BLOCK_N, BLOCK_K // 32, lane, j, h, step] of words and codes (`permuted_column`).

    words [BLOCK_N, BLOCK_K // 8], codes [BLOCK_N, BLOCK_K // 16]. unit, an int32 or [BLOCK_N, 1] of
    them, is a pair of bf16 exponents added to e5m3's.
    """
    # A pair of bf16 scales: e5m3's fields go into the lower part of bf16's.
    scale = codes.to(tl.int32) * 0x00100010 + unit
    slabs: tl.constexpr = BLOCK_K // 64
    scale = tl.reshape(scale, (BLOCK_N, slabs, 1, 4))  # a lane's two words have one scale
    scale = tl.reshape(tl.broadcast_to(scale, (BLOCK_N, slabs, 2, 4)), (BLOCK_N, BLOCK_K // 8))
    v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
        _EXPAND,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [words, scale],
        dtype=_EIGHT_BF16,
        is_pure=True,
        pack=1,
    )
    # join adds a last dimension: of the three, j (v0, v1) is the first, then h, then step.
    step0 = tl.join(tl.join(v0, v1), tl.join(v2, v3))
    step1 = tl.join(tl.join(v4, v5), tl.join(v6, v7))
    return tl.reshape(tl.join(step0, step1), (BLOCK_N, BLOCK_K // 32, 4, 2, 2, 2))


@triton.jit
def expand(words, codes, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """bf16 [BLOCK_N, BLOCK_K] in `permuted_column`'s order, in units of 1 / WEIGHT_UNIT."""
    # 0x7000 makes the scale times 2^107, which bf16 holds for the largest, 448, too.
    parts = expand_parts(words, codes, 0x70007000, BLOCK_N, BLOCK_K)
    return tl.reshape(tl.permute(parts, (0, 1, 5, 4, 2, 3)), (BLOCK_N, BLOCK_K))


@triton.jit
def _product(
    x,
    row,
    valid,
    words,
    codes,
    tile_index,
    split,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [BLOCK_N, BLOCK_ROWS]: a tile of an expert's matrix times rows of x [.., K].

    words and codes point at the expert's. Over part `split` of K's SPLITS. In units of element
    times block scale.
    """
    SLICE: tl.constexpr = K // SPLITS
    n = tile_index * BLOCK_N + tl.arange(0, BLOCK_N)
    word, code, k = tl.arange(0, BLOCK_K // 8), tl.arange(0, BLOCK_K // 16), tl.arange(0, BLOCK_K)
    words += slab_offsets(n[:, None], word[None, :], K, 8) + split * (64 * SLICE // 8)
    codes += slab_offsets(n[:, None], code[None, :], K, 4) + split * (64 * SLICE // 16)
    x += row.to(tl.int64)[:, None] * K + split * SLICE + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    for _ in range(0, SLICE // BLOCK_K):
        weights = expand(tl.load(words), tl.load(codes), BLOCK_N, BLOCK_K)
        tokens = tl.load(x, mask=valid[:, None], other=0.0)
        acc = tl.dot(weights, tl.trans(tokens), acc)
        words += 64 * BLOCK_K // 8
        codes += 64 * BLOCK_K // 16
        x += BLOCK_K
    return acc * WEIGHT_UNIT


@triton.jit
def finish_gate_up(
    acc,
    global_scale,
    intermediate,
    pair,
    tile_index,
    limit,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store swiglu_step of a tile's products acc, in the order of a bf16 or an FP8 down GEMM."""
    gate, up = split_gate_up(acc, BLOCK_N, BLOCK_ROWS)
    gate *= tl.load(global_scale)
    up *= tl.load(global_scale + 1)
    result = swiglu_step(gate, up, limit).to(tl.bfloat16)
    row, valid = intermediate + pair.to(tl.int64)[None, :] * PADDED, (pair >= 0)[None, :]
    column = tile_index * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    if PADDED != CHANNELS:
        # Of the last slab's columns, 4 of every 8 have rows in w13 and 4 are zeros.
        whole: tl.constexpr = CHANNELS // 64 * 64
        past = column - whole
        column = tl.where(past < 0, column, whole + past // 4 * 8 + past % 4)
        if tile_index == tl.num_programs(0) - 1:
            pad = tl.arange(0, 32)
            zero = whole + pad // 4 * 8 + 4 + pad % 4
            zero = position_fp8(zero) if FP8 else zero
            tl.store(row + zero[:, None], tl.zeros((32, BLOCK_ROWS), tl.bfloat16), mask=valid)
    column = position_fp8(column) if FP8 else column
    tl.store(row + column[:, None], result, mask=valid)


@triton.jit
def finish_down(
    acc,
    global_scale,
    topk_weights,
    partial,
    pair,
    tile_index,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store router weight times a tile's products acc, rounded to bf16."""
    valid = pair >= 0
    weight = tl.load(topk_weights + pair, mask=valid, other=0.0)
    result = acc * global_scale * weight[None, :]
    channel = tile_index * BLOCK_N + tl.arange(0, BLOCK_N)
    out = partial + pair.to(tl.int64)[None, :] * K + channel[:, None]
    tl.store(out, result.to(tl.bfloat16), mask=valid[None, :])


@triton.jit
def nvfp4_gate_up_kernel(
    x,
    w13,
    w13_scale,
    w13_global_scale,
    intermediate,
    pair_of_slot,
    expert_of_block,
    limit,
    parts,
    arrived,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
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
    acc = _product(
        x, pair // TOP_K, valid,
        w13 + expert * (2 * CHANNELS * K // 8), w13_scale + expert * (2 * CHANNELS * K // 16),
        tile_index, tl.program_id(2), K, SPLITS, BLOCK_ROWS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLITS > 1:
        acc, last = sum_of_tile(acc, parts, arrived, valid, SPLITS)
        if not last:
            return
    finish_gate_up(
        acc, w13_global_scale + expert * 2, intermediate, pair, tile_index, limit,
        CHANNELS, PADDED, False, BLOCK_ROWS, BLOCK_N,
    )  # fmt: skip


@triton.jit
def nvfp4_down_kernel(
    intermediate,
    w2,
    w2_scale,
    w2_global_scale,
    topk_weights,
    partial,
    pair_of_slot,
    expert_of_block,
    PADDED: tl.constexpr,
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
    valid = pair >= 0
    acc = _product(
        intermediate, pair, valid,
        w2 + expert * (K * PADDED // 8), w2_scale + expert * (K * PADDED // 16),
        tile_index, 0, PADDED, 1, BLOCK_ROWS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    finish_down(
        acc, tl.load(w2_global_scale + expert), topk_weights, partial, pair, tile_index,
        K, BLOCK_N,
    )  # fmt: skip


def gate_up(
    x: Tensor, weights: NVFP4Tiles, routing: Routing, limit: float | None, tile: GemmTile
) -> Tensor:
    """swiglu_step of the gate and up projections of every pair, in one launch.

    Args:
        x: bf16 [T, K], contiguous, its columns in the order of `hidden_permutation`.
        weights: this rank's experts.
        routing: the pairs sorted by expert.
        limit: the clamp of `swiglu_step`; None or 0 is no clamp.
        tile: block_k divides K / splits, block_n / 2 the channels (N rounded up to 32). With
            splits, `routing` has a counter for each tile.

    Returns:
        bf16 [T * top_k, N rounded up to 64] in the column order that `down` takes. Rows of pairs
        that no expert of this rank has stay unwritten.

    Raises:
        ValueError: a shape, dtype, layout or the tile does not fit.
    """
    hidden = weights.hidden_size
    require("x", x, (None, hidden), (torch.bfloat16,), contiguous=True)
    check_device("weights.w13", weights.w13, x.device)
    check_routing(routing, tile, x.device)
    limit = check_limit(limit)
    check_tile(tile, weights.w13_rows, hidden)
    intermediate = x.new_empty((x.shape[0] * routing.top_k, weights.intermediate_padded))
    tiles = weights.w13_rows // tile.block_n
    launch(
        nvfp4_gate_up_kernel,
        (tiles, routing.max_blocks, tile.splits),
        x,
        weights.w13,
        weights.w13_scale,
        weights.w13_global_scale,
        intermediate,
        routing.pair_of_slot,
        routing.expert_of_block,
        limit,
        *split_buffers(tile, tiles, hidden, tile.block_k, routing),
        CHANNELS=w13_channels(weights.intermediate_size),
        PADDED=weights.intermediate_padded,
        K=hidden,
        TOP_K=routing.top_k,
        SPLITS=tile.splits,
        **tile_options(tile),
    )
    return intermediate


def down(
    intermediate: Tensor,
    weights: NVFP4Tiles,
    routing: Routing,
    topk_weights: Tensor,
    tile: GemmTile,
) -> Tensor:
    """Router weight times down projection of every pair, in one launch.

    Args:
        intermediate: bf16 [T * top_k, N rounded up to 64], as `gate_up` returns it.
        weights, routing: as there.
        topk_weights: fp32 [T, top_k], contiguous.
        tile: block_rows as in gate_up; block_k divides intermediate's columns, block_n K.

    Returns:
        bf16 [T * top_k, K], rounded once; rows of pairs that no expert has stay unwritten.

    Raises:
        ValueError: a shape, dtype, layout or the tile does not fit.
    """
    hidden, padded = weights.hidden_size, weights.intermediate_padded
    require("intermediate", intermediate, (None, padded), (torch.bfloat16,), contiguous=True)
    pairs, device = intermediate.shape[0], intermediate.device
    check_down_rows(pairs, routing, topk_weights)
    check_device("weights.w2", weights.w2, device)
    check_device("topk_weights", topk_weights, device)
    check_routing(routing, tile, device)
    check_tile(tile, hidden, padded)
    partial = intermediate.new_empty((pairs, hidden))
    launch(
        nvfp4_down_kernel,
        (hidden // tile.block_n, routing.max_blocks),
        intermediate,
        weights.w2,
        weights.w2_scale,
        weights.w2_global_scale,
        topk_weights,
        partial,
        routing.pair_of_slot,
        routing.expert_of_block,
        PADDED=padded,
        K=hidden,
        **tile_options(tile),
    )
    return partial


def check_tile(tile: GemmTile, rows: int, columns: int) -> None:
    """Check that whole tiles of whole slabs cover a matrix of `rows` by `columns`.

    Raises:
        ValueError: block_n does not divide `rows`, block_k `columns`, or 64 one of them.
    """
    for name, block, size in (("n", tile.block_n, rows), ("k", tile.block_k, columns)):
        if block % SLAB or size % block:
            raise ValueError(
                f"tile.block_{name} is {block}, expected a multiple of {SLAB} that divides {size}"
            )
