"""The shared expert: every token's, in at most two launches and one for each product.

For few tokens one expert's weights are too few tiles for all SMs, so both sums are split: gate-up
over K, whose parts its last program adds (`split_k`); down over N, whose fp32 parts whoever sums
the experts adds. For many tokens nothing is split.

Weights are BF16, or FP8 with a scale per row, which becomes bf16 in registers (`e4m3_words`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.arch import arch_of
from step37_kernels.checks import ceil_div, require
from step37_kernels.experts.epilogue import store_activated
from step37_kernels.experts.gemm_arguments import (
    check_device,
    check_limit,
    check_sizes,
    new_parts,
    tile_options,
)
from step37_kernels.experts.grouped_bf16 import sum_over_columns
from step37_kernels.experts.rows import gate_up_rows, split_gate_up
from step37_kernels.experts.split_k import MOST_TILES, counters, sum_of_tile
from step37_kernels.experts.tiles import GemmTile, shared, shared_fp8
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
    parts,
    arrived,
    tokens,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [T, N] = swiglu_step(w13 @ x), in bf16."""
    token = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = token < tokens
    channels, half, channel = gate_up_rows(tl.program_id(0), N, BLOCK_N)
    SLICE: tl.constexpr = K // SPLITS
    PACK: tl.constexpr = 4 if WORDS else 1
    first = tl.program_id(2) * SLICE
    weight_rows = w13 + (half * N + channel) * (K // PACK) + first // PACK
    token_rows = x + token.to(tl.int64) * K + first
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_columns(weight_rows, token_rows, valid, acc, SLICE, BLOCK_K, WORDS)
    if SPLITS > 1:
        acc, last = sum_of_tile(acc, parts, arrived, valid, SPLITS)
        if not last:
            return
    if WORDS:
        acc *= tl.load(w13_scale + half * N + channel)[:, None]
    gate, up = split_gate_up(acc, BLOCK_N, BLOCK_ROWS)
    store_activated(gate, up, limit, out, tl.where(valid, token, -1), channels, N)


@triton.jit(do_not_specialize=["tokens"])
def shared_down_kernel(
    intermediate,
    w2,
    w2_scale,
    out,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [SPLITS, T, K] = w2 @ the intermediate, over parts of N."""
    split = tl.program_id(2)
    token = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = token < tokens
    channels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    SLICE: tl.constexpr = N // SPLITS
    PACK: tl.constexpr = 4 if WORDS else 1
    held = tl.minimum(channels, K - 1)
    weight_rows = w2 + held * (N // PACK) + split * (SLICE // PACK)
    token_rows = intermediate + token.to(tl.int64) * N + split * SLICE
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_columns(weight_rows, token_rows, valid, acc, SLICE, BLOCK_K, WORDS)
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
    tiles: tuple[GemmTile, GemmTile] | None = None,
) -> Tensor:
    """down(swiglu_step(gate(x), up(x))) of every token, as parts that are still to be added.

    Products are exact, sums in fp32; the intermediate is rounded to bf16. Deterministic: parts are
    added in a fixed order. Calls on one device may not overlap: they count at the same places.

    Args:
        hidden: bf16 [T, K]; K and N are multiples of 16.
        w13: [2N, K], the gate's rows above the up projection's; bf16, or FP8 as `prepare` returns.
        w2: [K, N], in the same format.
        limit: the shared expert's own clamp of `swiglu_step`; None or 0 is none.
        tiles: of gate-up and of down; None takes those of `tiles.shared` or `tiles.shared_fp8`.

    Returns:
        [S, T, K]; the result is the sum over S. fp32 where S is more than 1; bf16, the sum rounded
        once, where S is 1: there are many tokens, and memory is what they cost.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or parts are not whole steps.
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
    up, down = tiles or shared_tiles(tokens, w13, arch_of(hidden))
    grid = _grid(2 * channels, tokens, up)
    if up.splits > 1 and (grid[0] * grid[1] > MOST_TILES or size % (up.splits * up.block_k)):
        raise ValueError(
            f"gate-up's splits are {up.splits}, expected 1 for {grid[0] * grid[1]} tiles (at most "
            f"{MOST_TILES}) and {size} columns in steps of {up.block_k}"
        )
    if down.splits > 1 and channels % (down.splits * down.block_k):
        raise ValueError(
            f"down's splits are {down.splits}, expected a divisor of {channels} columns in steps "
            f"of {down.block_k}"
        )
    intermediate = hidden.new_empty((tokens, channels))
    parts = intermediate if up.splits == 1 else new_parts(up, grid[0] * grid[1], hidden)
    launch(
        shared_gate_up_kernel, grid,
        hidden, up_rows, up_scale, intermediate, parts, counters(hidden.device), tokens, clamp,
        N=channels, K=size, SPLITS=up.splits, WORDS=words, **tile_options(up),
    )  # fmt: skip
    kind = torch.bfloat16 if down.splits == 1 else torch.float32
    out = hidden.new_empty((down.splits, tokens, size), dtype=kind)
    launch(
        shared_down_kernel, _grid(size, tokens, down),
        intermediate, down_rows, down_scale, out, tokens,
        N=channels, K=size, SPLITS=down.splits, WORDS=words, **tile_options(down),
    )  # fmt: skip
    return out


def shared_tiles(tokens: int, w13: Tensor | FP8Words, arch: int) -> tuple[GemmTile, GemmTile]:
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


def _grid(rows: int, tokens: int, tile: GemmTile) -> tuple[int, int, int]:
    return ceil_div(rows, tile.block_n), ceil_div(tokens, tile.block_rows), tile.splits
