"""The expert layer in fp64 with a bound on what rounding may add, from the arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from step37_kernels.expert_weights import ExpertWeights, FP8Experts, NVFP4Experts
from step37_kernels.formats import nvfp4
from step37_kernels.formats.e4m3 import (
    dequantize_per_token_group,
    quantize_per_token_group,
    to_e4m3,
)

BF16 = 2.0**-8  # unit roundoffs
FP32 = 2.0**-24
E4M3 = 2.0**-4
SILU_SLOPE = 1.1  # the largest of |silu'|
EXP = 2.0**-20  # relative error of silu: exp, a sum and a quotient, a few ulps of fp32 each


def narrow_error(matrix: Tensor, row: Tensor, offset: int = 0) -> Tensor:
    """How far Hopper's FP8 instruction may be off in matrix [N, K] @ row [K], fp64 [N].

    It aligns 32 products and the sum so far to the largest of them and keeps 13 bits below it
    (DeepSeek-V3 report, 3.5.2), which loses at most 33 x 2^-13 of the largest; four times in a
    block of 128, whose sum then goes on in fp32. Column 0 stands at `offset` in its block.
    """
    products = torch.nn.functional.pad(matrix * row, (offset, -(offset + len(row)) % 128))
    products = products.view(len(matrix), -1, 4, 32)
    sums = products.sum(3).cumsum(2).abs().amax(2)
    largest = torch.maximum(products.abs().amax((2, 3)), sums)
    return 4 * 33 * 2.0**-13 * largest.sum(1)


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
    input_scales: tuple[Tensor, Tensor] | None = None,
    narrow: bool = False,
) -> Expected:
    """What `experts` has to return, and the bound.

    Sums of n products in fp32 are off by n unit roundoffs of the sum of magnitudes, whatever their
    order. silu has a slope of at most 1.1 and the clamps of 1. bf16 rounds the intermediate, each
    weighted output and the sum; FP8 activations round the intermediate once more, to e4m3 with a
    scale per group, whose subnormals are 2^-9 of the scale apart. `narrow` adds what a GPU's FP8
    products of FP8 weights lose.
    """
    x = hidden.double()
    offset = weights.intermediate_offset if isinstance(weights, FP8Experts) else 0
    if activations == "fp8":  # the same codes as the kernels', bit for bit
        x = dequantize_per_token_group(*quantize_per_token_group(hidden), dtype=torch.float64)
    units = input_scales or (None, None)
    if activations == "nvfp4":
        x = nvfp4.quantize(hidden, units[0]).dequantize(torch.float64)
    narrow = narrow and activations == "fp8" and isinstance(weights, FP8Experts)
    rounds_weights = activations == "fp8" and isinstance(weights, NVFP4Experts)
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
        if narrow:
            dg, du = dg + narrow_error(gate, row), du + narrow_error(up, row)
        extra = torch.zeros_like(down)
        if rounds_weights:
            dg = dg + (1 + terms) * (weight_error(weights, e, gate, 0) @ row.abs())
            du = du + (1 + terms) * (weight_error(weights, e, up, 1) @ row.abs())
            extra = weight_error(weights, e, down, None)
        s, c = torch.nn.functional.silu(g), u
        if limit:
            s, c = s.clamp(max=limit), c.clamp(-limit, limit)
        h = s * c
        dh = SILU_SLOPE * dg * c.abs() + (s.abs() + SILU_SLOPE * dg) * du + EXP * h.abs()
        h, dh = rounded(h, dh, activations, offset, units[1])
        size = h.abs() + dh
        d = down @ h
        dd = down.abs() @ dh + ((len(h) + 64) * FP32 * down.abs() + extra) @ size + extra @ dh
        if narrow:
            dd = dd + narrow_error(down, h, offset)
        output[token] += float(topk_weights[token, choice]) * d
        slack[token] += w * (dd + BF16 * (d.abs() + dd)) + 8 * FP32 * w * d.abs()
    return Expected(output, slack + BF16 * (output.abs() + slack))


def rounded(
    h: Tensor, dh: Tensor, form: str, offset: int, unit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """An intermediate [N] known up to dh, rounded to bf16 and then to e4m3 or e2m1.

    Rounding is monotone, so what h - dh and h + dh become encloses what the kernel has. With block
    scales that holds at one scale: in a group whose scale is not certain two halves of the widest
    step are added.
    """
    low, middle, high = ((h + side * dh).bfloat16() for side in (-1, 0, 1))
    if form == "same":
        return h, BF16 * (h.abs() + dh) + dh

    def steps(x: Tensor) -> Tensor:
        """What one code is worth, for each channel."""
        if form == "fp8":
            scale = quantize_per_token_group(x[None], offset=offset)[1].double()
            return scale.repeat_interleave(128, 1)[0, offset : offset + len(h)]
        scale = nvfp4.quantize(x[None], unit).block_scale.double() * unit.double()
        return scale.repeat_interleave(16, 1)[0]

    step = steps(middle)

    def through(x: Tensor) -> Tensor:
        if form == "fp8":
            return to_e4m3(x.float() / step.float()).double() * step
        size = (x.float() / step.float()).abs().clamp(max=6.0)
        spacing = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        return torch.sign(x.double()) * torch.round(size / spacing).double() * spacing * step

    kernel = through(middle)
    enclosed = torch.maximum((through(high) - kernel).abs(), (through(low) - kernel).abs())
    largest = steps(torch.maximum(low.abs(), high.abs()))
    certain = largest == steps((h.abs() - dh).clamp(min=0).bfloat16())
    if form == "fp8":
        half = torch.maximum(E4M3 * (h.abs() + dh), largest * 2.0**-10)
    else:
        half = largest * 1.0  # e2m1's widest spacing is 2, between 4 and 6
    return kernel, torch.where(certain, enclosed, 2 * half + dh)


def weight_error(weights: ExpertWeights, e: int, part: Tensor, half: int | None) -> Tensor:
    """What NVFP4 weights lose when they are rounded to e4m3 for FP8 products, [N, K] or [K, N].

    A row is divided by the power of two that brings its largest scale to 32 .. 60: half an e4m3
    step is 2^-4 of a weight's size, or 2^-10 of the row's unit below e4m3's normal numbers.
    """
    assert isinstance(weights, NVFP4Experts)
    size = weights.intermediate_size
    if half is None:
        scale, unit = weights.w2_scale[e], weights.w2_global_scale[e]
    else:
        scale = weights.w13_scale[e, half * size : (half + 1) * size]
        unit = weights.w13_global_scale[e, half]
    power = torch.frexp(scale.float().abs().amax(1).clamp(min=2.0**-9)).exponent - 6
    row = torch.ldexp(torch.ones(len(power)), power).double() * unit.double()
    return E4M3 * part.abs() + 2.0**-10 * row[:, None]
