"""The shared expert: one gated MLP that every token passes, beside the routed ones."""

from torch import Tensor

from step37_kernels.checks import require, require_floating
from step37_kernels.reference.activation import swiglu_step


def shared_expert(hidden: Tensor, w13: Tensor, w2: Tensor, limit: float | None) -> Tensor:
    """down(swiglu_step(gate(x), up(x))), in fp32 and not rounded.

    Args:
        hidden: [T, K], floating point.
        w13: [2N, K], rows 0..N the gate projection, N..2N the up projection.
        w2: [K, N], the down projection.
        limit: the clamp of `swiglu_step`.

    Returns:
        fp32 [1, T, K]: a single part, where a kernel may return several that add up.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require("hidden", hidden, (None, None))
    require_floating("hidden", hidden)
    require("w2", w2, (hidden.shape[1], None))
    require("w13", w13, (2 * w2.shape[1], hidden.shape[1]))
    intermediate = swiglu_step(hidden.float() @ w13.float().T, limit)
    return (intermediate @ w2.float().T)[None]
