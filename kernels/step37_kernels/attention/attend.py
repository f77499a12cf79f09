"""Attention of a batch's newest tokens: decode for one each, verify for a few, extend for more."""

from __future__ import annotations

import torch
from torch import Tensor

from step37_kernels.attention.decode import MAX_QUERIES, decode, verify
from step37_kernels.attention.extend import extend


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
    page_size: int = 1,
) -> Tensor:
    """What `reference.attend` returns, in two launches for decode and verify, one for extend.

    Args: as of `reference.attend`; query_lens None is one query for each sequence, and a number is
        that many for each, which are verified as drafts where they are few.

    Returns:
        bf16 [Tq, Hq * D].

    Raises:
        ValueError: see `decode`, `verify` and `extend`.
    """
    if query_lens is None:
        return decode(
            q, k_cache, v_cache, page_table, seq_lens, softmax_scale, window, page_size,
            k_scale, v_scale, head_gate,
        )  # fmt: skip
    if isinstance(query_lens, int):
        if 2 <= query_lens <= MAX_QUERIES and (window is None or query_lens <= window):
            each = (-1, query_lens, q.shape[1])
            gate = None if head_gate is None else head_gate.view(each)
            return verify(
                q.view(*each, q.shape[2]), k_cache, v_cache, page_table, seq_lens, softmax_scale,
                window, page_size, k_scale, v_scale, gate,
            ).flatten(0, 1)  # fmt: skip
        query_lens = torch.full_like(seq_lens, query_lens)
    return extend(
        q, k_cache, v_cache, page_table, seq_lens, query_lens, softmax_scale, window, page_size,
        k_scale, v_scale, head_gate,
    )  # fmt: skip
