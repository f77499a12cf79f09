"""Attention of the newest tokens over a paged cache: decode, and verify of drafts, in two launches.

Flash-decoding: `decode_split_kernel` gives each program an equal run of key blocks (`schedule.py`)
and writes a partial result per piece; `decode_merge_kernel` adds up each sequence's pieces and
applies the head gate. Grids and workspace depend on shapes alone, lengths are read on the device:
one CUDA graph serves all lengths. Splits depend on all lengths of a batch: results repeat bit for
bit for the same batch, and differ by rounding when a sequence is decoded beside others.

Products over a bf16 cache are in bf16. Over e4m3 they are in fp16, which holds every e4m3 value
exactly; q is exact there too from 2^-14 to 65504 (larger values saturate, infinities too; smaller
ones lose less than 2^-25). Probabilities are rounded to bf16 or fp16 relative to the running
maximum; in fp16 they are 2^15 times as large, so that only those below 2^-39 vanish. Sums and
softmax are in fp32.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels import interpret
from step37_kernels.attention import pages, tiles
from step37_kernels.attention.schedule import block_list, most_pieces, span
from step37_kernels.checks import ceil_div, require
from step37_kernels.launch import launch

_LOG2_E = 1.4426950408889634
MAX_QUERIES = 8
_FP16_MAX = tl.constexpr(65504.0)
_RAISE = tl.constexpr(15.0)  # exponent added to fp16 probabilities: 2^15 is within fp16
_PIECES = 64  # pieces merged at a time: at batch 1 a sequence has hundreds

# A register holds two int16 words of two e4m3 codes each. Sorted, its low half is the low codes of
# both and its high half the high codes. Two blocks of assembly, of which the assembler sorts once:
# of one with two results Triton 3.8 keeps only the first in the layout that the product wants.
_WIDEN_LOW = tl.constexpr(
    """{
    .reg .b32 sorted;
    .reg .b16 low, high;
    prmt.b32 sorted, $1, $1, 0x3120;
    mov.b32 {low, high}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, low;
    }"""
)
_WIDEN_HIGH = tl.constexpr(_WIDEN_LOW.value.replace("$0, low", "$0, high"))


def _fp16_of(codes: np.ndarray) -> np.ndarray:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).half().numpy()
    return every[codes & 255]


@interpret.assembly(_WIDEN_LOW.value)
def _low(words: np.ndarray) -> tuple[np.ndarray, ...]:
    """Stand-in of `_WIDEN_LOW`: the fp16 value of each word's low byte."""
    return (_fp16_of(words),)


@interpret.assembly(_WIDEN_HIGH.value)
def _high(words: np.ndarray) -> tuple[np.ndarray, ...]:
    """Stand-in of `_WIDEN_HIGH`."""
    return (_fp16_of(words >> 8),)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    page_size: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    head_gate: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """One new token a sequence, over its cached keys with its own among them.

    Args:
        q: bf16 [B, Hq, D], contiguous.
        k_cache, v_cache: [S, Hkv, D], bf16 or float8_e4m3fn, which is multiplied by its scale.
        page_table: int32 [B, max_pages]; page p is the slots p * page_size and following.
        seq_lens: int [B], keys of each sequence; 0 gives zeros.
        softmax_scale: multiplies the scores, normally D^-0.5.
        window: the query at p sees the keys p - window + 1 to p; None is all.
        page_size: 1, 16, 32 or 64.
        head_gate: [B, Hq] logits, bf16 or fp32, or None; outputs are multiplied by their sigmoid.
        lse: fp32 [B, Hq] or None; receives the natural logarithm of the sum of exp(score).

    Returns:
        bf16 [B, Hq * D].

    Raises:
        ValueError: an argument does not fit.
    """
    require("q", q, (None, None, None), (torch.bfloat16,))
    gate = None if head_gate is None else head_gate[:, None]
    lse_rows = None if lse is None else lse[:, None]
    return _attend(
        q[:, None], k_cache, v_cache, page_table, seq_lens, softmax_scale, window, page_size,
        k_scale, v_scale, gate, lse_rows, None,
    )[:, 0]  # fmt: skip


