"""FlashInfer's CUTLASS grouped GEMMs as a second backend of the routed experts, for sm_100 and up.

What `flashinfer.fused_moe.cutlass_fused_moe` 0.7.2 takes there, read from its source:

- BF16 weights with BF16 activations.
- NVFP4 weights with NVFP4 activations: it rounds hidden and the intermediate to NVFP4 itself, with
  each expert's `input_scale` and a dynamic scale per 16, so it is less accurate than BF16
  activations are.
- No FP8 with 128x128 block scales: `use_deepseek_fp8_block_scale` is for sm_90 alone. The FP8 it
  has on sm_100 (one scale per expert, or a power of two per 32) would need requantised weights.

Both GEMMs write bf16, so gate and up are rounded before the activation, unlike in our kernels. The
clamps use fminf and fmaxf, so that under a limit a NaN of gate or up becomes the limit, and NVFP4
activations have no NaN: a token with one may come out finite, without touching the others.
FlashInfer compiles its kernels at the first call: make one before capturing a CUDA graph.
"""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.dispatch import Target
from step37_kernels.expert_weights import BF16Experts, ExpertWeights, FP8Experts, NVFP4Experts
from step37_kernels.formats.e4m3 import to_e4m3

NO_FP8 = "FlashInfer's CUTLASS path takes FP8 with block scales on sm_90 only"
# Rows are read 16 bytes at a time: 8 channels of bf16, 32 of e2m1.
_ALIGNMENT = {"bf16": 8, "nvfp4": 32}
# The scale layout of Blackwell's block-scaled MMA: tiles of 128 rows and 4 scales.
_TILE_ROWS, _TILE_COLUMNS = 128, 4


@dataclass(frozen=True)
class InputScales:
    """The checkpoint's `input_scale`s, with which NVFP4 activations are quantised: amax / 2688.

    Args:
        w13: fp32 [E, 2], of gate_proj and up_proj. FlashInfer rounds hidden once for both, with
            the larger, whose range holds what either saw in calibration.
        w2: fp32 [E], of down_proj.
    """

    w13: Tensor
    w2: Tensor


@dataclass(frozen=True)
class FlashInferExperts:
    """One rank's experts of one layer as `cutlass_fused_moe` reads them.

    Args:
        w13: [E, 2N, K], up above gate (FlashInfer's order): bf16, or 16 e2m1 in an int64.
        w2: [E, K, N] likewise.
        quant_scales: nothing for BF16. For NVFP4 fp32 [E] or swizzled block scales, in the order
            1 / input scale, block scales, factor of the product; of w13, then of w2.
        limit: the clamp that it was prepared for, None for none.
        swiglu_limit: fp32 [E] of limit, or None. Left out, FlashInfer's SwigluStep clamps at 7.
    """

    w13: Tensor
    w2: Tensor
    quant_scales: tuple[Tensor, ...]
    limit: float | None
    swiglu_limit: Tensor | None

    @property
    def format(self) -> str:
        """The weights' format, "bf16" or "nvfp4"."""
        return "nvfp4" if self.quant_scales else "bf16"

    @property
    def num_experts(self) -> int:
        """Experts held by this rank, E."""
        return self.w13.shape[0]

    @property
    def intermediate_size(self) -> int:
        """Intermediate channels of this rank, N."""
        return self.w13.shape[1] // 2

    @property
    def hidden_size(self) -> int:
        """Hidden channels, K."""
        return self.w2.shape[1]


def supports(target: Target) -> tuple[bool, str]:
    """Whether `experts` can run on `target`, and why or why not."""
    if target.device_type != "cuda" or target.capability is None or target.capability < (10, 0):
        return False, "FlashInfer's CUTLASS path is used on sm_100 and up"
    if target.weight_format not in _ALIGNMENT:
        return False, NO_FP8
    try:
        flashinfer = importlib.import_module("flashinfer.fused_moe")
    except (ImportError, OSError, RuntimeError) as error:
        return False, f"flashinfer cannot be imported: {error}"
    if not hasattr(flashinfer.ActivationType, "SwigluStep"):
        return False, "this flashinfer has no ActivationType.SwigluStep"
    known = inspect.signature(flashinfer.cutlass_fused_moe).parameters
    missing = sorted(_Arguments.__annotations__.keys() - known.keys())
    if missing:
        return False, f"this flashinfer's cutlass_fused_moe has no {', '.join(missing)}"
    return True, "FlashInfer's CUTLASS grouped GEMMs with SwigluStep"


