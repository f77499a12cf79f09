"""The shared expert: every token's, in at most two launches and one for each product.

For few tokens one expert's weights are too few tiles for all SMs, so both sums are split: gate-up
writes fp32 sums over parts of K; down adds them in a fixed order while it reads them, applies the
activation, and writes fp32 sums over parts of N, which whoever sums the experts adds. For many
tokens nothing is split, and the intermediate is written once in bf16.

Weights are BF16, or FP8 with a scale per row, which becomes bf16 in registers (`e4m3_words`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.arch import arch_of
from step37_kernels.checks import ceil_div, require
from step37_kernels.experts.e4m3_words import weight_tile
from step37_kernels.experts.epilogue import swiglu_step
from step37_kernels.experts.gemm_arguments import (
    check_device,
    check_limit,
    check_sizes,
    tile_options,
)
from step37_kernels.experts.grouped_bf16 import sum_over_columns
from step37_kernels.experts.rows import gate_up_rows, split_gate_up
from step37_kernels.experts.tiles import GemmTile, SharedTiles, shared, shared_fp8
from step37_kernels.formats.fp8_block import FP8BlockTensor
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.launch import launch

_BF16 = (torch.bfloat16,)


@triton.jit(do_not_specialize=["tokens"])
def shared_gate_up_kernel(
    x,
    w13,
    w13_scale,
    out,
    tokens,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = swiglu_step(w13 @ x), bf16 [T, N]; or the sums of each part, fp32 [PARTS, 2, T, N]."""
    part = tl.program_id(2)
    token = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = token < tokens
    channels, half, channel = gate_up_rows(tl.program_id(0), N, BLOCK_N)
    SLICE: tl.constexpr = K // PARTS
    PACK: tl.constexpr = 4 if WORDS else 1
    weight_rows = w13 + (half * N + channel) * (K // PACK) + part * (SLICE // PACK)
    token_rows = x + token.to(tl.int64) * K + part * SLICE
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_columns(weight_rows, token_rows, valid, acc, SLICE, BLOCK_K, WORDS)
    if WORDS:
        acc *= tl.load(w13_scale + half * N + channel)[:, None]
    gate, up = split_gate_up(acc, BLOCK_N, BLOCK_ROWS)
    stored = valid[None, :] & (channels < N)[:, None]
    target = token.to(tl.int64)[None, :] * N + channels[:, None]
    if PARTS == 1:
        activated = swiglu_step(gate, up, limit)
        tl.store(out + target, activated.to(tl.bfloat16), mask=stored)
    else:
        first = out + part * 2 * tokens.to(tl.int64) * N
        tl.store(first + target, gate, mask=stored)
        tl.store(first + tokens.to(tl.int64) * N + target, up, mask=stored)


@triton.jit
def _activated(sums, at, inside, tokens, limit, N: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """swiglu_step of gate and up at offsets `at` of [T, N], their parts added first to last."""
    half = tokens.to(tl.int64) * N
    gate = tl.load(sums + at, mask=inside, other=0.0)
    up = tl.load(sums + half + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        gate += tl.load(sums + 2 * part * half + at, mask=inside, other=0.0)
        up += tl.load(sums + (2 * part + 1) * half + at, mask=inside, other=0.0)
    return swiglu_step(gate, up, limit)


@triton.jit(do_not_specialize=["tokens"])
def shared_down_kernel(
    source,
    w2,
    w2_scale,
    out,
    tokens,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [SPLITS, T, K] = w2 @ the intermediate over parts of N; `source` as gate-up left it."""
    split = tl.program_id(2)
    token = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = token < tokens
    channels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    SLICE: tl.constexpr = N // SPLITS
    PACK: tl.constexpr = 4 if WORDS else 1
    held = tl.minimum(channels, K - 1)
    weight_rows = w2 + held * (N // PACK) + split * (SLICE // PACK)
    rows = token.to(tl.int64) * N + split * SLICE
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    if PARTS == 1:
        acc = sum_over_columns(weight_rows, source + rows, valid, acc, SLICE, BLOCK_K, WORDS)
    else:
        k = tl.arange(0, BLOCK_K)
        for step in range(0, tl.cdiv(SLICE, BLOCK_K)):
            w = weight_tile(weight_rows, step, SLICE, BLOCK_N, BLOCK_K, WORDS)
            column = (step * BLOCK_K + k)[None, :]
            if SLICE % BLOCK_K == 0:
                inside = valid[:, None]
            else:
                inside = valid[:, None] & (column < SLICE)
            at = rows[:, None] + column
            h = _activated(source, at, inside, tokens, limit, N, PARTS)
            acc = tl.dot(w, tl.trans(h.to(tl.bfloat16)), acc)
    if WORDS:
        acc *= tl.load(w2_scale + held)[:, None]
    target = (split * tokens.to(tl.int64) + token)[None, :] * K + channels[:, None]
    stored = valid[None, :] & (channels < K)[:, None]
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=stored)


def prepare(weight: Tensor | FP8BlockTensor) -> Tensor | FP8Words:
    """One of the two matrices as the kernels read it: BF16 as it is, FP8 laid out anew.

    Raises:
        ValueError: FP8 weights that `FP8Words.pack` refuses.
    """
    return FP8Words.pack(weight) if isinstance(weight, FP8BlockTensor) else weight


def shared_expert(
    hidden: Tensor,
    w13: Tensor | FP8Words,
    w2: Tensor | FP8Words,
    limit: float | None,
    tiles: SharedTiles | None = None,
) -> Tensor:
    """down(swiglu_step(gate(x), up(x))) of every token, as parts that are still to be added.

    Products are exact, sums in fp32; the intermediate is rounded to bf16. Deterministic: the parts
    are added in a fixed order.

    Args:
        hidden: bf16 [T, K]; K and N are multiples of 16.
        w13: [2N, K], the gate's rows above the up projection's; bf16, or FP8 as `prepare` returns.
        w2: [K, N], in the same format.
        limit: the shared expert's own clamp of `swiglu_step`; None or 0 is none.
        tiles: None takes those of `tiles.shared` or `tiles.shared_fp8`.

    Returns:
        [S, T, K]; the result is the sum over S. fp32 where S is more than 1; bf16, the sum rounded
        once, where S is 1: there are many tokens, and memory is what they cost.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    require("hidden", hidden, (None, None), _BF16, contiguous=True)
    tokens, size = hidden.shape
    (up_rows, up_scale), (down_rows, down_scale) = (
        _of(n, w) for n, w in (("w13", w13), ("w2", w2))
    )
    if w13.shape[1] != size:
        raise ValueError(f"w13 has shape {list(w13.shape)}, expected [any, {size}]")
    if w13.shape[0] % 2:
        raise ValueError(f"w13 has {w13.shape[0]} rows, expected an even number (gate above up)")
    channels = w13.shape[0] // 2
    if w2.shape != (size, channels):
        raise ValueError(f"w2 has shape {list(w2.shape)}, expected {[size, channels]}")
    words = isinstance(w13, FP8Words)
    if isinstance(w2, FP8Words) != words:
        raise ValueError("w13 and w2 are in different formats, expected both BF16 or both FP8")
    check_sizes(size, channels)
    check_device("w13", up_rows, hidden.device)
    check_device("w2", down_rows, hidden.device)
    clamp = check_limit(limit)
    chosen = tiles or shared_tiles(tokens, w13, arch_of(hidden))
    if chosen.parts == 1:
        between = hidden.new_empty((tokens, channels))
    else:
        between = hidden.new_empty((chosen.parts, 2, tokens, channels), dtype=torch.float32)
    kind = torch.bfloat16 if chosen.splits == 1 else torch.float32
    out = hidden.new_empty((chosen.splits, tokens, size), dtype=kind)
    options = {
        "N": channels, "K": size, "PARTS": chosen.parts, "WORDS": words
    }  # fmt: skip
    launch(
        shared_gate_up_kernel,
        _grid(2 * channels, tokens, chosen.parts, chosen.gate_up),
        hidden, up_rows, up_scale, between, tokens, clamp,
        **options, **tile_options(chosen.gate_up),
    )  # fmt: skip
    launch(
        shared_down_kernel,
        _grid(size, tokens, chosen.splits, chosen.down),
        between, down_rows, down_scale, out, tokens, clamp,
        **options, SPLITS=chosen.splits, **tile_options(chosen.down),
    )  # fmt: skip
    return out


def shared_tiles(tokens: int, w13: Tensor | FP8Words, arch: int) -> SharedTiles:
    """The tiles for so many tokens and a w13 `[2N, K]` as `shared_expert` takes it."""
    rows, size = w13.shape
    choose = shared_fp8 if isinstance(w13, FP8Words) else shared
    return choose(tokens, rows // 2, size, arch)


def _of(name: str, weight: Tensor | FP8Words) -> tuple[Tensor, Tensor | None]:
    """What a kernel is given of a matrix: its elements or words, and its scales."""
    if isinstance(weight, FP8Words):
        return weight.words, weight.scale
    require(name, weight, (None, None), _BF16, contiguous=True)
    return weight, None


def _grid(rows: int, tokens: int, parts: int, tile: GemmTile) -> tuple[int, int, int]:
    return ceil_div(rows, tile.block_n), ceil_div(tokens, tile.block_rows), parts
