"""Attention of a batch's newest tokens: decode where each sequence has one, extend otherwise."""

from __future__ import annotations

from torch import Tensor

from step37_kernels.attention.decode import decode
from step37_kernels.attention.extend import extend


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor | None,
    softmax_scale: float,
    window: int | None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    head_gate: Tensor | None = None,
    page_size: int = 1,
) -> Tensor:
    """What `reference.attend` returns, in two launches for decode and one for extend.

    Args: as of `reference.attend`; query_lens None is one query for each sequence.

    Returns:
        bf16 [Tq, Hq * D].

    Raises:
        ValueError: see `decode` and `extend`.
    """
    if query_lens is None:
        return decode(
            q, k_cache, v_cache, page_table, seq_lens, softmax_scale, window, page_size,
            k_scale, v_scale, head_gate,
        )  # fmt: skip
    return extend(
        q, k_cache, v_cache, page_table, seq_lens, query_lens, softmax_scale, window, page_size,
        k_scale, v_scale, head_gate,
    )  # fmt: skip
