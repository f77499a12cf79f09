"""What only a GPU shows of page tables: a recorded launch follows lengths that change on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step37_kernels.attention.page_tables import page_tables
from step37_kernels.reference import page_tables as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

CONTEXT, REQUESTS, BATCH, WINDOW, DRAFTS = 262144, 8, 4, 512, 4


@pytest.mark.parametrize("page_size", [1, 64])
def test_one_graph_serves_all_lengths(page_size: int) -> None:
    torch.manual_seed(0)
    count = REQUESTS * CONTEXT // page_size
    in_page = torch.arange(page_size, device="cuda")
    pages = torch.randperm(count, device="cuda")[:, None] * page_size
    slots = (pages + in_page).view(REQUESTS, CONTEXT).int()
    mapping = (torch.randperm(count, device="cuda")[:, None] * page_size + in_page).view(-1)
    requests = torch.randperm(REQUESTS, device="cuda")[:BATCH]
    lengths = torch.ones(BATCH, dtype=torch.int64, device="cuda")
    new = mapping[: BATCH * DRAFTS].contiguous()

    def fresh() -> list[Tensor]:
        table = torch.zeros(2, BATCH, CONTEXT // page_size, dtype=torch.int32, device="cuda")
        return [lengths.int(), table[0], table[1], new.new_zeros(len(new) + 3)]

    def fill(function: object, written: list[Tensor]) -> None:
        counts, full, sliding, sliding_slots = written
        function(  # type: ignore[operator]
            slots, requests, lengths, DRAFTS, DRAFTS, page_size, counts, full, sliding, mapping,
            WINDOW, new, sliding_slots,
        )  # fmt: skip

    recorded = fresh()
    fill(page_tables, recorded)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fill(page_tables, recorded)
    for changed in ([1, 1, 1, 1], [65, 0, 200000, 511], [CONTEXT, 63, 64, CONTEXT - DRAFTS]):
        lengths.copy_(torch.tensor(changed))
        requests.copy_(torch.randperm(REQUESTS)[:BATCH])
        expected = fresh()
        fill(reference.page_tables, expected)
        for tensor in recorded:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, recorded, expected))
