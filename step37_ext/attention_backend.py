"""SGLang's attention seam: its batch and cache become the tensors that our verbs take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from step37_ext.model.forward import LayerCache, Paging, attend_cached
from step37_ext.server_facts import device_target
from step37_kernels import dispatch
from step37_kernels.attention.pages import PAGE_SIZES
from step37_kernels.reference.attention import write_cache

if TYPE_CHECKING:
    from sglang.srt.layers.attention.verify_mask import VerifyMask
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass(frozen=True)
class GraphTables:
    """What captured passes read.

    Attributes:
        full, sliding: page tables `[max_bs, pages]` of the two pools.
        sliding_slots: the sliding pool's slots `[tokens]`.
        seq_lens: int32 `[max_bs]`, lengths with the drafts.
    """

    full: torch.Tensor
    sliding: torch.Tensor
    sliding_slots: torch.Tensor
    seq_lens: torch.Tensor


class Step37AttentionBackend(AttentionBackend):
    """Attention through `step37_kernels` over SGLang's full and sliding-window pools.

    The model asks for a `LayerCache` and calls the operations itself, so that the head gate and
    the cache write are in them. `forward_decode` and `forward_extend` are for a server whose
    backends for prefill and decode differ: there q, k and v come one by one, and the gate after.
    """

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        # A page size that the kernels do not have is served slot by slot.
        self.page_size = runner.page_size if runner.page_size in PAGE_SIZES else 1
        device = torch.device(runner.device)
        self.attend = dispatch.choose("attend", device_target(device, "-", runner.dtype))
        self.full: Paging | None = None
        self.sliding: Paging | None = None
        self.seq_lens = torch.empty(0)
        self.query_lens: torch.Tensor | int | None = None
        self.graph: GraphTables | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Before a pass that no graph replays."""
        slots = self._first_slots(forward_batch, self._longest(forward_batch))
        new = forward_batch.out_cache_loc
        self.full = self.sliding = Paging(self._pages(slots), new)
        if isinstance(self.pool, SWAKVPool):
            translate = self.pool.translate_loc_from_full_to_swa
            self.sliding = Paging(self._pages(translate(slots)), translate(new))
        drafts = _drafts_to_count(forward_batch)
        self.seq_lens = forward_batch.seq_lens + drafts if drafts else forward_batch.seq_lens
        self.query_lens = _query_lens(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the tables that every captured graph reads, for that many sequences and tokens."""
        pages = -(-self.req_to_token.shape[1] // self.page_size)
        new = self.req_to_token.new_zeros
        self.graph = GraphTables(
            new((max_bs, pages), dtype=torch.int32),
            new((max_bs, pages), dtype=torch.int32),
            new((max_num_tokens,), dtype=torch.int64),
            new((max_bs,), dtype=torch.int32),
        )

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Before capture and before each replay: fill the tables in place."""
        assert self.graph is not None, "init_cuda_graph_state was not called"
        size, tables = forward_batch.batch_size, self.graph
        # A capture only needs tables that are valid: each replay fills them for itself.
        width = self._longest(forward_batch)
        # SGLang may hand over buffers that are longer than the batch.
        slots = self._first_slots(forward_batch, width)[:size]
        new = forward_batch.out_cache_loc
        pages = self._pages(slots)
        tables.full[:size, : pages.shape[1]] = pages
        self.full = self.sliding = Paging(tables.full[:size], new)
        if isinstance(self.pool, SWAKVPool):
            translate = self.pool.translate_loc_from_full_to_swa
            tables.sliding[:size, : pages.shape[1]] = self._pages(translate(slots))
            tables.sliding_slots[: len(new)] = translate(new)
            # A replay has as many rows as were captured: padding goes to SGLang's dummy slot.
            tables.sliding_slots[len(new) :].zero_()
            self.sliding = Paging(tables.sliding[:size], tables.sliding_slots[: len(new)])
        self.query_lens = _query_lens(forward_batch)
        self.seq_lens = forward_batch.seq_lens[:size]
        if isinstance(self.query_lens, int):
            lengths = self.seq_lens + _drafts_to_count(forward_batch)
            # A padding row's length is that of one token, and it has as many queries as the others.
            self.seq_lens = tables.seq_lens[:size].copy_(lengths.clamp(min=self.query_lens))

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    @cached_property
    def verify_mask(self) -> VerifyMask:
        """Drafts are one chain, each of which sees those before it, so no mask is read."""
        from sglang.srt.layers.attention.verify_mask import VerifyMask
        from sglang.srt.speculative.eagle_utils import TreeMaskMode

        # Without a place for any batch SGLang makes the smallest mask that it has.
        return VerifyMask(torch.empty(0), TreeMaskMode.QLEN_ONLY, max_bs=0, is_read=False)

    def update_verify_buffers_to_fill_after_draft(
        self, spec_info: Any, cuda_graph_bs: int | None
    ) -> None:
        """Nothing that is made before a verification depends on the drafts."""

    def layer_cache(self, layer: RadixAttention) -> LayerCache:
        """What the operations of one layer need in this pass."""
        window = layer.sliding_window_size + 1 if layer.sliding_window_size >= 0 else None
        paging = self.full if window is None else self.sliding
        assert paging is not None, "init_forward_metadata was not called"
        return LayerCache(
            self.pool.get_key_buffer(layer.layer_id),
            self.pool.get_value_buffer(layer.layer_id),
            paging,
            self.page_size,
            self.seq_lens,
            self.query_lens,
            window,
            1.0 if layer.k_scale_float is None else layer.k_scale_float,
            1.0 if layer.v_scale_float is None else layer.v_scale_float,
        )

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._forward(q, k, v, layer, save_kv_cache)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._forward(q, k, v, layer, save_kv_cache)

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        """q, k, v `[T, heads * D]` to `[T, query heads * D]`."""
        cache = self.layer_cache(layer)
        if save_kv_cache and k is not None and v is not None:
            heads = (-1, layer.tp_k_head_num, layer.qk_head_dim)
            write_cache(
                k.view(heads), v.view(heads), cache.k_cache, cache.v_cache, cache.paging.new_slots,
                cache.k_scale, cache.v_scale,
            )  # fmt: skip
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        return attend_cached(self.attend, q, cache, layer.scaling, None)

    def support_triton(self) -> bool:
        """SGLang's own Triton helpers may be used beside this backend on a GPU only."""
        return self.req_to_token.is_cuda

    def _first_slots(self, forward_batch: ForwardBatch, width: int) -> torch.Tensor:
        """The slot that each page of the first `width` positions begins with, `[B, pages]`."""
        return self.req_to_token[forward_batch.req_pool_indices, : width : self.page_size]

    def _pages(self, first_slots: torch.Tensor) -> torch.Tensor:
        """Numbers of the pages that begin with these slots."""
        return (first_slots // self.page_size).int()

    def _longest(self, forward_batch: ForwardBatch) -> int:
        """The longest sequence, of the lengths that SGLang has on the host: no wait."""
        lengths = forward_batch.seq_lens_cpu
        if lengths is None:
            return self.req_to_token.shape[1]
        return int(lengths.max()) + _drafts_to_count(forward_batch) if lengths.numel() else 0


def _drafts_to_count(forward_batch: ForwardBatch) -> int:
    """Drafts of each sequence that SGLang's lengths leave out: those that are being verified."""
    verified = forward_batch.forward_mode.is_target_verify()
    return forward_batch.spec_info.draft_token_num if verified else 0


def _query_lens(forward_batch: ForwardBatch) -> torch.Tensor | int | None:
    """As `LayerCache.query_lens`: drafts are as many for each sequence, known on the host."""
    mode = forward_batch.forward_mode
    if mode.is_decode_or_idle():
        return None
    if mode.is_target_verify() or mode.is_draft_extend_v2():
        return forward_batch.spec_info.num_tokens_per_req
    return forward_batch.extend_seq_lens
