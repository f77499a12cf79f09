"""Sort a batch's (token, choice) pairs by expert, on the device, in one launch.

One program per local expert. Each counts every expert's pairs for itself, so it knows where its
own blocks begin without waiting for another program; then it goes over the ids again and writes
its pairs in ascending order. That reads the ids twice per expert, from L2: quadratic, but one
launch with no synchronisation; at 8192 tokens it reads 2 x 288 x 256 KB = 150 MB of L2.

Programs beyond the experts prepare the hidden states for the GEMMs that follow: quantise them, or
permute their channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.checks import require
from step37_kernels.experts.activations import (
    Form,
    FP8Rows,
    new_rows,
    prepare_row,
    prepared_options,
)
from step37_kernels.experts.routing import Routing, most_blocks
from step37_kernels.formats.nvfp4 import NVFP4Tensor
from step37_kernels.launch import launch

CHUNKS = (256, 1024)
"""Pairs in one trip of the loop: few for a decode step, many for a prefill."""


# Numbers that follow the batch: a kernel for each class of them would only be compiled again.
_NUMBERS = ["pairs", "first_expert", "max_blocks", "block_rows", "counters"]


@triton.jit
def _local_experts(ids, start, pairs, first_expert, E: tl.constexpr, CHUNK: tl.constexpr):
    """Local expert of CHUNK pairs from `start`; E for pairs that are not this rank's."""
    pair = start + tl.arange(0, CHUNK)
    local = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int64) - first_expert
    mine = (pair < pairs) & (local >= 0) & (local < E)
    return tl.where(mine, local, E).to(tl.int32)


