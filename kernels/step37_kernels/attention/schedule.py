"""How decode's key blocks are shared out: by work and not by sequence, from lengths on the device.

Per KV head the key blocks of all sequences form one list, sequence after sequence, and each of
`workers` programs takes an equal run of it. Where a run crosses from one sequence to the next the
program writes one piece for each; the piece of worker w and sequence b has number w + b. Along the
list every next piece has a larger w or a larger b, so no number is used twice, and there are at
most workers + batch - 1 of them: `most_pieces`, which depends on shapes alone.
"""

import triton
import triton.language as tl


def most_pieces(workers: int, batch: int) -> int:
    """Pieces that a KV head's workspace has to hold, whatever the lengths are."""
    return workers + batch - 1


def most_blocks(batch: int, max_len: int, queries: int, window: int | None, block: int) -> int:
    """The most key blocks that a batch of sequences of up to `max_len` keys can have.

    The keys that a window leaves, `window + queries - 1`, need not begin at a block's begin.
    """
    keys = max_len if window is None else min(max_len, window + queries + block - 2)
    return batch * -(-keys // block)


@triton.jit
def span(seq_len, max_len, QUERIES: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Of each sequence: its length, the first key that a query sees, the first block, the blocks.

    A length that the page table cannot hold is cut to it, so that nothing outside is read.
    """
    length = tl.minimum(tl.maximum(seq_len.to(tl.int32), 0), max_len)
    first_key = length * 0
    if WINDOW > 0:
        first_key = tl.maximum(length - (QUERIES + WINDOW - 1), 0)
    first_block = first_key // BLOCK
    return length, first_key, first_block, (length + BLOCK - 1) // BLOCK - first_block


@triton.jit
def block_list(
    seq_lens, batch, max_len, workers,
    BATCH: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each sequence's run ends in the list of key blocks, its blocks, and a worker's share.

    Returns:
        ends and blocks, int32 [BATCH] (a power of two from `batch`), and the share, a scalar.
    """
    index = tl.arange(0, BATCH)
    seq_len = tl.load(seq_lens + index, mask=index < batch, other=0)
    _, _, _, blocks = span(seq_len, max_len, QUERIES, WINDOW, BLOCK)
    total = tl.sum(blocks, 0)
    return tl.cumsum(blocks, 0), blocks, (total + workers - 1) // workers
