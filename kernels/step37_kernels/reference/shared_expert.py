"""The shared expert: one gated MLP that every token passes, beside the routed ones."""

import torch
from torch import Tensor

from step37_kernels.checks import require, require_floating
from step37_kernels.formats.fp8_block import FP8BlockTensor
from step37_kernels.reference.activation import swiglu_step


def shared_expert(
    hidden: Tensor,
    w13: Tensor | FP8BlockTensor,
    w2: Tensor | FP8BlockTensor,
    limit: float | None,
) -> Tensor:
    """down(swiglu_step(gate(x), up(x))), in fp32 and not rounded.

    Args:
        hidden: [T, K], floating point.
        w13: [2N, K], rows 0..N the gate projection, N..2N the up projection; any format.
        w2: [K, N], the down projection.
        limit: the clamp of `swiglu_step`.

    Returns:
        fp32 [1, T, K]: a single part, where a kernel may return several that add up.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require("hidden", hidden, (None, None))
    require_floating("hidden", hidden)
    up_weight, down_weight = _fp32(w13), _fp32(w2)
    require("w2", down_weight, (hidden.shape[1], None))
    require("w13", up_weight, (2 * w2.shape[1], hidden.shape[1]))
    intermediate = swiglu_step(hidden.float() @ up_weight.T, limit)
    return (intermediate @ down_weight.T)[None]


def _fp32(weight: Tensor | FP8BlockTensor) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
