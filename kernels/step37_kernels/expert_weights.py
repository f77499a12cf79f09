"""The expert layer's weights of one rank: w13 (gate above up) and w2 of all experts as one object.

E experts, hidden size K, intermediate size N of this rank (the whole one divided by the tensor
parallel size). The objects hold the caller's tensors, check only shapes and dtypes, and so cost
nothing to build for every forward pass.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from step37_kernels.checks import ceil_div, require, require_floating
from step37_kernels.formats.fp8_block import FP8BlockTensor, check_block_size
from step37_kernels.formats.nvfp4 import GROUP_SIZE, NVFP4Tensor


@dataclass(frozen=True)
class BF16Experts:
    """Unquantised experts.

    Args:
        w13: [E, 2N, K], rows 0..N the gate projection, N..2N the up projection.
        w2: [E, K, N], the down projection. Both in one float dtype (bf16, or fp32 for parity).

    Raises:
        ValueError: a shape or dtype does not fit.
    """

    format: ClassVar[str] = "bf16"
    w13: Tensor
    w2: Tensor

    def __post_init__(self) -> None:
        require_floating("w13", self.w13)
        experts, size, hidden = _w13_shape(self.w13)
        require("w2", self.w2, (experts, hidden, size), (self.w13.dtype,))

    @property
    def num_experts(self) -> int:
        """Experts held by this rank, E."""
        return self.w13.shape[0]

    @property
    def intermediate_size(self) -> int:
        """Intermediate channels of this rank, N."""
        return self.w13.shape[1] // 2

    @property
    def hidden_size(self) -> int:
        """Hidden channels, K."""
        return self.w13.shape[2]

    def gate(self, e: int, dtype: torch.dtype) -> Tensor:
        """Gate projection of expert `e`, [N, K]."""
        return self.w13[e, : self.intermediate_size].to(dtype)

    def up(self, e: int, dtype: torch.dtype) -> Tensor:
        """Up projection of expert `e`, [N, K]."""
        return self.w13[e, self.intermediate_size :].to(dtype)

    def down(self, e: int, dtype: torch.dtype) -> Tensor:
        """Down projection of expert `e`, [K, N]."""
        return self.w2[e].to(dtype)


@dataclass(frozen=True)
class FP8Experts:
    """Experts in e4m3 with an fp32 scale per block.

    A tensor-parallel shard keeps the block grid of the whole intermediate dimension, so that its
    rows of w13 and columns of w2 may begin inside a block; gate and up each have their own grid.

    Args:
        w13: e4m3 [E, 2N, K].
        w13_scale: fp32 [E, 2, nb, kb], gate then up, nb = ceil((intermediate_offset + N) / block),
            kb = ceil(K / block).
        w2: e4m3 [E, K, N].
        w2_scale: fp32 [E, kb, nb].
        block_size: one block's size along a projection's output and input.
        intermediate_offset: where in its first block this rank's intermediate channels begin.

    Raises:
        ValueError: a shape, a dtype or the offset does not fit.
    """

    format: ClassVar[str] = "fp8"
    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    block_size: tuple[int, int] = (128, 128)
    intermediate_offset: int = 0

    @classmethod
    def of(cls, gate: FP8BlockTensor, up: FP8BlockTensor, down: FP8BlockTensor) -> "FP8Experts":
        """From the three projections, [E, N, K] twice and [E, K, N], or shards of them over N.

        Raises:
            ValueError: they do not fit together.
        """
        return cls(
            torch.cat([gate.data, up.data], 1),
            torch.stack([gate.scale_inv, up.scale_inv], 1),
            down.data.contiguous(),
            down.scale_inv,
            gate.block_size,
            gate.row_offset,
        )

    def __post_init__(self) -> None:
        out_block, in_block = check_block_size(self.block_size)
        offset = self.intermediate_offset
        if not 0 <= offset < min(out_block, in_block):
            raise ValueError(
                f"intermediate_offset is {offset}, expected 0 to {min(out_block, in_block) - 1} "
                "(inside a block)"
            )
        experts, size, hidden = _w13_shape(self.w13)
        e4m3, fp32 = (torch.float8_e4m3fn,), (torch.float32,)
        require("w13", self.w13, (experts, 2 * size, hidden), e4m3)
        require("w2", self.w2, (experts, hidden, size), e4m3)
        rows13, cols13 = ceil_div(offset + size, out_block), ceil_div(hidden, in_block)
        require("w13_scale", self.w13_scale, (experts, 2, rows13, cols13), fp32)
        rows2, cols2 = ceil_div(hidden, out_block), ceil_div(offset + size, in_block)
        require("w2_scale", self.w2_scale, (experts, rows2, cols2), fp32)

    @property
    def num_experts(self) -> int:
        """Experts held by this rank, E."""
        return self.w13.shape[0]

    @property
    def intermediate_size(self) -> int:
        """Intermediate channels of this rank, N."""
        return self.w13.shape[1] // 2

    @property
    def hidden_size(self) -> int:
        """Hidden channels, K."""
        return self.w13.shape[2]

    def gate(self, e: int, dtype: torch.dtype) -> Tensor:
        """Gate projection of expert `e`, dequantised, [N, K]."""
        return self._half(e, 0).dequantize(dtype)

    def up(self, e: int, dtype: torch.dtype) -> Tensor:
        """Up projection of expert `e`, dequantised, [N, K]."""
        return self._half(e, 1).dequantize(dtype)

    def down(self, e: int, dtype: torch.dtype) -> Tensor:
        """Down projection of expert `e`, dequantised, [K, N]."""
        return FP8BlockTensor(
            self.w2[e], self.w2_scale[e], self.block_size, col_offset=self.intermediate_offset
        ).dequantize(dtype)

    def _half(self, e: int, half: int) -> FP8BlockTensor:
        size = self.intermediate_size
        return FP8BlockTensor(
            self.w13[e, half * size : (half + 1) * size],
            self.w13_scale[e, half],
            self.block_size,
            row_offset=self.intermediate_offset,
        )


@dataclass(frozen=True)
class NVFP4Experts:
    """Experts in NVFP4; low nibble = even element; gate and up keep their own global scale.

    Args:
        w13: uint8 [E, 2N, K/2].
        w13_scale: e4m3 [E, 2N, K/16].
        w13_global_scale: fp32 [E, 2], gate then up.
        w2: uint8 [E, K, N/2].
        w2_scale: e4m3 [E, K, N/16].
        w2_global_scale: fp32 [E].

    Raises:
        ValueError: a shape or dtype does not fit.
    """

    format: ClassVar[str] = "nvfp4"
    w13: Tensor
    w13_scale: Tensor
    w13_global_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    w2_global_scale: Tensor

    @classmethod
    def of(cls, gate: NVFP4Tensor, up: NVFP4Tensor, down: NVFP4Tensor) -> "NVFP4Experts":
        """From the three projections, [E, N, K] twice and [E, K, N].

        Raises:
            ValueError: they do not fit together.
        """
        return cls(
            torch.cat([gate.packed, up.packed], 1),
            torch.cat([gate.block_scale, up.block_scale], 1),
            torch.stack([gate.global_scale, up.global_scale], 1),
            down.packed,
            down.block_scale,
            down.global_scale,
        )

    def __post_init__(self) -> None:
        experts, size, half_hidden = _w13_shape(self.w13)
        hidden = 2 * half_hidden
        for name, channels in (("hidden", hidden), ("intermediate", size)):
            if channels % GROUP_SIZE:
                raise ValueError(f"{name} size is {channels}, expected a multiple of {GROUP_SIZE}")
        byte, e4m3, fp32 = (torch.uint8,), (torch.float8_e4m3fn,), (torch.float32,)
        require("w13", self.w13, (experts, 2 * size, hidden // 2), byte)
        require("w13_scale", self.w13_scale, (experts, 2 * size, hidden // GROUP_SIZE), e4m3)
        require("w13_global_scale", self.w13_global_scale, (experts, 2), fp32)
        require("w2", self.w2, (experts, hidden, size // 2), byte)
        require("w2_scale", self.w2_scale, (experts, hidden, size // GROUP_SIZE), e4m3)
        require("w2_global_scale", self.w2_global_scale, (experts,), fp32)

    @property
    def num_experts(self) -> int:
        """Experts held by this rank, E."""
        return self.w13.shape[0]

    @property
    def intermediate_size(self) -> int:
        """Intermediate channels of this rank, N."""
        return self.w13.shape[1] // 2

    @property
    def hidden_size(self) -> int:
        """Hidden channels, K."""
        return 2 * self.w13.shape[2]

    def gate(self, e: int, dtype: torch.dtype) -> Tensor:
        """Gate projection of expert `e`, dequantised, [N, K]."""
        return self._half(e, 0).dequantize(dtype)

    def up(self, e: int, dtype: torch.dtype) -> Tensor:
        """Up projection of expert `e`, dequantised, [N, K]."""
        return self._half(e, 1).dequantize(dtype)

    def down(self, e: int, dtype: torch.dtype) -> Tensor:
        """Down projection of expert `e`, dequantised, [K, N]."""
        return NVFP4Tensor(self.w2[e], self.w2_scale[e], self.w2_global_scale[e]).dequantize(dtype)

    def _half(self, e: int, half: int) -> NVFP4Tensor:
        size = self.intermediate_size
        rows = slice(half * size, (half + 1) * size)
        return NVFP4Tensor(
            self.w13[e, rows], self.w13_scale[e, rows], self.w13_global_scale[e, half]
        )


ExpertWeights = BF16Experts | FP8Experts | NVFP4Experts


_Weights = TypeVar("_Weights", bound=ExpertWeights)


def on_device(weights: _Weights, device: torch.device) -> _Weights:
    """The same experts with their tensors on `device`."""
    fields: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in vars(weights).items()
    }
    return type(weights)(**fields)


def _w13_shape(w13: Tensor) -> tuple[int, int, int]:
    """E, N and the last dimension of w13 [E, 2N, last]."""
    require("w13", w13, (None, None, None))
    experts, rows, last = w13.shape
    if rows % 2:
        raise ValueError(f"w13 has {rows} rows, expected an even number (gate above up)")
    return experts, rows // 2, last
