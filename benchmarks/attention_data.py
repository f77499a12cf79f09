"""Data for the attention benchmark, and what its implementations have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_cells import PAGE_SIZE, Heads, heads_of, rotation, stored_pages
from benchmarks.expert_data import BF16_ROUNDING, DEVICE
from benchmarks.harness.cells import Accuracy, Cell, Trial, relative_l2
from benchmarks.shapes import HEAD_DIM
from step37_kernels.reference.attention import attend

K_SCALE, V_SCALE = 0.05, 0.04  # of an fp8 cache: unlike each other and 1, as calibrated ones are
SOFTMAX_SCALE = HEAD_DIM**-0.5
_CHECKED_SEQUENCES = 4
_CHECKED_QUERIES = 64

CACHE_DTYPE = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """A cell's tensors: B sequences of equal length, `queries` new tokens in each.

    Attributes:
        q: bf16 [B * queries, Hq, D].
        head_gate: bf16 [B * queries, Hq].
        k, v: [copies, slots, Hkv, D] in the cache's type; every copy has the same page table.
        page_table: int32 [B, pages]; pages outside the window are 0 and never read.
        seq_lens, query_lens: int32 [B].
    """

    heads: Heads
    q: Tensor
    head_gate: Tensor
    k: Tensor
    v: Tensor
    page_table: Tensor
    seq_lens: Tensor
    query_lens: Tensor

    @property
    def k_scale(self) -> float:
        return K_SCALE if self.k.dtype == torch.float8_e4m3fn else 1.0

    @property
    def v_scale(self) -> float:
        return V_SCALE if self.v.dtype == torch.float8_e4m3fn else 1.0

    def slots(self, sequences: Sequence[int]) -> Tensor:
        """Slot of every position, int64 [sequences, pages * PAGE_SIZE]."""
        pages = self.page_table[list(sequences)].long()
        within = torch.arange(PAGE_SIZE, device=pages.device)
        return (pages[:, :, None] * PAGE_SIZE + within).flatten(1)


def make_problem(cell: Cell, copies: int) -> Problem:
    """Random tensors for a decode or prefill cell."""
    of, settings = heads_of(cell), cell.settings
    batch = int(settings.get("batch", 1))
    queries = int(settings.get("new", 1))
    length = int(settings.get("context", int(settings.get("prefix", 0)) + queries))
    generator = torch.Generator(DEVICE).manual_seed(length)
    if queries == 1:
        first, end = stored_pages(of, length)
    else:
        first, end = 0, -(-length // PAGE_SIZE)
    count = batch * (end - first)
    pages = torch.zeros(batch, end, dtype=torch.int32, device=DEVICE)
    shuffled = torch.randperm(count, generator=generator, device=DEVICE)
    pages[:, first:] = shuffled.view(batch, -1).int()
    shape = (copies, count * PAGE_SIZE, of.kv, HEAD_DIM)
    dtype = CACHE_DTYPE[str(settings["cache"])]
    tokens = batch * queries
    return Problem(
        of,
        torch.randn(tokens, of.query, HEAD_DIM, generator=generator, device=DEVICE).bfloat16(),
        torch.randn(tokens, of.query, generator=generator, device=DEVICE).bfloat16(),
        cache_values(shape, dtype, K_SCALE, generator),
        cache_values(shape, dtype, V_SCALE, generator),
        pages,
        torch.full((batch,), length, dtype=torch.int32, device=DEVICE),
        torch.full((batch,), queries, dtype=torch.int32, device=DEVICE),
    )


def cache_values(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scale: float,
    generator: torch.Generator,
    std: float = 1.0,
) -> Tensor:
    """Normal values as a cache holds them: divided by `scale` in e4m3, as they are in bf16."""
    out = torch.empty(shape, dtype=dtype, device=generator.device)
    if dtype == torch.float8_e4m3fn:
        std /= scale
    for part in out.view(-1, shape[-1]).split(1 << 20):  # the fp32 values of a part at a time
        values = torch.randn(part.shape, generator=generator, device=generator.device)
        part.copy_(values.mul_(std).clamp_(-448, 448))
    return out


class AttentionSubject:
    """An implementation of decode and prefill cells: what differs is `load` and `bind`.

    `gated` says whether the head gate is a part of what it does.
    """

    name: str
    library: str
    gated = False

    def load(self) -> None:
        """Import what it needs; any exception says that it cannot be used, and why."""
        raise NotImplementedError

    def version(self) -> str:
        from importlib import metadata

        return f"{self.library} {metadata.version(self.library)}"

    def available(self) -> tuple[bool, str]:
        try:
            self.load()
            return True, self.version()
        except Exception as error:  # libraries without their GPU fail in many ways
            return False, f"{type(error).__name__}: {error}".splitlines()[0][:160]

    def refuses(self, cell: Cell) -> str | None:
        raise NotImplementedError

    def bind(self, problem: Problem, cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
        """What runs the cell on one copy's k and v [slots, Hkv, D]; it returns [T, Hq (*) D]."""
        raise NotImplementedError

    def allowed(self, cell: Cell) -> float:
        """The largest relative L2 error that is rounding: P and the output to bf16, twice over."""
        return 4 * BF16_ROUNDING

    def prepare(self, cell: Cell) -> Any:
        return make_problem(cell, rotation(cell).copies)

    def trial(self, prepared: Any, cell: Cell) -> Trial:
        problem: Problem = prepared
        run = self.bind(problem, cell)
        turns = rotation(cell).calls // len(problem.k)

        def call(copy: int) -> Callable[[], Tensor]:
            return lambda: run(problem.k[copy], problem.v[copy])

        def check() -> Accuracy:
            found = call(0)().view(problem.q.shape)
            gate = problem.head_gate if self.gated else None
            pieces = check_decode if cell.operation == "decode" else check_prefill
            return Accuracy(pieces(problem, found, gate), self.allowed(cell))

        calls = [call(copy) for copy in range(len(problem.k))] * turns
        return Trial(calls, check, cell.work)


