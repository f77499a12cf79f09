"""Which kernels `attend` takes for a batch, and that it hands on what it was given."""

from __future__ import annotations

import pytest
import torch
from paged import E4M3, Batch

from step37_kernels.attention import tiles
from step37_kernels.attention.attend import attend
from step37_kernels.launch import counted

DECODE = ["decode_split_kernel", "decode_merge_kernel"]


@pytest.mark.parametrize(
    "queries, window, kernels",
    [
        (1, None, DECODE),
        (4, None, DECODE),
        (4, 4, DECODE),
        (4, 3, ["extend_kernel"]),  # drafts do not fit into the window
        (9, 64, ["extend_kernel"]),  # more than are verified at once
    ],
)
def test_as_many_queries_for_each_sequence(device, monkeypatch, queries, window, kernels) -> None:
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 2)
    scales = {"k_scale": 0.5, "v_scale": 2.0}
    batch = Batch(E4M3, 16, 12, 1, [40, 21], window, queries=queries, gated=True, **scales)
    assert batch.head_gate is not None
    arguments = [
        t.to(device)
        for t in (batch.q.flatten(0, 1), batch.k_cache, batch.v_cache, batch.page_table)
    ]
    with counted() as launched:
        out = attend(
            *arguments, torch.tensor(batch.lengths, dtype=torch.int32, device=device),
            None if queries == 1 else queries, batch.q.shape[-1] ** -0.5, window,
            head_gate=batch.head_gate.flatten(0, 1).to(device), page_size=16, **scales,
        )  # fmt: skip
    assert launched == kernels
    batch.check(out.cpu().view(batch.q.shape))
