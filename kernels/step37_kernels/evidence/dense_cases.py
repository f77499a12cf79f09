"""Shipped configurations of the BF16 and FP8 expert kernels, with the limits of their code.

An H100's 3.35 TB/s are 14.5 bytes a clock and SM, which issues 128 lane instructions in it: 8.8 for
each byte of weights, 17.7 for a bf16 weight. Decode is bound by memory, so its loops may take half
of that, a quarter where nothing has to be converted. Prefill is bound by products: one of a tile's
weights keeps the tensor core busy for rows/16 issue slots in bf16, rows/32 in e4m3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from step37_kernels.evidence.layer_shapes import EXPERTS, HIDDEN, TOP_K, meta, meta_routing
from step37_kernels.evidence.limits import BYTES_IN_FLIGHT, LOOP_FORBIDS, Case, Limits
from step37_kernels.expert_weights import BF16Experts, FP8Experts
from step37_kernels.experts import grouped_bf16, grouped_fp8, grouped_fp8_bf16, tiles
from step37_kernels.experts.activations import FP8Rows
from step37_kernels.experts.shared_expert import shared_expert
from step37_kernels.experts.tiles import GemmTile

SHARDS = ((1280, 0), (640, 0), (320, 64), (160, 96))
"""(N, where it begins in a block) at TP = 1, 2, 4, 8."""
PRODUCTS = "as long as the products take, rows / 16, and a tenth more for what is not in the loop"
NO_STORES = tuple(opcode for opcode in LOOP_FORBIDS if opcode != "STS")
"""For loops that hand something small through shared memory on purpose."""
SHARED_KERNELS = ("shared_gate_up_kernel", "shared_down_kernel")
DECODE, PREFILL = (1, 64), (768, 1536, 8192)
"""Tokens; 768, 1536 and 8192 are 21, 43 and 228 rows an expert: the larger blocks."""


def cases() -> list[Case]:
    """Every tile of the policy: all shards at decode, TP = 1 and 4 for the larger blocks."""
    wanted = [(tokens, shard) for tokens in DECODE for shard in SHARDS]
    wanted += [(tokens, shard) for tokens in PREFILL for shard in (SHARDS[0], SHARDS[2])]
    found = [
        case
        for arch in (90, 100)
        for make in (_bf16, _fp8, _fp8_bf16)
        for tokens, (size, offset) in wanted
        for case in make(arch, tokens, size, offset)
    ]
    return found + [
        _shared(arch, tokens, size)
        for arch in (90, 100)
        for tokens in (1, 32, 64, 256, 512, 8192)
        for size, _ in SHARDS
    ]


def _limits(
    name: str, tile: GemmTile, columns: int, arch: int, per_unit: float, reason: str
) -> Limits:
    """What a loop over `columns` columns has to keep to."""
    forbidden: tuple[str, ...] = LOOP_FORBIDS
    if name.endswith("_fp8_kernel") and tile.block_rows >= 64:
        forbidden = NO_STORES  # the token scales, 256 numbers, change layout through shared memory
    core = ("QGMMA", "UTCQMMA") if name.endswith("_fp8_kernel") else ("HGMMA", "UTCHMMA")
    return Limits(
        reason,
        tensor_core=core[arch >= 100],
        units=tile.block_n * tile.block_k,
        per_unit=per_unit,
        loop_forbids=forbidden,
        async_copies=True,
        bytes_in_flight=BYTES_IN_FLIGHT,
        unrolled_units=tile.block_n * columns,
    )


def _pair(
    form: str,
    module: ModuleType,
    choose: Callable[..., tuple[GemmTile, GemmTile]],
    budget: Callable[[GemmTile], tuple[float, str]],
    arch: int,
    tokens: int,
    weights: BF16Experts | FP8Experts,
    x: Tensor | FP8Rows,
    intermediate: Tensor | FP8Rows,
) -> Iterator[Case]:
    """The two launches of a layer, a case each."""
    pairs, size = tokens * TOP_K, weights.intermediate_size
    up, down = choose(pairs, EXPERTS, size, HIDDEN, arch)
    routing = meta_routing(tokens, up, 2 * size)
    factors = meta(tokens, TOP_K, dtype=torch.float32)
    what = f"{tokens} tokens, N={size}"
    name = f"gate_up_{form}_kernel"
    yield Case(
        f"{form} gate-up, {what}",
        arch,
        lambda: module.gate_up(x, weights, routing, 7.0, up),
        {name: _limits(name, up, HIDDEN // up.splits, arch, *budget(up))},
    )
    name = f"down_{form}_kernel"
    yield Case(
        f"{form} down, {what}",
        arch,
        lambda: module.down(intermediate, weights, routing, factors, down),
        {name: _limits(name, down, size, arch, *budget(down))},
    )


def _bf16(arch: int, tokens: int, size: int, offset: int) -> Iterator[Case]:
    weights = BF16Experts(meta(EXPERTS, 2 * size, HIDDEN), meta(EXPERTS, HIDDEN, size))
    x, rows = meta(tokens, HIDDEN), meta(tokens * TOP_K, size)

    def budget(tile: GemmTile) -> tuple[float, str]:
        if tile.block_rows == 128:
            return 8.8, PRODUCTS
        return 4.4, "a quarter of the 17.7 that leave nothing for waiting"

    yield from _pair("bf16", grouped_bf16, tiles.bf16, budget, arch, tokens, weights, x, rows)


def _fp8_experts(size: int, offset: int) -> FP8Experts:
    blocks, e4m3, fp32 = -(-(offset + size) // 128), torch.float8_e4m3fn, torch.float32
    return FP8Experts(
        meta(EXPERTS, 2 * size, HIDDEN, dtype=e4m3),
        meta(EXPERTS, 2, blocks, HIDDEN // 128, dtype=fp32),
        meta(EXPERTS, HIDDEN, size, dtype=e4m3),
        meta(EXPERTS, HIDDEN // 128, blocks, dtype=fp32),
        intermediate_offset=offset,
    )


def _fp8_rows(rows: int, size: int, offset: int) -> FP8Rows:
    q = meta(rows, size, dtype=torch.float8_e4m3fn)
    return FP8Rows(q, meta(rows, -(-(offset + size) // 128), dtype=torch.float32))


def _fp8(arch: int, tokens: int, size: int, offset: int) -> Iterator[Case]:
    x, rows = _fp8_rows(tokens, HIDDEN, 0), _fp8_rows(tokens * TOP_K, size, offset)

    def budget(tile: GemmTile) -> tuple[float, str]:
        if tile.block_rows >= 64:
            # The products take rows / 32; with the scaling of each block's sum no loop may be
            # slower than bf16 products would be.
            return tile.block_rows / 16, "as long as bf16 products take: rows / 16"
        return 4.4, "half of the 8.8 that leave nothing for waiting"

    weights = _fp8_experts(size, offset)
    yield from _pair("fp8", grouped_fp8, tiles.fp8, budget, arch, tokens, weights, x, rows)


def _fp8_bf16(arch: int, tokens: int, size: int, offset: int) -> Iterator[Case]:
    x, rows = meta(tokens, HIDDEN), meta(tokens * TOP_K, size)

    def budget(tile: GemmTile) -> tuple[float, str]:
        if tile.block_rows == 128:
            return 8.8, PRODUCTS
        full = tile.block_n * tile.block_k == 2**14 and tile.num_warps == 4
        return 4.4 if full else 6.2, "half of 8.8; 70% where the tile is small or takes 8 warps"

    weights, module = _fp8_experts(size, offset), grouped_fp8_bf16
    yield from _pair("fp8_bf16", module, tiles.fp8_bf16, budget, arch, tokens, weights, x, rows)


def few_steps(limits: Limits, tile: GemmTile, columns: int) -> Limits:
    """The limits, or those of a program without a loop: all its loads are in flight at once."""
    if columns > 2 * tile.block_k:
        return limits
    return Limits("one or two steps", tensor_core=limits.tensor_core)


def _shared(arch: int, tokens: int, size: int) -> Case:
    chosen = tiles.shared(tokens, size, HIDDEN, arch)
    limits = {}
    for name, tile, whole in zip(SHARED_KERNELS, chosen, (HIDDEN, size), strict=True):
        columns = whole // tile.splits
        budget = (4.4, "a quarter of the 17.7 that leave nothing for waiting")
        if tile.block_rows == 128:
            budget = (8.8, PRODUCTS)
        elif columns <= 10 * tile.block_k:
            # So short a loop is unrolled, and the whole program counts, adding parts included.
            budget = (8.8, "half of the 17.7 that leave nothing for waiting")
        limit = _limits(name, tile, columns, arch, *budget)
        limits[name] = few_steps(limit, tile, columns)
    x, w13, w2 = meta(tokens, HIDDEN), meta(2 * size, HIDDEN), meta(HIDDEN, size)
    return Case(
        f"shared expert, {tokens} tokens, N={size}",
        arch,
        lambda: shared_expert(x, w13, w2, 16.0, chosen),
        limits,
    )
