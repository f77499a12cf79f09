"""Activations in the form that a grouped GEMM takes them: permuted, in FP8 or in NVFP4.

Each form is one row's work, used twice: on hidden states by the programs that the sort launch has
beside its own, and on the intermediate by a launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import ceil_div, require
from step37_kernels.experts.e4m3_words import word_column
from step37_kernels.experts.grouped_nvfp4_nvfp4 import quantize_nvfp4_row
from step37_kernels.formats.nvfp4 import GROUP_SIZE, NVFP4Tensor
from step37_kernels.formats.nvfp4_tiles import SLAB, permuted_column, permuted_column_fp8
from step37_kernels.launch import launch

GROUP = 128
Form = Literal["slabs", "words", "fp8", "fp8 slabs", "nvfp4"]
"""What becomes of a bf16 row.

slabs, words: bf16 with the channels of every 64 or 16 in the order of `permuted_column` (NVFP4
    weights) or `word_column` (FP8 weights).
fp8: e4m3 with a scale per 128 channels; "fp8 slabs" in the order of `permuted_column_fp8`.
nvfp4: e2m1 with a scale per 16 channels under a given global scale.
"""
_UNIT: dict[Form, int] = {
    "slabs": SLAB, "words": 16, "fp8": 1, "fp8 slabs": SLAB, "nvfp4": GROUP_SIZE
}  # fmt: skip


@dataclass(frozen=True)
class FP8Rows:
    """Rows in e4m3 with a scale per group of 128 channels.

    Args:
        q: e4m3 [R, K].
        scale: fp32 [R, ceil((offset + K) / 128)], offset as `quantize_per_token_group` has it.
    """

    q: Tensor
    scale: Tensor


@triton.jit
def _fp8_row(
    x,
    q,
    scale,
    row,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    PADDED: tl.constexpr,
    SLABS: tl.constexpr,
):
    """Quantise one row [K] of x: amax / 448 per group (1 for zeros), nearest even, saturating."""
    GROUPS: tl.constexpr = (OFFSET + K + 127) // 128
    group = tl.arange(0, PADDED)
    k = group[:, None] * 128 - OFFSET + tl.arange(0, 128)[None, :]
    inside = (k >= 0) & (k < K)
    column = permuted_column_fp8(k) if SLABS else k
    value = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
    # Divisions rounded to nearest, so that the codes are the reference's, bit for bit.
    amax = tl.max(tl.abs(value), axis=1)
    factor = tl.div_rn(amax, tl.full((PADDED,), 448.0, tl.float32))
    factor = tl.where(factor > 0.0, factor, 1.0)
    scaled = tl.div_rn(value, tl.broadcast_to(factor[:, None], (PADDED, 128)))
    keep: tl.constexpr = tl.PropagateNan.ALL
    scaled = tl.minimum(tl.maximum(scaled, -448.0, propagate_nan=keep), 448.0, propagate_nan=keep)
    tl.store(q + row * K + k, scaled.to(q.dtype.element_ty), mask=inside)
    tl.store(scale + row * GROUPS + group, factor, mask=group < GROUPS)


@triton.jit
def prepare_row(
    x,
    out,
    scale,
    global_scale,
    row,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    PADDED: tl.constexpr,
    FORM: tl.constexpr,
):
    """Bring one row [K] of x into FORM; see `prepared_options` for PADDED."""
    if FORM == "fp8" or FORM == "fp8 slabs":
        _fp8_row(x, out, scale, row, K, OFFSET, PADDED, FORM == "fp8 slabs")
    elif FORM == "nvfp4":
        quantize_nvfp4_row(x, out, scale, row, tl.load(global_scale), K, PADDED)
    else:
        position = tl.arange(0, PADDED)
        column = word_column(position) if FORM == "words" else permuted_column(position)
        value = tl.load(x + row * K + column, mask=position < K)
        tl.store(out + row * K + position, value, mask=position < K)


@triton.jit(do_not_specialize=["first_expert"])
def quantize_kernel(
    x,
    out,
    scale,
    global_scale,
    ids,
    first_expert,
    E: tl.constexpr,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    PADDED: tl.constexpr,
    FORM: tl.constexpr,
):
    """One pair's intermediate; pairs of experts that are elsewhere were never written."""
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(ids + row).to(tl.int64) - first_expert
    if (local >= 0) & (local < E):
        prepare_row(x, out, scale, global_scale, row, K, OFFSET, PADDED, FORM)


