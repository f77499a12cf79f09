"""SwiGLU with Step-3.7's clamp, which comes after SiLU."""

import torch
from torch import Tensor


def swiglu_step(gate_up: Tensor, limit: float | None) -> Tensor:
    """silu(gate).clamp(max=limit) * up.clamp(-limit, limit), in fp32.

    The gate is bounded above only, after SiLU; other models' clamped SwiGLU bounds it before.

    Args:
        gate_up: [T, 2N], floating point, the gate in the first N columns.
        limit: the layer's entry of swiglu_limits or swiglu_limits_shared; None or 0 is no clamp.

    Returns:
        [T, N] in gate_up's dtype.

    Raises:
        ValueError: limit is negative, or the number of columns is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[-1]} columns, expected an even number")
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}, expected a positive number, or 0 or None for no clamp")
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = torch.nn.functional.silu(gate)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * up).to(gate_up.dtype)