def verify(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    page_size: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    head_gate: Tensor | None = None,
    lse: Tensor | None = None,
    tree_mask: Tensor | None = None,
) -> Tensor:
    """2 to 8 draft tokens a sequence, which are its last keys; the rest as `decode`.

    The n drafts follow a prefix of seq_len - n keys. Without `tree_mask` they follow each other:
    draft i stands at seq_len - n + i and sees the keys up to there. With it draft i sees the draft
    keys j with tree_mask[b, i, j], normally its ancestors and itself, and stands as many positions
    behind the prefix as it sees other drafts. A window counts from that position, and hides
    keys of the prefix only: it is at least n long.

    Args:
        q: bf16 [B, n, Hq, D], contiguous.
        seq_lens: int [B], the drafts included.
        head_gate, lse: [B, n, Hq].
        tree_mask: bool [B, n, n], contiguous, or None.

    Returns:
        bf16 [B, n, Hq * D].

    Raises:
        ValueError: an argument does not fit.
    """
    require("q", q, (None, None, None, None), (torch.bfloat16,))
    drafts = q.shape[1]
    if not 2 <= drafts <= MAX_QUERIES:
        raise ValueError(f"q has {drafts} drafts a sequence, expected 2 to {MAX_QUERIES}")
    if window is not None and window < drafts:
        raise ValueError(f"window is {window}, expected None or at least the {drafts} drafts")
    if tree_mask is not None:
        require("tree_mask", tree_mask, (q.shape[0], drafts, drafts), (torch.bool,))
        _require_contiguous("tree_mask", tree_mask)
    return _attend(
        q, k_cache, v_cache, page_table, seq_lens, softmax_scale, window, page_size,
        k_scale, v_scale, head_gate, lse, tree_mask,
    )  # fmt: skip


