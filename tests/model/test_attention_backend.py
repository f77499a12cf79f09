"""SGLang's batch as page tables: eager, recorded, and replayed with fewer requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from step37_ext import attention_backend
from step37_ext.attention_backend import Step37AttentionBackend
from step37_kernels.attention.pages import check_paging

LENGTH, SLOTS = 64, 256


class Pool:
    """Stands in for SGLang's pool of two caches: sliding slots are full ones plus 1000."""

    def translate_loc_from_full_to_swa(self, slots: torch.Tensor) -> torch.Tensor:
        return slots + 1000


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Step37AttentionBackend:
    return make(monkeypatch, page_size=1)


def make(monkeypatch: pytest.MonkeyPatch, page_size: int) -> Step37AttentionBackend:
    monkeypatch.setattr(attention_backend, "SWAKVPool", Pool)
    table = torch.arange(SLOTS, dtype=torch.int32).view(4, LENGTH)
    runner = SimpleNamespace(
        token_to_kv_pool=Pool(),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        page_size=page_size,
        device="cpu",
        dtype=torch.bfloat16,
    )
    return Step37AttentionBackend(runner)  # type: ignore[arg-type]


def batch(
    rows: list[int], lengths: list[int], new: list[int], decode: bool = True
) -> SimpleNamespace:
    seq_lens = torch.tensor(lengths)
    return SimpleNamespace(
        batch_size=len(rows),
        req_pool_indices=torch.tensor(rows),
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens,
        extend_seq_lens=torch.ones_like(seq_lens),
        out_cache_loc=torch.tensor(new),
        spec_info=None,
        forward_mode=SimpleNamespace(is_decode_or_idle=lambda: decode, name="DECODE"),
    )


def test_eager_tables(backend: Step37AttentionBackend) -> None:
    backend.init_forward_metadata(batch([2, 0], [3, 5], [130, 4], decode=False))
    assert backend.full is not None and backend.sliding is not None
    assert backend.full.page_table.tolist() == [[128, 129, 130, 131, 132], [0, 1, 2, 3, 4]]
    assert backend.sliding.page_table[1].tolist() == [1000, 1001, 1002, 1003, 1004]
    assert backend.sliding.new_slots.tolist() == [1130, 1004]
    assert backend.query_lens is not None and backend.full.page_table.dtype == torch.int32


@pytest.mark.parametrize("width", [5, 16, 17, 40])
def test_pages_of_16_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    backend = make(monkeypatch, page_size=16)
    one = batch([1, 2], [width, 1], [70, 128], decode=False)
    backend.init_forward_metadata(one)
    assert backend.full is not None
    pages = -(-width // 16)
    assert backend.full.page_table.tolist() == [
        list(range(4, 4 + pages)),
        list(range(8, 8 + pages)),
    ]
    check_paging(backend.full.page_table, one.seq_lens, 16, 2)


def test_a_replay_with_fewer_requests_writes_nothing_of_theirs(
    backend: Step37AttentionBackend,
) -> None:
    backend.init_cuda_graph_state(4, 4)
    backend.init_forward_metadata_out_graph(batch([0, 0, 0, 0], [1] * 4, [0] * 4), in_capture=True)
    assert backend.sliding is not None and backend.full is not None
    recorded_slots, recorded_table = backend.sliding.new_slots, backend.full.page_table
    backend.init_forward_metadata_out_graph(batch([0, 1, 2, 3], [9, 8, 7, 6], [8, 71, 134, 197]))
    assert recorded_slots.tolist() == [1008, 1071, 1134, 1197]
    assert recorded_table[3, :6].tolist() == list(range(192, 198))
    # SGLang pads the rows and not the new slots.
    backend.init_forward_metadata_out_graph(batch([0, 1, 2, 0], [10, 9, 8, 1], [9, 72, 135]))
    assert recorded_slots.tolist() == [1009, 1072, 1135, 0]
    assert backend.get_cuda_graph_seq_len_fill_value() == 1
