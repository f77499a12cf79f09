"""NVFP4: e2m1 pairs in a byte, an e4m3 scale per 16 elements, an fp32 scale per tensor.

A byte holds two neighbours of the last dimension, the even element in its low nibble. The value of
an element is e2m1 * block_scale * global_scale. Checkpoint names: `weight` (packed), `weight_scale`
(block_scale), `weight_scale_2` (global_scale).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from step37_kernels.checks import require, require_floating
from step37_kernels.formats.e4m3 import E4M3_MAX, to_e4m3
from step37_kernels.formats.fp8_block import slice_bounds

GROUP_SIZE = 16
E2M1_MAX = 6.0
_E4M3_TINY = 2.0**-9  # the smallest positive e4m3: a scale below it would round to zero
# On the CPU by name: the module may be imported under another default device.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cpu")
_E2M1_OF_NIBBLE = torch.cat([_E2M1, -_E2M1])
_PAIR_OF_BYTE = torch.stack(  # [256, 2]: a byte's even and odd element
    [_E2M1_OF_NIBBLE.repeat(16), _E2M1_OF_NIBBLE.repeat_interleave(16)], dim=-1
)


@dataclass(frozen=True)
class NVFP4Tensor:
    """A matrix (or a stack of them) in NVFP4.

    Args:
        packed: uint8 [..., N, K/2].
        block_scale: e4m3 [..., N, K/16].
        global_scale: fp32 [...], one per matrix (a scalar for a single one).

    Raises:
        ValueError: a shape or dtype does not fit.
    """

    packed: Tensor
    block_scale: Tensor
    global_scale: Tensor

    def __post_init__(self) -> None:
        if self.packed.ndim < 2 or self.packed.shape[-1] % (GROUP_SIZE // 2):
            raise ValueError(
                f"packed has shape {list(self.packed.shape)}, expected [..., N, K/2] "
                f"with K a multiple of {GROUP_SIZE}"
            )
        *lead, rows, half = self.packed.shape
        require("packed", self.packed, self.packed.shape, (torch.uint8,))
        groups = 2 * half // GROUP_SIZE
        require("block_scale", self.block_scale, (*lead, rows, groups), (torch.float8_e4m3fn,))
        require("global_scale", self.global_scale, lead, (torch.float32,))

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantised tensor, [..., N, K]."""
        *lead, half = self.packed.shape
        return torch.Size((*lead, 2 * half))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights, [..., N, K] in `dtype`.

        e2m1 * block_scale is exact in fp32 (2 and 4 significant bits), so that multiplying by
        global_scale last leaves one rounding, and a second where `dtype` is narrower.
        """
        *lead, cols = self.shape
        elements = _PAIR_OF_BYTE.to(self.packed.device)[self.packed.int()]
        groups = elements.view(*lead, cols // GROUP_SIZE, GROUP_SIZE)
        scaled = groups * self.block_scale.float()[..., None]
        return (scaled.view(*lead, cols) * self.global_scale[..., None, None]).to(dtype)

    def shard(self, rows: slice | None, cols: slice | None) -> "NVFP4Tensor":
        """The part at `rows` and `cols` (None: all), as views; nothing is requantised.

        Raises:
            ValueError: a slice has a step or leaves the tensor, or cols cuts a group of 16.
        """
        *_, num_rows, num_cols = self.shape
        row_start, row_stop = slice_bounds("rows", rows, num_rows)
        col_start, col_stop = slice_bounds("cols", cols, num_cols)
        if col_start % GROUP_SIZE or col_stop % GROUP_SIZE:
            raise ValueError(
                f"cols is {cols}, expected multiples of {GROUP_SIZE}: an NVFP4 group shares a scale"
            )
        return NVFP4Tensor(
            self.packed[..., row_start:row_stop, col_start // 2 : col_stop // 2],
            self.block_scale[
                ..., row_start:row_stop, col_start // GROUP_SIZE : col_stop // GROUP_SIZE
            ],
            self.global_scale,
        )


def quantize(weight: Tensor, global_scale: Tensor | None = None) -> NVFP4Tensor:
    """Quantise as nvidia-modelopt does, which makes the release's checkpoints.

    global_scale = amax / (6 * 448) per matrix; block_scale = e4m3(amax16 / (6 * global_scale)), at
    least e4m3's smallest and at most 448; element = e2m1(weight / (block_scale * global_scale)),
    rounded to nearest, ties to even, saturating at 6. A group of zeros has block_scale 1, a matrix
    of zeros global_scale 1.

    Args:
        weight: floating point [..., N, K], K a multiple of 16.
        global_scale: fp32 [...], where it is given (gate and up of one expert may share one).

    Raises:
        ValueError: shape or dtype does not fit, weight is not finite, or a global scale is not
            positive.
    """
    require_floating("weight", weight)
    if weight.ndim < 2 or weight.numel() == 0 or weight.shape[-1] % GROUP_SIZE:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [..., N, K], not empty, "
            f"with K a multiple of {GROUP_SIZE}"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds NaN or infinity, which NVFP4 cannot store")
    *lead, cols = weight.shape
    groups = weight.float().view(*lead, cols // GROUP_SIZE, GROUP_SIZE)
    amax16 = groups.abs().amax(-1)
    if global_scale is None:
        global_scale = amax16.amax((-2, -1)) / (E2M1_MAX * E4M3_MAX)
        global_scale = torch.where(global_scale > 0, global_scale, torch.ones_like(global_scale))
    require("global_scale", global_scale, lead[:-1], (torch.float32,))
    if not bool((global_scale > 0).all()):
        raise ValueError(f"global_scale is {global_scale.tolist()}, expected positive numbers")

    ratio = amax16 / (E2M1_MAX * global_scale[..., None, None])
    ratio = torch.where(ratio > 0, ratio, torch.ones_like(ratio))
    block_scale = to_e4m3(ratio.clamp(min=_E4M3_TINY))
    step = block_scale.float() * global_scale[..., None, None]
    nibbles = _to_e2m1(groups / step[..., None]).view(*lead, cols)
    packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return NVFP4Tensor(packed, block_scale, global_scale)


def _to_e2m1(x: Tensor) -> Tensor:
    """Nibbles (uint8: sign, 2 bits exponent, 1 bit mantissa) of x rounded to nearest even."""
    magnitude = x.abs().clamp(max=E2M1_MAX)
    # The spacing is 0.5 up to 2, then 1 up to 4, then 2; codes count on from 4 at 2 and 6 at 4.
    # torch.round takes ties to the even count, which is the even mantissa in each range.
    code = torch.where(
        magnitude < 2,
        (magnitude * 2).round(),
        torch.where(magnitude < 4, magnitude.round() + 2, (magnitude / 2).round() + 4),
    )
    return code.to(torch.uint8) | ((x < 0).to(torch.uint8) << 3)
