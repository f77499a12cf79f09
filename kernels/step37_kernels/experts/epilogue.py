"""What the grouped GEMMs do at their end, in fp32: activation, router weight, the one store."""

import triton
import triton.language as tl


@triton.jit
def swiglu_step(gate, up, limit):
    """min(silu(gate), limit) * clamp(up, -limit, limit), NaN kept; both fp32, any shape.

    Layers without a clamp have an infinite one: the same numbers, and no kernel of their own.
    """
    # exp overflows to infinity for very negative gates: silu is then -0.
    activated = gate / (1.0 + tl.exp(-gate))
    keep: tl.constexpr = tl.PropagateNan.ALL
    activated = tl.minimum(activated, limit, propagate_nan=keep)
    up = tl.minimum(tl.maximum(up, -limit, propagate_nan=keep), limit, propagate_nan=keep)
    return activated * up


@triton.jit
def store_activated(gate, up, limit, intermediate, pair, channels, N: tl.constexpr):
    """intermediate[pair, channels] = swiglu_step of gate and up [channels, pairs], in bf16."""
    activated = swiglu_step(gate, up, limit)
    target = intermediate + pair.to(tl.int64)[None, :] * N + channels[:, None]
    stored = (pair >= 0)[None, :] & (channels < N)[:, None]
    tl.store(target, activated.to(tl.bfloat16), mask=stored)


@triton.jit
def store_weighted(acc, topk_weights, partial, pair, channels, K: tl.constexpr):
    """partial[pair, channels] = router weight * acc [channels, pairs], in bf16."""
    valid = pair >= 0
    acc *= tl.load(topk_weights + pair, mask=valid, other=0.0)[None, :]
    target = partial + pair.to(tl.int64)[None, :] * K + channels[:, None]
    tl.store(target, acc.to(tl.bfloat16), mask=valid[None, :] & (channels < K)[:, None])
