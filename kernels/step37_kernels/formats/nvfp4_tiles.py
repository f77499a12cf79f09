"""NVFP4 experts laid out for the Hopper GEMMs: what a lane of the matrix unit reads is one word.

A matrix [R, K] is cut into slabs of 64 rows by 64 columns; a slab's 2 KB of elements and its 256
bytes of scales are each contiguous, so a tile of any size is a few long copies.

* Columns are permuted inside a slab (`permuted_column`) so that the 16 elements one lane of an m64
  matrix instruction holds of a row are one group: a lane needs one scale per slab. The other
  operand's columns have to be permuted alike. w13's rows are ordered so that gate-up writes the
  intermediate in the order that w2 reads.
* An int32 word holds a lane's 8 elements of 32 columns, their bits placed so that masks and shifts
  alone make four pairs of bf16 of them (`PAIR_BITS`).
* Block scales are re-encoded, exactly, as unsigned e5m3 (exponent bias 10, no subnormals), which
  one multiply-add turns into a pair of bf16. The sign of a scale moves into its elements' signs,
  and a zero scale into zero magnitudes, since e5m3 has neither.
* Rows of w13 alternate between 8 of gate and 8 of up, which one thread's accumulator holds.

An intermediate size that is no multiple of 64 is padded with zero weights: in w13 to 32 channels,
in w2 to 64, and gate-up writes zeros where w2 has columns that w13 has no rows for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.expert_weights import NVFP4Experts
from step37_kernels.formats.nvfp4 import GROUP_SIZE

SLAB = 64
"""Rows and columns of a slab."""

PAIR_BITS = (
    (6, 7, 8, 15),
    (12, 13, 14, 21),
    (2, 3, 4, 11),
    (0, 1, 10, 9),
)
"""For each pair of a word, where its first element's bits are: mantissa, exponent (2), sign.

