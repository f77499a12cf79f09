"""The routed experts: gate and up projection, clamped SwiGLU, down projection, weighted sum."""

from typing import Literal

import torch
from torch import Tensor

from step37_kernels.checks import require
from step37_kernels.expert_weights import ExpertWeights, FP8Experts
from step37_kernels.formats.e4m3 import dequantize_per_token_group, quantize_per_token_group
from step37_kernels.reference.activation import swiglu_step


def experts(
    hidden: Tensor,
    weights: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    limit: float | None,
    first_expert: int = 0,
    activations: Literal["same", "fp8"] = "same",
    shared: Tensor | None = None,
) -> Tensor:
    """Sum over a token's experts of topk_weight * down(swiglu_step(gate(x), up(x))), in fp32.

    Ids outside first_expert .. first_expert + E - 1, so also -1, contribute nothing: another rank
    holds them (expert parallelism), or the token is padding.

    Args:
        hidden: [T, K], floating point; T may be 0.
        weights: this rank's experts, in any format; dequantised to fp32 for each active expert.
        topk_weights: fp32 [T, top_k].
        topk_ids: int32 or int64 [T, top_k].
        limit: the clamp of `swiglu_step`.
        first_expert: global id of weights' expert 0.
        activations: "same" multiplies hidden and the intermediate as they are; "fp8" first rounds
            both to e4m3 with a scale per token and group of 128, as kernels with FP8 products do.
            The intermediate's groups are the checkpoint's blocks, cut by the shard: with FP8
            weights they begin at weights.intermediate_offset.
        shared: floating point [S, T, K], partial sums of the shared expert's output, or None; they
            are added in fp32.

    Returns:
        [T, K] in hidden's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, or activations is another word.
    """
    require("hidden", hidden, (None, weights.hidden_size))
    require("topk_weights", topk_weights, (hidden.shape[0], None), (torch.float32,))
    require("topk_ids", topk_ids, topk_weights.shape, (torch.int32, torch.int64))
    if activations not in ("same", "fp8"):
        raise ValueError(f"activations is {activations!r}, expected 'same' or 'fp8'")
    fp8 = activations == "fp8"
    x = _through_e4m3(hidden) if fp8 else hidden.float()
    offset = weights.intermediate_offset if isinstance(weights, FP8Experts) else 0

    local = topk_ids.long() - first_expert
    token, choice = ((local >= 0) & (local < weights.num_experts)).nonzero(as_tuple=True)
    expert, order = local[token, choice].sort(stable=True)
    token, choice = token[order], choice[order]
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    active, counts = expert.unique_consecutive(return_counts=True)
    for e, rows, columns in zip(
        active.tolist(), token.split(counts.tolist()), choice.split(counts.tolist()), strict=True
    ):
        part = x[rows]
        gate_up = torch.cat(
            [part @ weights.gate(e, torch.float32).T, part @ weights.up(e, torch.float32).T], dim=-1
        )
        intermediate = swiglu_step(gate_up, limit)
        if fp8:
            intermediate = _through_e4m3(intermediate, offset)
        down = intermediate @ weights.down(e, torch.float32).T
        out.index_add_(0, rows, down * topk_weights[rows, columns, None])
    if shared is not None:
        require("shared", shared, (None, *hidden.shape))
        out += shared.float().sum(0)
    return out.to(hidden.dtype)


def _through_e4m3(x: Tensor, offset: int = 0) -> Tensor:
    """x [T, K] rounded to e4m3 with a scale per token and 128 channels, as fp32."""
    q, scale = quantize_per_token_group(x, offset=offset)
    return dequantize_per_token_group(q, scale, offset=offset)
