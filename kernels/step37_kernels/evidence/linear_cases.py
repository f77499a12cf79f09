"""Shipped configurations of the FP8 linear layers and the shared expert in FP8, with limits.

An H100's 14.5 bytes a clock and SM leave 8.8 lane instructions for each FP8 weight; decode may take
half of them, seven tenths where a tile is small. Prefill is bound by products, rows / 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from step37_kernels.evidence.dense_cases import PRODUCTS, SHARDS, SHARED_KERNELS, few_steps
from step37_kernels.evidence.layer_shapes import HIDDEN, meta
from step37_kernels.evidence.limits import BYTES_IN_FLIGHT, LOOP_FORBIDS, Case, Limits
from step37_kernels.experts import tiles
from step37_kernels.experts.shared_expert import shared_expert
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.linear import linear, widened
from step37_kernels.linear_tiles import FUSED_TOKENS
from step37_kernels.linear_tiles import linear as choose

SHAPES = (
    ("qkv", 10240, HIDDEN), ("sliding qkv", 14336, HIDDEN), ("qkv TP=4", 2560, HIDDEN),
    ("sliding qkv TP=8", 1792, HIDDEN), ("o", HIDDEN, 8192), ("sliding o", HIDDEN, 12288),
    ("o TP=8", HIDDEN, 1024), ("dense gate-up", 22528, HIDDEN), ("dense down", HIDDEN, 11264),
    ("dense down TP=8", HIDDEN, 1408), ("dense down TP=16", HIDDEN, 704),  # fills no step of 128
)  # fmt: skip
"""Of the released model: layer, N, K."""
TOKENS = (1, 32, 64, 512)


def cases() -> list[Case]:
    """Every layer for one token and one of the larger tiles each, and the shared expert."""
    found = [
        case
        for arch in (90, 100)
        for name, rows, columns in SHAPES
        for case in _linear(arch, name, rows, columns)
    ]
    return found + [
        _shared(arch, tokens, size)
        for arch in (90, 100)
        for tokens in (1, 32, 64, 256, 8192)
        for size, _ in SHARDS
    ]


def _words(rows: int, columns: int) -> FP8Words:
    return FP8Words(
        meta(rows, columns // 4, dtype=torch.int32),
        meta(rows, dtype=torch.float32),
        meta(-(-rows // 64), dtype=torch.int32),
    )


def _limits(tile: GemmTile, columns: int, arch: int) -> Limits:
    """What a loop over `columns` columns has to keep to."""
    most, reason = 4.4, "half of the 8.8 that leave nothing for waiting"
    if tile.block_rows == 128:
        most, reason = 8.8, PRODUCTS
    elif tile.block_n * tile.block_k < 2**14:
        most, reason = 6.2, "70% of 8.8: the tile is small"
    return Limits(
        reason,
        tensor_core="HGMMA" if arch < 100 else "UTCHMMA",
        blocks_per_sm=2,
        units=tile.block_n * tile.block_k,
        per_unit=most,
        loop_forbids=LOOP_FORBIDS,
        async_copies=True,
        bytes_in_flight=BYTES_IN_FLIGHT,
        unrolled_units=tile.block_n * columns,
    )


def _linear(arch: int, name: str, rows: int, columns: int) -> Iterator[Case]:
    weight = _words(rows, columns)
    for tokens in TOKENS if name in ("qkv", "qkv TP=4") else TOKENS[:1]:
        chosen, x = choose(tokens, rows, columns, arch), meta(tokens, columns)
        limits = _limits(chosen, columns // chosen.splits, arch)
        if columns // chosen.splits <= 2 * chosen.block_k:
            # All loads are on their way at once; what is not the loop is not per weight.
            limits = replace(limits, per_unit=None, reason="one or two steps")
        yield Case(
            f"fp8 linear, {name}, {tokens} tokens",
            arch,
            partial(linear, x, weight, chosen),
            {"linear_fp8_kernel": limits},
        )
    if name == "qkv":
        yield Case(
            f"fp8 linear, {name}, {FUSED_TOKENS + 1} tokens, weights expanded to memory",
            arch,
            partial(widened, weight),
            {},
        )


def _shared(arch: int, tokens: int, size: int) -> Case:
    chosen = tiles.shared_fp8(tokens, size, HIDDEN, arch)
    limits = {}
    for name, tile, whole in zip(SHARED_KERNELS, chosen, (HIDDEN, size), strict=True):
        columns = whole // tile.splits
        limit = _limits(tile, columns, arch)
        if columns <= 10 * tile.block_k:
            # So short a loop is unrolled, and the whole program counts.
            limit = replace(limit, per_unit=10.0, reason="the epilogue is half of the program")
        limits[name] = few_steps(limit, tile, columns)
    x, w13, w2 = meta(tokens, HIDDEN), _words(2 * size, HIDDEN), _words(HIDDEN, size)
    return Case(
        f"fp8 shared expert, {tokens} tokens, N={size}",
        arch,
        lambda: shared_expert(x, w13, w2, 16.0, chosen),
        limits,
    )
