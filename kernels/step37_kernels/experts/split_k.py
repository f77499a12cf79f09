"""Sums that several programs share: each writes its part, the one that is last adds them all.

A grid of few tiles leaves SMs idle and draws too little of the memory's bandwidth, so K is cut. The
parts are added in their order by whichever program finds that all are there: the same bits every
time, and no second launch that waits for the first.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TILES = 1024
"""Counters of a device."""


@cache
def counters(device: torch.device) -> Tensor:
    """int32 [MOST_TILES], zeros between launches, for kernels that have none of their own."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


@triton.jit
def is_last(parts, at, stored, size, split, acc, counter, SPLITS: tl.constexpr):
    """Write part `split` of a tile; whether all of its parts are there now.

    parts + split * size + at is where acc goes, the shape of both and of the mask `stored`.
    `counter` is the tile's own and zero before the first part comes.
    """
    tl.store(parts + split * size + at, acc, mask=stored)
    tl.debug_barrier()  # the count speaks for every thread's part
    return tl.atomic_add(counter, 1) == SPLITS - 1


@triton.jit
def added(parts, at, stored, size, counter, SPLITS: tl.constexpr):
    """The sum of a tile's parts, for the program that was last; the counter is zero after it."""
    total = tl.zeros(at.shape, tl.float32)
    for part in tl.static_range(SPLITS):
        # Not from L1, which does not see what other SMs have written.
        total += tl.load(parts + part * size + at, mask=stored, other=0.0, cache_modifier=".cg")
    tl.store(counter, 0)
    return total


@triton.jit
def sum_of_tile(acc, parts, arrived, valid, SPLITS: tl.constexpr):
    """A grouped GEMM's tile [BLOCK_N, BLOCK_ROWS], and whether this program has all of it.

    parts [blocks * tiles, SPLITS, BLOCK_ROWS, BLOCK_N]; `valid` [BLOCK_ROWS] are the rows that
    count. Program (tile, block, split) has summed its part of K in acc.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    size: tl.constexpr = acc.shape[0] * acc.shape[1]
    number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    # The 8 neighbouring rows that a warp holds are a sector of memory.
    row, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, acc.shape[1])[None, :]
    at = number * (SPLITS * size) + column * BLOCK_N + row
    stored = valid[None, :]
    counter = arrived + number
    last = is_last(parts, at, stored, size, tl.program_id(2), acc, counter, SPLITS)
    if last:
        acc = added(parts, at, stored, size, counter, SPLITS)
    return acc, last
