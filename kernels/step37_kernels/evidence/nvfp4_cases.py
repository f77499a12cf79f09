"""The NVFP4 expert GEMMs at the model's shapes, with the limits of their machine code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from step37_kernels.evidence.layer_shapes import EXPERTS, HIDDEN, TOP_K, meta, meta_routing
from step37_kernels.evidence.limits import BYTES_IN_FLIGHT, LOOP_FORBIDS, Case, Limits
from step37_kernels.expert_weights import NVFP4Experts
from step37_kernels.experts import grouped_nvfp4, grouped_nvfp4_fp8, grouped_nvfp4_nvfp4, tiles
from step37_kernels.experts.activations import new_fp8_rows
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats.nvfp4 import NVFP4Tensor
from step37_kernels.formats.nvfp4_tiles import NVFP4Tiles, padded_intermediate, w13_channels

SHARDS = {1280: "TP=1", 640: "TP=2", 320: "TP=4", 160: "TP=8"}
TOKENS = (1, 64, 600, 1024, 8192)


def cases() -> list[Case]:
    """NVFP4 weights with bf16, FP8 and NVFP4 activations."""
    return [*nvfp4_cases(), *nvfp4_fp8_cases(), *nvfp4_nvfp4_cases()]


def nvfp4_cases() -> list[Case]:
    """NVFP4 x bf16: every tile that the policy chooses from one token to a prefill."""
    return [
        case
        for arch in (90, 100)
        for case in _cases("nvfp4", arch, TOKENS, tiles.nvfp4, _bf16_limits)
    ]


def meta_tiles(size: int) -> NVFP4Tiles:
    """A layer's weights with no memory, N = size."""
    rows, columns, word, byte = 2 * w13_channels(size) // 64, HIDDEN // 64, torch.int32, torch.uint8
    padded, fp32 = padded_intermediate(size) // 64, torch.float32
    return NVFP4Tiles(
        meta(EXPERTS, rows, columns, 64, 8, dtype=word),
        meta(EXPERTS, rows, columns, 64, 4, dtype=byte),
        meta(EXPERTS, rows * 64, dtype=byte),
        meta(EXPERTS, 2, dtype=fp32),
        meta(EXPERTS, columns, padded, 64, 8, dtype=word),
        meta(EXPERTS, columns, padded, 64, 4, dtype=byte),
        meta(EXPERTS, HIDDEN, dtype=byte),
        meta(EXPERTS, dtype=fp32),
        size,
    )


def nvfp4_fp8_cases() -> list[Case]:
    """NVFP4 x FP8 on sm_90: what an opted-in decode batch and a prefill run."""
    return [*_cases("nvfp4_fp8", 90, (64, 1024, 8192), tiles.nvfp4_fp8, _fp8_limits)]


def nvfp4_nvfp4_cases() -> list[Case]:
    """NVFP4 x NVFP4 on sm_100."""
    batches = (1, 64, 600, 1024, 8192)
    return [*_cases("nvfp4_nvfp4", 100, batches, tiles.nvfp4_nvfp4, _native_limits, meta_experts)]


def _cases(
    kind: str,
    arch: int,
    batches: Sequence[int],
    choose: Callable[..., tuple[GemmTile, GemmTile]],
    limits: Callable[[GemmTile, int], Limits],
    weights: Callable[[int], Any] = meta_tiles,
) -> Iterator[Case]:
    """A case for each step, shard and number of tokens whose tile is not yet among them."""
    seen = set()
    for size, ranks in SHARDS.items():
        for tokens in batches:
            pair = choose(tokens * TOP_K, EXPERTS, size, HIDDEN, arch)
            for step, tile in zip(("gate_up", "down"), pair, strict=True):
                if (size, step, tile) not in seen:
                    seen.add((size, step, tile))
                    run = partial(_RUNS[kind, step], weights(size), tokens, tile)
                    name = f"{kind.replace('_', ' x ')} {step}, {tokens} tokens, {ranks}"
                    yield Case(name, arch, run, {f"{kind}_{step}_kernel": limits(tile, arch)})


def _gate_up(weights: NVFP4Tiles, tokens: int, tile: GemmTile) -> Tensor:
    routing = meta_routing(tokens, tile, weights.w13_rows)
    return grouped_nvfp4.gate_up(meta(tokens, HIDDEN), weights, routing, 7.0, tile)


def _down(weights: NVFP4Tiles, tokens: int, tile: GemmTile) -> Tensor:
    rows = meta(tokens * TOP_K, weights.intermediate_padded)
    routing, topk_weights = meta_routing(tokens, tile), _topk_weights(tokens)
    return grouped_nvfp4.down(rows, weights, routing, topk_weights, tile)


def _gate_up_fp8(weights: NVFP4Tiles, tokens: int, tile: GemmTile) -> Tensor:
    rows = new_fp8_rows(tokens, HIDDEN, meta(1))
    routing = meta_routing(tokens, tile)
    return grouped_nvfp4_fp8.gate_up(rows, weights, routing, 7.0, tile)


def _down_fp8(weights: NVFP4Tiles, tokens: int, tile: GemmTile) -> Tensor:
    rows = new_fp8_rows(tokens * TOP_K, weights.intermediate_padded, meta(1))
    routing, topk_weights = meta_routing(tokens, tile), _topk_weights(tokens)
    return grouped_nvfp4_fp8.down(rows, weights, routing, topk_weights, tile)


