"""How a gate-up tile lays gate and up beside each other, so that its epilogue moves no data."""

import triton
import triton.language as tl

# A warp's accumulator of an m64 matrix instruction holds rows r and r + 8 in one thread.
STRIP = tl.constexpr(8)


@triton.jit
def gate_up_rows(tile_index, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile's channels [BLOCK_N // 2] and its rows of w13 [BLOCK_N]: 8 of gate, 8 of up, ...

    Rows past the last channel repeat it: their loads are harmless and their results not stored.
    """
    r = tl.arange(0, BLOCK_N)
    half = (r // STRIP) % 2
    channel = tile_index * (BLOCK_N // 2) + r // (2 * STRIP) * STRIP + r % STRIP
    if N % (BLOCK_N // 2) != 0:
        channel = tl.minimum(channel, N - 1)
    channels = tile_index * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    return channels, half, channel


@triton.jit
def split_gate_up(acc, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """gate and up, [BLOCK_N // 2, BLOCK_ROWS] each, of an accumulator in `gate_up_rows` order."""
    strips = tl.reshape(acc, (BLOCK_N // (2 * STRIP), 2, STRIP, BLOCK_ROWS))
    gate, up = tl.split(tl.permute(strips, (0, 2, 3, 1)))
    shape: tl.constexpr = (BLOCK_N // 2, BLOCK_ROWS)
    return tl.reshape(gate, shape), tl.reshape(up, shape)