def check_decode(problem: Problem, found: Tensor, head_gate: Tensor | None) -> float:
    """Relative L2 error of a few sequences, spread over the batch."""
    batch = problem.seq_lens.shape[0]
    chosen = sorted({round(i * (batch - 1) / 3) for i in range(_CHECKED_SEQUENCES)})
    expected = attend(
        problem.q[chosen].float(),
        problem.k[0],
        problem.v[0],
        problem.slots(chosen),
        problem.seq_lens[chosen],
        problem.query_lens[chosen],
        SOFTMAX_SCALE,
        problem.heads.window,
        problem.k_scale,
        problem.v_scale,
        None if head_gate is None else head_gate[chosen],
    )
    return relative_l2(found[chosen].flatten(1), expected)


def check_prefill(problem: Problem, found: Tensor, head_gate: Tensor | None) -> float:
    """Relative L2 error of the queries that end in the middle, and at the end, of the new tokens.

    A query sees nothing behind it, so queries up to a position are those of a sequence that ends
    there.
    """
    new, length = found.shape[0], int(problem.seq_lens[0])
    count = min(_CHECKED_QUERIES, new // 2)
    ends = (new // 2, new)
    rows = [slice(end - count, end) for end in ends]
    expected = [
        attend(
            problem.q[part].float(),
            problem.k[0],
            problem.v[0],
            problem.slots([0]),
            torch.tensor([length - new + end]),
            torch.tensor([count]),
            SOFTMAX_SCALE,
            problem.heads.window,
            problem.k_scale,
            problem.v_scale,
            None if head_gate is None else head_gate[part],
        )
        for part, end in zip(rows, ends, strict=True)
    ]
    return relative_l2(torch.cat([found[part] for part in rows]).flatten(1), torch.cat(expected))
