"""How the FP8 linear layers are cut into programs: plain Python, with its reasons."""

from __future__ import annotations

from dataclasses import replace

from step37_kernels.checks import ceil_div
from step37_kernels.experts.tiles import GemmTile, sm_count, warpgroup_products

FUSED_TOKENS = 1024
"""Up to so many tokens the weights are expanded in registers, above it once into memory.

Written and read again in bf16 a weight costs 4 bytes beside its own, on an H100 the time of its
products with 400 tokens (3.35 TB/s, and 700 TFLOP/s reached by torch). The kernel expands the
weights anew for each 128 tokens; if it reaches 70% of that rate, 1000 tokens are even: unmeasured.
"""

MOST_SPLITS = 16
"""The last program of a tile reads all parts, one after the other."""


def linear(tokens: int, rows: int, columns: int, arch: int) -> GemmTile:
    """The tile of a linear layer whose weights are expanded in registers.

    Its splits of K need all tokens in one of its blocks.

    Args:
        tokens: T.
        rows, columns: N and K of this rank's weights.
        arch: 90 for sm_90 and so on.
    """
    sms = sm_count(arch)
    block_rows = next((r for r in (16, 32, 64) if tokens <= r), 128)
    if not warpgroup_products(arch):
        # Expanded weights pass through registers to mma, and 99 KB of shared memory are all.
        block_rows = min(block_rows, 64)
    blocks = ceil_div(max(tokens, 1), block_rows)
    # One warp of a program for each scheduler leaves slots unused while it waits: three programs
    # for two SMs where there is little to multiply, else nearly one for each.
    wanted = 3 * sms // 2 if block_rows == 16 else 7 * sms // 8
    found: list[tuple[int, GemmTile]] = []
    for block_n in (128, 64):  # 128 rows share a tile of tokens, and take fewer instructions
        tile = _tile(block_rows, block_n, columns, arch)
        programs = ceil_div(rows, tile.block_n) * blocks
        for splits in _splits(tokens, columns, tile) if blocks == 1 else [1]:
            if programs * splits >= wanted:
                return replace(tile, splits=splits)
            found.append((programs * splits, replace(tile, splits=splits)))
    return max(found, key=lambda one: one[0])[1]


def _tile(block_rows: int, block_n: int, columns: int, arch: int) -> GemmTile:
    if not warpgroup_products(arch):
        return GemmTile(block_rows, 64, 64, num_warps=4, num_stages=3)
    block_k = 128 if columns % 128 == 0 and block_rows < 128 else 64
    if block_rows == 128:
        # Two programs an SM: one expands while the other multiplies.
        return GemmTile(128, block_n, block_k, 8 if block_n == 128 else 4, num_stages=4)
    # stages - 2 tiles of weights are on their way in each of two or three programs an SM.
    stages = 4 if block_n * block_k == 2**14 or block_rows == 64 else 6
    return GemmTile(block_rows, block_n, block_k, num_warps=4, num_stages=stages)


def _splits(tokens: int, columns: int, tile: GemmTile) -> list[int]:
    """Into how many parts of whole steps K may be cut, the fewest first.

    A part is written and read again in fp32, in L2: 8 * T * N bytes of each, together at most a
    quarter of the N * K bytes of the weights. A program has two steps at the least: of a single one
    the compiler makes loads that wait in registers.
    """
    steps, rest = divmod(columns, tile.block_k)
    most = 1 if rest else min(columns // (32 * max(tokens, 1)), steps // 2, MOST_SPLITS)
    return [s for s in range(1, max(most, 1) + 1) if s == 1 or steps % s == 0]
