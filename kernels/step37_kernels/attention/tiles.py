"""Which tile each attention kernel uses, and how many programs: plain Python, with its reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from step37_kernels.attention.pages import MAX_BATCH
from step37_kernels.attention.schedule import most_blocks
from step37_kernels.checks import ceil_div

REGISTERS_PER_SM = 65536
FEW_SEQUENCES = 64
_H100_MULTIPROCESSORS = 132  # stands in where there is no GPU


@dataclass(frozen=True)
class DecodeTile:
    """The tile of the split kernel.

    Keys are the left operand of both products, so that query rows are the matrix instruction's N.

    Args:
        rows: query rows (queries x heads of a group) of a program, padded.
        block: keys in one trip of the loop.
        resident: programs that fit on an SM, by registers and shared memory.
        num_warps, num_stages: as Triton takes them.
    """

    rows: int
    block: int
    resident: int
    num_warps: int
    num_stages: int

    @property
    def registers(self) -> int:
        """What a thread may use for `resident` programs to fit."""
        return min(255, REGISTERS_PER_SM // (self.resident * self.num_warps * 32) // 8 * 8)


def decode_tile(cache_type: torch.dtype, rows: int) -> DecodeTile:
    """The tile for `rows` query rows a KV head.

    A warp's matrix instruction (m16n8k16) takes 16 keys and 8 rows: a group of 8 fills it, a group
    of 12 three quarters of two, which costs little where memory is the limit. More rows take
    further programs over the same keys, read from L2: tiles of 32 rows spilled.

    Two warps need 2 to 3 instructions a byte of an e4m3 cache, four (with wgmma) 2.9 to 3.5: each
    warp shares its part of the softmax with fewer. 64 keys of e4m3 or 32 of bf16 are 16 KB of K and
    V; 4 stages make 3 buffers, and 4 programs an SM keep 128 KB on their way.
    """
    block = 64 if cache_type == torch.float8_e4m3fn else 32
    return DecodeTile(
        rows=8 if rows <= 8 else 16, block=block, resident=4, num_warps=2, num_stages=4
    )


def batch_block(batch: int) -> int:
    """Places for the numbers of a batch: few, or as many as there may be.

    Each is another compilation of every attention kernel. Two warps, the fewest of them, hold 64
    places in a register of each thread, and 512 in eight while the work is shared out.
    """
    return FEW_SEQUENCES if batch <= FEW_SEQUENCES else MAX_BATCH


def decode_workers(
    tile: DecodeTile,
    rows: int,
    kv_heads: int,
    multiprocessors: int,
    batch: int,
    max_len: int,
    queries: int,
    window: int | None,
) -> int:
    """Programs per KV head and row tile: what fits on the GPU at once, but no more than blocks."""
    at_once = tile.resident * multiprocessors // (kv_heads * ceil_div(rows, tile.rows))
    return max(1, min(at_once, most_blocks(batch, max_len, queries, window, tile.block)))


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; an H100's where there is none."""
    if device.type != "cuda":
        return _H100_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


PROLOGUE_ROWS = 32
"""Heads of a prologue program: 8 KB of q, k and v, 4 loads of 16 bytes a thread in flight."""

PAGE_TABLE_BLOCK = 512
"""Pages in one trip of a page table program: four a thread, whose loads are under way at once."""


def page_table_programs(pages: int, batch: int) -> int:
    """Programs that share one sequence's row of `pages`: 8 an SM for all, no more than blocks.

    They are as many as a row's full width can occupy, since lengths are not known on the host.
    """
    each = 8 * _H100_MULTIPROCESSORS // max(batch, 1)
    return max(1, min(each, ceil_div(pages, PAGE_TABLE_BLOCK)))


@dataclass(frozen=True)
class ExtendTile:
    """The tile of the extend kernel.

    Args:
        block_rows: (token, query head of a group) pairs, rows of both matrix products.
        block_keys: keys of one trip of the loop.
        num_warps, num_stages: as Triton takes them.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


def extend_tile(cache_type: torch.dtype, arch: int) -> ExtendTile:
    """The tile for a cache of this type.

    128 rows are two warpgroups of 64, each with the whole accumulator in registers; 256 rows and
    blocks of 128 keys spill. The page table between a key and its address halves the pipeline's
    depth: 5 stages keep two blocks of bf16 keys and values (64 KB) on their way while one is
    multiplied. e4m3 blocks are converted first and hold one buffer more, so they take 7 (32 KB).
    Architectures with 99 KB of shared memory hold one block at a time.
    """
    stages = 7 if cache_type == torch.float8_e4m3fn else 5
    if arch in (86, 89) or arch >= 120:
        stages = 3
    return ExtendTile(block_rows=128, block_keys=64, num_warps=8, num_stages=stages)


def most_extend_tiles(tile: ExtendTile, num_tokens: int, num_sequences: int, group: int) -> int:
    """The most tiles that any split of `num_tokens` into `num_sequences` sequences needs.

    A sequence has r rows, a multiple of the group, and where r > 0 needs at most
    (r + block_rows - gcd(group, block_rows)) / block_rows tiles.
    """
    active = min(num_tokens, num_sequences)
    spare = tile.block_rows - math.gcd(group, tile.block_rows)
    return (num_tokens * group + active * spare) // tile.block_rows
