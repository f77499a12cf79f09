"""What each operation has to move and to multiply at the least, on one GPU.

Sizes are those of the rank: its heads, its columns, its experts. Activations are BF16. What has to
be read more than once, or padded, by some kernel is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

BYTES_PER_WEIGHT = {  # of the routed experts, as the checkpoints have them
    "bf16": 2.0,
    "fp8": 1 + 4 / (128 * 128),  # an fp32 scale per block of 128 x 128
    "nvfp4": 0.5 + 1 / 16,  # an e4m3 scale per 16
}
CACHE_BYTES = {"fp8": 1, "bf16": 2}
_ACTIVATION = 2  # bytes of a bf16 number
_CHOICE = 8  # bytes of an expert's id and its weight


@dataclass(frozen=True)
class Work:
    """What one call has to do at the least.

    Attributes:
        stream_bytes: what GB/s counts: the weights that are used, or the keys and values seen,
            once each.
        bytes: stream_bytes and the inputs and outputs beside them.
        flops: multiplications and additions of the matrix products.
        matmul: the type they are multiplied in: "bf16" (fp16 alike), "fp8" or "nvfp4".
    """

    stream_bytes: float
    bytes: float
    flops: float
    matmul: str

    def floor(self, bandwidth: float, flops: Mapping[str, float]) -> float:
        """The least microseconds at these bytes/s and FLOP/s.

        A GPU without the type has no floor of it: then only the bytes count.
        """
        rate = flops.get(self.matmul)
        return max(self.bytes / bandwidth, self.flops / rate if rate else 0.0) * 1e6


def added(*works: Work) -> Work:
    """Several pieces of work as one, in the first one's multiplication type."""
    return Work(
        math.fsum(w.stream_bytes for w in works),
        math.fsum(w.bytes for w in works),
        math.fsum(w.flops for w in works),
        works[0].matmul,
    )


def elementwise(tokens: int, read: int, written: int) -> Work:
    """So many numbers of each token in and out, and no product."""
    moved = tokens * (read + written) * _ACTIVATION
    return Work(moved, moved, 0.0, "bf16")


def _dense_bytes(inputs: int, outputs: int, weights: str) -> int:
    """A matrix in BF16, or in FP8 with an fp32 scale for each of its rows."""
    return outputs * {"bf16": 2 * inputs, "fp8": inputs + 4}[weights]


def linear(tokens: int, inputs: int, outputs: int, weights: str = "bf16") -> Work:
    """A projection; FP8 weights are multiplied as BF16."""
    streamed = _dense_bytes(inputs, outputs, weights)
    moved = streamed + tokens * (inputs + outputs) * _ACTIVATION
    return Work(streamed, moved, 2 * tokens * inputs * outputs, "bf16")


def route(tokens: int, hidden: int, experts: int, top_k: int) -> Work:
    """The router with a BF16 gate: reads it and hidden, writes weights and ids."""
    weights = 2 * experts * hidden
    moved = weights + tokens * (hidden * _ACTIVATION + top_k * _CHOICE)
    return Work(weights, moved, 2 * tokens * experts * hidden, "bf16")


def shared_expert(tokens: int, hidden: int, intermediate: int, weights: str = "bf16") -> Work:
    """The shared expert. Its input and output are not counted: the routed experts' are."""
    streamed = _dense_bytes(hidden, 2 * intermediate, weights)
    streamed += _dense_bytes(intermediate, hidden, weights)
    return Work(streamed, streamed, 6 * tokens * intermediate * hidden, "bf16")


def routed_experts(
    tokens: int,
    hidden: int,
    top_k: int,
    intermediate: int,
    distinct: float,
    pairs: float,
    weights: str,
    activations: str = "bf16",
) -> Work:
    """One layer's routed experts: `distinct` experts read once, `pairs` rows multiplied.

    Args:
        intermediate: columns of each expert on this rank.
        pairs: (token, expert) choices that are this rank's.
        activations: the type that is multiplied.
    """
    count = 3 * intermediate * hidden
    streamed = distinct * count * BYTES_PER_WEIGHT[weights]
    moved = streamed + tokens * (2 * hidden * _ACTIVATION + top_k * _CHOICE)
    return Work(streamed, moved, 2 * pairs * count, activations)


@dataclass(frozen=True)
class Heads:
    """One layer's attention on one rank."""

    query: int
    kv: int
    dim: int
    rotary_dim: int
    window: int | None

    @property
    def qkv_width(self) -> int:
        """Columns of the fused projection."""
        return (self.query + 2 * self.kv) * self.dim

    def visible(self, context: int) -> int:
        """Keys that a query at the end of `context` keys sees."""
        return context if self.window is None else min(context, self.window)

    def kv_bytes(self, keys: int, cache: str) -> int:
        """Bytes of so many keys and values."""
        return 2 * keys * self.kv * self.dim * CACHE_BYTES[cache]

    def pairs(self, length: int) -> int:
        """Visible (query, key) pairs of a sequence from its start."""
        window = self.visible(length)
        return window * (window + 1) // 2 + (length - window) * window


def prologue(of: Heads, tokens: int, cache: str) -> Work:
    """qkv and fp32 cosines read, q and the cache written; no matrix product."""
    moved = tokens * ((of.qkv_width + of.query * of.dim) * _ACTIVATION + of.rotary_dim * 4)
    moved += of.kv_bytes(tokens, cache)
    return Work(moved, moved, 0.0, "bf16")


def decode_attention(of: Heads, batch: int, context: int, cache: str, new: int = 1) -> Work:
    """The last `new` tokens of each sequence: the keys and values that any of them sees, once."""
    kv = batch * of.kv_bytes(min(context, of.visible(context) + new - 1), cache)
    moved = kv + 2 * batch * new * of.query * of.dim * _ACTIVATION
    pairs = sum(of.visible(max(0, context - later)) for later in range(new))
    return Work(kv, moved, 4 * batch * of.query * of.dim * pairs, "bf16")


def prefill_attention(of: Heads, new: int, prefix: int, cache: str) -> Work:
    """One sequence's new tokens over its prefix and each other, only the visible pairs."""
    end = prefix + new
    first_key = 0 if of.window is None else max(0, prefix + 1 - of.window)
    kv = of.kv_bytes(end - first_key, cache)
    pairs = of.pairs(end) - of.pairs(prefix)
    moved = kv + 2 * new * of.query * of.dim * _ACTIVATION
    return Work(kv, moved, 4 * of.query * of.dim * pairs, "bf16")
