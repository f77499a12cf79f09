"""The routed experts: gate and up projection, clamped SwiGLU, down projection, weighted sum."""

from typing import Literal

import torch
from torch import Tensor

from step37_kernels.checks import require
from step37_kernels.expert_weights import ExpertWeights, FP8Experts
from step37_kernels.formats import nvfp4
from step37_kernels.formats.e4m3 import dequantize_per_token_group, quantize_per_token_group
from step37_kernels.reference.activation import swiglu_step


def experts(
    hidden: Tensor,
    weights: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    limit: float | None,
    first_expert: int = 0,
    activations: Literal["same", "fp8", "nvfp4"] = "same",
    shared: Tensor | None = None,
    total_experts: int | None = None,
    input_scales: tuple[Tensor, Tensor] | None = None,
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
            weights they begin at weights.intermediate_offset. "nvfp4" rounds both to e2m1 with a
            scale per token and 16 channels.
        shared: floating point [S, T, K], partial sums of the shared expert's output, or None; they
            are added in fp32.
        total_experts: experts of all ranks; kernels choose tiles by it, no result depends on it.
        input_scales: fp32 scalars, NVFP4's global scales of hidden and of the intermediate.

    Returns:
        [T, K] in hidden's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, activations is another word, or input_scales are
            missing.
    """
    require("hidden", hidden, (None, weights.hidden_size))
    require("topk_weights", topk_weights, (hidden.shape[0], None), (torch.float32,))
    require("topk_ids", topk_ids, topk_weights.shape, (torch.int32, torch.int64))
    if activations not in ("same", "fp8", "nvfp4"):
        raise ValueError(f"activations is {activations!r}, expected 'same', 'fp8' or 'nvfp4'")
    if activations == "nvfp4" and input_scales is None:
        raise ValueError("input_scales is None, expected two scales for activations 'nvfp4'")
    offset = weights.intermediate_offset if isinstance(weights, FP8Experts) else 0

    def rounded(x: Tensor, which: int) -> Tensor:
        if activations == "fp8":
            return _through_e4m3(x, offset if which else 0)
        return x.float() if input_scales is None else _through_nvfp4(x, input_scales[which])

    x = rounded(hidden, 0)

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
        intermediate = rounded(swiglu_step(gate_up, limit), 1)
        down = intermediate @ weights.down(e, torch.float32).T
        out.index_add_(0, rows, down * topk_weights[rows, columns, None])
    if shared is not None:
        require("shared", shared, (None, *hidden.shape))
        out += shared.float().sum(0)
    return out.to(hidden.dtype)


def _through_nvfp4(x: Tensor, global_scale: Tensor) -> Tensor:
    """x [T, K] rounded to e2m1 with a scale per token and 16 channels, as fp32."""
    if not x.numel():
        return x.float()
    return nvfp4.quantize(x, global_scale).dequantize(torch.float32)


def _through_e4m3(x: Tensor, offset: int = 0) -> Tensor:
    """x [T, K] rounded to e4m3 with a scale per token and 128 channels, as fp32."""
    q, scale = quantize_per_token_group(x, offset=offset)
    return dequantize_per_token_group(q, scale, offset=offset)
