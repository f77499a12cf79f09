"""SGLang's batch as page tables: eager, recorded, and replayed with fewer requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from step37_ext import attention_backend
from step37_ext.attention_backend import Step37AttentionBackend
from step37_kernels.attention.pages import check_paging, debug_check

LENGTH, SLOTS, WINDOW = 64, 256, 48


class Pool:
    """Stands in for SGLang's pool of two caches: sliding slots are full ones plus 1024."""

    def __init__(self, full_layers: int = 1) -> None:
        self.full_layer_nums = full_layers
        # As SGLang's, it ends with what the slot -1 is.
        self.full_to_swa_index_mapping = torch.cat(
            (torch.arange(1024, 1024 + SLOTS), torch.tensor([-1]))
        )


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Step37AttentionBackend:
    return make(monkeypatch, page_size=1)


def make(
    monkeypatch: pytest.MonkeyPatch, page_size: int = 1, pool: Any = None
) -> Step37AttentionBackend:
    monkeypatch.setattr(attention_backend, "SWAKVPool", Pool)
    table = torch.arange(SLOTS, dtype=torch.int32).view(4, LENGTH)
    runner = SimpleNamespace(
        token_to_kv_pool=Pool() if pool is None else pool,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        page_size=page_size,
        sliding_window_size=WINDOW - 1,
        device="cpu",
        dtype=torch.bfloat16,
    )
    return Step37AttentionBackend(runner)  # type: ignore[arg-type]


def batch(
    rows: list[int],
    lengths: list[int],
    new: list[int],
    decode: bool = True,
    verify: int = 0,
    extend: int = 0,
) -> SimpleNamespace:
    """What SGLang says of a batch; `verify` and `extend` are its drafts in each sequence."""
    seq_lens = torch.tensor(lengths)
    return SimpleNamespace(
        batch_size=len(rows),
        req_pool_indices=torch.tensor(rows),
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens,
        extend_seq_lens=torch.ones_like(seq_lens),
        out_cache_loc=torch.tensor(new),
        spec_info=SimpleNamespace(draft_token_num=verify, num_tokens_per_req=verify or extend),
        forward_mode=SimpleNamespace(
            is_decode_or_idle=lambda: decode and not verify and not extend,
            is_target_verify=lambda: verify > 0,
            is_draft_extend_v2=lambda: extend > 0,
        ),
    )


def test_eager_tables(backend: Step37AttentionBackend) -> None:
    backend.init_forward_metadata(batch([2, 0], [3, 5], [130, 4], decode=False))
    assert backend.full is not None and backend.sliding is not None
    assert backend.full.page_table.tolist() == [[128, 129, 130, 0, 0], [0, 1, 2, 3, 4]]
    assert backend.sliding.page_table[1].tolist() == [1024, 1025, 1026, 1027, 1028]
    assert backend.sliding.new_slots.tolist() == [1154, 1028]
    assert backend.query_lens is not None and backend.full.page_table.dtype == torch.int32


