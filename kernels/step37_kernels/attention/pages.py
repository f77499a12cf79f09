"""What every attention operation asks of a paged cache, and the check of what only devices see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from step37_kernels.checks import debugging, require

PAGE_SIZES = (1, 16, 32, 64)
CACHE_TYPES = (torch.bfloat16, torch.float8_e4m3fn)
INDEX_TYPES = (torch.int32, torch.int64)
MAX_BATCH = 512
"""Sequences of a batch: the kernels hold one number of each in registers."""


def check_cache(k_cache: Tensor, v_cache: Tensor, num_heads: int, head_dim: int) -> None:
    """Check a layer's cache [S, Hkv, D], bf16 or e4m3, whose slots are contiguous inside.

    Raises:
        ValueError: shapes, types or strides do not fit, or Hkv does not divide `num_heads`.
    """
    if head_dim < 32 or head_dim & (head_dim - 1):
        raise ValueError(f"q has head dim {head_dim}, expected a power of two from 32")
    require("k_cache", k_cache, (None, None, head_dim), CACHE_TYPES)
    require("v_cache", v_cache, k_cache.shape, (k_cache.dtype,))
    kv_heads = k_cache.shape[1]
    if kv_heads == 0 or num_heads % kv_heads:
        raise ValueError(f"q has {num_heads} heads, expected a multiple of k_cache's {kv_heads}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride()[1:] != (head_dim, 1) or cache.stride(0) != k_cache.stride(0):
            raise ValueError(
                f"{name} has strides {cache.stride()}, expected ({k_cache.stride(0)}, "
                f"{head_dim}, 1): contiguous slots, k_cache's and v_cache's alike"
            )


def check_paging(page_table: Tensor, seq_lens: Tensor, page_size: int, batch: int) -> None:
    """Check page_table, int32 [B, max_pages] with contiguous rows, and seq_lens, int [B].

    Raises:
        ValueError: a shape, type, stride, the page size or the batch size is another one.
    """
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size is {page_size}, expected one of {PAGE_SIZES}")
    if batch > MAX_BATCH:
        raise ValueError(f"the batch has {batch} sequences, at most {MAX_BATCH} are supported")
    require("page_table", page_table, (batch, None), (torch.int32,))
    if page_table.shape[1] > 1 and page_table.stride(1) != 1:
        raise ValueError(f"page_table has strides {page_table.stride()}, expected (any, 1)")
    require("seq_lens", seq_lens, (batch,), INDEX_TYPES)
    if batch > 1 and seq_lens.stride(0) != 1:
        raise ValueError(f"seq_lens has stride {seq_lens.stride(0)}, expected 1")


def check_scale(name: str, scale: float) -> None:
    """Check a cache scale.

    Raises:
        ValueError: it is not a positive finite number.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{name} is {scale}, expected a positive number")


def debug_check(
    page_table: Tensor, seq_lens: Tensor, page_size: int, num_slots: int, visible: int | None = None
) -> None:
    """With STEP37_DEBUG=1 read lengths and pages back from the device and check them.

    Without it the kernels touch nothing out of bounds, and say nothing. Not for CUDA graphs.

    Args:
        visible: only pages of the last so many keys of a sequence are read; None is all.

    Raises:
        ValueError: a length that the page table cannot hold or a page that the cache does not
            have; the first such sequence is named.
    """
    if not debugging():
        return
    longest, pages = page_table.shape[1] * page_size, num_slots // page_size
    table = page_table.cpu()
    for sequence, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= longest:
            raise ValueError(
                f"sequence {sequence} has seq_len {length}, expected 0 to {longest} "
                "(what its row of page_table holds)"
            )
        first = 0 if visible is None else max(0, length - visible)
        used = table[sequence, first // page_size : -(-length // page_size)]
        wrong = used[(used < 0) | (used >= pages)]
        if len(wrong):
            raise ValueError(
                f"sequence {sequence} has page {int(wrong[0])}, expected 0 to {pages - 1}"
            )
