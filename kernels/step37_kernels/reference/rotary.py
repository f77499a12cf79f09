"""Rotary position embedding in GPT-NeoX order, partial or full, with llama3 frequency scaling."""

import math
from typing import Any

import torch
from torch import Tensor

from step37_kernels.checks import require


def apply_rotary(x: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> Tensor:
    """Rotate the first rotary_dim channels of every head; the others pass through.

    Channel i < rotary_dim/2 forms a pair with channel i + rotary_dim/2 ("rotate half").

    Args:
        x: [T, H, D], floating point.
        positions: int [T].
        cos_sin_cache: fp32 [P, rotary_dim], per position the cosines, then the sines.

    Returns:
        [T, H, D] in x's dtype, computed in fp32.

    Raises:
        ValueError: a shape does not fit, or rotary_dim is odd or above D.
    """
    require("x", x, (None, None, None))
    require("positions", positions, (x.shape[0],))
    require("cos_sin_cache", cos_sin_cache, (None, None))
    rotary_dim = cos_sin_cache.shape[-1]
    if rotary_dim % 2 or rotary_dim > x.shape[-1]:
        raise ValueError(
            f"rotary_dim is {rotary_dim}, expected an even number up to the head dim {x.shape[-1]}"
        )
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, dim=-1)
    first, second = x[..., :rotary_dim].float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), x[..., rotary_dim:]], dim=-1)


def cos_sin_cache(
    rotary_dim: int, theta: float, max_position: int, rope_scaling: dict[str, Any] | None
) -> Tensor:
    """Cosines and sines of every position below `max_position`.

    Args:
        rotary_dim: number of channels that rotate, even.
        theta: base of the frequencies, theta^(-2i / rotary_dim).
        max_position: number of positions P.
        rope_scaling: None, or the config's dict of rope_type "llama3" (factor, low_freq_factor,
            high_freq_factor, original_max_position_embeddings) or "default" (no scaling).

    Returns:
        fp32 [P, rotary_dim] on the CPU: cosines in the first half, sines in the second.

    Raises:
        ValueError: rotary_dim is odd, or rope_scaling has another type or lacks a number.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}, expected an even positive number")
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    frequency = 1.0 / theta**exponent
    if rope_scaling is not None:
        kind = rope_scaling.get("rope_type", rope_scaling.get("type"))
        if kind == "llama3":
            frequency = _llama3(frequency, rope_scaling)
        elif kind != "default":
            raise ValueError(f"rope_scaling type is {kind!r}, expected 'llama3' or 'default'")
    position = torch.arange(max_position, dtype=torch.float32, device="cpu")
    angle = torch.outer(position, frequency)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def _llama3(frequency: Tensor, rope_scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling: long wavelengths divided by factor, short ones kept, a ramp between."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in rope_scaling]
    if missing:
        raise ValueError(f"rope_scaling lacks {', '.join(missing)}; it has {sorted(rope_scaling)}")
    factor, low, high, original = (float(rope_scaling[name]) for name in names)
    if high <= low:
        raise ValueError(f"high_freq_factor is {high}, expected more than low_freq_factor {low}")
    turns = original * frequency / (2 * math.pi)  # rotations within the original context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequency / factor + kept * frequency