@triton.jit
def _sort_expert(
    ids,
    pair_of_slot,
    expert_of_block,
    e,
    pairs,
    first_expert,
    max_blocks,
    block_rows,
    counters,
    arrived,
    E: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write blocks, slots and counters of local expert e; the last one also ends the block list."""
    bin = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, CHUNK):
        counts += tl.histogram(_local_experts(ids, start, pairs, first_expert, E, CHUNK), BINS)
    blocks = tl.where(bin < E, (counts + block_rows - 1) // block_rows, 0)
    first_block = tl.sum(tl.where(bin < e, blocks, 0), axis=0)
    num_blocks = tl.sum(tl.where(bin == e, blocks, 0), axis=0)
    count = tl.sum(tl.where(bin == e, counts, 0), axis=0)
    first_slot = first_block * block_rows

    lane = tl.arange(0, CHUNK)
    for start in range(0, num_blocks, CHUNK):
        at = start + lane
        tl.store(expert_of_block + first_block + at, e + at * 0, mask=at < num_blocks)
    for start in range(0, num_blocks * counters, CHUNK):
        at = start + lane
        tl.store(arrived + first_block * counters + at, at * 0, mask=at < num_blocks * counters)
    for start in range(count, num_blocks * block_rows, CHUNK):
        at = start + lane
        tl.store(pair_of_slot + first_slot + at, -1, mask=at < num_blocks * block_rows)
    if e == E - 1:
        for start in range(first_block + num_blocks, max_blocks, CHUNK):
            at = start + lane
            tl.store(expert_of_block + at, -1, mask=at < max_blocks)

    written = 0
    for start in range(0, pairs, CHUNK):
        mine = _local_experts(ids, start, pairs, first_expert, E, CHUNK) == e
        rank = written + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(pair_of_slot + first_slot + rank, start + lane, mask=mine)
        written += tl.sum(mine.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=_NUMBERS)
def sort_kernel(
    ids,
    pair_of_slot,
    expert_of_block,
    pairs,
    first_expert,
    max_blocks,
    block_rows,
    counters,
    arrived,
    E: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sort only: bf16 GEMMs read the hidden states as they are."""
    _sort_expert(
        ids, pair_of_slot, expert_of_block, tl.program_id(0), pairs, first_expert, max_blocks,
        block_rows, counters, arrived, E, BINS, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def sort_and_prepare_kernel(
    ids,
    pair_of_slot,
    expert_of_block,
    pairs,
    first_expert,
    max_blocks,
    block_rows,
    counters,
    arrived,
    hidden,
    out,
    scale,
    global_scale,
    E: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    PADDED: tl.constexpr,
    FORM: tl.constexpr,
):
    """Sort; and program E + t brings token t's hidden state into FORM."""
    program = tl.program_id(0)
    if program < E:
        _sort_expert(
            ids, pair_of_slot, expert_of_block, program, pairs, first_expert, max_blocks,
            block_rows, counters, arrived, E, BINS, CHUNK,
        )  # fmt: skip
    else:
        row = (program - E).to(tl.int64)
        prepare_row(hidden, out, scale, global_scale, row, K, OFFSET, PADDED, FORM)


def _new_routing(topk_ids: Tensor, num_experts: int, block_rows: int, counters: int) -> Routing:
    blocks = most_blocks(topk_ids.numel(), num_experts, block_rows)
    new = topk_ids.new_empty
    return Routing(
        new((blocks * block_rows,), dtype=torch.int32),
        new((blocks,), dtype=torch.int32),
        block_rows,
        topk_ids.shape[1],
        new((blocks, counters), dtype=torch.int32) if counters else None,
    )


def _check_ids(topk_ids: Tensor) -> None:
    require("topk_ids", topk_ids, (None, None), (torch.int32, torch.int64), contiguous=True)


def sort_chunk(pairs: int) -> int:
    """Pairs in one trip of the sort's loops."""
    return CHUNKS[0] if pairs <= CHUNKS[0] else CHUNKS[1]


def _sort_options(topk_ids: Tensor, num_experts: int) -> dict[str, int]:
    return {
        "E": num_experts,
        "BINS": triton.next_power_of_2(num_experts + 1),  # one bin for pairs of other ranks
        "CHUNK": sort_chunk(topk_ids.numel()),
        "num_warps": 4,
    }


def sort(
    topk_ids: Tensor, num_experts: int, first_expert: int, block_rows: int, counters: int = 0
) -> Routing:
    """Sort pairs by local expert.

    Args:
        topk_ids: int32 or int64 [T, top_k], contiguous; ids outside first_expert .. first_expert +
            num_experts - 1 are not this rank's and take part in nothing.
        num_experts, first_expert: the experts of this rank.
        block_rows: rows of a block of the GEMMs, a power of two.
        counters: zeros that each block gets, for a gate-up that splits K: one per tile.

    Raises:
        ValueError: topk_ids has another shape, dtype or layout.
    """
    _check_ids(topk_ids)
    routing = _new_routing(topk_ids, num_experts, block_rows, counters)
    launch(
        sort_kernel,
        (num_experts if topk_ids.numel() else 0,),
        topk_ids,
        routing.pair_of_slot,
        routing.expert_of_block,
        topk_ids.numel(),
        first_expert,
        routing.max_blocks,
        block_rows,
        counters,
        routing.expert_of_block if routing.arrived is None else routing.arrived,
        **_sort_options(topk_ids, num_experts),
    )
    return routing


def sort_and_prepare(
    hidden: Tensor,
    form: Form,
    topk_ids: Tensor,
    num_experts: int,
    first_expert: int,
    block_rows: int,
    counters: int = 0,
    global_scale: Tensor | None = None,
) -> tuple[Routing, Tensor | FP8Rows | NVFP4Tensor]:
    """`sort`, and hidden [T, K] bf16 in another form, in the same launch.

    Args:
        form: what the GEMM takes, see `Form`.
        topk_ids, num_experts, first_expert, block_rows, counters: as of `sort`.
        global_scale: of NVFP4, an fp32 scalar.

    Raises:
        ValueError: a shape, dtype or layout does not fit.
    """
    _check_ids(topk_ids)
    shape = (topk_ids.shape[0], None)
    require("hidden", hidden, shape, (torch.bfloat16,), contiguous=True)
    tokens, size = hidden.shape
    options = prepared_options(size, 0, form)
    rows, out, scale = new_rows(tokens, size, hidden, form, 0, global_scale)
    routing = _new_routing(topk_ids, num_experts, block_rows, counters)
    launch(
        sort_and_prepare_kernel,
        (num_experts + tokens if topk_ids.numel() else 0,),
        topk_ids,
        routing.pair_of_slot,
        routing.expert_of_block,
        topk_ids.numel(),
        first_expert,
        routing.max_blocks,
        block_rows,
        counters,
        routing.expert_of_block if routing.arrived is None else routing.arrived,
        hidden,
        out,
        scale,
        scale if global_scale is None else global_scale,
        **_sort_options(topk_ids, num_experts),
        **options,
    )
    return routing, rows
