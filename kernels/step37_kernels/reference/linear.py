"""A linear layer over quantised weights."""

import torch
from torch import Tensor

from step37_kernels.checks import require, require_floating
from step37_kernels.formats.fp8_block import FP8BlockTensor


def linear(x: Tensor, weight: FP8BlockTensor) -> Tensor:
    """x @ weight^T, multiplied and summed in fp32.

    Args:
        x: [T, K], floating point; T may be 0.
        weight: [N, K], dequantised to fp32.

    Returns:
        [T, N] in x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require_floating("x", x)
    require("weight", weight.data, (None, None))
    require("x", x, (None, weight.shape[1]))
    return (x.float() @ weight.dequantize(torch.float32).T).to(x.dtype)
