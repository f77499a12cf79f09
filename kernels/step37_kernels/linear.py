"""Linear layers whose weights are FP8 with a scale per row, and whose activations stay BF16.

Few tokens are bound by the bytes of the weights, so that one kernel expands e4m3 to bf16 in
registers, exactly (`experts.e4m3_words`). Where N has too few tiles for all SMs, K is split
(`experts.split_k`). For many tokens, which are bound by products, the weights are expanded to
memory once, again exactly, and multiplied by torch's own GEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.arch import arch_of
from step37_kernels.checks import ceil_div, require
from step37_kernels.experts.e4m3_words import weight_tile
from step37_kernels.experts.gemm_arguments import check_device, tile_options
from step37_kernels.experts.grouped_bf16 import sum_over_columns
from step37_kernels.experts.split_k import added, is_last
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.launch import launch
from step37_kernels.linear_tiles import FUSED_TOKENS
from step37_kernels.linear_tiles import linear as choose_tile

WIDENED_ROWS, WIDENED_COLUMNS = 32, 256


@triton.jit(do_not_specialize=["tokens"])
def linear_fp8_kernel(
    x,
    words,
    scale,
    out,
    parts,
    arrived,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [T, N] = x @ weights^T, at once or as the sum of its parts [SPLITS, T, N] over K."""
    # Blocks of tokens side by side: they find the weights in L2.
    token = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    held = row if N % BLOCK_N == 0 else tl.minimum(row, N - 1)
    valid = token < tokens
    SLICE: tl.constexpr = K // SPLITS
    weight_rows = words + held * (K // 4) + split * (SLICE // 4)
    token_rows = x + token.to(tl.int64) * K + split * SLICE
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc = sum_over_columns(weight_rows, token_rows, valid, acc, SLICE, BLOCK_K, True)
    acc *= tl.load(scale + held)[:, None]
    at = token.to(tl.int64)[None, :] * N + row[:, None]
    stored = valid[None, :] & (row < N)[:, None]
    if SPLITS == 1:
        tl.store(out + at, acc.to(tl.bfloat16), mask=stored)
    else:
        size = tokens.to(tl.int64) * N
        if is_last(parts, at, stored, size, split, acc, arrived + tile, SPLITS):
            total = added(parts, at, stored, size, arrived + tile, SPLITS)
            tl.store(out + at, total.to(tl.bfloat16), mask=stored)


@triton.jit
def widen_fp8_kernel(
    words,
    scale,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [N, K] = the weights in bf16."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    held = tl.minimum(row, N - 1)
    w = weight_tile(words + held * (K // 4), step, K, BLOCK_N, BLOCK_K, True)
    w = w.to(tl.float32) * tl.load(scale + held)[:, None]
    column = step * BLOCK_K + tl.arange(0, BLOCK_K)
    stored = (row < N)[:, None] & (column < K)[None, :]
    target = out + row.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(target, w.to(tl.bfloat16), mask=stored)


def linear(x: Tensor, weight: FP8Words, tile: GemmTile | None = None) -> Tensor:
    """x @ weight^T with BF16 products and sums in fp32.

    One launch up to `linear_tiles.FUSED_TOKENS` tokens; above that one that expands the weights to
    bf16, N * K * 2 bytes for the time of the call, and torch's GEMM. Nothing is read on the host.
    Deterministic; a token's bits depend on the others only through their number.

    Args:
        x: bf16 [T, K], contiguous; T may be 0.
        weight: [N, K], K a multiple of 16. Calls with the same weight may not overlap.
        tile: None takes that of `linear_tiles.linear`; given, it serves any number of tokens.

    Returns:
        bf16 [T, N]; every product is exact, the scaled sum is rounded once.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or K is to be split with tokens
            in several blocks or into parts that are not whole steps.
    """
    require("x", x, (None, weight.shape[1]), (torch.bfloat16,), contiguous=True)
    check_device("weight", weight.words, x.device)
    tokens, (rows, columns) = x.shape[0], weight.shape
    tile = tile or linear_tile(tokens, rows, columns, arch_of(x))
    if tile is None:
        return x @ widened(weight).T
    splits = tile.splits
    if splits > 1 and (tokens > tile.block_rows or columns % (splits * tile.block_k)):
        raise ValueError(
            f"splits is {splits}, expected 1 for {tokens} tokens in blocks of {tile.block_rows} "
            f"and {columns} columns in steps of {tile.block_k}"
        )
    out = x.new_empty((tokens, rows))
    parts = out if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)
    launch(
        linear_fp8_kernel,
        (ceil_div(tokens, tile.block_rows), ceil_div(rows, tile.block_n), splits),
        x, weight.words, weight.scale, out, parts, weight.arrived, tokens,
        N=rows, K=columns, SPLITS=splits, **tile_options(tile),
    )  # fmt: skip
    return out


def linear_tile(tokens: int, rows: int, columns: int, arch: int) -> GemmTile | None:
    """The tile for so many tokens, None where the weights `[rows, columns]` are expanded first."""
    return None if tokens > FUSED_TOKENS else choose_tile(tokens, rows, columns, arch)


def widened(weight: FP8Words) -> Tensor:
    """The weights in bf16 [N, K], exactly; one launch."""
    rows, columns = weight.shape
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=weight.device)
    launch(
        widen_fp8_kernel,
        (ceil_div(rows, WIDENED_ROWS), ceil_div(columns, WIDENED_COLUMNS)),
        weight.words, weight.scale, out,
        N=rows, K=columns, BLOCK_N=WIDENED_ROWS, BLOCK_K=WIDENED_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
