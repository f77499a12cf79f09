"""What every gate-up GEMM does at its end, in fp32: the Step activation."""

import triton
import triton.language as tl


@triton.jit
def swiglu_step(gate, up, limit, HAS_LIMIT: tl.constexpr):
    """min(silu(gate), limit) * clamp(up, -limit, limit), NaN kept; both fp32, any shape."""
    # exp2 of the negative argument overflows to infinity for very negative gates: silu is then -0.
    activated = gate / (1.0 + tl.exp(-gate))
    if HAS_LIMIT:
        keep: tl.constexpr = tl.PropagateNan.ALL
        activated = tl.minimum(activated, limit, propagate_nan=keep)
        up = tl.minimum(tl.maximum(up, -limit, propagate_nan=keep), limit, propagate_nan=keep)
    return activated * up