The second element's are 16 further, modulo 32. Pair 0 is where bf16 has them; pair 1 comes there by
rotating right by 6, pair 2 by shifting left by 4, and pair 3 by shifting left by 6 but for its
upper exponent bit, which comes there by shifting right by 2.
"""

_STRIP = 8  # rows of gate, then as many of up
_BYTES_AT_A_TIME = 64 * 2**20


@triton.jit
def permuted_column(position):
    """The column of the unpermuted matrix that stands at `position`; also on torch tensors.

    Within a slab, position 32 S + 16 step + 8 h + 2 lane + j holds column 16 lane + 8 S + 4 step +
    2 h + j: lane, step, h and j say which of its registers a thread of the instruction's left
    operand (m64k16, 16-bit) reads it from.
    """
    at = position % 64
    within = at // 2 % 4 * 16 + at // 32 * 8 + at // 16 % 2 * 4 + at // 8 % 2 * 2 + at % 2
    return position // 64 * 64 + within


@triton.jit
def slab_offsets(row, word, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Offset in a matrix of COLUMNS columns of a row's `word`-th unit, WIDTH units to a slab row.

    WIDTH is 8 for words of elements and 4 for scales.
    """
    in_slab = row % 64 * WIDTH + word % WIDTH
    return (row // 64 * (COLUMNS // 64) + word // WIDTH) * (64 * WIDTH) + in_slab


@triton.jit
def permuted_column_fp8(position):
    """As `permuted_column`, for operands of 8 bits (m64k32): 4 columns stay together.

    Position 32 S + 16 step + 4 lane + q holds column 16 lane + 8 S + 4 step + q.
    """
    at = position % 64
    within = at // 4 % 4 * 16 + at // 32 * 8 + at // 16 % 2 * 4 + at % 4
    return position // 64 * 64 + within


@triton.jit
def position_fp8(position):
    """Where in `permuted_column_fp8`'s order the column at `position` of `permuted_column`'s is."""
    at = position % 16
    return position // 16 * 16 + at // 2 % 4 * 4 + at // 8 * 2 + at % 2


def hidden_permutation(hidden_size: int) -> Tensor:
    """Index [K] int64 on the CPU that puts hidden's columns in order: `hidden[:, index]`."""
    return permuted_column.fn(torch.arange(hidden_size))


def hidden_permutation_fp8(hidden_size: int) -> Tensor:
    """As `hidden_permutation`, for FP8 activations."""
    return permuted_column_fp8.fn(torch.arange(hidden_size))


@dataclass(frozen=True)
class NVFP4Tiles:
    """NVFP4 experts of one rank in the layout of this module.

    E experts, hidden size K, a multiple of 64; intermediate size N, a multiple of 16.

    Args:
        w13: int32 [E, 2 C / 64, K / 64, 64, 8], C = N rounded up to 32.
        w13_scale: uint8 [E, 2 C / 64, K / 64, 64, 4].
        w13_exponent: uint8 [E, 2 C], the exponent field of each row's largest scale code.
        w13_global_scale: fp32 [E, 2], gate then up.
        w2: int32 [E, K / 64, P / 64, 64, 8], P = N rounded up to 64.
        w2_scale: uint8 [E, K / 64, P / 64, 64, 4].
        w2_exponent: uint8 [E, K], as w13_exponent.
        w2_global_scale: fp32 [E].
        intermediate_size: N.

    Raises:
        ValueError: a shape or dtype does not fit.
    """

    format: ClassVar[str] = "nvfp4"
    w13: Tensor
    w13_scale: Tensor
    w13_exponent: Tensor
    w13_global_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    w2_exponent: Tensor
    w2_global_scale: Tensor
    intermediate_size: int

    def __post_init__(self) -> None:
        experts, rows, columns = self.num_experts, self.w13_rows // SLAB, self.hidden_size // SLAB
        padded = self.intermediate_padded // SLAB
        word, byte, fp32 = (torch.int32,), (torch.uint8,), (torch.float32,)
        require("w13", self.w13, (experts, rows, columns, SLAB, 8), word, contiguous=True)
        require("w13_scale", self.w13_scale, (experts, rows, columns, SLAB, 4), byte, True)
        require("w13_exponent", self.w13_exponent, (experts, self.w13_rows), byte, True)
        require("w13_global_scale", self.w13_global_scale, (experts, 2), fp32, True)
        require("w2", self.w2, (experts, columns, padded, SLAB, 8), word, True)
        require("w2_scale", self.w2_scale, (experts, columns, padded, SLAB, 4), byte, True)
        require("w2_exponent", self.w2_exponent, (experts, self.hidden_size), byte, True)
        require("w2_global_scale", self.w2_global_scale, (experts,), fp32, True)

    @property
    def num_experts(self) -> int:
        """Experts held by this rank, E."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """Hidden channels, K."""
        return self.w2.shape[1] * SLAB

    @property
    def w13_rows(self) -> int:
        """Rows of w13, gate and up, with those added to fill a slab."""
        return 2 * w13_channels(self.intermediate_size)

    @property
    def intermediate_padded(self) -> int:
        """Columns of w2 and of the intermediate."""
        return padded_intermediate(self.intermediate_size)

    @classmethod
    def pack(cls, weights: NVFP4Experts, reuse_memory: bool = False) -> NVFP4Tiles:
        """Lay `weights` out; a few experts at a time, so that little more than the result is held.

        Args:
            weights: on any device; the global scales are shared with the result.
            reuse_memory: write over w13 and w2 where the layout has as many bytes (N a multiple of
                32 for w13, of 64 for w2); `weights` must then not be used any more.

        Raises:
            ValueError: hidden size is no multiple of 64, or a block scale is NaN.
        """
        size, hidden = weights.intermediate_size, weights.hidden_size
        if hidden % SLAB:
            raise ValueError(f"hidden size is {hidden}, expected a multiple of {SLAB}")
        rows = _w13_source_rows(size).to(weights.w13.device)
        padding = padded_intermediate(size) - size
        w13 = _pack("w13", weights.w13, weights.w13_scale, rows, 0, reuse_memory)
        w2 = _pack("w2", weights.w2, weights.w2_scale, None, padding, reuse_memory)
        return cls(*w13, weights.w13_global_scale, *w2, weights.w2_global_scale, size)

    def unpack(self) -> NVFP4Experts:
        """The experts as in the checkpoint, equal to those packed when dequantised.

        Equal byte for byte but for what the layout does not keep: a negative scale comes back
        positive with its elements' signs flipped, a zero scale's elements as zeros.
        """
        rows = _w13_source_rows(self.intermediate_size)
        kept = (rows < 2 * self.intermediate_size).nonzero().flatten()
        position_of_row = kept[rows[kept].argsort()].to(self.w13.device)
        w13, w13_scale = _unpack(self.w13, self.w13_scale)
        w2, w2_scale = _unpack(self.w2, self.w2_scale)
        size = self.intermediate_size
        return NVFP4Experts(
            w13[:, position_of_row].contiguous(),
            w13_scale[:, position_of_row].contiguous().view(torch.float8_e4m3fn),
            self.w13_global_scale,
            w2[..., : size // 2].contiguous(),
            w2_scale[..., : size // GROUP_SIZE].contiguous().view(torch.float8_e4m3fn),
            self.w2_global_scale,
        )


def w13_channels(intermediate_size: int) -> int:
    """Channels that w13 has rows for: gate and up of 32 channels fill a slab."""
    return ceil_div(intermediate_size, SLAB // 2) * (SLAB // 2)


def padded_intermediate(intermediate_size: int) -> int:
    """Columns of the intermediate: whole slabs of w2."""
    return ceil_div(intermediate_size, SLAB) * SLAB


def _w13_source_rows(intermediate_size: int) -> Tensor:
    """For each row of w13 here its row in the checkpoint's [2N]; 2N for rows of zeros."""
    order = permuted_column.fn(torch.arange(padded_intermediate(intermediate_size)))
    channel = order[order < w13_channels(intermediate_size)].view(-1, 1, _STRIP)
    half = torch.arange(2).view(1, 2, 1)
    row = torch.where(
        channel < intermediate_size,
        channel + half * intermediate_size,
        torch.full_like(channel, 2 * intermediate_size),
    )
    return row.flatten()


def _pack(
    name: str, packed: Tensor, scale: Tensor, rows: Tensor | None, padding: int, reuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scale codes and row exponents of [E, R, K/2] bytes and [E, R, K/16] scales.

    Row r of the result is rows[r] (None: r), zeros where that is past the end; `padding` columns of
    zeros are added.
    """
    experts, source_rows, half = packed.shape
    num_rows, columns = source_rows if rows is None else len(rows), 2 * half + padding
    shape = (experts, num_rows // SLAB, columns // SLAB, SLAB)
    if reuse and num_rows == source_rows and not padding and packed.is_contiguous():
        words = packed.view(torch.int32).view(*shape, 8)
    else:
        words = packed.new_empty((*shape, 8), dtype=torch.int32)
    codes = packed.new_empty((*shape, 4))
    exponents = packed.new_empty((experts, num_rows))
    chunk = max(1, _BYTES_AT_A_TIME // (num_rows * columns))
    for first in range(0, experts, chunk):
        part = slice(first, first + chunk)
        _refuse_nan(name, scale[part], first)
        elements, factors = packed[part], scale[part].view(torch.uint8)
        if rows is not None:
            # The row of zeros past the end is the source of rows that the checkpoint lacks.
            elements = torch.nn.functional.pad(elements, (0, 0, 0, 1)).index_select(1, rows)
            factors = torch.nn.functional.pad(factors, (0, 0, 0, 1)).index_select(1, rows)
        elements = torch.nn.functional.pad(elements, (0, padding // 2))
        factors = torch.nn.functional.pad(factors, (0, padding // GROUP_SIZE))
        words[part], codes[part] = _encode(elements, factors)
        exponents[part] = codes[part].amax((2, 4)).flatten(1) >> 3
    return words, codes, exponents


def _refuse_nan(name: str, scale: Tensor, first_expert: int) -> None:
    faulty = (scale.view(torch.uint8) & 0x7F == 0x7F).flatten(1).any(1)
    if bool(faulty.any()):
        expert = first_expert + int(faulty.int().argmax())
        raise ValueError(f"{name}_scale of expert {expert} holds NaN, expected finite scales")


def _encode(elements: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Slabs of words and codes of bytes [e, R, K/2] and e4m3 bytes [e, R, K/16]."""
    experts, rows, half = elements.shape
    groups = elements.view(experts, rows, -1, GROUP_SIZE // 2)
    zero, negative = (scale & 0x7F == 0)[..., None], (scale >= 0x80)[..., None]
    signs = torch.where(negative, 0x88, 0x00).to(torch.uint8)
    kept = torch.where(zero, 0x88, 0xFF).to(torch.uint8)
    groups = (groups ^ signs) & kept
    # A group of 16 is a lane's; its bytes are (S, pair).
    slabs = groups.view(experts, rows // SLAB, SLAB, half // 32, 4, 2, 4)
    pairs = slabs.permute(0, 1, 3, 2, 5, 4, 6)
    tables = _pair_tables().to(elements.device)
    words = tables[0][pairs[..., 0].int()]
    for pair in range(1, 4):
        words |= tables[pair][pairs[..., pair].int()]
    codes = _code_of_scale().to(scale.device)[(scale & 0x7F).int()]
    codes = codes.view(experts, rows // SLAB, SLAB, half // 32, 4).transpose(2, 3)
    return words.flatten(-2), codes


def _unpack(words: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [E, R, K/2] and e4m3 bytes [E, R, K/16] of slabs."""
    experts, row_slabs, column_slabs = words.shape[:3]
    pairs = torch.stack([_pair_of_words(words, bits) for bits in PAIR_BITS], -1)
    pairs = pairs.view(experts, row_slabs, column_slabs, SLAB, 2, 4, 4).permute(0, 1, 3, 2, 5, 4, 6)
    scale = torch.zeros(256, dtype=torch.uint8)
    scale[_code_of_scale()[1:127].int()] = torch.arange(1, 127, dtype=torch.uint8)
    shape = (experts, row_slabs * SLAB, -1)
    return pairs.reshape(shape), scale.to(codes.device)[codes.transpose(2, 3).int()].reshape(shape)


def _pair_of_words(words: Tensor, bits: tuple[int, ...]) -> Tensor:
    """The byte that `_pair_tables` put into the words at `bits`, the first element low."""
    places = [(bit + 16 * j) % 32 for j in range(2) for bit in bits]
    byte = torch.zeros_like(words)
    for target, place in enumerate(places):
        byte |= (words >> place & 1) << target
    return byte.to(torch.uint8)


@cache
def _pair_tables() -> Tensor:
    """int32 [4, 256]: the bits of a byte (two elements, the first low) where pair i has them."""
    byte = torch.arange(256, dtype=torch.int64)
    tables = []
    for bits in PAIR_BITS:
        places = [(bit + 16 * j) % 32 for j in range(2) for bit in bits]
        tables.append(sum((byte >> source & 1) << place for source, place in enumerate(places)))
    return torch.stack([torch.as_tensor(t) for t in tables]).to(torch.int32)  # wraps at 2^31


@cache
def _code_of_scale() -> Tensor:
    """uint8 [128]: e5m3 codes of the e4m3 codes that are not negative; that of NaN is not used."""
    scale = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    code = (exponent.int() + 9) * 8 + ((2 * mantissa - 1) * 8).int()
    code[0], code[127] = 0, 0
    return code.to(torch.uint8)
