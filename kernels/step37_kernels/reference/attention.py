"""Attention over a paged cache: head norms and rotary, cache write, causal or windowed attention.

T tokens, Hq query heads, Hkv KV heads, head dim D, S cache slots, B sequences. A cache slot holds
one token; a page table maps a sequence's positions to slots.
"""

import torch
from torch import Tensor

from step37_kernels.checks import require
from step37_kernels.formats.e4m3 import to_e4m3
from step37_kernels.reference.norm import gemma_rms_norm
from step37_kernels.reference.rotary import apply_rotary

_QUERY_CHUNK = 128  # bounds the scores held at once, Hq * 128 * keys, and what a window wastes


def prologue(
    qkv: Tensor,
    positions: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    cos_sin_cache: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a qkv projection, normalise q and k per head, rotate them.

    q and k stay in fp32 from the norm to the end of the rotation and are rounded once.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], floating point, in the order q, k, v.
        positions: int [T].
        q_norm_weight, k_norm_weight: [D], of `gemma_rms_norm`.
        cos_sin_cache: fp32 [P, rotary_dim], of `apply_rotary`.

    Returns:
        q [T, Hq, D], k [T, Hkv, D] and v [T, Hkv, D] in qkv's dtype; v is a view.

    Raises:
        ValueError: a shape does not fit.
    """
    head_dim = q_norm_weight.shape[0]
    num_heads = num_q_heads + 2 * num_kv_heads
    require("qkv", qkv, (None, num_heads * head_dim))
    heads = qkv.view(qkv.shape[0], num_heads, head_dim)
    q, k, v = heads.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    q = apply_rotary(gemma_rms_norm(q.float(), q_norm_weight, eps), positions, cos_sin_cache)
    k = apply_rotary(gemma_rms_norm(k.float(), k_norm_weight, eps), positions, cos_sin_cache)
    return q.to(qkv.dtype), k.to(qkv.dtype), v


def write_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    """Store new keys and values in the cache, in place.

    A float8_e4m3fn cache holds k / k_scale and v / v_scale, saturated at 448; any other cache holds
    k and v themselves, cast, and the scales are not used.

    Args:
        k, v: [T, Hkv, D], floating point.
        k_cache, v_cache: [S, Hkv, D].
        slots: int [T], where each token goes; -1 is skipped.
        k_scale, v_scale: the checkpoint's cache scales, positive.

    Raises:
        ValueError: a shape does not fit, or a scale is not positive.
    """
    require("k", k, (None, *k_cache.shape[1:]))
    require("v", v, (k.shape[0], *v_cache.shape[1:]))
    require("slots", slots, (k.shape[0],))
    keep = slots >= 0
    kept = slots[keep].long()
    for name, new, cache, scale in (
        ("k_scale", k, k_cache, k_scale),
        ("v_scale", v, v_cache, v_scale),
    ):
        if not scale > 0:
            raise ValueError(f"{name} is {scale}, expected a positive number")
        if cache.dtype == torch.float8_e4m3fn:
            # Indexed writes are not there for 8-bit floats everywhere; as bytes they are.
            stored = to_e4m3(new[keep].float() / scale).view(torch.uint8)
            cache.view(torch.uint8)[kept] = stored
        else:
            cache[kept] = new[keep].to(cache.dtype)


def prologue_into_cache(
    qkv: Tensor,
    positions: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    cos_sin_cache: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """`prologue`, then `write_cache` of its k and v; arguments and errors as theirs.

    Returns:
        q [T, Hq, D] in qkv's dtype.
    """
    q, k, v = prologue(
        qkv, positions, q_norm_weight, k_norm_weight, cos_sin_cache, num_q_heads, num_kv_heads, eps
    )
    write_cache(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    return q


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor | int | None,
    softmax_scale: float,
    window: int | None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    head_gate: Tensor | None = None,
    tree_mask: Tensor | None = None,
    page_size: int = 1,
) -> Tensor:
    """Causal grouped-query attention of the newest queries of each sequence, prefill and decode.

    Query i of a sequence stands at position p = seq_len - query_len + i and sees the keys up to p;
    with a window the last `window` of them, p itself included: p - window + 1 .. p. Products and
    softmax are in fp32. Slots of positions before every query's window are never read.

    With a tree mask (drafts to verify) query i sees the query_len newest keys j where
    tree_mask[b, i, j], normally its ancestors and itself, and p is as many positions behind the
    other keys as it sees other drafts; a window hides none of the newest keys.

    Args:
        q: [Tq, Hq, D], floating point, the sequences' queries one after the other.
        k_cache, v_cache: [S, Hkv, D]; float8_e4m3fn is multiplied by its scale, others are not.
        page_table: int [B, max_pages]; page p is the slots p * page_size and following, so with
            pages of one slot it is the slot of each position.
        seq_lens: int [B], keys of each sequence, the new ones included.
        query_lens: int [B], queries of each sequence; they add up to Tq. A number is that many
            each, None is one each.
        softmax_scale: multiplies the scores, normally D^-0.5.
        window: number of keys a query sees at most; None is all.
        head_gate: [Tq, Hq] logits or None; each head's output is multiplied by their sigmoid.
        tree_mask: bool [B, n, n] or None; every query_len is n then, at most 128.

    Returns:
        [Tq, Hq * D] in q's dtype.

    Raises:
        ValueError: shapes, lengths or window do not fit.
    """
    require("q", q, (None, None, k_cache.shape[-1]))
    num_tokens, num_heads, head_dim = q.shape
    require("v_cache", v_cache, k_cache.shape)
    require("page_table", page_table, (None, None))
    require("seq_lens", seq_lens, (page_table.shape[0],))
    if query_lens is None or isinstance(query_lens, int):
        query_lens = torch.full_like(seq_lens, 1 if query_lens is None else query_lens)
    require("query_lens", query_lens, (page_table.shape[0],))
    if num_heads % k_cache.shape[1]:
        raise ValueError(f"q has {num_heads} heads, expected a multiple of {k_cache.shape[1]}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected a positive number or None")
    if tree_mask is not None:
        require("tree_mask", tree_mask, (page_table.shape[0], None, None), (torch.bool,))
        drafts = tree_mask.shape[1]
        if tree_mask.shape[2] != drafts or set(query_lens.tolist()) - {drafts}:
            raise ValueError(
                f"tree_mask has shape {list(tree_mask.shape)}, query_lens are "
                f"{query_lens.tolist()}, expected [B, n, n] and n each"
            )
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}, expected a positive number")
    in_page = torch.arange(page_size, device=page_table.device)
    page_table = (page_table.long()[..., None] * page_size + in_page).flatten(1)
    lengths = _checked_lengths(seq_lens, query_lens, num_tokens, page_table.shape[1])

    k_factor = k_scale if k_cache.dtype == torch.float8_e4m3fn else 1.0
    v_factor = v_scale if v_cache.dtype == torch.float8_e4m3fn else 1.0
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    row = 0
    for sequence, (seq_len, query_len) in enumerate(lengths):
        for start in range(seq_len - query_len, seq_len, _QUERY_CHUNK):
            stop = min(start + _QUERY_CHUNK, seq_len)
            first_key = 0 if window is None else max(0, start - window + 1)
            slots = page_table[sequence, first_key:stop].long()
            k = _gather(k_cache, slots) * k_factor
            v = _gather(v_cache, slots) * v_factor
            rows = slice(row, row + stop - start)
            if tree_mask is None:
                hidden = _hidden(stop - start, stop - first_key, window, q.device)
            else:
                hidden = _hidden_in_tree(tree_mask[sequence], stop - first_key, window)
            out[rows] = _attend_chunk(q[rows].float(), k, v, hidden, softmax_scale)
            row = rows.stop
    if head_gate is not None:
        require("head_gate", head_gate, (num_tokens, num_heads))
        out *= torch.sigmoid(head_gate.float())[..., None]
    return out.view(num_tokens, num_heads * head_dim).to(q.dtype)


def _checked_lengths(
    seq_lens: Tensor, query_lens: Tensor, num_tokens: int, max_len: int
) -> list[tuple[int, int]]:
    """(seq_len, query_len) of each sequence as numbers, checked against q and the page table."""
    lengths = list(zip(seq_lens.tolist(), query_lens.tolist(), strict=True))
    for sequence, (seq_len, query_len) in enumerate(lengths):
        if not 0 <= query_len <= seq_len <= max_len:
            raise ValueError(
                f"sequence {sequence} has query_len {query_len} and seq_len {seq_len}, expected "
                f"0 <= query_len <= seq_len <= {max_len} (the page table's width)"
            )
    total = sum(query_len for _, query_len in lengths)
    if total != num_tokens:
        raise ValueError(f"query_lens add up to {total}, expected the {num_tokens} rows of q")
    return lengths


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """Cache rows of `slots` as fp32 [L, Hkv, D]."""
    if cache.dtype == torch.float8_e4m3fn:
        return cache.view(torch.uint8)[slots].view(torch.float8_e4m3fn).float()
    return cache[slots].float()


def _hidden(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys the newest `queries` tokens of `keys` do not see: bool [queries, keys]."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    hidden = key > position
    return hidden if window is None else hidden | (key <= position - window)


def _hidden_in_tree(mask: Tensor, keys: int, window: int | None) -> Tensor:
    """`_hidden` for one sequence's tree mask [n, n]."""
    prefix = keys - mask.shape[0]
    position = prefix + mask.sum(1, keepdim=True) - 1
    key = torch.arange(prefix, device=mask.device)
    limit = torch.full_like(position, -1) if window is None else position - window
    return torch.cat([key <= limit, ~mask], dim=1)


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, softmax_scale: float) -> Tensor:
    """Attention of q [n, Hq, D] over k, v [L, Hkv, D], without the `hidden` [n, L]."""
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    # Query heads h*group .. (h+1)*group share KV head h: fold them into the rows of one product.
    folded = q.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    folded = folded.reshape(num_kv_heads, group * num_queries, head_dim)
    scores = (folded @ k.permute(1, 2, 0)) * softmax_scale
    scores = scores.view(num_kv_heads, group, num_queries, num_keys)
    probability = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out = probability.view(num_kv_heads, group * num_queries, num_keys) @ v.permute(1, 0, 2)
    out = out.view(num_kv_heads, group, num_queries, head_dim)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
