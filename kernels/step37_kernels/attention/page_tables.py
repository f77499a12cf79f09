"""Where a batch's keys are, for all layers of a pass: page tables and lengths, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.attention import pages, tiles
from step37_kernels.checks import ceil_div, require
from step37_kernels.launch import launch


def page_tables(
    req_to_token: Tensor,
    requests: Tensor,
    seq_lens: Tensor,
    drafts: int,
    query_lens: Tensor | int | None,
    page_size: int,
    lengths: Tensor,
    full: Tensor | None,
    sliding: Tensor | None = None,
    full_to_sliding: Tensor | None = None,
    window: int | None = None,
    new_slots: Tensor | None = None,
    sliding_slots: Tensor | None = None,
) -> None:
    """What `reference.page_tables` does, in one launch that a CUDA graph can hold.

    Lengths are read on the device and the grid depends on shapes alone. Nothing outside the
    tensors is touched: a request that `req_to_token` does not have gets pages of -1, as a slot
    does that `full_to_sliding` does not have, where the reference raises.

    Args, raises: as of `reference.page_tables`.
    """
    batch = requests.shape[0] if requests.dim() else 0
    columns = _check_tables(req_to_token, batch, page_size, full, sliding)
    for name, tensor in (("requests", requests), ("seq_lens", seq_lens)):
        require(name, tensor, (batch,), pages.INDEX_TYPES, contiguous=True)
    require("lengths", lengths, (batch,), (torch.int32,), contiguous=True)
    if isinstance(query_lens, Tensor):
        require("query_lens", query_lens, (batch,), pages.INDEX_TYPES, contiguous=True)
    _check_sliding(sliding, full_to_sliding, new_slots, sliding_slots)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected a positive number or None")

    programs = tiles.page_table_programs(columns, batch)
    capacity = 0 if sliding_slots is None else sliding_slots.shape[0]
    number = query_lens if isinstance(query_lens, int) else None
    launch(
        page_tables_kernel,
        (batch * programs + ceil_div(capacity, tiles.PAGE_TABLE_BLOCK),),
        req_to_token, requests, seq_lens, None if number is not None else query_lens,
        full_to_sliding, new_slots, lengths, full, sliding, sliding_slots,
        drafts, 1 if number is None else number, number or 0, batch, programs,
        req_to_token.shape[0], columns, 0 if full_to_sliding is None else full_to_sliding.shape[0],
        0 if new_slots is None else new_slots.shape[0], capacity, req_to_token.stride(0),
        0 if full is None else full.stride(0), 0 if sliding is None else sliding.stride(0),
        PAGE=page_size, WINDOW=window or 0, BLOCK=tiles.PAGE_TABLE_BLOCK,
        num_warps=4,
    )  # fmt: skip


def _check_tables(
    req_to_token: Tensor, batch: int, page_size: int, full: Tensor | None, sliding: Tensor | None
) -> int:
    """Check what is read and the two tables; returns the pages of their rows."""
    if page_size not in pages.PAGE_SIZES:
        raise ValueError(f"page_size is {page_size}, expected one of {pages.PAGE_SIZES}")
    require("req_to_token", req_to_token, (None, None), (torch.int32,))
    tables = [(n, t) for n, t in (("full", full), ("sliding", sliding)) if t is not None]
    if not tables:
        raise ValueError("full and sliding are None, expected one of them")
    columns, most = tables[0][1].shape[-1], ceil_div(req_to_token.shape[1], page_size)
    for name, table in tables:
        require(name, table, (batch, columns), (torch.int32,))
    if columns > most:
        raise ValueError(
            f"{tables[0][0]} has {columns} pages, expected at most the {most} of req_to_token"
        )
    for name, table in (("req_to_token", req_to_token), *tables):
        if table.shape[1] > 1 and table.stride(1) != 1:
            raise ValueError(f"{name} has strides {table.stride()}, expected (any, 1)")
    return columns


def _check_sliding(
    sliding: Tensor | None,
    full_to_sliding: Tensor | None,
    new_slots: Tensor | None,
    sliding_slots: Tensor | None,
) -> None:
    """Check what belongs to the sliding pool: all of it is there or nothing."""
    absent = [t is None for t in (sliding, full_to_sliding, new_slots, sliding_slots)]
    if any(absent) and not all(absent):
        raise ValueError(
            "some of sliding, full_to_sliding, new_slots and sliding_slots are None, expected all "
            "or none of them"
        )
    if full_to_sliding is None or new_slots is None or sliding_slots is None:
        return
    require("full_to_sliding", full_to_sliding, (None,), pages.INDEX_TYPES, contiguous=True)
    require("new_slots", new_slots, (None,), pages.INDEX_TYPES, contiguous=True)
    require("sliding_slots", sliding_slots, (None,), (torch.int64,), contiguous=True)
    if len(sliding_slots) < len(new_slots):
        raise ValueError(
            f"sliding_slots has {len(sliding_slots)} places, expected at least {len(new_slots)}, "
            "as many as new_slots"
        )


@triton.jit
def _moved(full_to_sliding, slot, mapped, wanted):
    """The sliding pool's slots, of `wanted` only; -1 where there is none."""
    there = wanted & (slot >= 0) & (slot < mapped)
    return tl.load(full_to_sliding + slot.to(tl.int64), mask=there, other=-1)


