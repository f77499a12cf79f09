"""Random batches in a paged cache, and how far a kernel may be from the reference on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step37_kernels.attention.extend import extend
from step37_kernels.formats.e4m3 import to_e4m3
from step37_kernels.reference.attention import attend

DIM = 128
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@dataclass
class Batch:
    """Queries of a ragged batch, on the CPU, and its cache.

    Slots that belong to no key hold NaN, and pages of the table that no key needs point past the
    cache. `slots` is the same table by position, as the reference takes it.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    slots: Tensor
    seq_lens: Tensor
    query_lens: Tensor
    page_size: int
    window: int | None
    k_scale: float = 1.0
    v_scale: float = 1.0
    head_gate: Tensor | None = None

    @property
    def scale(self) -> float:
        return DIM**-0.5

    def shared(self) -> dict[str, Any]:
        return {
            "softmax_scale": self.scale,
            "window": self.window,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
        }

    def run(self, device: torch.device) -> Tensor:
        """[Tq, Hq, D] of the kernel, on the CPU."""
        tensors = (self.q, self.k_cache, self.v_cache, self.page_table, self.seq_lens)
        gate = None if self.head_gate is None else self.head_gate.to(device)
        out = extend(
            *(tensor.to(device) for tensor in tensors), self.query_lens.to(device),
            page_size=self.page_size, head_gate=gate, **self.shared(),
        )  # fmt: skip
        return out.cpu().view(self.q.shape)

    def check(self, out: Tensor) -> None:
        """Hold `run`'s result against the reference."""
        assert ((out.float() - self.reference()).abs() <= self.bound()).all()

    def rows(self, sequence: int) -> slice:
        """The sequence's rows of q."""
        first = int(self.query_lens[:sequence].sum())
        return slice(first, first + int(self.query_lens[sequence]))

    def slot(self, sequence: int, position: int) -> int:
        """Where the cache holds a key."""
        return int(self.slots[sequence, position])

    def reference(self, v_cache: Tensor | None = None) -> Tensor:
        """fp32 [Tq, Hq, D]; over other values if given."""
        out = attend(
            self.q.float(), self.k_cache, self.v_cache if v_cache is None else v_cache, self.slots,
            self.seq_lens, self.query_lens, head_gate=self.head_gate, **self.shared(),
        )  # fmt: skip
        return out.view(self.q.shape)

    def bound(self) -> Tensor:
        """How far each output may be from `reference`, [Tq, Hq, D].

        With u the unit roundoff of bf16 (2^-8) or of the type P is multiplied in (fp16 over e4m3:
        2^-11): u_out |out| for rounding the output, u_p sum(p |v|) for P, and sums in fp32: a score
        of D products is off by at most (D + 4) 2^-24 times scale |q| |k|, twice (numerator and
        denominator) on both sides; sums over n keys by n 2^-24, on both sides.
        """
        cached_fp8 = self.k_cache.dtype == E4M3
        roundoff = 2.0**-11 if cached_fp8 else 2.0**-8
        k = self.k_cache.float().nan_to_num() * (self.k_scale if cached_fp8 else 1.0)
        norms = self.q.float().norm(dim=-1).max() * k.norm(dim=-1).max()
        longest = int(self.seq_lens.max())
        fp32 = 2.0**-24 * (4 * (DIM + 4) * self.scale * norms + 4 * longest)
        magnitude = self.reference(self.v_cache.float().abs().to(self.v_cache.dtype))
        return 2.0**-8 * self.reference().abs() + 1.01 * (roundoff + fp32) * magnitude


def make_batch(
    lengths: list[tuple[int, int]],
    cache_type: torch.dtype = E4M3,
    group: int = 8,
    kv_heads: int = 1,
    window: int | None = None,
    page_size: int = 16,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    gated: bool = False,
    seed: int = 0,
) -> Batch:
    """A batch of (cached keys, new tokens) sequences with N(0, 1) queries, keys and values."""
    draw = torch.Generator().manual_seed(seed)
    seq_lens = [cached + new for cached, new in lengths]
    pages = [-(-length // page_size) for length in seq_lens]
    num_pages, longest = sum(pages) + 1, max(pages) + 1
    shuffled = torch.randperm(num_pages, generator=draw).int()
    page_table = torch.full((len(lengths), longest), num_pages + 7, dtype=torch.int32)
    first = 0
    for sequence, count in enumerate(pages):
        page_table[sequence, :count] = shuffled[first : first + count]
        first += count
    column = torch.arange(longest * page_size)
    slots = page_table[:, column // page_size] * page_size + column % page_size
    used = torch.cat([slots[b, :length] for b, length in enumerate(seq_lens)]).long()

    caches = []
    for scale in (k_scale, v_scale):
        cache = torch.full((num_pages * page_size, kv_heads, DIM), float("nan"))
        cache[used] = torch.randn(len(used), kv_heads, DIM, generator=draw)
        caches.append(to_e4m3(cache / scale) if cache_type == E4M3 else cache.to(cache_type))
    num_tokens, heads = sum(new for _, new in lengths), group * kv_heads
    return Batch(
        q=torch.randn(num_tokens, heads, DIM, generator=draw).to(BF16),
        k_cache=caches[0],
        v_cache=caches[1],
        page_table=page_table,
        slots=slots,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        query_lens=torch.tensor([new for _, new in lengths], dtype=torch.int32),
        page_size=page_size,
        window=window,
        k_scale=k_scale,
        v_scale=v_scale,
        head_gate=torch.randn(num_tokens, heads, generator=draw).to(BF16) if gated else None,
    )
