"""Random sequences in a paged cache, the reference's answer, and how far kernels may be off."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from step37_kernels.attention.decode import decode, verify
from step37_kernels.reference.attention import attend

D = 128
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
NOWHERE = 2**30  # a page that no cache has
ROUNDOFF = {BF16: 2.0**-8, E4M3: 2.0**-11}  # of probabilities: bf16, and fp16 over e4m3


@dataclass
class Batch:
    """Sequences whose last `queries` tokens are queries.

    Whatever no query may read is NaN in the cache or NOWHERE in the page table.
    """

    dtype: torch.dtype
    page_size: int
    heads: int
    kv_heads: int
    lengths: list[int]
    window: int | None = None
    queries: int = 1
    k_scale: float = 1.0
    v_scale: float = 1.0
    gated: bool = False
    tree_mask: Tensor | None = None
    seed: int = 0
    q: Tensor = field(init=False)
    k_cache: Tensor = field(init=False)
    v_cache: Tensor = field(init=False)
    page_table: Tensor = field(init=False)
    head_gate: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        batch, size = len(self.lengths), self.page_size
        pages = -(-max(self.lengths) // size) + 1
        shape = (batch * pages * size, self.kv_heads, D)
        kv = [torch.full(shape, float("nan"), dtype=BF16).to(self.dtype) for _ in range(2)]
        self.page_table = torch.randperm(batch * pages).view(batch, pages).int()
        for sequence in range(batch):
            slots = self.slots(sequence)
            for cache, scale in zip(kv, (self.k_scale, self.v_scale), strict=True):
                new = torch.randn(len(slots), self.kv_heads, D) / scale
                cache.view(torch.uint8)[slots] = new.to(self.dtype).view(torch.uint8)
            self.page_table[sequence, : self.first_key(sequence) // size] = NOWHERE
            self.page_table[sequence, -(-self.lengths[sequence] // size) :] = NOWHERE
        self.k_cache, self.v_cache = kv
        self.q = torch.randn(batch, self.queries, self.heads, D).bfloat16()
        self.head_gate = torch.randn(batch, self.queries, self.heads) if self.gated else None

    def first_key(self, sequence: int) -> int:
        """The first position that a query of the sequence sees."""
        visible = self.lengths[sequence] if self.window is None else self.window + self.queries - 1
        return max(0, self.lengths[sequence] - visible)

    def slots(self, sequence: int) -> Tensor:
        """Slots of the positions that queries of the sequence see."""
        position = torch.arange(self.first_key(sequence), self.lengths[sequence])
        page = self.page_table[sequence, position // self.page_size].long()
        return page * self.page_size + position % self.page_size

    def run(self, device: torch.device, lse: Tensor | None = None) -> Tensor:
        """The kernels' output, [B, queries, Hq, D]."""
        verb, axis = (decode, 0) if self.queries == 1 else (verify, slice(None))
        gate = None if self.head_gate is None else self.head_gate[:, axis].to(device)
        out_lse = None if lse is None else lse[:, axis].contiguous().to(device)
        tree = {} if self.tree_mask is None else {"tree_mask": self.tree_mask.to(device)}
        out = verb(
            self.q[:, axis].contiguous().to(device), self.k_cache.to(device),
            self.v_cache.to(device), self.page_table.to(device),
            torch.tensor(self.lengths, dtype=torch.int32, device=device), D**-0.5, self.window,
            self.page_size, self.k_scale, self.v_scale, gate, out_lse, **tree,
        )  # fmt: skip
        if lse is not None and out_lse is not None:
            lse.copy_(out_lse.cpu().view(lse.shape))
        return out.cpu().view(self.q.shape)

    def reference(self, q: Tensor, v_cache: Tensor) -> Tensor:
        """The reference's output in fp32, [B, queries, Hq, D]; zeros without enough keys."""
        out = torch.zeros(q.shape)
        for sequence, length in enumerate(self.lengths):
            if length < self.queries:
                continue
            # Positions that are not seen get no slot at all: reading one raises.
            slots = torch.full((1, length), NOWHERE)
            slots[0, self.first_key(sequence) :] = self.slots(sequence)
            one = slice(sequence, sequence + 1)
            out[sequence] = attend(
                q[sequence].float(), self.k_cache, v_cache, slots, torch.tensor([length]),
                torch.tensor([self.queries]), D**-0.5, self.window, self.k_scale, self.v_scale,
                None if self.head_gate is None else self.head_gate[sequence],
                None if self.tree_mask is None else self.tree_mask[one],
            ).view(q.shape[1:])  # fmt: skip
        return out

    def check(self, out: Tensor) -> None:
        """Hold an output against the reference.

        Each probability is rounded once, to bf16 or fp16, which moves an output by at most that
        unit roundoff of the average of |v|. In fp32, on both sides: scores are sums of D products
        and meet 8 more roundings, each at most 2^-24 of the sum of magnitudes; sums over L keys
        and their weights are off by 2 L roundings. The result is rounded to bf16.
        """
        exact = self.reference(self.q, self.v_cache)
        magnitude = self.reference(self.q, self.v_cache.float().abs().to(self.dtype))
        k = torch.cat([self.k_cache[self.slots(b)].float() for b in range(len(self.lengths))])
        largest = self.q.float().norm(dim=-1).max() * k.norm(dim=-1).max()  # Cauchy-Schwarz
        score = (D + 8) * 2.0**-24 * float(largest) * self.k_scale * D**-0.5
        fp32 = 2 * (2 * score + 2 * max(self.lengths) * 2.0**-24)
        error = (ROUNDOFF[self.dtype] + fp32) * magnitude
        bound = error + 2.0**-8 * (exact.abs() + error)
        assert out.dtype == BF16
        worst = ((out.float() - exact).abs() - bound).amax((1, 2, 3))
        assert (worst <= 0).all(), f"over the bound by {worst.tolist()}, lengths {self.lengths}"
        assert relative_l2(out, exact) <= 0.003


def relative_l2(out: Tensor, exact: Tensor) -> float:
    """|out - exact| / |exact| over the whole tensor."""
    return float((out.float() - exact).norm() / exact.norm())
