"""Shape and dtype checks whose errors name the tensor, what it is and what it has to be."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

DEBUG_VARIABLE = "STEP37_DEBUG"


def debugging() -> bool:
    """Whether STEP37_DEBUG=1 asks to read back and check what only the device sees."""
    return os.environ.get(DEBUG_VARIABLE) == "1"


def require(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = (),
    contiguous: bool = False,
) -> None:
    """Check `tensor` against `shape` (None: any size) and `dtypes` (empty: any).

    With `contiguous` its memory has to be dense in row-major order, as kernels address it.

    Raises:
        ValueError: the tensor's shape, dtype or layout is another one.
    """
    fits = len(tensor.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{expected}]")
    if dtypes and tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {allowed}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous memory")


def require_floating(name: str, tensor: Tensor) -> None:
    """Check that `tensor` is float64, float32, bfloat16 or float16: a type to compute in.

    Raises:
        ValueError: it has another dtype, for example an integer or an 8-bit float.
    """
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected a float of 16 bits or more")


def ceil_div(numerator: int, denominator: int) -> int:
    """Number of blocks of `denominator` that cover `numerator` elements."""
    return -(-numerator // denominator)
