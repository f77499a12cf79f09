"""The tile policy and the schedule's bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from step37_kernels.attention.pages import MAX_BATCH
from step37_kernels.attention.schedule import block_list, most_blocks, most_pieces
from step37_kernels.attention.tiles import batch_block, decode_tile, decode_workers
from step37_kernels.launch import launch

CACHES = (torch.bfloat16, torch.float8_e4m3fn)


@triton.jit
def _list_kernel(
    seq_lens, out, batch, max_len, workers,
    BATCH: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ends, blocks, share = block_list(
        seq_lens, batch, max_len, workers, BATCH, QUERIES, WINDOW, BLOCK
    )
    index = tl.arange(0, BATCH)
    tl.store(out + index, ends)
    tl.store(out + BATCH + index, blocks)
    tl.store(out + 2 * BATCH, share)


@pytest.mark.parametrize(("window", "queries"), [(None, 1), (512, 1), (512, 8), (5, 4)])
def test_the_list_holds_every_block_that_a_query_sees(device, window, queries) -> None:
    lengths = [0, 1, 63, 64, 65, 511, 512, 513, 575, 576, 577, 4097, 2**31 - 1, -3]
    block, longest, workers = 64, 8192, 7
    out = torch.zeros(33, dtype=torch.int32, device=device)
    launch(
        _list_kernel, (1,), torch.tensor(lengths, device=device), out, len(lengths), longest,
        workers, BATCH=16, QUERIES=queries, WINDOW=window or 0, BLOCK=block,
    )  # fmt: skip
    expected = []
    for length in lengths:
        length = min(max(length, 0), longest)
        first = 0 if window is None else max(0, length - queries - window + 1)
        expected.append(len({key // block for key in range(first, length)}))
    ends, blocks, share = out[:16].tolist(), out[16:32].tolist(), int(out[32])
    assert blocks[: len(lengths)] == expected and blocks[len(lengths) :] == [0, 0]
    assert ends == list(itertools.accumulate(blocks))
    assert share == -(-sum(expected) // workers)
    assert max(expected) <= most_blocks(1, longest, queries, window, block)


def test_a_batch_has_one_of_few_sizes() -> None:
    sizes = [batch_block(batch) for batch in range(1, MAX_BATCH + 1)]
    assert all(size >= batch for batch, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [64, 512]


def test_no_lengths_need_more_blocks_than_the_most() -> None:
    for window, queries, block in itertools.product((1, 5, 64, 512), (1, 8), (32, 64)):
        needed = max(
            len({key // block for key in range(max(0, n - queries - window + 1), n)})
            for n in range(2048)
        )
        assert needed == most_blocks(1, 2047, queries, window, block)


def test_pieces_have_numbers_of_their_own_below_the_most() -> None:
    for workers, counts in (
        (1, [3, 0, 2]), (4, [1, 1, 1, 1, 1]), (5, [0, 9, 0, 0, 1]), (7, [2] * 9), (3, [0, 0]),
    ):  # fmt: skip
        of_block = [b for b, count in enumerate(counts) for _ in range(count)]
        share = -(-len(of_block) // workers)
        pieces = {(at // share, b) for at, b in enumerate(of_block)}
        numbers = {worker + b for worker, b in pieces}
        assert len(numbers) == len(pieces)
        assert max(numbers, default=0) < most_pieces(workers, len(counts))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", [1, 8, 9, 12, 16, 24, 96])
def test_tiles_hold_the_rows_and_fit(cache, rows) -> None:
    tile = decode_tile(cache, rows)
    assert tile.rows in (8, 16) and (tile.rows >= rows or tile.rows == 16)
    assert tile.resident * tile.num_warps * 32 * tile.registers <= 65536
    buffers = (tile.num_stages - 1) * 2 * tile.block * 128 * cache.itemsize
    assert tile.resident * buffers <= 227 * 1024


def test_workers_fill_the_gpu_once_and_no_further_than_blocks() -> None:
    tile = decode_tile(torch.float8_e4m3fn, 12)

    def workers(rows: int, kv_heads: int, batch: int, length: int, window: int | None) -> int:
        return decode_workers(tile, rows, kv_heads, 132, batch, length, 1, window)

    assert workers(12, 8, 64, 262144, None) == 4 * 132 // 8
    assert workers(12, 1, 64, 262144, None) == 4 * 132
    assert workers(96, 8, 64, 262144, None) == 4 * 132 // (8 * 6)
    assert workers(12, 1, 1, 1024, None) == 16
    assert workers(12, 1, 1, 262144, 512) == 9
    assert workers(12, 1024, 1, 262144, None) == 1