def prepared_options(size: int, offset: int, form: Form) -> dict[str, int | str]:
    """The constants of `prepare_row` for rows of `size` channels.

    Raises:
        ValueError: `size` is not a multiple of what the form keeps together.
    """
    if size % _UNIT[form]:
        raise ValueError(f"rows have {size} channels, {form} takes a multiple of {_UNIT[form]}")
    parts = {"fp8": ceil_div(offset + size, GROUP), "nvfp4": size // GROUP_SIZE}
    units = parts.get(form.removesuffix(" slabs"), size)
    padded = triton.next_power_of_2(units)
    return {"K": size, "OFFSET": offset, "PADDED": padded, "FORM": form}


def new_fp8_rows(rows: int, size: int, like: Tensor, offset: int = 0) -> FP8Rows:
    """Uninitialised rows of `size` channels on the device of `like`."""
    groups = ceil_div(offset + size, GROUP)
    return FP8Rows(
        like.new_empty((rows, size), dtype=torch.float8_e4m3fn),
        like.new_empty((rows, groups), dtype=torch.float32),
    )


def new_rows(
    rows: int, size: int, like: Tensor, form: Form, offset: int, global_scale: Tensor | None
) -> tuple[Tensor | FP8Rows | NVFP4Tensor, Tensor, Tensor]:
    """Uninitialised rows of a form: the object, and its tensors of values and of scales.

    Raises:
        ValueError: NVFP4 without a global scale, or with one that is not an fp32 scalar.
    """
    if form == "nvfp4":
        if global_scale is None:
            raise ValueError("NVFP4 activations need a global scale: input_scales is None")
        require("global_scale", global_scale, (), (torch.float32,))
        packed = like.new_empty((rows, size // 2), dtype=torch.uint8)
        scale = like.new_empty((rows, size // GROUP_SIZE), dtype=torch.float8_e4m3fn)
        return NVFP4Tensor(packed, scale, global_scale), packed, scale
    if form in ("slabs", "words"):
        out = like.new_empty((rows, size))
        return out, out, out
    fp8 = new_fp8_rows(rows, size, like, offset)
    return fp8, fp8.q, fp8.scale


def quantize(
    intermediate: Tensor,
    form: Form,
    topk_ids: Tensor,
    num_experts: int,
    first_expert: int,
    offset: int = 0,
    global_scale: Tensor | None = None,
) -> Tensor | FP8Rows | NVFP4Tensor:
    """The intermediate in another form, one launch; rows of experts elsewhere stay unwritten.

    Args:
        intermediate: bf16 [P, N], a row per pair.
        form: "fp8" or "nvfp4" (gate-up has it permuted already).
        topk_ids: int32 or int64 [T, top_k], P = T * top_k of them.
        num_experts, first_expert: the experts of this rank.
        offset: where in its first group of 128 the rank's channel 0 stands.
        global_scale: of NVFP4, an fp32 scalar.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require("intermediate", intermediate, (topk_ids.numel(), None), (torch.bfloat16,))
    pairs, size = intermediate.shape
    options = prepared_options(size, offset, form)
    rows, out, scale = new_rows(pairs, size, intermediate, form, offset, global_scale)
    launch(
        quantize_kernel,
        (pairs,),
        intermediate,
        out,
        scale,
        scale if global_scale is None else global_scale,
        topk_ids,
        first_expert,
        E=num_experts,
        num_warps=4,
        **options,
    )
    return rows
