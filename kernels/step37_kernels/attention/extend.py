"""Extend (prefill): new tokens attend over their sequence's cached prefix and over themselves.

One launch for a batch of sequences of any lengths. The new tokens' keys and values are in the
paged cache already (the prologue wrote them), so all keys are read from there.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.arch import arch_of
from step37_kernels.attention import pages
from step37_kernels.attention.tiles import batch_block, extend_tile, most_extend_tiles
from step37_kernels.checks import require
from step37_kernels.launch import launch

# Probabilities are kept as 2^15 p: at most 32768, so fp16 holds them, and as precise as bf16 down
# to p = 2^-31 where plain p would end at 2^-25. The factor cancels in the division by their sum.
_P_EXPONENT = tl.constexpr(15.0)


def extend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    page_size: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    head_gate: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention of each sequence's newest tokens, in one launch.

    `reference.attention.attend` over pages: query i of a sequence stands at position
    p = seq_len - query_len + i and sees the keys p - window + 1 .. p. Over a float8_e4m3fn cache
    keys, values, queries and probabilities are multiplied in fp16 (exact for e4m3, and for bf16
    queries from 2^-14 up to 65504, beyond which they saturate), over bf16 in bf16; sums and softmax
    are in fp32. Keys that a query does not see never change its output, NaN or not.

    What only the device can see is checked with STEP37_DEBUG=1 alone: else pages outside the cache
    read as zeros, keys past the page table are not there, and rows of q that no sequence claims
    are not written. The host reads nothing, and the grid depends on shapes.

    Args:
        q: bf16 [Tq, Hq, D], contiguous, the sequences' queries one after the other.
        k_cache, v_cache: bf16 or float8_e4m3fn [S, Hkv, D], of `reference.write_cache`.
        page_table: int32 [B, max_pages]; page p is the slots p * page_size .. + page_size - 1.
        seq_lens: int32 or int64 [B], keys of each sequence, the new ones included.
        query_lens: int32 or int64 [B], queries of each sequence, 0 for padding; they add up to Tq.
        softmax_scale: multiplies the scores, normally D^-0.5.
        window: number of keys a query sees at most; None is all.
        page_size: 1, 16, 32 or 64.
        k_scale, v_scale: of an e4m3 cache; not used over bf16.
        head_gate: bf16 or fp32 [Tq, Hq] logits or None; outputs are multiplied by their sigmoid.
            Rows may be apart, as columns of a wider matrix are.

    Returns:
        bf16 [Tq, Hq * D].

    Raises:
        ValueError: a shape, dtype, device, scale, window or page size is not one of these.
    """
    require("q", q, (None, None, None), (torch.bfloat16,))
    num_tokens, num_heads, head_dim = q.shape
    pages.check_cache(k_cache, v_cache, num_heads, head_dim)
    num_sequences, max_pages = page_table.shape[0], page_table.shape[-1]
    pages.check_paging(page_table, seq_lens, page_size, num_sequences)
    require("query_lens", query_lens, (num_sequences,), pages.INDEX_TYPES)
    if num_tokens and not num_sequences:
        raise ValueError(f"page_table has 0 sequences, expected some for the {num_tokens} tokens")
    if head_gate is not None:
        require("head_gate", head_gate, (num_tokens, num_heads), (torch.bfloat16, torch.float32))
    _check_memory(q, k_cache, v_cache, page_table, seq_lens, query_lens, head_gate)
    for name, scale in (
        ("softmax_scale", softmax_scale),
        ("k_scale", k_scale),
        ("v_scale", v_scale),
    ):
        pages.check_scale(name, scale)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected a positive number or None")
    visible = None if window is None else window + num_tokens - 1
    pages.debug_check(page_table, seq_lens, page_size, k_cache.shape[0], visible)

    fp8 = k_cache.dtype == torch.float8_e4m3fn
    num_kv_heads = k_cache.shape[1]
    tile = extend_tile(k_cache.dtype, arch_of(q))
    tiles = most_extend_tiles(tile, num_tokens, num_sequences, num_heads // num_kv_heads)
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
    launch(
        extend_kernel,
        (tiles, num_kv_heads),
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        query_lens,
        head_gate,
        out,
        softmax_scale * (k_scale if fp8 else 1.0) * math.log2(math.e),
        v_scale if fp8 else 1.0,
        num_tokens,
        k_cache.shape[0] // page_size,
        num_sequences,
        max_pages,
        page_table.stride(0),
        0 if head_gate is None else head_gate.stride(0),
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        SLOT=k_cache.stride(0),
        PAGE_SIZE=page_size,
        WINDOW=0 if window is None else window,
        BLOCK_BATCH=batch_block(num_sequences),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_KEYS=tile.block_keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _check_memory(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor,
    head_gate: Tensor | None,
) -> None:
    """Check devices, and the strides that the kernel takes for granted."""
    on_device = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "page_table": page_table,
        "seq_lens": seq_lens,
        "query_lens": query_lens,
    }
    if head_gate is not None:
        on_device["head_gate"] = head_gate
        if head_gate.stride(1) != 1:
            raise ValueError(f"head_gate has strides {head_gate.stride()}, expected (any, 1)")
    for name, tensor in on_device.items():
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {q.device} as q")
    for name, tensor in (("q", q), ("query_lens", query_lens)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected it contiguous")


@triton.jit
def _tile_of_program(
    query_lens, num_tokens, num_sequences, GROUP: tl.constexpr, BLOCK_BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """(sequence, its first token, its query_len, tile in it) of this program; sequence -1: none."""
    index = tl.arange(0, BLOCK_BATCH)
    lens = tl.load(query_lens + index, mask=index < num_sequences, other=0).to(tl.int32)
    lens = tl.minimum(tl.maximum(lens, 0), num_tokens)
    tiles = tl.cdiv(lens * GROUP, BLOCK_ROWS)
    # Last tiles first: they see the most keys, and the short ones fill the gaps at the end.
    tile = tl.sum(tiles, 0) - 1 - tl.program_id(0)
    sequence = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = index < sequence
    first_token = tl.sum(tl.where(before, lens, 0), 0)
    query_len = tl.sum(tl.where(index == sequence, lens, 0), 0)
    first_tile = tl.sum(tl.where(before, tiles, 0), 0)
    return tl.where(tile < 0, -1, sequence), first_token, query_len, tile - first_tile


@triton.jit
def _slots(
    pages, start, end_key, num_pages, PAGE_SIZE: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Cache slot of each key of a block, -1 from end_key on and for pages outside the cache."""
    index = tl.arange(0, BLOCK_KEYS)
    if ALIGNED and PAGE_SIZE == BLOCK_KEYS:
        page = tl.load(pages + start // PAGE_SIZE)
        slot = page.to(tl.int64) * PAGE_SIZE + index
    elif ALIGNED:
        at = pages + start // PAGE_SIZE + index // PAGE_SIZE
        page = tl.load(at, mask=start + index < end_key, other=-1)
        slot = page.to(tl.int64) * PAGE_SIZE + index % PAGE_SIZE
    else:
        key = (start + index).to(tl.uint32)
        page = tl.load(pages + key // PAGE_SIZE, mask=start + index < end_key, other=-1)
        slot = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
    held = (page >= 0) & (page < num_pages) & (start + index < end_key)
    return tl.where(held, slot, -1)


@triton.jit
def _gather(cache, slot, SLOT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One head's rows of `slot`, [keys, HEAD_DIM]; zeros for slot -1."""
    rows = cache + slot[:, None] * SLOT + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(rows, mask=slot[:, None] >= 0, other=0.0)


@triton.jit
def _attend(
    state, q, position, k_cache, v_cache, pages, first_key, end_key, all_from, all_to, scale,
    num_pages, SLOT: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """The state (sum of 2^15 p v, sum of 2^15 p, largest score) after first_key .. end_key - 1.

    Online softmax (Milakov and Gimelshein, arXiv 1805.02867): sums are relative to the running
    maximum and rescaled when it grows.

    Every row sees the keys all_from .. all_to - 1; with EDGES the blocks that reach beyond are
    masked. A probability of zero does not stop a value that is NaN or infinite, so in those blocks
    a key with such a value has it replaced by zeros and gets a score of NaN: the rows that see the
    key become NaN, all dims, and no others.
    """
    HEAD_DIM: tl.constexpr = q.shape[1]
    compute: tl.constexpr = q.dtype
    acc, total, largest = state
    for start in tl.range(first_key, end_key, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        slot = _slots(pages, start, end_key, num_pages, PAGE_SIZE, BLOCK_KEYS, WINDOW == 0)
        k = _gather(k_cache, slot, SLOT, HEAD_DIM).to(compute)
        score = tl.dot(q, tl.trans(k))
        v = _gather(v_cache, slot, SLOT, HEAD_DIM).to(compute)
        if EDGES:
            if (start < all_from) or (start + BLOCK_KEYS > all_to):
                seen = key[None, :] <= position[:, None]
                if WINDOW > 0:
                    seen &= key[None, :] > position[:, None] - WINDOW
                finite = tl.min((tl.abs(v) < float("inf")).to(tl.int32), 1) > 0
                v = tl.where(finite[:, None], v, 0.0)
                score = tl.where(finite[None, :], score, float("nan"))
                score = tl.where(seen, score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, 1))
        # A row may have seen no key yet: minus infinity would make NaN of its differences.
        offset = tl.where(new_largest == float("-inf"), 0.0, new_largest * scale)
        p = tl.exp2(score * scale - (offset - _P_EXPONENT)[:, None])
        keep = tl.exp2(largest * scale - offset)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(compute), v, acc * keep[:, None])
        largest = new_largest
    return acc, total, largest


@triton.jit(do_not_specialize=["num_tokens", "num_pages", "num_sequences", "max_pages"])
def extend_kernel(
    q_ptr, k_cache, v_cache, page_table, seq_lens, query_lens, head_gate, out, scale, v_scale,
    num_tokens, num_pages, num_sequences, max_pages, page_stride, gate_stride, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SLOT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_BATCH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of a sequence's rows and one KV head; grid (tiles of the whole batch, KV heads).

    Rows are (token, query head of the group) pairs in that order, tokens straddling tiles: the
    heads that share keys share their reading and conversion, groups of 12 fill the matrix unit as
    groups of 8 do, and a tile spans few tokens, so that causal and window edges are narrow.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence, first_token, query_len, tile = _tile_of_program(
        query_lens, num_tokens, num_sequences, GROUP, BLOCK_BATCH, BLOCK_ROWS
    )
    if sequence < 0:
        return
    kv_head = tl.program_id(1)
    # Row r of the tile is head `head` of the group and token `token` after the tile's first one.
    row = tile * BLOCK_ROWS % GROUP + tl.arange(0, BLOCK_ROWS)
    token = row // GROUP
    head = row % GROUP
    tile_token = tile * BLOCK_ROWS // GROUP
    tokens = tl.minimum(query_len - tile_token, num_tokens - first_token - tile_token)
    in_range = token < tokens
    base = (first_token + tile_token).to(tl.int64)
    # 64 bits once a tile: pointers of 64 bits a row would spill on sm_100.
    q_ptr += (base * HEADS + kv_head * GROUP) * HEAD_DIM
    out += (base * HEADS + kv_head * GROUP) * HEAD_DIM
    at = ((token * HEADS + head) * HEAD_DIM)[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    q = tl.load(q_ptr + at, mask=in_range[:, None], other=0.0)
    if k_cache.dtype.element_ty == tl.float8e4nv:
        NAN: tl.constexpr = tl.PropagateNan.ALL
        q = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0, NAN), 65504.0, NAN).to(tl.float16)

    lowest = tl.load(seq_lens + sequence).to(tl.int32) - query_len + tile_token
    position = lowest + token
    highest = lowest + tl.minimum((tile * BLOCK_ROWS % GROUP + BLOCK_ROWS - 1) // GROUP, tokens - 1)
    end_key = tl.minimum(highest + 1, max_pages * PAGE_SIZE)
    k_cache += kv_head * HEAD_DIM
    v_cache += kv_head * HEAD_DIM
    page_table += sequence.to(tl.int64) * page_stride
    acc = tl.zeros([BLOCK_ROWS, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    if WINDOW > 0:
        # Nine blocks or so: one loop, since filling the copy pipeline anew costs as much as masks.
        first_key = tl.maximum(lowest - WINDOW + 1, 0)
        all_from = highest - WINDOW + 1
    else:
        first_key = tl.maximum(tl.minimum(lowest + 1, end_key), 0) // BLOCK_KEYS * BLOCK_KEYS
        all_from = 0
        acc, total, largest = _attend(
            (acc, total, largest), q, position, k_cache, v_cache, page_table, 0, first_key, 0, 0,
            scale, num_pages, SLOT, PAGE_SIZE, WINDOW, BLOCK_KEYS, False,
        )  # fmt: skip
    acc, total, largest = _attend(
        (acc, total, largest), q, position, k_cache, v_cache, page_table, first_key, end_key,
        all_from, lowest + 1, scale, num_pages, SLOT, PAGE_SIZE, WINDOW, BLOCK_KEYS, True,
    )  # fmt: skip

    # A position before the sequence's start sees nothing: 0 / 1, not 0 / 0.
    factor = v_scale / tl.where(total == 0.0, 1.0, total)
    if head_gate is not None:
        head_gate += base * gate_stride + kv_head * GROUP
        gate = tl.load(head_gate + token * gate_stride + head, mask=in_range, other=0.0)
        factor = factor / (1.0 + tl.exp(-gate.to(tl.float32)))
    tl.store(out + at, (acc * factor[:, None]).to(out.dtype.element_ty), mask=in_range[:, None])