def meta_experts(size: int) -> NVFP4Experts:
    """A layer's weights as the checkpoint has them, with no memory, N = size."""
    byte, e4m3, fp32 = torch.uint8, torch.float8_e4m3fn, torch.float32
    return NVFP4Experts(
        meta(EXPERTS, 2 * size, HIDDEN // 2, dtype=byte),
        meta(EXPERTS, 2 * size, HIDDEN // 16, dtype=e4m3),
        meta(EXPERTS, 2, dtype=fp32),
        meta(EXPERTS, HIDDEN, size // 2, dtype=byte),
        meta(EXPERTS, HIDDEN, size // 16, dtype=e4m3),
        meta(EXPERTS, dtype=fp32),
    )


def _native_rows(rows: int, columns: int) -> NVFP4Tensor:
    packed = meta(rows, columns // 2, dtype=torch.uint8)
    scale = meta(rows, columns // 16, dtype=torch.float8_e4m3fn)
    return NVFP4Tensor(packed, scale, meta(dtype=torch.float32))


def _gate_up_native(weights: NVFP4Experts, tokens: int, tile: GemmTile) -> Tensor:
    rows = _native_rows(tokens, HIDDEN)
    routing = meta_routing(tokens, tile, 2 * weights.intermediate_size)
    return grouped_nvfp4_nvfp4.gate_up(rows, weights, routing, 7.0, tile)


def _down_native(weights: NVFP4Experts, tokens: int, tile: GemmTile) -> Tensor:
    rows = _native_rows(tokens * TOP_K, weights.intermediate_size)
    routing, topk_weights = meta_routing(tokens, tile), _topk_weights(tokens)
    return grouped_nvfp4_nvfp4.down(rows, weights, routing, topk_weights, tile)


def _topk_weights(tokens: int) -> Tensor:
    return meta(tokens, TOP_K, dtype=torch.float32)


_RUNS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("nvfp4", "gate_up"): _gate_up,
    ("nvfp4", "down"): _down,
    ("nvfp4_fp8", "gate_up"): _gate_up_fp8,
    ("nvfp4_fp8", "down"): _down_fp8,
    ("nvfp4_nvfp4", "gate_up"): _gate_up_native,
    ("nvfp4_nvfp4", "down"): _down_native,
}


def _bf16_limits(tile: GemmTile, arch: int) -> Limits:
    """Per weight, over one trip of the loop.

    An H100's memory delivers 26 weights a clock to each SM, which issues 128 lane instructions (64
    integer and logic ones). The products of `rows` tokens take rows / 2048 clocks a weight.
    """
    weights = tile.block_n * tile.block_k
    if arch == 100:
        # A B200's memory delivers 52 weights a clock and SM: 2.5 instructions each. This kernel is
        # the portable one there; the native FP4 product is the fast one.
        return Limits(
            "the products of 128 rows take as long as 8 instructions a weight do on sm_90",
            tensor_core="UTCHMMA",
            units=weights,
            per_unit=7.0,
            async_copies=True,
            bytes_in_flight=BYTES_IN_FLIGHT,
        )
    if tile.block_rows <= 32:
        reason = "3.2 instructions are 65% of what is issued at full bandwidth, 3.4 69%, 3.9 79%"
        # The fixed cost of a trip falls on half the weights in a tile of 64 rows or columns.
        per_unit = {(128, 128): 3.2, (128, 64): 3.4}.get((tile.block_n, tile.block_k), 3.9)
        alu = 1.3 if tile.block_rows == 16 else 1.5
    else:
        reason = (
            "products take as long as 4 (64 rows) or 8 (128) instructions a weight; not much more"
        )
        per_unit, alu = (4.1 if tile.block_rows == 64 else 5.0), None
    return Limits(
        reason,
        tensor_core="HGMMA",
        units=weights,
        per_unit=per_unit,
        alu_per_unit=alu,
        loop_forbids=LOOP_FORBIDS,
        async_copies=True,
        bytes_in_flight=BYTES_IN_FLIGHT,
    )


def _fp8_limits(tile: GemmTile, arch: int) -> Limits:
    """Per weight: 4.1 instructions to expand and round it, 1 a 128 rows to scale sums, and a trip's
    own; the products of 128 rows take 4. What counts beside a product of bf16 is that the sum of
    both stays under the 8 plus 4 that 128 rows take there.
    """
    per_unit = {16: 4.9, 32: 4.9, 64: 6.0, 128: 7.0}[tile.block_rows]
    narrow = tile.block_rows == 128 and tile.block_k == 64
    return Limits(
        "7 instructions and products worth 4 are less than bf16's products worth 8 and 4",
        tensor_core="QGMMA",
        units=tile.block_n * tile.block_k,
        per_unit=10.0 if narrow else per_unit,
        loop_forbids=("F2F", "I2F", "LDL", "STL"),
        async_copies=True,
        bytes_in_flight=BYTES_IN_FLIGHT,
    )


def _native_limits(tile: GemmTile, arch: int) -> Limits:
    """The threads only copy, and bring the scales to the matrix unit."""
    # The 3 or 5 trips of 64 columns of TP=8 and 4 may be unrolled, and are all in flight at once.
    loop = tile.block_k > 64
    return Limits(
        "a B200's memory delivers 52 weights a clock and SM: 2.5 instructions each at full rate",
        tensor_core="UTCOMMA",
        units=tile.block_n * tile.block_k,
        per_unit=2.0 if loop else None,
        loop_forbids=("LDL", "STL") if loop else (),
        async_copies=True,
        bytes_in_flight=BYTES_IN_FLIGHT if loop else None,
    )