@triton.jit
def _page_of(slot, PAGE: tl.constexpr):
    """The page of a slot; of a negative one -1, which no kernel reads (division rounds to 0)."""
    return tl.where(slot < 0, -1, slot // PAGE).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "drafts", "queries", "least", "batch", "programs", "rows", "pages", "mapped", "tokens",
        "capacity", "full_stride", "sliding_stride",
    ]
)  # fmt: skip
def page_tables_kernel(
    req_to_token, requests, seq_lens, query_lens, full_to_sliding, new_slots, lengths, full,
    sliding, sliding_slots, drafts, queries, least, batch, programs, rows, pages, mapped, tokens,
    capacity, row_stride, full_stride, sliding_stride,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`programs` for each sequence, which share its blocks of pages; the others move new slots."""
    program = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    if program < batch * programs:
        seq, turn = program // programs, program % programs
        length = tl.load(seq_lens + seq).to(tl.int32) + drafts
        length = tl.maximum(length, least)
        if turn == 0:
            tl.store(lengths + seq, length)
        used = tl.minimum((length + PAGE - 1) // PAGE, pages)
        first = used * 0
        if WINDOW > 0:
            if query_lens is not None:
                queries = tl.load(query_lens + seq).to(tl.int32)
            first = tl.maximum(length - (queries + WINDOW - 1), 0) // PAGE
        block = turn
        if full is None:
            block += first // BLOCK
        request = tl.load(requests + seq).to(tl.int64)
        known = (request >= 0) & (request < rows)
        row = req_to_token + request * row_stride
        for start in range(block * BLOCK, used, programs * BLOCK):
            page = start + index
            held = page < used
            slot = tl.load(row + page * PAGE, mask=held & known, other=-1)
            if full is not None:
                at = full + seq.to(tl.int64) * full_stride + page
                tl.store(at, _page_of(slot, PAGE), mask=held)
            if sliding is not None:
                seen = held & (page >= first)
                at = sliding + seq.to(tl.int64) * sliding_stride + page
                slot = _moved(full_to_sliding, slot, mapped, seen)
                tl.store(at, _page_of(slot, PAGE), mask=seen)
    else:
        at = (program - batch * programs) * BLOCK + index
        if sliding_slots is not None:
            new = at < tokens
            slot = tl.load(new_slots + at, mask=new, other=-1)
            slot = _moved(full_to_sliding, slot, mapped, new).to(tl.int64)
            tl.store(sliding_slots + at, tl.where(new, slot, 0), mask=at < capacity)
