"""e4m3 weights to bf16 in registers, four at a time, without the slow conversion instructions.

A byte's sign goes to bf16's, its four exponent bits to the low end of bf16's eight and its three
mantissa bits to the top of bf16's seven; a multiplication by 2^120, the difference of the biases,
makes the number right. It is exact, and subnormals come out normal. The codes 0x7f and 0xff, e4m3's
NaN, come out as 480 and -480: a checkpoint that holds one has to be refused before.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from step37_kernels import interpret

# Bytes b0 b1 b2 b3 of a word become the pairs (b0, b1) and (b2, b3). 0x7b80 is bf16 2^120, 0x8000
# is -0: a product alone (mul.bf16x2) needs sm_90, adding nothing to it only sm_80.
WIDEN = tl.constexpr("""{
.reg .b32 low, high, sign, factor, nothing;
mov.b32 factor, 0x7b807b80;
mov.b32 nothing, 0x80008000;
prmt.b32 low, $4, 0, 0x1404;
prmt.b32 high, $4, 0, 0x3424;
and.b32 sign, low, 0x80008000;
shr.u32 low, low, 4;
lop3.b32 low, low, 0x07f007f0, sign, 0xea;
fma.rn.bf16x2 low, low, factor, nothing;
mov.b32 {$0, $1}, low;
and.b32 sign, high, 0x80008000;
shr.u32 high, high, 4;
lop3.b32 high, high, 0x07f007f0, sign, 0xea;
fma.rn.bf16x2 high, high, factor, nothing;
mov.b32 {$2, $3}, high;
}""")


@interpret.assembly(WIDEN.value)
def _widen(words: np.ndarray) -> tuple[np.ndarray, ...]:
    """The assembly above step by step, on 16-bit halves."""
    import ml_dtypes

    def half(byte: int) -> np.ndarray:
        shifted = ((words.view(np.uint32) >> (8 * byte)) & 0xFF).astype(np.uint16) << 8
        placed = ((shifted >> 4) & 0x07F0) | (shifted & 0x8000)
        number = placed.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
        return (number * np.float32(2.0**120)).astype(ml_dtypes.bfloat16)

    return tuple(half(byte) for byte in range(4))


@triton.jit
def widen(words, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 words [BLOCK_N, BLOCK_K // 4] to bf16 [BLOCK_N, BLOCK_K] in `word_column` order.

    A matrix instruction takes 16 columns, of which a lane holds 2t, 2t + 1, 2t + 8 and 2t + 9; they
    are given the four of word t, so that a lane loads one whole word and moves nothing.
    """
    b0, b1, b2, b3 = tl.inline_asm_elementwise(
        WIDEN,
        "=h,=h,=h,=h,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=1,
    )
    bytes = tl.join(tl.join(b0, b2), tl.join(b1, b3))  # the last two dimensions: pair, in the pair
    bytes = tl.reshape(bytes, (BLOCK_N, BLOCK_K // 16, 4, 2, 2))
    return tl.reshape(tl.permute(bytes, (0, 1, 3, 2, 4)), (BLOCK_N, BLOCK_K))


@triton.jit
def weight_tile(
    rows,
    step,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
):
    """bf16 [BLOCK_N, BLOCK_K] of the columns from step * BLOCK_K on, zeros from column SIZE on.

    rows [BLOCK_N] point at column 0 of bf16, or with WORDS at int32 words of `formats.fp8_words`,
    which `widen` brings into the order of their columns.
    """
    PACK: tl.constexpr = 4 if WORDS else 1
    at = step * (BLOCK_K // PACK) + tl.arange(0, BLOCK_K // PACK)
    if SIZE % BLOCK_K == 0:
        w = tl.load(rows[:, None] + at[None, :])
    else:
        w = tl.load(rows[:, None] + at[None, :], mask=(at < SIZE // PACK)[None, :], other=0)
    if WORDS:
        w = widen(w, BLOCK_N, BLOCK_K)
    return w


@triton.jit
def word_column(position):
    """Which column of the weights stands at a position of what `widen` returns; both from 0."""
    in_word = position // 8 % 2 * 2 + position % 2
    return position // 16 * 16 + position // 2 % 4 * 4 + in_word


def word_order(size: int) -> torch.Tensor:
    """`word_column` of positions 0 .. size - 1, int64: x[:, word_order(K)] is x in that order.

    Args:
        size: number of columns, a multiple of 16.

    Raises:
        ValueError: it is not.
    """
    if size % 16:
        raise ValueError(f"size is {size}, expected a multiple of 16")
    columns = torch.arange(size).view(-1, 4, 2, 2)  # word, pair, in the pair
    return columns.transpose(1, 2).reshape(-1)