def prepare(
    weights: ExpertWeights, limit: float | None, input_scales: InputScales | None = None
) -> FlashInferExperts:
    """A layer's weights laid out for FlashInfer, once at load; it reads scales back from the GPU.

    FlashInfer has one factor per expert for gate and up. Where the checkpoint's two differ:

    - Without a limit the gate's is used for both, which makes up, and so the intermediate, too
      large by gate / up. The scale that quantises the intermediate takes that back; its e2m1 codes
      and block scales are those that the true intermediate has. Ratios are rounded to fp32.
    - With a limit up has to be right where it is clamped. The larger factor is used for both, and
      the block scales of the other half are multiplied by the ratio where all of an expert's are
      exact in e4m3, as they mostly are if it is a power of two; otherwise it is refused.

    Args:
        weights: one rank's experts. The result holds a copy of w13 and of NVFP4's scales, and w2
            itself: drop `weights` after it.
        limit: the layer's clamp of `swiglu_step`; None or 0 is none.
        input_scales: for NVFP4.

    Raises:
        ValueError: FP8 experts, a dtype or shape that FlashInfer does not take, a limit that is
            not a positive number, input_scales missing or not positive, or gate and up factors
            under a limit that no e4m3 block scales can bring together.
    """
    if isinstance(weights, FP8Experts):
        raise ValueError(f"weights are FP8 with block scales: {NO_FP8}")
    alignment = _ALIGNMENT[weights.format]
    for name, size in (
        ("hidden", weights.hidden_size),
        ("intermediate", weights.intermediate_size),
    ):
        if size % alignment:
            raise ValueError(
                f"{name} size is {size}, expected a multiple of {alignment} for {weights.format}"
            )
    limit = _normalised(limit)
    experts = weights.num_experts
    clamp = None if limit is None else weights.w2.new_full((experts,), limit, dtype=torch.float32)
    if isinstance(weights, BF16Experts):
        require("w13", weights.w13, weights.w13.shape, (torch.bfloat16,))
        return FlashInferExperts(
            _up_above_gate(weights.w13), weights.w2.contiguous(), (), limit, clamp
        )
    scales = _nvfp4_scales(weights, limit, _checked(input_scales, experts))
    w13 = _up_above_gate(weights.w13).view(torch.int64)
    return FlashInferExperts(w13, weights.w2.contiguous().view(torch.int64), scales, limit, clamp)


