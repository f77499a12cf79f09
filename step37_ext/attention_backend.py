"""SGLang's attention seam: its batch and cache become the tensors that our verbs take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from step37_ext.model.forward import LayerCache, Paging, attend_cached
from step37_ext.server_facts import device_target
from step37_kernels import dispatch
from step37_kernels.attention.pages import PAGE_SIZES
from step37_kernels.checks import ceil_div
from step37_kernels.reference.attention import write_cache

if TYPE_CHECKING:
    from sglang.srt.layers.attention.verify_mask import VerifyMask
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass(frozen=True)
class Tables:
    """What the passes of a batch read: made for one pass, or once for all captured ones.

    Attributes:
        full, sliding: page tables `[B, pages]` of the two pools, as `page_tables` fills them; None
            where no layer reads it, or where there is no such pool.
        sliding_slots: the sliding pool's slots `[tokens]` for new keys, None without that pool.
        seq_lens: int32 `[B]`, lengths with the drafts.
    """

    full: torch.Tensor | None
    sliding: torch.Tensor | None
    sliding_slots: torch.Tensor | None
    seq_lens: torch.Tensor


class Step37AttentionBackend(AttentionBackend):
    """Attention through `step37_kernels` over SGLang's full and sliding-window pools.

    The model asks for a `LayerCache` and calls the operations itself, so that the head gate and
    the cache write are in them. `forward_decode` and `forward_extend` are for a server whose
    backends for prefill and decode differ: there q, k and v come one by one, and the gate after.
    """

    # With drafts SGLang then leaves `seq_lens_cpu` None where they are verified and made, and waits
    # for no lengths. Prompts, and decoding without drafts, keep theirs, and `_longest` reads them
    # for the width of a table; with STEP37_DEBUG=1 the attention kernels check that it is enough.
    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        # A page size that the kernels do not have is served slot by slot.
        self.page_size = runner.page_size if runner.page_size in PAGE_SIZES else 1
        self.two_pools = isinstance(self.pool, SWAKVPool)
        if self.two_pools and self.pool.full_to_swa_index_mapping is None:
            raise ValueError(
                "the KV pools of this start have no table from full to sliding slots "
                "(--enable-unified-memory): --attention-backend step37 needs one"
            )
        # Drafts are sliding layers alone: nobody would read a full table of theirs.
        self.has_full = not self.two_pools or self.pool.full_layer_nums > 0
        last = runner.sliding_window_size
        self.window = None if last is None else last + 1
        target = device_target(torch.device(runner.device), "-", runner.dtype)
        self.attend = dispatch.choose("attend", target)
        self.page_tables = dispatch.choose("page_tables", target)
        self.full: Paging | None = None
        self.sliding: Paging | None = None
        self.seq_lens = torch.empty(0)
        self.query_lens: torch.Tensor | int | None = None
        self.graph: Tables | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Before a pass that no graph replays."""
        pages = self._pages(self._longest(forward_batch))
        new = len(forward_batch.out_cache_loc)
        self._fill(self._tables(forward_batch.batch_size, pages, new), forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the tables that every captured graph reads, for that many sequences and tokens."""
        self.graph = self._tables(max_bs, self._pages(self.req_to_token.shape[1]), max_num_tokens)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Before capture and before each replay: fill the tables in place, from device lengths."""
        assert self.graph is not None, "init_cuda_graph_state was not called"
        self._fill(self.graph, forward_batch)

    def _tables(self, batch: int, pages: int, tokens: int) -> Tables:
        # Zeros: what no pass fills is then a page that exists, whatever is checked of it.
        new = partial(self.req_to_token.new_zeros, dtype=torch.int32)
        # Kernels are compiled anew for rows that are not whole multiples of 16 apart.
        apart = 16 * max(ceil_div(pages, 16), 1)
        return Tables(
            new((batch, apart))[:, :pages] if self.has_full else None,
            new((batch, apart))[:, :pages] if self.two_pools else None,
            new((tokens,), dtype=torch.int64) if self.two_pools else None,
            new((batch,)),
        )

    def _fill(self, tables: Tables, forward_batch: ForwardBatch) -> None:
        """Fill the tables' first rows with this batch, and let its layers read them."""
        # SGLang may hand over buffers that are longer than the batch.
        size, new = forward_batch.batch_size, forward_batch.out_cache_loc
        full, sliding, slots = tables.full, tables.sliding, tables.sliding_slots
        full = None if full is None else full[:size]
        sliding = None if sliding is None else sliding[:size]
        self.seq_lens, self.query_lens = tables.seq_lens[:size], _query_lens(forward_batch)
        # All new slots of a captured pass are filled: it has as many rows as were captured.
        self.page_tables(
            self.req_to_token,
            forward_batch.req_pool_indices[:size],
            forward_batch.seq_lens[:size],
            _drafts_to_count(forward_batch),
            self.query_lens,
            self.page_size,
            self.seq_lens,
            full,
            sliding,
            self.pool.full_to_swa_index_mapping if self.two_pools else None,
            self.window,
            new if self.two_pools else None,
            slots,
        )
        self.full = None if full is None else Paging(full, new)
        self.sliding = self.full
        if sliding is not None and slots is not None:
            self.sliding = Paging(sliding, slots[: len(new)])

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
        # Its pages before that window were not filled.
        assert window is None or self.window is None or window <= self.window, "a wider window"
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

    def _pages(self, positions: int) -> int:
        """Pages of so many positions."""
        return ceil_div(positions, self.page_size)

    def _longest(self, forward_batch: ForwardBatch) -> int:
        """The longest sequence by the lengths on the host; without them the longest possible."""
        lengths, most = forward_batch.seq_lens_cpu, self.req_to_token.shape[1]
        if lengths is None:
            return most
        longest = int(lengths.max()) + _drafts_to_count(forward_batch) if lengths.numel() else 0
        return min(longest, most)


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
