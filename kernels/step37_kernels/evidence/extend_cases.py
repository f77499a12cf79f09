"""Extend (prefill) at the model's shapes, with the limits of its machine code."""

from __future__ import annotations

import torch

from step37_kernels.attention.extend import extend
from step37_kernels.attention.tiles import extend_tile
from step37_kernels.evidence.limits import BYTES_IN_FLIGHT, Case, Limits

_DIM, _SLOTS, _CONTEXT, _TOKENS, _BATCH = 128, 1 << 20, 262144, 8192, 8
_CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# Query heads, KV heads and window of the model's two attention types; a rank has a TPth of them.
_FULL, _SLIDING = ("full", 64, 8, None), ("sliding", 96, 8, 512)
_FORBIDDEN = ("F2F", "LDL", "STL")


def cases() -> list[Case]:
    """One case per cache, attention type and page size that compile apart, both architectures."""
    return [
        _case(arch, cache, kind, tp, page_size)
        for arch in (90, 100)
        for cache in _CACHES
        for kind, tp, page_size in (
            (_FULL, 1, 1),
            (_FULL, 4, 16),
            (_FULL, 8, 64),
            (_SLIDING, 1, 1),
            (_SLIDING, 8, 64),
        )
    ]


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _case(
    arch: int, cache: str, kind: tuple[str, int, int, int | None], tp: int, page_size: int
) -> Case:
    name, heads, kv_heads, window = kind
    heads, kv_heads = heads // tp, kv_heads // tp
    held = _meta(_SLOTS, kv_heads, _DIM, dtype=_CACHES[cache])
    lengths = _meta(_BATCH, dtype=torch.int32)
    arguments = (
        _meta(_TOKENS, heads, _DIM), held, held,
        _meta(_BATCH, _CONTEXT // page_size, dtype=torch.int32), lengths, lengths, _DIM**-0.5,
        window, page_size, 1.0, 1.0, _meta(_TOKENS, heads),
    )  # fmt: skip
    return Case(
        f"extend, {name}, {cache} cache, page size {page_size}, TP={tp}",
        arch,
        lambda: extend(*arguments),
        {"extend_kernel": _limits(arch, _CACHES[cache], window)},
    )


def _limits(arch: int, cache_type: torch.dtype, window: int | None) -> Limits:
    tile = extend_tile(cache_type, arch)
    reason = (
        "two products of 128 rows keep the matrix unit of an SM busy for 1024 cycles a block "
        "(1024 multiply-adds each, data sheet), in which it issues 4096 instructions: 512 for each "
        "of 8 warps, 16 lane instructions a score. Copies have to bridge a block."
    )
    if arch != 90:
        return Limits(reason, tensor_core="UTCHMMA", async_copies=True)
    # The sliding layers' loop holds the masks of its edge blocks, which are branched around.
    counted = window is None
    return Limits(
        reason,
        tensor_core="HGMMA",
        async_copies=True,
        units=tile.block_rows * tile.block_keys,
        per_unit=16.0 if counted else None,
        loop_forbids=_FORBIDDEN,
        bytes_in_flight=BYTES_IN_FLIGHT,
    )
