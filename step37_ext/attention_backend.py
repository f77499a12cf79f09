"""SGLang's attention seam: its batch and cache become tensors, then one verb is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from step37_kernels import dispatch
from step37_kernels.reference.attention import write_cache

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass(frozen=True)
class Paging:
    """Where one batch's keys are in one of the two cache pools.

    Attributes:
        page_table: int `[B, longest]`, the slot of each position.
        new_slots: int `[T]`, where this step's keys go.
    """

    page_table: torch.Tensor
    new_slots: torch.Tensor


class Step37AttentionBackend(AttentionBackend):
    """Attention through `step37_kernels`, with the head gate applied in the same operation."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        device = torch.device(runner.device)
        capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
        self.attend = dispatch.choose("attend", dispatch.Target(device.type, capability, "-"))
        self.full: Paging | None = None
        self.sliding: Paging | None = None
        self.seq_lens = self.query_lens = torch.empty(0)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        mode = forward_batch.forward_mode
        if forward_batch.spec_info is not None:
            raise ValueError(f"attention backend step37 does not verify drafts (mode {mode.name})")
        self.seq_lens = forward_batch.seq_lens
        self.query_lens = (
            torch.ones_like(self.seq_lens)
            if mode.is_decode_or_idle()
            else forward_batch.extend_seq_lens
        )
        longest = int(self.seq_lens.max()) if self.seq_lens.numel() else 0
        table = self.req_to_token[forward_batch.req_pool_indices, :longest]
        self.full = self.sliding = Paging(table, forward_batch.out_cache_loc)
        if isinstance(self.pool, SWAKVPool):
            self.sliding = Paging(
                self.pool.translate_loc_from_full_to_swa(table),
                self.pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc),
            )

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._forward(q, k, v, layer, save_kv_cache, **kwargs)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._forward(q, k, v, layer, save_kv_cache, **kwargs)

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        save_kv_cache: bool,
        head_gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q, k, v `[T, heads * D]` to `[T, query heads * D]`, gated if `head_gate` is given."""
        window = layer.sliding_window_size + 1 if layer.sliding_window_size >= 0 else None
        paging = self.full if window is None else self.sliding
        assert paging is not None, "init_forward_metadata was not called"
        k_cache = self.pool.get_key_buffer(layer.layer_id)
        v_cache = self.pool.get_value_buffer(layer.layer_id)
        k_scale = 1.0 if layer.k_scale_float is None else layer.k_scale_float
        v_scale = 1.0 if layer.v_scale_float is None else layer.v_scale_float
        if save_kv_cache and k is not None and v is not None:
            heads = (-1, layer.tp_k_head_num, layer.qk_head_dim)
            write_cache(
                k.view(heads), v.view(heads), k_cache, v_cache, paging.new_slots, k_scale, v_scale
            )
        return self.attend(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k_cache,
            v_cache,
            paging.page_table,
            self.seq_lens,
            self.query_lens,
            layer.scaling,
            window,
            k_scale=k_scale,
            v_scale=v_scale,
            head_gate=head_gate,
        )

    def support_triton(self) -> bool:
        """SGLang's own Triton helpers may be used beside this backend on a GPU only."""
        return self.req_to_token.is_cuda
