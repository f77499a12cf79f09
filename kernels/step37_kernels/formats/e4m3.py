"""float8 e4m3fn: saturating casts, and activations with a scale per token and group of channels."""

import torch
from torch import Tensor

from step37_kernels.checks import ceil_div, require, require_floating

E4M3_MAX = 448.0


def to_e4m3(x: Tensor) -> Tensor:
    """Round to float8_e4m3fn, nearest even, saturating.

    Values beyond +-448, infinities too, become +-448 (e4m3fn has no infinity, and what a bare cast
    makes of them differs between devices and PyTorch versions); NaN stays NaN.

    Args:
        x: any float of 16 bits or more, any shape.
    """
    require_floating("x", x)
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_scale(amax: Tensor) -> Tensor:
    """The fp32 scale amax/448 that maps a group's largest magnitude to e4m3's largest.

    Where that is zero (a group of zeros) the scale is 1, so that the group dequantises to zeros.
    """
    # By a tensor: on CUDA torch multiplies with the reciprocal of a number, which rounds otherwise.
    scale = amax.float() / amax.new_full((), E4M3_MAX, dtype=torch.float32)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, exactly on every device, which `torch.ldexp` is not said to be on CUDA.

    Args:
        exponent: int32, any shape, -126 to 127.
    """
    return ((exponent + 127) << 23).view(torch.float32)


def quantize_per_token_group(
    x: Tensor, group_size: int = 128, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantise activations with one dynamic scale per token and group of channels.

    Args:
        x: [T, K], floating point; the first and the last group may be narrower than `group_size`.
        offset: where in its first group channel 0 stands, 0 <= offset < group_size. The channels
            of a tensor-parallel rank keep the groups of the whole tensor, as its weights do.

    Returns:
        q: e4m3 [T, K], and its scale: fp32 [T, ceil((offset + K) / group_size)], amax / 448 of
        each group, 1 for a group of zeros.

    Raises:
        ValueError: x is not a floating point matrix, or group_size or offset is out of range.
    """
    require_floating("x", x)
    require("x", x, (None, None))
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}, expected a positive number")
    if not 0 <= offset < group_size:
        raise ValueError(f"offset is {offset}, expected 0 to {group_size - 1} (inside a group)")
    tokens, channels = x.shape
    groups = ceil_div(offset + channels, group_size)
    tail = groups * group_size - offset - channels
    padded = torch.nn.functional.pad(x.float(), (offset, tail))
    grouped = padded.view(tokens, groups, group_size)
    scale = e4m3_scale(grouped.abs().amax(-1))
    q = to_e4m3(grouped / scale[..., None])
    q = q.view(tokens, groups * group_size)[:, offset : offset + channels]
    return q.contiguous(), scale


def dequantize_per_token_group(
    q: Tensor,
    scale: Tensor,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
) -> Tensor:
    """Undo `quantize_per_token_group`: q times its group's scale, multiplied in fp32.

    Args:
        q: e4m3 [T, K].
        scale: fp32 [T, ceil((offset + K) / group_size)].
        offset: as there.

    Returns:
        [T, K] in `dtype`.

    Raises:
        ValueError: q or scale has another shape or dtype.
    """
    require("q", q, (None, None), (torch.float8_e4m3fn,))
    tokens, channels = q.shape
    groups = ceil_div(offset + channels, group_size)
    require("scale", scale, (tokens, groups), (torch.float32,))
    factor = scale.repeat_interleave(group_size, -1)[:, offset : offset + channels]
    return (q.float() * factor).to(dtype)
