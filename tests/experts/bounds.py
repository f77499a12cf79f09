"""The expert layer in fp64 with a bound on what rounding may add, from the arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from step37_kernels.expert_weights import ExpertWeights, FP8Experts
from step37_kernels.formats.e4m3 import dequantize_per_token_group, quantize_per_token_group

BF16 = 2.0**-8  # unit roundoffs
FP32 = 2.0**-24
E4M3 = 2.0**-4
SILU_SLOPE = 1.1  # the largest of |silu'|
EXP = 2.0**-20  # relative error of silu: exp, a sum and a quotient, a few ulps of fp32 each


@dataclass(frozen=True)
class Expected:
    """A layer's output in fp64 and how far the kernels may be from it, both [T, K]."""

    output: Tensor
    bound: Tensor


def expect(
    hidden: Tensor,
    weights: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    limit: float | None,
    first_expert: int = 0,
    activations: str = "same",
) -> Expected:
    """What `experts` has to return, and the bound.

    Sums of n products in fp32 are off by n unit roundoffs of the sum of magnitudes, whatever their
    order. silu has a slope of at most 1.1 and the clamps of 1. bf16 rounds the intermediate, each
    weighted output and the sum; FP8 activations round the intermediate once more, to e4m3 with a
    scale per group, whose subnormals are 2^-9 of the scale apart.
    """
    x = hidden.double()
    offset = weights.intermediate_offset if isinstance(weights, FP8Experts) else 0
    if activations == "fp8":  # the same codes as the kernels', bit for bit
        x = dequantize_per_token_group(*quantize_per_token_group(hidden), dtype=torch.float64)
    output = torch.zeros_like(x)
    slack = torch.zeros_like(x)
    for token, choice in ((topk_ids >= first_expert).nonzero()).tolist():
        e = int(topk_ids[token, choice]) - first_expert
        if e >= weights.num_experts:
            continue
        gate, up, down = (
            part(e, torch.float64) for part in (weights.gate, weights.up, weights.down)
        )
        row, w = x[token], abs(float(topk_weights[token, choice]))
        g, u = gate @ row, up @ row
        terms = (len(row) + 64) * FP32
        dg, du = terms * (gate.abs() @ row.abs()), terms * (up.abs() @ row.abs())
        s, c = torch.nn.functional.silu(g), u
        if limit:
            s, c = s.clamp(max=limit), c.clamp(-limit, limit)
        h = s * c
        dh = SILU_SLOPE * dg * c.abs() + (s.abs() + SILU_SLOPE * dg) * du + EXP * h.abs()
        dh = dh + BF16 * (h.abs() + dh)
        if activations == "fp8":
            magnitude = (h.abs() + dh)[None].float()
            scale = quantize_per_token_group(magnitude, offset=offset)[1].double()
            step = scale.repeat_interleave(128, 1)[0, offset : offset + len(h)] * 2.0**-10
            dh = dh + torch.maximum(E4M3 * (h.abs() + dh), step)
        d, dd = down @ h, down.abs() @ dh + (len(h) + 64) * FP32 * (down.abs() @ (h.abs() + dh))
        output[token] += float(topk_weights[token, choice]) * d
        slack[token] += w * (dd + BF16 * (d.abs() + dd)) + 8 * FP32 * w * d.abs()
    return Expected(output, slack + BF16 * (output.abs() + slack))
