"""Add up each token's routed parts and the shared expert's, in fp32 and in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.launch import launch

BLOCK_K = 1024


@triton.jit(do_not_specialize=["num_tokens", "first_expert"])
def combine_kernel(
    partial,
    ids,
    shared,
    out,
    num_tokens,
    first_expert,
    E: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED_PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K channels of one token. A pair of another rank was not written and is not read."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    total = tl.zeros((BLOCK_K,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        local = tl.load(ids + pair).to(tl.int64) - first_expert
        here = (local >= 0) & (local < E)
        total += tl.load(partial + pair * K + k, mask=inside & here, other=0.0).to(tl.float32)
    for part in tl.static_range(SHARED_PARTS):
        row = part * num_tokens + token
        total += tl.load(shared + row * K + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * K + k, total.to(out.dtype.element_ty), mask=inside)


def combine(
    partial: Tensor, topk_ids: Tensor, num_experts: int, first_expert: int, shared: Tensor | None
) -> Tensor:
    """Sum over a token's local experts of its rows of `partial`, plus the shared expert's parts.

    Args:
        partial: bf16 [P, K], each pair's output times its router weight, P = T * top_k.
        topk_ids: int32 or int64 [T, top_k], contiguous.
        num_experts, first_expert: the experts of this rank.
        shared: fp32 or bf16 [S, T, K], contiguous, or None.

    Returns:
        bf16 [T, K], rounded once.

    Raises:
        ValueError: a shape, dtype or layout does not fit.
    """
    num_tokens, top_k = topk_ids.shape
    require("partial", partial, (num_tokens * top_k, None), (torch.bfloat16,), contiguous=True)
    size = partial.shape[1]
    if shared is not None:
        kinds = (torch.float32, torch.bfloat16)
        require("shared", shared, (None, num_tokens, size), kinds, contiguous=True)
    out = partial.new_empty((num_tokens, size))
    launch(
        combine_kernel,
        (num_tokens, ceil_div(size, BLOCK_K)),
        partial,
        topk_ids,
        partial if shared is None else shared,
        out,
        num_tokens,
        first_expert,
        E=num_experts,
        K=size,
        TOP_K=top_k,
        SHARED_PARTS=0 if shared is None else shared.shape[0],
        BLOCK_K=BLOCK_K,
        num_warps=4,
    )
    return out
