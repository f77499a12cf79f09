"""Shipped configurations of the attention kernels, with the limits of their machine code."""

from __future__ import annotations

from functools import partial

import torch

from step37_kernels.attention.page_tables import page_tables
from step37_kernels.evidence import decode_cases, extend_cases
from step37_kernels.evidence.limits import Case, Limits

_CONTEXT, _SLOTS, _REQUESTS, _WINDOW = 262144, 1 << 20, 512, 512


def cases() -> list[Case]:
    """One case per format, shape and architecture that the tile policy chooses apart."""
    tables = [case for arch in (90, 100) for case in _page_tables(arch)]
    return [*tables, *decode_cases.cases(), *extend_cases.cases()]


def _page_tables(arch: int) -> list[Case]:
    """The main model's tables before a verification of 4 and a decode step; a draft's; a prompt's.

    An SM has room for 16 programs of four warps; the policy asks for 8.
    """
    limits = {
        "page_tables_kernel": Limits(
            "waits for memory thrice, so programs hide it", blocks_per_sm=8
        )
    }

    def case(name: str, batch: int, page_size: int, queries: int | None, full: bool) -> Case:
        def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        table = meta(batch, _CONTEXT // page_size, dtype=torch.int32)
        tokens = meta(batch * (queries or 1))
        run = partial(
            page_tables, meta(_REQUESTS, _CONTEXT, dtype=torch.int32), meta(batch), meta(batch), 0,
            meta(batch, dtype=torch.int32) if name == "prefill" else queries, page_size,
            meta(batch, dtype=torch.int32), table if full else None, table, meta(_SLOTS), _WINDOW,
            tokens, tokens,
        )  # fmt: skip
        return Case(f"page tables, {name}, page {page_size}, {batch} sequences", arch, run, limits)

    return [
        case("decode", 64, 1, None, full=True),
        case("decode", 512, 64, None, full=True),
        case("verify", 64, 64, 4, full=True),
        case("draft", 64, 1, 4, full=False),
        case("prefill", 8, 64, 1024, full=True),
    ]
