"""Step-3.7's router in two launches: logits split along K, then scores and top-k of each token.

The gate is multiplied as it is stored. Where that is fp32 it is cut into three bf16 parts in
registers, whose products with bf16 hidden states are exact, so that the tensor cores can be used
and no copy of the weight is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.launch import launch

BLOCK_E = 32  # 288 experts are nine tiles of 32 and not a whole number of 64
BLOCK_K = {torch.bfloat16: 128, torch.float32: 32}  # three bf16 parts of more columns spill


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def route_logits_kernel(
    hidden,
    gate,
    logits,
    num_tokens,
    steps,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits [splits, T, E] fp32: `steps` blocks of K, BLOCK_E experts, BLOCK_M tokens."""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    column = tl.arange(0, BLOCK_K)
    real, valid = (expert < E)[:, None], (token < num_tokens)[:, None]
    accumulator = tl.zeros((BLOCK_E, BLOCK_M), tl.float32)
    first = split * steps
    gate += expert[:, None] * K + first * BLOCK_K + column[None, :]
    hidden += token[:, None].to(tl.int64) * K + first * BLOCK_K + column[None, :]
    for step in range(first, tl.minimum(first + steps, (K + BLOCK_K - 1) // BLOCK_K)):
        inside = (step * BLOCK_K + column < K)[None, :]
        weight = tl.load(
            gate,
            mask=real if K % BLOCK_K == 0 else real & inside,
            other=0.0,
        )
        x = tl.load(
            hidden,
            mask=valid if K % BLOCK_K == 0 else valid & inside,
            other=0.0,
        )
        high = weight.to(tl.bfloat16)
        accumulator = tl.dot(high, tl.trans(x), accumulator)
        if weight.dtype == tl.float32:
            rest = weight - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            accumulator = tl.dot(middle, tl.trans(x), accumulator)
            accumulator = tl.dot(low, tl.trans(x), accumulator)
        gate += BLOCK_K
        hidden += BLOCK_K
    row = split.to(tl.int64) * num_tokens + token
    tl.store(
        logits + row[:, None] * E + expert[None, :],
        tl.trans(accumulator),
        mask=(token < num_tokens)[:, None] & (expert < E)[None, :],
    )


@triton.jit(do_not_specialize=["num_tokens"])
def route_topk_kernel(
    logits,
    bias,
    weights,
    ids,
    num_tokens,
    scaling_factor,
    E: tl.constexpr,
    PADDED_E: tl.constexpr,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """weights fp32 and ids int32 [T, TOP_K] of one token, best first."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, PADDED_E)
    real = expert < E
    logit = tl.zeros((PADDED_E,), tl.float32)
    for split in tl.static_range(SPLITS):  # always in this order: the sum's bits do not vary
        logit += tl.load(logits + (split * num_tokens + token) * E + expert, mask=real, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit))
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=real, other=0.0)
    # NaN first, as a descending sort in PyTorch has it; what is not an expert never.
    choice = tl.where(choice == choice, choice, float("inf"))
    choice = tl.where(real, choice, float("-inf"))
    slot = tl.arange(0, PADDED_TOP_K)
    best_ids = tl.zeros((PADDED_TOP_K,), tl.int32)
    best = tl.zeros((PADDED_TOP_K,), tl.float32)
    for k in tl.static_range(TOP_K):
        chosen = tl.argmax(choice, axis=0, tie_break_left=True)
        best_ids = tl.where(slot == k, chosen, best_ids)
        best = tl.where(slot == k, tl.sum(tl.where(expert == chosen, score, 0.0), axis=0), best)
        choice = tl.where(expert == chosen, float("-inf"), choice)
    if RENORMALIZE:
        total = tl.sum(tl.where(slot < TOP_K, best, 0.0), axis=0)
        best = best / tl.maximum(total, 1e-20, propagate_nan=tl.PropagateNan.ALL)
    out = token * TOP_K + slot
    tl.store(weights + out, best * scaling_factor, mask=slot < TOP_K)
    tl.store(ids + out, best_ids, mask=slot < TOP_K)


def route(
    hidden: Tensor,
    gate_weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    scaling_factor: float,
    renormalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Pick the top-k experts of every token and their weights, as `reference.route` does.

    Two launches. Logits are sums of exact products in fp32, so experts whose scores differ by no
    more than fp32's rounding may change places; equal scores go to the lower id. The sum over K
    does not depend on other tokens, but its order depends on the number of tokens (`route_tile`).

    Args:
        hidden: bf16 [T, K], contiguous.
        gate_weight: bf16 or fp32 [E, K], contiguous.
        bias: fp32 [E] or None.
        top_k: experts per token, 1 to E.
        scaling_factor: multiplies the weights.
        renormalize: make a token's weights add up to 1 before scaling.

    Returns:
        weights fp32 [T, top_k] and ids int32 [T, top_k], best first.

    Raises:
        ValueError: a shape, dtype or layout does not fit, or top_k is out of range.
    """
    require("hidden", hidden, (None, None), (torch.bfloat16,), contiguous=True)
    num_tokens, size = hidden.shape
    gate_types = (torch.bfloat16, torch.float32)
    require("gate_weight", gate_weight, (None, size), gate_types, contiguous=True)
    experts = gate_weight.shape[0]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to the number of experts {experts}")
    if bias is not None:
        require("bias", bias, (experts,), (torch.float32,), contiguous=True)
    block_k = BLOCK_K[gate_weight.dtype]
    block_m, steps = route_tile(num_tokens, gate_weight)
    splits = ceil_div(size, steps * block_k)
    new = hidden.new_empty
    logits = new((splits, num_tokens, experts), dtype=torch.float32)
    launch(
        route_logits_kernel,
        (ceil_div(experts, BLOCK_E), ceil_div(num_tokens, block_m), splits),
        hidden,
        gate_weight,
        logits,
        num_tokens,
        steps,
        K=size,
        E=experts,
        BLOCK_M=block_m,
        BLOCK_E=BLOCK_E,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=4,
    )
    weights = new((num_tokens, top_k), dtype=torch.float32)
    ids = new((num_tokens, top_k), dtype=torch.int32)
    launch(
        route_topk_kernel,
        (num_tokens,),
        logits,
        logits if bias is None else bias,
        weights,
        ids,
        num_tokens,
        float(scaling_factor),
        E=experts,
        PADDED_E=triton.next_power_of_2(experts),
        SPLITS=splits,
        TOP_K=top_k,
        PADDED_TOP_K=triton.next_power_of_2(top_k),
        HAS_BIAS=bias is not None,
        RENORMALIZE=renormalize,
        num_warps=2,  # 512 padded experts are eight values a lane
    )
    return weights, ids


def route_tile(num_tokens: int, gate_weight: Tensor) -> tuple[int, int]:
    """Tokens of a tile of logits, and steps of BLOCK_K columns in one split.

    Enough programs for about 132 SMs, at least 256 columns each; in powers of two, since every
    number of splits is another compilation.
    """
    experts, size = gate_weight.shape
    block_m = 16 if num_tokens <= 64 else 64
    tiles = ceil_div(experts, BLOCK_E) * ceil_div(num_tokens, block_m)
    wanted = max(1, min(144 // max(tiles, 1), size // 256))
    wanted = 1 << wanted.bit_length() - 1
    return block_m, ceil_div(ceil_div(size, wanted), BLOCK_K[gate_weight.dtype])
