"""Other implementations of attention, each behind a small adapter.

None applies the head gate, which is a kernel of its own in SGLang: their times are without it and
are compared with a reference without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_cells import PAGE_SIZE
from benchmarks.attention_data import K_SCALE, SOFTMAX_SCALE, V_SCALE, AttentionSubject, Problem
from benchmarks.harness.cells import Cell
from benchmarks.shapes import HEAD_DIM

Bound = Callable[[Tensor, Tensor], Tensor]

FP8_PRODUCTS = 0.06
"""Q or P rounded to e4m3: at most 2^-4, 2^-4 / sqrt(3) = 3.6% in the root mean square, of which
both together make 5.1%."""


def _indptr(counts: Tensor) -> Tensor:
    """Running sum of counts [B] with a zero before it, int32 [B + 1]."""
    ends = counts.cumsum(0, dtype=torch.int32)
    return torch.cat([torch.zeros(1, dtype=torch.int32, device=counts.device), ends])


def _window_left(problem: Problem) -> int:
    """Keys before the newest that are seen, -1 for all: the convention of FlashInfer and FA."""
    window = problem.heads.window
    return -1 if window is None else window - 1


class FlashInfer(AttentionSubject):
    """FlashInfer's paged prefill wrapper, which its decode with tensor cores uses as well."""

    library = "flashinfer-python"

    def __init__(self, backend: str) -> None:
        self.name, self._backend = f"FlashInfer {backend}", backend

    def load(self) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self._wrapper = BatchPrefillWithPagedKVCacheWrapper

    def refuses(self, cell: Cell) -> str | None:
        if cell.operation == "prologue":
            return "only attention"
        if self._backend == "fa3" and cell.settings["cache"] == "fp8":
            return "fa3 multiplies bf16 queries with bf16 keys only"
        return None

    def bind(self, problem: Problem, cell: Cell) -> Bound:
        of, lengths = problem.heads, problem.seq_lens
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=lengths.device)
        wrapper = self._wrapper(workspace, "NHD", backend=self._backend)
        batch, pages = problem.page_table.shape
        wrapper.plan(
            _indptr(problem.query_lens),
            _indptr(torch.full_like(lengths, pages)),
            problem.page_table.flatten(),
            (lengths - 1) % PAGE_SIZE + 1,
            of.query,
            of.kv,
            HEAD_DIM,
            PAGE_SIZE,
            causal=True,
            sm_scale=SOFTMAX_SCALE,
            window_left=_window_left(problem),
            q_data_type=torch.bfloat16,
            kv_data_type=problem.k.dtype,
        )
        shape = (-1, PAGE_SIZE, of.kv, HEAD_DIM)
        scales = {"k_scale": problem.k_scale, "v_scale": problem.v_scale}
        if problem.k.dtype == torch.bfloat16:
            scales = {}
        return lambda k, v: wrapper.run(problem.q, (k.view(shape), v.view(shape)), **scales)


class FlashAttention3(AttentionSubject):
    """FlashAttention 3 over pages; with an fp8 cache it takes q in fp8 and multiplies in fp8."""

    name, library = "FA3", "flash_attn_3"

    def load(self) -> None:
        try:
            from flash_attn_interface import flash_attn_with_kvcache
        except ImportError:  # SGLang ships the same function
            from sgl_kernel.flash_attn import flash_attn_with_kvcache
        self._attend = flash_attn_with_kvcache

    def version(self) -> str:
        from importlib import metadata

        for library in (self.library, "sgl-kernel"):
            try:
                return f"{library} {metadata.version(library)}"
            except metadata.PackageNotFoundError:
                continue
        return "unknown"

    def refuses(self, cell: Cell) -> str | None:
        if cell.operation == "prologue":
            return "only attention"
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            return "FA3 is for sm_90"
        return None

    def allowed(self, cell: Cell) -> float:
        return FP8_PRODUCTS if cell.settings["cache"] == "fp8" else super().allowed(cell)

    def bind(self, problem: Problem, cell: Cell) -> Bound:
        of, batch = problem.heads, problem.seq_lens.shape[0]
        q = problem.q.to(problem.k.dtype).view(batch, -1, of.query, HEAD_DIM)
        options: dict[str, Any] = {
            "cache_seqlens": problem.seq_lens,
            "page_table": problem.page_table,
            "softmax_scale": SOFTMAX_SCALE,
            "causal": True,
            "window_size": (_window_left(problem), 0 if of.window else -1),
        }
        if problem.k.dtype == torch.float8_e4m3fn:
            ones = torch.ones(batch, of.kv, device=q.device)
            options |= {"k_descale": ones * K_SCALE, "v_descale": ones * V_SCALE}
        shape = (-1, PAGE_SIZE, of.kv, HEAD_DIM)
        return lambda k, v: self._attend(q, k.view(shape), v.view(shape), **options)


