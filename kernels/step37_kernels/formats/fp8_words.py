"""FP8 weights with a scale per row, as the kernels with BF16 activations read them.

Four e4m3 codes make one little-endian int32 word, the unit that `experts.e4m3_words.widen` expands.
Its lanes give word t of 16 columns to the positions 2t, 2t + 1, 2t + 8 and 2t + 9, so these four
columns are what is stored in word t: the expanded weights are in the order of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from step37_kernels.checks import require
from step37_kernels.formats.fp8_block import FP8BlockTensor

COLUMNS_MULTIPLE = 16
"""Columns that one matrix instruction takes, and that are put in order together."""
_LEAST_TILE = 64


@dataclass(frozen=True)
class FP8Words:
    """One weight matrix [N, K] in the kernels' order; `pack` makes it, `unpack` is the way back.

    Args:
        words: int32 [N, K // 4].
        scale: fp32 [N], multiplied with the rows.
        arrived: int32, a zero for each 64 rows: where a kernel that splits K counts the parts of a
            tile that are done. It leaves zeros behind, so one weight serves one stream at a time.

    Raises:
        ValueError: a shape or dtype does not fit.
    """

    words: Tensor
    scale: Tensor
    arrived: Tensor

    format = "fp8"

    def __post_init__(self) -> None:
        require("words", self.words, (None, None), (torch.int32,), contiguous=True)
        rows = self.words.shape[0]
        require("scale", self.scale, (rows,), (torch.float32,), contiguous=True)
        require("arrived", self.arrived, (-(-rows // _LEAST_TILE),), (torch.int32,))

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight matrix, [N, K]."""
        rows, words = self.words.shape
        return torch.Size((rows, 4 * words))

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.words.device

    @staticmethod
    def pack(weight: FP8BlockTensor) -> FP8Words:
        """The same codes and scales in the kernels' order, a copy. Waits for the device.

        Args:
            weight: [N, K] with one scale per row (`fp8_block.quantize_rows`).

        Raises:
            ValueError: it is not a matrix, has several scales a row or a number of columns that is
                not a multiple of 16, or holds NaN, which the kernels would read as 480.
        """
        require("weight", weight.data, (None, None))
        rows, columns = weight.shape
        if weight.block_size[0] != 1 or weight.scale_inv.shape[1] != 1:
            raise ValueError(
                f"weight has blocks of {list(weight.block_size)}, expected a scale per row: "
                f"[1, {columns}]"
            )
        if columns % COLUMNS_MULTIPLE:
            raise ValueError(
                f"weight has {columns} columns, expected a multiple of {COLUMNS_MULTIPLE}"
            )
        codes = weight.data.view(torch.uint8)
        if bool((codes & 0x7F == 0x7F).any()):
            raise ValueError("weight holds NaN, expected finite e4m3 codes")
        pairs = codes.view(rows, columns // 16, 2, 4, 2)  # half, word, in the pair
        words = pairs.transpose(2, 3).contiguous().view(rows, columns).view(torch.int32)
        arrived = words.new_zeros(-(-rows // _LEAST_TILE))
        return FP8Words(words, weight.scale_inv[:, 0].contiguous(), arrived)

    def unpack(self) -> FP8BlockTensor:
        """What `pack` was given."""
        rows, columns = self.shape
        codes = self.words.view(torch.uint8).view(rows, columns // 16, 4, 2, 2).transpose(2, 3)
        data = codes.reshape(rows, columns).view(torch.float8_e4m3fn)
        return FP8BlockTensor(data, self.scale[:, None], (1, columns))