def experts(
    hidden: Tensor,
    weights: FlashInferExperts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    limit: float | None,
    first_expert: int = 0,
    shared: Tensor | None = None,
    total_experts: int | None = None,
) -> Tensor:
    """Sum over a token's experts of topk_weight * down(swiglu_step(gate(x), up(x))).

    FlashInfer sorts ids outside first_expert .. first_expert + E - 1, so also -1, behind all rows,
    multiplies none of them and leaves them out of the sum; a token without an expert here is zero.
    Its unfused finalize sums a token's experts in order: deterministic for given tactics.

    Args:
        hidden: bf16 [T, K], contiguous; T may be 0.
        weights: what `prepare` returned.
        topk_weights: fp32 [T, top_k], contiguous.
        topk_ids: int32 or int64 [T, top_k], contiguous; a token's local ids are distinct.
        limit: the one that `weights` were prepared for.
        first_expert: global id of weights' expert 0, a multiple of E: FlashInfer counts in ranks.
        shared: floating point [S, T, K], the shared expert's parts, added in fp32 to the routed
            sum, which FlashInfer has rounded to bf16.
        total_experts: experts on all ranks, a multiple of E; None: no rank comes after this one.

    Returns:
        bf16 [T, K].

    Raises:
        ValueError: a shape, dtype, layout, device, limit, first_expert or total_experts is wrong.
    """
    require("hidden", hidden, (None, weights.hidden_size), (torch.bfloat16,), contiguous=True)
    tokens, count = hidden.shape[0], weights.num_experts
    require("topk_weights", topk_weights, (tokens, None), (torch.float32,), contiguous=True)
    id_types = (torch.int32, torch.int64)
    require("topk_ids", topk_ids, topk_weights.shape, id_types, contiguous=True)
    if shared is not None:
        require("shared", shared, (None, *hidden.shape))
    for name, tensor in (
        ("weights", weights.w13), ("topk_weights", topk_weights), ("topk_ids", topk_ids)
    ):  # fmt: skip
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, expected hidden's {hidden.device}")
    if (limit or None) != weights.limit:
        raise ValueError(f"limit is {limit}, but the weights were prepared for {weights.limit}")
    total = first_expert + count if total_experts is None else total_experts
    if first_expert < 0 or first_expert % count:
        raise ValueError(
            f"first_expert is {first_expert}, expected a multiple of this rank's {count} experts"
        )
    if total % count or total < first_expert + count:
        raise ValueError(
            f"total_experts is {total}, expected a multiple of {count}, at least "
            f"{first_expert + count}"
        )
    out = torch.empty_like(hidden)
    if tokens:
        flashinfer = importlib.import_module("flashinfer.fused_moe")
        # Without a limit the plain SwiGLU, which passes NaN on; SwigluStep at infinity would not.
        kind = flashinfer.ActivationType
        arguments: _Arguments = {
            "input": hidden,
            "token_selected_experts": topk_ids.to(torch.int32),
            "token_final_scales": topk_weights,
            "fc1_expert_weights": weights.w13,
            "fc2_expert_weights": weights.w2,
            "output_dtype": torch.bfloat16,
            "quant_scales": list(weights.quant_scales) or None,
            "swiglu_limit": weights.swiglu_limit,
            "ep_size": total // count,
            "ep_rank": first_expert // count,
            "output": out,
            "activation_type": kind.Swiglu if weights.limit is None else kind.SwigluStep,
            # The fused one sums with atomics, in another order each time.
            "use_fused_finalize": False,
        }
        flashinfer.cutlass_fused_moe(**arguments)
    if shared is None:
        return out
    return (out.float() + shared.float().sum(0)).to(torch.bfloat16)


class _Arguments(TypedDict):
    """What `cutlass_fused_moe` is called with; everything else keeps its default."""

    input: Tensor
    token_selected_experts: Tensor
    token_final_scales: Tensor
    fc1_expert_weights: Tensor
    fc2_expert_weights: Tensor
    output_dtype: torch.dtype
    quant_scales: list[Tensor] | None
    swiglu_limit: Tensor | None
    ep_size: int
    ep_rank: int
    output: Tensor
    activation_type: Any
    use_fused_finalize: bool


def swizzle_block_scales(scale: Tensor) -> Tensor:
    """NVFP4 block scales in the order in which Blackwell's tensor cores read them.

    Tiles of 128 rows and 4 scales of a row, row-major, 512 bytes each; within one the rows r,
    r + 32, r + 64 and r + 96 lie side by side, 16 bytes in all. Missing rows and columns are zero.
    FlashInfer's SWIZZLED_128x4, `get_sf_out_offset_128x4` in its quantization_utils.cuh.

    Args:
        scale: e4m3 [E, R, C].

    Returns:
        int32 [E, R', C' / 4], R' and C' rounded up to multiples of 128 and 4; four e4m3 each.
    """
    experts, rows, columns = scale.shape
    tile_rows, tile_columns = ceil_div(rows, _TILE_ROWS), ceil_div(columns, _TILE_COLUMNS)
    shape = (experts, tile_rows * _TILE_ROWS, tile_columns * _TILE_COLUMNS)
    padded = torch.zeros(shape, dtype=torch.uint8, device=scale.device)
    padded[:, :rows, :columns] = scale.view(torch.uint8)
    tiles = padded.view(experts, tile_rows, 4, 32, tile_columns, _TILE_COLUMNS)
    return tiles.permute(0, 1, 4, 3, 2, 5).contiguous().view(shape).view(torch.int32)


