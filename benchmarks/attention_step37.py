"""This project's attention kernels as the benchmark runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_cells import PAGE_SIZE, heads_of, rotation
from benchmarks.attention_data import (
    CACHE_DTYPE,
    K_SCALE,
    SOFTMAX_SCALE,
    V_SCALE,
    AttentionSubject,
    Problem,
)
from benchmarks.expert_data import BF16_ROUNDING, DEVICE
from benchmarks.harness.cells import Accuracy, Cell, Trial, relative_l2
from benchmarks.shapes import ATTENTION, HEAD_DIM, RMS_NORM_EPS
from step37_kernels.reference.attention import prologue as reference_prologue
from step37_kernels.reference.attention import write_cache
from step37_kernels.reference.rotary import cos_sin_cache


@dataclass(frozen=True)
class PrologueInputs:
    """qkv [copies, T, width] bf16, positions and slots [T], norms [D], cos_sin, the caches."""

    qkv: Tensor
    positions: Tensor
    slots: Tensor
    q_norm: Tensor
    k_norm: Tensor
    cos_sin: Tensor
    k_cache: Tensor
    v_cache: Tensor


class Step37Attention(AttentionSubject):
    """Decode, prefill and prologue of this project, head gate included."""

    name, library, gated = "step37", "step37-ext", True

    def load(self) -> None:
        from step37_kernels.attention.decode import decode
        from step37_kernels.attention.extend import extend
        from step37_kernels.attention.prologue import prologue

        self._decode, self._extend, self._prologue = decode, extend, prologue

    def version(self) -> str:
        return "this checkout"  # a result records the hash of its sources

    def refuses(self, cell: Cell) -> str | None:
        return None

    def allowed(self, cell: Cell) -> float:
        """0.3% beyond the cache's own error is the aim; the output's rounding comes on top."""
        return 0.003 + BF16_ROUNDING

    def bind(self, problem: Problem, cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
        options: dict[str, Any] = {
            "softmax_scale": SOFTMAX_SCALE,
            "window": problem.heads.window,
            "page_size": PAGE_SIZE,
            "k_scale": problem.k_scale,
            "v_scale": problem.v_scale,
            "head_gate": problem.head_gate,
        }
        q, pages, lengths = problem.q, problem.page_table, problem.seq_lens
        if cell.operation == "decode":
            return lambda k, v: self._decode(q, k, v, pages, lengths, **options)
        counts = problem.query_lens
        return lambda k, v: self._extend(q, k, v, pages, lengths, counts, **options)

    def prepare(self, cell: Cell) -> Any:
        if cell.operation != "prologue":
            return super().prepare(cell)
        of, tokens = heads_of(cell), int(cell.settings["tokens"])
        theta = ATTENTION[str(cell.settings["kind"])].rope_theta
        copies = rotation(cell).copies
        qkv = torch.empty(copies, tokens, of.qkv_width, dtype=torch.bfloat16, device=DEVICE)
        dtype = CACHE_DTYPE[str(cell.settings["cache"])]
        caches = torch.zeros(2, copies * tokens, of.kv, HEAD_DIM, dtype=dtype, device=DEVICE)
        return PrologueInputs(
            qkv.normal_(),
            torch.randperm(tokens, device=DEVICE),
            torch.randperm(copies * tokens, device=DEVICE).int(),
            torch.randn(HEAD_DIM, device=DEVICE).mul(0.1).bfloat16(),
            torch.randn(HEAD_DIM, device=DEVICE).mul(0.1).bfloat16(),
            cos_sin_cache(of.rotary_dim, theta, tokens, None).to(DEVICE),
            caches[0],
            caches[1],
        )

    def trial(self, prepared: Any, cell: Cell) -> Trial:
        if cell.operation != "prologue":
            return super().trial(prepared, cell)
        of, data = heads_of(cell), prepared
        tokens = data.positions.shape[0]
        fp8 = data.k_cache.dtype == torch.float8_e4m3fn
        scales = (K_SCALE, V_SCALE) if fp8 else (1.0, 1.0)

        def call(copy: int) -> Callable[[], Tensor]:
            # fmt: off
            return lambda: self._prologue(
                data.qkv[copy], data.positions, data.q_norm, data.k_norm, data.cos_sin, of.query,
                of.kv, RMS_NORM_EPS, data.k_cache, data.v_cache,
                data.slots[copy * tokens : (copy + 1) * tokens], *scales,
            )
            # fmt: on

        def check() -> Accuracy:
            q, k, v = reference_prologue(
                data.qkv[0], data.positions, data.q_norm, data.k_norm, data.cos_sin, of.query,
                of.kv, RMS_NORM_EPS,
            )  # fmt: skip
            k_cache, v_cache = torch.zeros_like(data.k_cache), torch.zeros_like(data.v_cache)
            slots = data.slots[:tokens]
            write_cache(k, v, k_cache, v_cache, slots, *scales)
            found = call(0)()
            errors = [relative_l2(found.view(q.shape), q)]
            for have, want in ((data.k_cache, k_cache), (data.v_cache, v_cache)):
                errors.append(relative_l2(_rows(have, slots), _rows(want, slots)))
            # Both round once; sums in another order move a value over a border of e4m3's codes,
            # 2^-3 apart, in at most a share 2^-15 of the cases, and of bf16's less.
            return Accuracy(max(errors), 2 * BF16_ROUNDING)

        copies = len(data.qkv)
        calls = [call(copy) for copy in range(copies)] * (rotation(cell).calls // copies)
        return Trial(calls, check, cell.work)


def _rows(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows of a cache as fp32; 8-bit floats are not indexed everywhere, their bytes are."""
    if cache.dtype.itemsize == 1:
        return cache.view(torch.uint8)[slots.long()].view(cache.dtype).float()
    return cache[slots.long()].float()