def _require_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected it contiguous")


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    page_size: int,
    k_scale: float,
    v_scale: float,
    head_gate: Tensor | None,
    lse: Tensor | None,
    tree_mask: Tensor | None,
) -> Tensor:
    """Check everything, then both launches; q, head_gate and lse with the queries' axis."""
    batch, queries, heads, dim = q.shape
    _require_contiguous("q", q)
    pages.check_cache(k_cache, v_cache, heads, dim)
    pages.check_paging(page_table, seq_lens, page_size, batch)
    pages.check_scale("k_scale", k_scale)
    pages.check_scale("v_scale", v_scale)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected a positive number or None")
    if head_gate is not None:
        require("head_gate", head_gate, (batch, queries, heads), (torch.bfloat16, torch.float32))
        head_gate = head_gate.reshape(batch * queries, heads)
        if head_gate.stride(1) != 1:
            raise ValueError(f"head_gate has strides {head_gate.stride()}, expected (any, 1)")
    if lse is not None:
        require("lse", lse, (batch, queries, heads), (torch.float32,))
        _require_contiguous("lse", lse)
    visible = None if window is None else window + queries - 1
    pages.debug_check(page_table, seq_lens, page_size, k_cache.shape[0], visible)

    out = torch.empty(batch, queries, heads * dim, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    kv_heads, max_pages = k_cache.shape[1], page_table.shape[1]
    rows = queries * heads // kv_heads
    tile = tiles.decode_tile(k_cache.dtype, rows)
    workers = tiles.decode_workers(
        tile, rows, kv_heads, tiles.multiprocessors(q.device), batch, max_pages * page_size,
        queries, window,
    )  # fmt: skip
    pieces = most_pieces(workers, batch)
    partial = torch.empty(pieces, kv_heads, rows, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(pieces, kv_heads, rows, 2, dtype=torch.float32, device=q.device)
    shared = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "QUERIES": queries,
        "WINDOW": window or 0,
        "BATCH": tiles.batch_block(batch),
        "BLOCK": tile.block,
    }
    # Bytes are loaded in pairs: 16-bit words can be transposed on their way to the registers.
    k_words, v_words = (c.view(torch.int16) if fp8 else c for c in (k_cache, v_cache))
    launch(
        decode_split_kernel,
        (workers, kv_heads * ceil_div(rows, tile.rows)),
        q, k_words, v_words, page_table, seq_lens, tree_mask, partial, stats,
        softmax_scale * (k_scale if fp8 else 1.0) * _LOG2_E,
        batch, max_pages, page_table.stride(0), k_cache.shape[0] // page_size, workers,
        **shared,
        SLOT=k_words.stride(0), PAGE=page_size, ROWS=tile.rows, STAGES=tile.num_stages,
        num_warps=tile.num_warps, maxnreg=tile.registers,
    )  # fmt: skip
    launch(
        decode_merge_kernel,
        (batch * queries, heads),
        partial, stats, seq_lens, head_gate, out, lse,
        v_scale if fp8 else 1.0,
        batch, max_pages * page_size, workers,
        **shared,
        RAISED=_RAISE.value if fp8 else 0.0, PIECES=_PIECES,
        GATE_STRIDE=0 if head_gate is None else head_gate.stride(0),
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _widen(words):
    """int16 words of two e4m3 codes each -> the low codes and the high codes in fp16."""
    low = tl.inline_asm_elementwise(_WIDEN_LOW, "=r,r", [words], tl.float16, is_pure=True, pack=2)
    high = tl.inline_asm_elementwise(_WIDEN_HIGH, "=r,r", [words], tl.float16, is_pure=True, pack=2)
    return low, high


@triton.jit
def _to_fp16(x):
    """Round to fp16, saturating; NaN stays NaN."""
    keep: tl.constexpr = tl.PropagateNan.ALL
    x = tl.maximum(x.to(tl.float32), -_FP16_MAX, propagate_nan=keep)
    return tl.minimum(x, _FP16_MAX, propagate_nan=keep).to(tl.float16)


@triton.jit
def _sight(
    tree_mask, seq, query, length, ROWS: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr
):
    """Per row, of query `query` each: which keys it sees, as flags, and the first one.

    Bit 0 of the flags stands for the prefix and bit 1 + j for draft key j.
    """
    if tree_mask is None:
        flags, position = (4 << query) - 1, query
    else:
        other = tl.arange(0, 8)
        at = (seq * QUERIES + query)[:, None] * QUERIES + other[None, :]
        mask = (query < QUERIES)[:, None] & (other < QUERIES)[None, :]
        sees = tl.load(tree_mask + at, mask=mask, other=0).to(tl.int32)
        flags, position = 1 + tl.sum(sees << (1 + other)[None, :], 1), tl.sum(sees, 1) - 1
    first = tl.zeros([ROWS], tl.int32)
    if WINDOW > 0:
        first = length - QUERIES + position - (WINDOW - 1)
    return flags, first


@triton.jit
def _visible(key, length, first_key, flags, first, QUERIES: tl.constexpr, WINDOW: tl.constexpr):
    """Which of the keys [BLOCK] each row sees: [BLOCK, ROWS], or [BLOCK, 1] for one query."""
    if QUERIES == 1:
        seen = ((key < length) & (key >= first_key))[:, None]
    else:
        # Beyond the last draft a flag that no row has; a window holds all drafts.
        flag = 1 << tl.minimum(tl.maximum(key - (length - QUERIES) + 1, 0), QUERIES + 1)
        seen = (flags[None, :] & flag[:, None]) != 0
        if WINDOW > 0:
            seen &= key[:, None] >= first[None, :]
    return seen


@triton.jit(do_not_specialize=["batch", "max_pages", "num_pages", "workers"])
def decode_split_kernel(
    q, k_cache, v_cache, page_table, seq_lens, tree_mask, partial, stats,
    score_factor, batch, max_pages, table_stride, num_pages, workers,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    WINDOW: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A worker's run of key blocks of one KV head: a piece (maximum, sum, output) per sequence."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (QUERIES * GROUP + ROWS - 1) // ROWS
    worker, head = tl.program_id(0), tl.program_id(1) // TILES
    max_len = max_pages * PAGE
    ends, blocks, share = block_list(
        seq_lens, batch, max_len, workers, BATCH, QUERIES, WINDOW, BLOCK
    )
    start = worker * share
    stop = tl.minimum(start + share, tl.max(ends, 0))
    if start >= stop:
        return
    first = tl.sum((ends <= start).to(tl.int32), 0)
    last = tl.sum((ends < stop).to(tl.int32), 0)
    begin = tl.sum(tl.where(tl.arange(0, BATCH) == first, ends - blocks, 0), 0)

    row = tl.program_id(1) % TILES * ROWS + tl.arange(0, ROWS)
    real = row < QUERIES * GROUP
    dim = tl.arange(0, DIM)
    for seq in range(first, last + 1):
        seq_len = tl.load(seq_lens + seq)
        length, first_key, first_block, count = span(seq_len, max_len, QUERIES, WINDOW, BLOCK)
        low = tl.maximum(start, begin) - begin + first_block
        high = tl.minimum(stop, begin + count) - begin + first_block
        begin += count
        if high > low:
            query_row = (seq * QUERIES + row // GROUP) * HEADS + head * GROUP + row % GROUP
            queries = tl.load(
                q + query_row[:, None] * DIM + dim[None, :], mask=real[:, None], other=0.0
            )
            flags, first_seen = _sight(tree_mask, seq, row // GROUP, length, ROWS, QUERIES, WINDOW)
            table = page_table + seq * table_stride
            maximum, total, out = _attend_blocks(
                queries, k_cache, v_cache, table, low, high, length, first_key, flags, first_seen,
                score_factor, num_pages, head, DIM, QUERIES, WINDOW, BLOCK, SLOT, PAGE, ROWS,
                STAGES,
            )  # fmt: skip
            piece = ((worker + seq) * KV_HEADS + head).to(tl.int64) * (QUERIES * GROUP) + row
            tl.store(partial + piece[:, None] * DIM + dim[None, :], out, mask=real[:, None])
            tl.store(stats + piece * 2, maximum, mask=real)
            tl.store(stats + piece * 2 + 1, total, mask=real)


@triton.jit
def _page_of(table, block, high, length, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """The page of a block, a scalar where pages hold blocks, else of each of its keys; -1: none."""
    if PAGE >= BLOCK:
        page = tl.load(table + block // (PAGE // BLOCK), mask=block < high, other=-1)
    else:
        index = tl.arange(0, BLOCK)
        at = table + block * (BLOCK // PAGE) + index // PAGE
        page = tl.load(at, mask=block * BLOCK + index < length, other=-1)
    return page


@triton.jit
def _attend_blocks(
    queries, k_cache, v_cache, table, low, high, length, first_key, flags, first_seen,
    score_factor, num_pages, head, DIM: tl.constexpr, QUERIES: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention over the key blocks low .. high - 1: maximum, sum [ROWS] and output [ROWS, DIM].

    Transposed throughout: scores are [keys, rows] and outputs [dim, rows], so that K and V are the
    left operands, which are widened in registers and never written back to shared memory. Of an
    e4m3 word the low and the high code are even and odd channels: two products each.
    """
    FP8: tl.constexpr = k_cache.dtype.element_ty == tl.int16
    WORDS: tl.constexpr = DIM // 2 if FP8 else DIM
    work: tl.constexpr = tl.float16 if FP8 else tl.bfloat16
    RAISE: tl.constexpr = _RAISE if FP8 else 0.0
    index, word = tl.arange(0, BLOCK), tl.arange(0, WORDS)
    if FP8:
        q_even, q_odd = tl.split(tl.reshape(_to_fp16(queries), [ROWS, WORDS, 2]))
        q_even, q_odd = tl.trans(q_even), tl.trans(q_odd)
        out_odd = tl.zeros([WORDS, ROWS], tl.float32)
    else:
        q_even = tl.trans(queries)
    out_even = tl.zeros([WORDS, ROWS], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK, ROWS], tl.float32)  # summed over keys once, at the end
    # Loaded one block ahead, so that copies of K and V do not wait for the page's number.
    page = _page_of(table, low, high, length, BLOCK, PAGE)
    for block in tl.range(low, high, num_stages=STAGES):
        key = block * BLOCK + index
        held = (page >= 0) & (page < num_pages) & (key < length) & (key >= first_key)
        if PAGE >= BLOCK:
            slot = page.to(tl.int64) * PAGE + block % (PAGE // BLOCK) * BLOCK
            at_k = k_cache + slot * SLOT + head * WORDS + (index[:, None] * SLOT + word[None, :])
            at_v = v_cache + slot * SLOT + head * WORDS + (index[None, :] * SLOT + word[:, None])
        else:
            slots = (page * PAGE + index % PAGE).to(tl.int64) * SLOT + head * WORDS
            at_k, at_v = (
                k_cache + slots[:, None] + word[None, :],
                v_cache + slots[None, :] + word[:, None],
            )
        page = _page_of(table, block + 1, high, length, BLOCK, PAGE)
        k = tl.load(at_k, mask=held[:, None], other=0)
        v = tl.load(at_v, mask=held[None, :], other=0)
        if FP8:
            k_even, k_odd = _widen(k)
            scores = tl.dot(k_odd, q_odd, tl.dot(k_even, q_even))
        else:
            scores = tl.dot(k, q_even)
        seen = _visible(key, length, first_key, flags, first_seen, QUERIES, WINDOW)
        scores = tl.where(seen, scores * score_factor, float("-inf"))
        new = tl.maximum(maximum, tl.max(scores, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        chance = tl.exp2(scores - (base - RAISE)[None, :])
        shrink = tl.exp2(maximum - base)[None, :]
        total = total * shrink + chance
        if FP8:
            v_even, v_odd = _widen(v)
            out_even = tl.dot(v_even, chance.to(work), out_even * shrink)
            out_odd = tl.dot(v_odd, chance.to(work), out_odd * shrink)
        else:
            out_even = tl.dot(v, chance.to(work), out_even * shrink)
        maximum = new
    if FP8:
        out = tl.reshape(tl.permute(tl.join(out_even, out_odd), [1, 0, 2]), [ROWS, DIM])
    else:
        out = tl.trans(out_even)
    return maximum, tl.sum(total, 0), out


@triton.jit(do_not_specialize=["batch", "max_len", "workers"])
def decode_merge_kernel(
    partial, stats, seq_lens, head_gate, out, lse,
    v_factor, batch, max_len, workers,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    WINDOW: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr, RAISED: tl.constexpr,
    PIECES: tl.constexpr, GATE_STRIDE: tl.constexpr,
):  # fmt: skip
    """One query and head: its pieces in the order of the workers, divided, scaled and gated."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row, head = tl.program_id(0), tl.program_id(1)
    seq = row // QUERIES
    ends, blocks, share = block_list(
        seq_lens, batch, max_len, workers, BATCH, QUERIES, WINDOW, BLOCK
    )
    mine = tl.arange(0, BATCH) == seq
    end, count = tl.sum(tl.where(mine, ends, 0), 0), tl.sum(tl.where(mine, blocks, 0), 0)
    share = tl.maximum(share, 1)
    first = (end - count) // share
    last = tl.where(count > 0, (end + share - 1) // share, first)

    dim, index = tl.arange(0, DIM), tl.arange(0, PIECES)
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    result = tl.zeros([DIM], tl.float32)
    for begin in range(first, last, PIECES):
        real = begin + index < last
        piece = ((begin + index + seq) * KV_HEADS + head // GROUP).to(tl.int64)
        piece = (piece * QUERIES + row % QUERIES) * GROUP + head % GROUP
        top = tl.load(stats + piece * 2, mask=real, other=float("-inf"))
        sums = tl.load(stats + piece * 2 + 1, mask=real, other=0.0)
        values = tl.load(
            partial + piece[:, None] * DIM + dim[None, :], mask=real[:, None], other=0.0
        )
        new = tl.maximum(maximum, tl.max(top, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight, shrink = tl.exp2(top - base), tl.exp2(maximum - base)
        total = total * shrink + tl.sum(sums * weight, 0)
        result = result * shrink + tl.sum(values * weight[:, None], 0)
        maximum = new
    # A sequence with no key, or none that it may see, gives zeros.
    result = result * tl.where(total == 0.0, 0.0, v_factor / total)
    at = row * HEADS + head
    if head_gate is not None:
        gate = tl.load(head_gate + row * GATE_STRIDE + head).to(tl.float32)
        result = result / (1.0 + tl.exp(-gate))
    tl.store(out + at.to(tl.int64) * DIM + dim, result.to(out.dtype.element_ty))
    if lse is not None:
        ln2: tl.constexpr = 0.6931471805599453
        natural = (maximum - RAISED) * ln2 + tl.log(total)
        tl.store(lse + at + tl.arange(0, 1), natural)