class SGLangTriton(AttentionSubject):
    """SGLang's Triton kernels, decode with the 8 splits that it takes by default."""

    name, library = "SGLang Triton", "sglang"
    _SPLITS = 8

    def load(self) -> None:
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

        self._decode, self._extend = decode_attention_fwd, extend_attention_fwd

    def refuses(self, cell: Cell) -> str | None:
        return "only attention" if cell.operation == "prologue" else None

    def allowed(self, cell: Cell) -> float:
        return FP8_PRODUCTS if cell.settings["cache"] == "fp8" else super().allowed(cell)

    def bind(self, problem: Problem, cell: Cell) -> Bound:
        from benchmarks.expert_peers import sglang_context

        sglang_context()
        bind = self._bind_decode if cell.operation == "decode" else self._bind_extend
        return bind(problem)

    def _bind_decode(self, problem: Problem) -> Bound:
        batch, heads = problem.seq_lens.shape[0], problem.heads
        length = int(problem.seq_lens[0])
        visible = heads.visible(length)
        slots = problem.slots(range(batch))[:, length - visible : length]
        indices = slots.flatten().contiguous()
        ends = _indptr(torch.full_like(problem.seq_lens, visible))
        splits = torch.full_like(problem.seq_lens, self._SPLITS)
        shape = (batch, heads.query, self._SPLITS)
        partial = torch.empty(*shape, HEAD_DIM, device=indices.device)
        lse = torch.empty(shape, device=indices.device)

        def run(k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(problem.q)
            self._decode(
                problem.q, k, v, out, ends, indices, partial, lse, splits, self._SPLITS,
                SOFTMAX_SCALE, problem.k_scale, problem.v_scale,
            )  # fmt: skip
            return out

        return run

    def _bind_extend(self, problem: Problem) -> Bound:
        new, length = problem.q.shape[0], int(problem.seq_lens[0])
        slots = problem.slots([0])[0, :length]
        prefix, newest = slots[: length - new].contiguous(), slots[length - new :]
        ends = _indptr(torch.full_like(problem.seq_lens, length - new))
        # It takes the new keys as bf16 beside the cache: here they are what the cache holds.
        k_new = _dequantised(problem.k[0], newest, problem.k_scale)
        v_new = _dequantised(problem.v[0], newest, problem.v_scale)

        def run(k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(problem.q)
            self._extend(
                problem.q, k_new, v_new, out, k, v, _indptr(problem.query_lens), ends, prefix,
                None, True, None, new, problem.k_scale, problem.v_scale, SOFTMAX_SCALE,
                sliding_window_size=_window_left(problem),
            )  # fmt: skip
            return out

        return run


def _dequantised(cache: Tensor, slots: Tensor, scale: float) -> Tensor:
    if cache.dtype == torch.bfloat16:
        return cache[slots]
    values = cache.view(torch.uint8)[slots].view(cache.dtype)
    return (values.float() * scale).bfloat16()


class FlexAttention(AttentionSubject):
    """PyTorch's flex attention, compiled, over keys that lie one after the other (no pages)."""

    name, library = "torch flex", "torch"

    def load(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self._flex, self._mask = torch.compile(flex_attention), create_block_mask

    def refuses(self, cell: Cell) -> str | None:
        if cell.operation != "prefill" or cell.settings["cache"] != "bf16":
            return "only prefill over bf16: it reads no pages and no e4m3"
        return None

    def bind(self, problem: Problem, cell: Cell) -> Bound:
        new, length = problem.q.shape[0], int(problem.seq_lens[0])
        prefix, window = length - new, problem.heads.window or length
        slots = problem.slots([0])[0, :length]

        def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query + prefix) & (key > query + prefix - window)

        mask = self._mask(visible, None, None, new, length, device=str(problem.q.device))
        q = problem.q.transpose(0, 1)[None]
        contiguous = {}
        for k, v in zip(problem.k, problem.v, strict=True):
            pair = [part[slots].transpose(0, 1)[None].contiguous() for part in (k, v)]
            contiguous[k.data_ptr()] = pair

        def run(k: Tensor, v: Tensor) -> Tensor:
            keys, values = contiguous[k.data_ptr()]
            out = self._flex(
                q, keys, values, block_mask=mask, scale=SOFTMAX_SCALE, enable_gqa=True
            )  # fmt: skip
            return out[0].transpose(0, 1).contiguous()

        return run


def peers() -> list[AttentionSubject]:
    """All peers, whether they can be used here or not."""
    return [
        FlashInfer("fa2"),
        FlashInfer("fa3"),
        FlashAttention3(),
        SGLangTriton(),
        FlexAttention(),
    ]