def _nvfp4_scales(
    weights: NVFP4Experts, limit: float | None, input_scales: InputScales
) -> tuple[Tensor, ...]:
    """FlashInfer's six `quant_scales`; a product's factor is input scale * global scale."""
    _require_positive("w13_global_scale", weights.w13_global_scale)
    block, pair = weights.w13_scale, weights.w13_global_scale
    if limit is None:
        factor, up_over_factor = pair[:, 0], pair[:, 1] / pair[:, 0]
    else:
        block, factor = _with_one_factor(block, pair)
        up_over_factor = torch.ones_like(factor)
    hidden_scale = input_scales.w13.amax(1)
    return (
        1 / hidden_scale,
        swizzle_block_scales(_up_above_gate(block)),
        hidden_scale * factor,
        up_over_factor / input_scales.w2,
        swizzle_block_scales(weights.w2_scale),
        input_scales.w2 * weights.w2_global_scale,
    )


def _with_one_factor(block: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Block scales e4m3 [E, 2N, C] and fp32 [E] with the values of `block` and `pair` fp32 [E, 2].

    Raises:
        ValueError: an expert's product block * pair is no e4m3 times the larger of its pair.
    """
    block, common = block.clone(), pair.amax(1)
    refused = []
    for e in (pair[:, 0] != pair[:, 1]).nonzero().flatten().tolist():
        half = int(pair[e].argmin())
        rows = block[e].chunk(2)[half]
        # 4 by 24 bits: fp64 holds these products, so that equality is exactness.
        wanted = rows.double() * pair[e, half].double()
        rescaled = to_e4m3((wanted / common[e].double()).float())
        if bool((rescaled.double() * common[e].double() == wanted).all()):
            rows.copy_(rescaled)
        else:
            refused.append(e)
    if refused:
        raise ValueError(
            f"w13_global_scale of gate and up differ in experts {refused} (of this rank) by ratios "
            "that e4m3 block scales cannot take up, and with a limit FlashInfer has one factor "
            "for both"
        )
    return block, common


def _up_above_gate(stacked: Tensor) -> Tensor:
    """[E, 2N, ...] with its halves exchanged, in memory of its own."""
    gate, up = stacked.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1)


def _normalised(limit: float | None) -> float | None:
    """The limit, None for 0.

    Raises:
        ValueError: it is negative, infinite or NaN.
    """
    if limit is not None and not 0 <= limit < math.inf:
        raise ValueError(f"limit is {limit}, expected a positive number, or 0 or None for no clamp")
    return limit or None


def _checked(input_scales: InputScales | None, experts: int) -> InputScales:
    """The scales, of the right shape and positive."""
    if input_scales is None:
        raise ValueError(
            "input_scales is None, expected the checkpoint's: FlashInfer rounds the activations of "
            "NVFP4 experts to NVFP4"
        )
    require("input_scales.w13", input_scales.w13, (experts, 2), (torch.float32,))
    require("input_scales.w2", input_scales.w2, (experts,), (torch.float32,))
    _require_positive("input_scales.w13", input_scales.w13)
    _require_positive("input_scales.w2", input_scales.w2)
    return input_scales


def _require_positive(name: str, scale: Tensor) -> None:
    """Check fp32 [E, ...]: ratios and reciprocals of it are taken.

    Raises:
        ValueError: a scale is zero, negative, infinite or NaN; the message names the experts.
    """
    wrong = ~((scale > 0) & scale.isfinite()).view(scale.shape[0], -1).all(1)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} of experts {wrong.nonzero().flatten().tolist()} (of this rank) is not a "
            "positive number"
        )
