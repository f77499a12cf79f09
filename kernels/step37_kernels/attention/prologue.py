"""Head norms, rotary and the cache write of new tokens, in one launch.

Roundings are the reference's (`reference.attention`, prologue and write_cache): q and k stay in
fp32 from the norm to the end of the rotation and are rounded to bf16 once; an e4m3 cache gets the
bf16 value divided by its scale in fp32, saturated at 448, to nearest even. v's codes are therefore
the reference's bit for bit, and so are k's wherever k is the same bf16 number: a few fp32 roundings
differ (order of the sum, fused multiply-adds), which moves a k that lies next to the middle of two
bf16 numbers to its neighbour, and its code by at most one.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.attention import pages, tiles
from step37_kernels.checks import ceil_div, require
from step37_kernels.launch import launch

_E4M3_MAX = tl.constexpr(448.0)
_BEYOND = tl.constexpr(1024.0)  # any finite number that rounds to no code
_ROW_BYTES = 16  # what one thread loads at once


def prologue(
    qkv: Tensor,
    positions: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    cos_sin_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Normalise and rotate q and k per head; return q, write k and v into the cache.

    Args:
        qkv: bf16 [T, at least (Hq + 2 Hkv) * D], in the order q, k, v; further columns are left
            alone. Rows are contiguous and begin at multiples of 16 bytes.
        positions: int [T]; one outside the rotary cache rotates to zeros.
        q_norm_weight, k_norm_weight: [D], bf16 or fp32, of Gemma's norm (1 + weight).
        cos_sin_cache: fp32 [P, rotary_dim]: cosines, then sines. Channel i forms a pair with
            i + rotary_dim / 2; those from rotary_dim on are not rotated.
        num_heads, num_kv_heads: Hq and Hkv.
        eps: of the norm.
        k_cache, v_cache: [S, Hkv, D], bf16 or float8_e4m3fn, written in place.
        slots: int [T], where each token goes; -1, and what the cache does not have, is skipped.
        k_scale, v_scale: a float8_e4m3fn cache holds values divided by them.

    Returns:
        q: bf16 [T, Hq, D].

    Raises:
        ValueError: an argument does not fit.
    """
    tokens, dim = positions.shape[0], q_norm_weight.shape[-1]
    heads = num_heads + 2 * num_kv_heads
    require("qkv", qkv, (tokens, None), (torch.bfloat16,))
    if qkv.shape[1] < heads * dim:
        raise ValueError(f"qkv has {qkv.shape[1]} columns, expected at least {heads * dim}")
    if qkv.stride(1) != 1 or qkv.stride(0) * qkv.itemsize % _ROW_BYTES or qkv.data_ptr() % 16:
        raise ValueError(
            f"qkv has strides {qkv.stride()} and begins at address {qkv.data_ptr():#x}, expected "
            "contiguous rows at multiples of 16 bytes"
        )
    require("positions", positions, (tokens,), pages.INDEX_TYPES)
    weight_types = (torch.bfloat16, torch.float32)
    require("q_norm_weight", q_norm_weight, (dim,), weight_types)
    require("k_norm_weight", k_norm_weight, (dim,), weight_types)
    require("cos_sin_cache", cos_sin_cache, (None, None), (torch.float32,))
    rotary_dim = cos_sin_cache.shape[1]
    if rotary_dim not in (dim // 2, dim):
        raise ValueError(f"cos_sin_cache has {rotary_dim} columns, expected {dim // 2} or {dim}")
    if not cos_sin_cache.is_contiguous():
        raise ValueError(f"cos_sin_cache has strides {cos_sin_cache.stride()}, not contiguous")
    pages.check_cache(k_cache, v_cache, num_heads, dim)
    if k_cache.shape[1] != num_kv_heads:
        raise ValueError(f"k_cache has {k_cache.shape[1]} heads, expected {num_kv_heads}")
    require("slots", slots, (tokens,), pages.INDEX_TYPES)
    pages.check_scale("k_scale", k_scale)
    pages.check_scale("v_scale", v_scale)

    q = torch.empty(tokens, num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    rows = tiles.PROLOGUE_ROWS
    q_programs = ceil_div(tokens * num_heads, rows)
    kv_programs = ceil_div(tokens * num_kv_heads, rows)
    launch(
        prologue_kernel,
        (q_programs + 2 * kv_programs,),
        qkv, positions, q_norm_weight, k_norm_weight, cos_sin_cache, q, k_cache, v_cache, slots,
        tokens, cos_sin_cache.shape[0], k_cache.shape[0], q_programs, kv_programs, eps,
        k_scale, _reciprocal(k_scale), v_scale, _reciprocal(v_scale),
        QKV_STRIDE=qkv.stride(0), SLOT=k_cache.stride(0), HEADS=num_heads, KV_HEADS=num_kv_heads,
        DIM=dim, ROTARY=rotary_dim, ROWS=rows,
        num_warps=4,
    )  # fmt: skip
    return q


def _reciprocal(scale: float) -> float:
    """1 / scale, correctly rounded in fp32 as `_cached` needs it."""
    return float(np.float32(1) / np.float32(scale))


@triton.jit
def _cached(x, scale, inverse, CACHE: tl.constexpr):
    """bf16 as the cache holds it; NaN stays NaN.

    A quotient corrected by its remainder is correctly rounded (Markstein) wherever it is not far
    beyond e4m3's range, in three instructions where a full division takes more than ten.
    """
    if CACHE == tl.float8e4nv:
        keep: tl.constexpr = tl.PropagateNan.ALL
        x = x.to(tl.float32)
        quotient = tl.minimum(x * inverse, _BEYOND, propagate_nan=keep)
        quotient = tl.maximum(quotient, -_BEYOND, propagate_nan=keep)  # finite if x is
        # Times -1, since Triton's minus is 0 - x: so that -0 stays -0.
        excess = tl.fma(quotient, scale, x * -1.0)
        quotient = tl.fma(excess, -inverse, quotient)
        quotient = tl.minimum(quotient, _E4M3_MAX, propagate_nan=keep)
        x = tl.maximum(quotient, -_E4M3_MAX, propagate_nan=keep)
    return x.to(CACHE)


@triton.jit
def _turned(
    source, weight, cos_sin, position, known, real, out, at, written, eps, scale, inverse,
    DIM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of rows: `source` points at each, `out` and `at` at where it is stored."""
    HALF: tl.constexpr = ROTARY // 2
    kind: tl.constexpr = out.dtype.element_ty
    # The pairs' halves are loaded apart: both stand in the same thread, and loads stay wide.
    half, rest_at = tl.arange(0, HALF), ROTARY + tl.arange(0, max(DIM - ROTARY, 1))
    source, out = source[:, None], out + at[:, None]
    first = tl.load(source + half[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    second = tl.load(source + HALF + half[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    if ROTARY < DIM:
        rest = tl.load(source + rest_at[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, 1)
    inverse_rms = tl.rsqrt(squares / DIM + eps)[:, None]

    first *= inverse_rms * (1.0 + tl.load(weight + half).to(tl.float32))[None, :]
    second *= inverse_rms * (1.0 + tl.load(weight + HALF + half).to(tl.float32))[None, :]
    angle = cos_sin + (position.to(tl.int64) * ROTARY)[:, None] + half[None, :]
    cos = tl.load(angle, mask=known[:, None], other=0.0)
    sin = tl.load(angle + HALF, mask=known[:, None], other=0.0)
    turned = (first * cos - second * sin).to(tl.bfloat16)
    tl.store(out + half[None, :], _cached(turned, scale, inverse, kind), mask=written[:, None])
    turned = (second * cos + first * sin).to(tl.bfloat16)
    turned = _cached(turned, scale, inverse, kind)
    tl.store(out + HALF + half[None, :], turned, mask=written[:, None])
    if ROTARY < DIM:
        rest *= inverse_rms * (1.0 + tl.load(weight + rest_at).to(tl.float32))[None, :]
        rest = _cached(rest.to(tl.bfloat16), scale, inverse, kind)
        tl.store(out + rest_at[None, :], rest, mask=written[:, None])


@triton.jit(do_not_specialize=["tokens", "num_positions", "num_slots", "q_programs", "kv_programs"])
def prologue_kernel(
    qkv, positions, q_weight, k_weight, cos_sin, q, k_cache, v_cache, slots,
    tokens, num_positions, num_slots, q_programs, kv_programs, eps,
    k_scale, k_inverse, v_scale, v_inverse,
    QKV_STRIDE: tl.constexpr, SLOT: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS heads of q, of k or of v: the first programs take q's, the next k's, the last v's."""
    program = tl.program_id(0)
    if program < q_programs:
        row = program * ROWS + tl.arange(0, ROWS)
        token, head = row // HEADS, row % HEADS
        real = token < tokens
        position = tl.load(positions + token, mask=real, other=-1)
        known = (position >= 0) & (position < num_positions)
        source = qkv + token.to(tl.int64) * QKV_STRIDE + head * DIM
        _turned(
            source, q_weight, cos_sin, position, known, real, q, row.to(tl.int64) * DIM, real, eps,
            1.0, 1.0, DIM, ROTARY,
        )  # fmt: skip
    else:
        turn = program - q_programs
        row = turn % kv_programs * ROWS + tl.arange(0, ROWS)
        token, head = row // KV_HEADS, row % KV_HEADS
        real = token < tokens
        slot = tl.load(slots + token, mask=real, other=-1).to(tl.int64)
        held = (slot >= 0) & (slot < num_slots)
        at = slot * SLOT + head * DIM
        source = qkv + token.to(tl.int64) * QKV_STRIDE + (HEADS + head) * DIM
        if turn < kv_programs:
            position = tl.load(positions + token, mask=real, other=-1)
            known = (position >= 0) & (position < num_positions)
            _turned(
                source, k_weight, cos_sin, position, known, real, k_cache, at, held, eps, k_scale,
                k_inverse, DIM, ROTARY,
            )  # fmt: skip
        else:
            dim = tl.arange(0, DIM)[None, :]
            v = tl.load(source[:, None] + KV_HEADS * DIM + dim, mask=held[:, None], other=0.0)
            v = _cached(v, v_scale, v_inverse, v_cache.dtype.element_ty)
            tl.store(v_cache + at[:, None] + dim, v, mask=held[:, None])
