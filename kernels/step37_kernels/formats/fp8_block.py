"""FP8 weights with a scale per block: e4m3 data, one float32 `weight_scale_inv` per 128x128.

The format of DeepSeek-V3's checkpoints (`quant_method` "fp8", `weight_block_size` [128, 128]): the
tensor `NAME.weight` in e4m3 beside `NAME.weight_scale_inv`, which despite its name is multiplied.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from step37_kernels.checks import ceil_div, require, require_floating
from step37_kernels.formats.e4m3 import e4m3_scale, power_of_two, to_e4m3


@dataclass(frozen=True)
class FP8BlockTensor:
    """An e4m3 matrix (or a stack of them) whose blocks of `block_size` share an fp32 scale.

    A shard keeps the block grid of the whole tensor, so it may begin and end inside a block.

    Args:
        data: e4m3 [..., N, K].
        scale_inv: fp32 [..., nb, kb], multiplied with the data; nb and kb count the blocks that the
            rows and columns touch.
        block_size: rows and columns of one block.
        row_offset: where in its first block row this shard begins, 0 <= row_offset < block_size[0].
        col_offset: likewise for columns.

    Raises:
        ValueError: a shape, dtype or offset does not fit.
    """

    data: Tensor
    scale_inv: Tensor
    block_size: tuple[int, int] = (128, 128)
    row_offset: int = 0
    col_offset: int = 0

    def __post_init__(self) -> None:
        block_rows, block_cols = check_block_size(self.block_size)
        for name, offset, size in (
            ("row_offset", self.row_offset, block_rows),
            ("col_offset", self.col_offset, block_cols),
        ):
            if not 0 <= offset < size:
                raise ValueError(f"{name} is {offset}, expected 0 to {size - 1} (inside a block)")
        if self.data.ndim < 2:
            raise ValueError(f"data has shape {list(self.data.shape)}, expected [..., N, K]")
        *lead, rows, cols = self.data.shape
        require("data", self.data, self.data.shape, (torch.float8_e4m3fn,))
        grid = (
            ceil_div(self.row_offset + rows, block_rows),
            ceil_div(self.col_offset + cols, block_cols),
        )
        require("scale_inv", self.scale_inv, (*lead, *grid), (torch.float32,))

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantised tensor, [..., N, K]."""
        return self.data.shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights, [..., N, K] in `dtype`: data * scale_inv, multiplied in fp32."""
        *_, rows, cols = self.data.shape
        scale = self.scale_inv.repeat_interleave(self.block_size[0], -2)
        scale = scale[..., self.row_offset : self.row_offset + rows, :]
        scale = scale.repeat_interleave(self.block_size[1], -1)
        scale = scale[..., self.col_offset : self.col_offset + cols]
        return (self.data.float() * scale).to(dtype)

    def shard(self, rows: slice | None, cols: slice | None) -> "FP8BlockTensor":
        """The part at `rows` and `cols` (None: all), with the scales of the blocks it touches.

        Views, nothing is requantised.

        Raises:
            ValueError: a slice has a step, or does not lie inside the tensor.
        """
        *_, num_rows, num_cols = self.data.shape
        row_start, row_stop = slice_bounds("rows", rows, num_rows)
        col_start, col_stop = slice_bounds("cols", cols, num_cols)
        row_blocks, row_offset = _covered(self.row_offset, row_start, row_stop, self.block_size[0])
        col_blocks, col_offset = _covered(self.col_offset, col_start, col_stop, self.block_size[1])
        return FP8BlockTensor(
            self.data[..., row_start:row_stop, col_start:col_stop],
            self.scale_inv[..., row_blocks, col_blocks],
            self.block_size,
            row_offset,
            col_offset,
        )


def quantize(weight: Tensor, block_size: tuple[int, int] = (128, 128)) -> FP8BlockTensor:
    """Quantise as block-scaled checkpoints are: scale_inv = amax / 448 of each block.

    A block of zeros has scale 1. N and K need not be multiples of the block.

    Args:
        weight: floating point [..., N, K].

    Raises:
        ValueError: weight has fewer than two dimensions, another dtype or values that are not
            finite.
    """
    block_rows, block_cols = check_block_size(block_size)
    require_floating("weight", weight)
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [..., N, K], not empty")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds NaN or infinity, which FP8 blocks cannot store")
    *lead, rows, cols = weight.shape
    grid_rows, grid_cols = ceil_div(rows, block_rows), ceil_div(cols, block_cols)
    padding = (0, grid_cols * block_cols - cols, 0, grid_rows * block_rows - rows)
    blocks = torch.nn.functional.pad(weight.float(), padding).view(
        *lead, grid_rows, block_rows, grid_cols, block_cols
    )
    scale = e4m3_scale(blocks.abs().amax((-3, -1)))
    data = to_e4m3(blocks / scale[..., :, None, :, None])
    data = data.view(*lead, grid_rows * block_rows, grid_cols * block_cols)
    return FP8BlockTensor(data[..., :rows, :cols].contiguous(), scale, (block_rows, block_cols))


_LEAST_ROW_EXPONENT = -117  # a subnormal code times 2^-117 is still a normal bf16


def quantize_rows(weight: Tensor) -> FP8BlockTensor:
    """Quantise with one scale per row, the least power of two that keeps the row within 448.

    e4m3 is a floating-point format: its error is relative, so finer scales gain nothing until
    numbers 2^14 times smaller than the largest count. Powers of two make data * scale exact in
    bf16, so that whoever expands the weights to bf16 has the very weights of a kernel that scales
    its sums.

    Args:
        weight: floating point [N, K].

    Returns:
        blocks of [1, K]; the scale of a row of zeros is 1.

    Raises:
        ValueError: weight is not a floating point matrix, is empty or holds NaN or infinity.
    """
    require_floating("weight", weight)
    require("weight", weight, (None, None))
    if weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [N, K], not empty")
    amax = weight.abs().amax(1, keepdim=True).float()
    if not bool(amax.isfinite().all()):
        raise ValueError("weight holds NaN or infinity, which FP8 rows cannot store")
    fraction, exponent = torch.frexp(e4m3_scale(amax))  # 0.5 <= fraction < 1
    exponent -= (fraction == 0.5).int()
    scale = power_of_two(exponent.clamp(min=_LEAST_ROW_EXPONENT))
    return FP8BlockTensor(to_e4m3(weight.float() / scale), scale, (1, weight.shape[1]))


def check_block_size(block_size: tuple[int, int]) -> tuple[int, int]:
    """Return `block_size` as (rows, columns).

    Raises:
        ValueError: it is not two positive numbers.
    """
    if len(block_size) != 2 or min(block_size) < 1:
        raise ValueError(f"block_size is {block_size}, expected two positive numbers")
    return block_size[0], block_size[1]


def slice_bounds(name: str, part: slice | None, size: int) -> tuple[int, int]:
    """Start and stop of a shard's slice over `size` elements; None is all of them.

    Raises:
        ValueError: the slice has a step, is empty or reaches outside 0..size.
    """
    if part is None:
        return 0, size
    start = 0 if part.start is None else part.start
    stop = size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start < stop <= size:
        raise ValueError(f"{name} is {part}, expected a slice without step inside 0..{size}")
    return start, stop


def _covered(offset: int, start: int, stop: int, block: int) -> tuple[slice, int]:
    """Blocks touched by elements start..stop of a shard at `offset`, and the new shard's offset."""
    first = (offset + start) // block
    return slice(first, ceil_div(offset + stop, block)), (offset + start) % block
