"""Where a batch's keys are: page tables of the full and the sliding cache pool, and lengths."""

import torch
from torch import Tensor

from step37_kernels.checks import ceil_div, require

_OF_SLIDING = "sliding, full_to_sliding, new_slots and sliding_slots"


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
    """Write the page tables and lengths of B sequences in place.

    Page p of a sequence is the page of the slot that its position p * page_size has; slots of a
    page follow each other in both pools. Written are the pages of a sequence's length, in the
    sliding table only those that its newest queries see through the window. What else is in the
    tables stays as it was: no kernel reads it.

    Args:
        req_to_token: int32 [R, C], the full pool's slot of each position of each request; -1 is
            none, whose page is -1.
        requests: int [B], rows of `req_to_token`.
        seq_lens: int [B], keys of each sequence without its `drafts`.
        drafts: added to every length.
        query_lens: int [B], new queries of each sequence; a number is that many for each, and no
            length is below it (padding rows have shorter ones); None is one for each.
        page_size: slots of a page; 1 is any slot for itself.
        lengths: int32 [B], written: `seq_lens` with drafts, at least 0. Not `seq_lens` itself.
        full: int32 [B, P], written; P is at most the pages of C positions. None: not wanted.
        sliding: int32 [B, P], written; None where there is one pool only.
        full_to_sliding: int [S], the sliding pool's slot of each of the full pool's.
        window: keys that a query sees at most, itself among them; None is all.
        new_slots: int [T], the full pool's slots of new tokens; -1 stays -1.
        sliding_slots: int64 [at least T], written: the sliding pool's, then zeros (that pool's
            slot for padding). It, `new_slots` and `full_to_sliding` go with `sliding`.

    Raises:
        ValueError: a shape, dtype, page size or window does not fit, or a tensor is missing.
        IndexError: `req_to_token` has no such request, or `full_to_sliding` no such slot.
    """
    require("req_to_token", req_to_token, (None, None), (torch.int32,))
    require("seq_lens", seq_lens, requests.shape)
    require("lengths", lengths, requests.shape, (torch.int32,))
    of_sliding = (sliding, full_to_sliding, new_slots, sliding_slots)
    if any(t is None for t in of_sliding) and any(t is not None for t in of_sliding):
        raise ValueError(f"some of {_OF_SLIDING} are None, expected all or none of them")
    tables = [table for table in (full, sliding) if table is not None]
    for table in tables:
        require("a page table", table, (len(requests), tables[0].shape[1]), (torch.int32,))
    if not tables:
        raise ValueError("full and sliding are None, expected one of them")
    for name, number in (("page_size", page_size), ("window", window)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, expected a positive number")
    least = query_lens if isinstance(query_lens, int) else 0
    lengths.copy_((seq_lens + drafts).clamp(min=least))
    longest = int(lengths.max()) if len(lengths) else 0
    used = min(tables[0].shape[1], ceil_div(longest, page_size))
    page = torch.arange(used, device=lengths.device)
    held = page * page_size < lengths[:, None]
    slots = req_to_token[requests.long(), : used * page_size : page_size]
    if full is not None:
        full[:, :used] = torch.where(held, _page_of(slots, page_size), full[:, :used])
    if sliding is None or full_to_sliding is None or new_slots is None or sliding_slots is None:
        return
    if window is not None:
        queries = 1 if query_lens is None else query_lens
        first = (lengths - (queries + window - 1)).clamp(min=0) // page_size
        held &= page >= first[:, None]
    moved = _page_of(_moved(full_to_sliding, torch.where(held, slots, -1)), page_size)
    sliding[:, :used] = torch.where(held, moved, sliding[:, :used])
    sliding_slots.zero_()
    sliding_slots[: len(new_slots)] = _moved(full_to_sliding, new_slots)


def _moved(full_to_sliding: Tensor, slots: Tensor) -> Tensor:
    return torch.where(slots < 0, -1, full_to_sliding[slots.clamp(min=0).long()])


def _page_of(slots: Tensor, page_size: int) -> Tensor:
    return torch.where(slots < 0, -1, slots // page_size).int()