@pytest.mark.parametrize("width", [5, 16, 17, 40])
def test_pages_of_16_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    backend = make(monkeypatch, page_size=16)
    one = batch([1, 2], [width, 1], [70, 128], decode=False)
    backend.init_forward_metadata(one)
    assert backend.full is not None
    pages = -(-width // 16)
    assert backend.full.page_table[0].tolist() == list(range(4, 4 + pages))
    assert int(backend.full.page_table[1, 0]) == 8
    check_paging(backend.full.page_table, one.seq_lens, 16, 2)


@pytest.mark.parametrize("longest", [1, 5, 16, 33])
def test_rows_are_whole_multiples_of_16_apart(
    backend: Step37AttentionBackend, longest: int
) -> None:
    """Else kernels would be compiled anew for every other width."""
    backend.init_forward_metadata(batch([2, 0], [longest, 1], [130, 4], decode=False))
    assert backend.full is not None and backend.sliding is not None
    for paging in (backend.full, backend.sliding):
        assert paging.page_table.shape == (2, longest) and paging.page_table.stride(0) % 16 == 0


def test_a_replay_with_fewer_requests_writes_nothing_of_theirs(
    backend: Step37AttentionBackend,
) -> None:
    backend.init_cuda_graph_state(4, 4)
    backend.init_forward_metadata_out_graph(batch([0, 0, 0, 0], [1] * 4, [0] * 4), in_capture=True)
    assert backend.sliding is not None and backend.full is not None
    recorded_slots, recorded_table = backend.sliding.new_slots, backend.full.page_table
    backend.init_forward_metadata_out_graph(batch([0, 1, 2, 3], [9, 8, 7, 6], [8, 71, 134, 197]))
    assert recorded_slots.tolist() == [1032, 1095, 1158, 1221]
    assert recorded_table[3, :6].tolist() == list(range(192, 198))
    # SGLang pads the rows and not the new slots.
    backend.init_forward_metadata_out_graph(batch([0, 1, 2, 0], [10, 9, 8, 1], [9, 72, 135]))
    assert recorded_slots.tolist() == [1033, 1096, 1159, 0]
    assert backend.get_cuda_graph_seq_len_fill_value() == 1


def test_drafts_that_are_verified_are_not_in_sglang_s_lengths(
    backend: Step37AttentionBackend,
) -> None:
    backend.init_forward_metadata(batch([2, 0], [3, 5], [131, 132, 5, 6], verify=2))
    assert backend.full is not None and backend.full.page_table.shape == (2, 7)
    assert backend.seq_lens.tolist() == [5, 7] and backend.query_lens == 2
    backend.init_forward_metadata(batch([2, 0], [5, 7], [131, 132, 5, 6], extend=2))
    assert backend.full.page_table.shape == (2, 7)
    assert backend.seq_lens.tolist() == [5, 7] and backend.query_lens == 2


def test_lengths_that_sglang_keeps_on_the_gpu_are_not_waited_for(
    backend: Step37AttentionBackend,
) -> None:
    unknown = batch([2, 0], [3, 5], [131, 132, 5, 6], verify=2)
    unknown.seq_lens_cpu = None
    backend.init_forward_metadata(unknown)
    assert backend.full is not None and backend.full.page_table.shape == (2, LENGTH)
    assert backend.seq_lens.tolist() == [5, 7] and not backend.needs_cpu_seq_lens
    assert backend.full.page_table[0, :6].tolist() == [128, 129, 130, 131, 132, 0]


def test_a_replay_reads_lengths_on_the_device_and_the_recorded_tensors(
    backend: Step37AttentionBackend,
) -> None:
    backend.init_cuda_graph_state(4, 4)
    backend.init_forward_metadata_out_graph(batch([0] * 4, [1] * 4, [0] * 4), in_capture=True)
    assert backend.full is not None and backend.sliding is not None
    recorded = (
        backend.full.page_table, backend.sliding.page_table, backend.sliding.new_slots,
        backend.seq_lens,
    )  # fmt: skip
    for length in (5, LENGTH, 2):
        replay = batch([1, 2, 3, 0], [length, 4, 3, 1], [64, 65, 66, 67])
        replay.seq_lens_cpu = None
        backend.init_forward_metadata_out_graph(replay)
        now = (
            backend.full.page_table, backend.sliding.page_table, backend.sliding.new_slots,
            backend.seq_lens,
        )  # fmt: skip
        assert [t.data_ptr() for t in now] == [t.data_ptr() for t in recorded]
        full, sliding, slots, lengths = recorded
        assert lengths.tolist() == [length, 4, 3, 1] and slots[0] == 1088
        first = max(0, length - WINDOW)
        assert full[0, :length].tolist() == list(range(64, 64 + length))
        assert sliding[0, first:length].tolist() == list(range(1088 + first, 1088 + length))


def test_drafts_have_no_full_table_and_one_pool_no_sliding_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafts = make(monkeypatch, pool=Pool(full_layers=0))
    drafts.init_forward_metadata(batch([2, 0], [5, 7], [131, 132, 5, 6], extend=2))
    assert drafts.full is None and drafts.sliding is not None
    assert drafts.sliding.page_table[1].tolist() == list(range(1024, 1031))
    single = make(monkeypatch, pool=object())
    single.init_forward_metadata(batch([2, 0], [5, 7], [132, 6]))
    assert single.sliding is single.full and single.full is not None
    assert single.full.new_slots.tolist() == [132, 6]
    assert single.full.page_table[1].tolist() == list(range(7))


def test_pools_without_a_table_between_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    pool.full_to_swa_index_mapping = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="--enable-unified-memory"):
        make(monkeypatch, pool=pool)


def test_lengths_on_the_host_that_are_too_short_are_named(
    backend: Step37AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention kernels' own check, with the table and the lengths that they get."""
    monkeypatch.setenv("STEP37_DEBUG", "1")
    late = batch([2, 0], [3, 5], [130, 7], decode=False)
    late.seq_lens = torch.tensor([3, 8])
    backend.init_forward_metadata(late)
    assert backend.full is not None
    with pytest.raises(ValueError, match="sequence 1 has seq_len 8, expected 0 to 5"):
        debug_check(backend.full.page_table, backend.seq_lens, backend.page_size, SLOTS)


@pytest.mark.parametrize("kind", ["verify", "extend"])
def test_recorded_drafts_read_the_same_places(backend: Step37AttentionBackend, kind: str) -> None:
    """Also from buffers longer than the batch, as SGLang hands them over for draft steps."""
    backend.init_cuda_graph_state(4, 8)
    drafts = {kind: 2}
    first = batch([0] * 4, [1] * 4, [0] * 8, **drafts)
    backend.init_forward_metadata_out_graph(first, in_capture=True)
    recorded = backend.seq_lens
    assert recorded.tolist() == ([3] * 4 if kind == "verify" else [2] * 4)
    assert backend.query_lens == 2
    replay = batch([3, 1, 0, 0], [9, 8, 1, 1], [201, 202, 72, 73], **drafts)
    replay.batch_size = 2
    backend.init_forward_metadata_out_graph(replay)
    more = 2 if kind == "verify" else 0
    assert recorded[:2].tolist() == [9 + more, 8 + more]
    assert backend.seq_lens.data_ptr() == recorded.data_ptr() and backend.seq_lens.shape == (2,)
    assert backend.full is not None and backend.sliding is not None
    assert backend.full.page_table[:, :3].tolist() == [[192, 193, 194], [64, 65, 66]]
    assert backend.sliding.new_slots.tolist() == [1225, 1226, 1096, 1097]


def test_no_mask_is_made_for_drafts(backend: Step37AttentionBackend) -> None:
    mask = backend.verify_mask
    assert not mask.is_read and not mask.fits(1)
