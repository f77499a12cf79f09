"""Gemma-style RMSNorm, the only norm of Step-3.7 (block, final and q/k head norms)."""

import torch
from torch import Tensor

from step37_kernels.checks import require


def gemma_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * (1 + weight), all in fp32 and rounded once at the end.

    The weights are stored around zero ("zero_centered" in the config), hence 1 + weight.

    Args:
        x: [..., D], floating point.
        weight: [D], floating point.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: weight is not as wide as x.
    """
    require("weight", weight, (x.shape[-1],))
    x32 = x.float()
    inverse_rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * inverse_rms * (1.0 + weight.float())).to(x.dtype)
