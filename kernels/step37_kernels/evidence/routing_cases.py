"""The small launches around the expert GEMMs, at the model's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from step37_kernels.activation import activation
from step37_kernels.evidence.layer_shapes import EXPERTS, HIDDEN, TOP_K, meta
from step37_kernels.evidence.limits import Case, Limits
from step37_kernels.experts.activations import quantize
from step37_kernels.experts.combine import combine
from step37_kernels.experts.sort import sort, sort_and_prepare
from step37_kernels.route import route

DENSE = 11264

ROUTE = Limits(
    "32 experts x 16 tokens are too few rows for wgmma; the gate is 2 MB, read once",
    blocks_per_sm=2,
    loop_forbids=("LDL", "STL"),
    async_copies=True,
)


def cases() -> list[Case]:
    """Route, sort, quantise and combine for one token, a decode batch and a prefill."""
    return [case for arch in (90, 100) for case in _of(arch)]


def _of(arch: int) -> Iterator[Case]:
    for tokens in (1, 64, 8192):
        ids = meta(tokens, TOP_K, dtype=torch.int32)
        hidden = meta(tokens, HIDDEN)
        for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            gate, bias = meta(EXPERTS, HIDDEN, dtype=kind), meta(EXPERTS, dtype=torch.float32)
            yield Case(
                f"route, {name} gate, {tokens} tokens",
                arch,
                partial(route, hidden, gate, bias, TOP_K, 3.0),
                {"route_logits_kernel": ROUTE},
            )
        yield Case(f"sort, {tokens} tokens", arch, partial(sort, ids, EXPERTS, 0, 16, 10), {})
        unit = meta(dtype=torch.float32)
        for form in ("slabs", "words", "fp8", "fp8 slabs", "nvfp4"):
            yield Case(
                f"sort, hidden as {form}, {tokens} tokens",
                arch,
                partial(sort_and_prepare, hidden, form, ids, EXPERTS, 0, 16, 10, unit),
                {},
            )
        parts = meta(tokens * TOP_K, HIDDEN)
        shared = meta(1, tokens, HIDDEN, dtype=torch.float32)
        yield Case(
            f"combine, {tokens} tokens",
            arch,
            partial(combine, parts, ids, EXPERTS, 0, shared),
            {},
        )
    for tokens in (1, 8192):
        gate_up = meta(tokens, 2 * DENSE)
        yield Case(f"activation, {tokens} tokens", arch, partial(activation, gate_up, None), {})
    for size, offset in ((1280, 0), (320, 64), (160, 96)):
        rows, ids = meta(512, size), meta(64, TOP_K, dtype=torch.int32)
        yield Case(
            f"quantise intermediate, N={size}, offset {offset}",
            arch,
            partial(quantize, rows, "fp8", ids, EXPERTS, 0, offset),
            {},
        )
