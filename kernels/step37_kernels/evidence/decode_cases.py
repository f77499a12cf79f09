"""Prologue, decode and verify at the model's shapes, with the limits of their machine code."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from step37_kernels.attention.decode import decode, verify
from step37_kernels.attention.prologue import prologue
from step37_kernels.attention.tiles import decode_tile
from step37_kernels.evidence.limits import BYTES_IN_FLIGHT, Case, Limits

DIM, SLOTS, CONTEXT, BATCH = 128, 1 << 20, 262144, 64
CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# Name: query heads, KV heads, window, rotary dim. Heads per rank are these over the TP size.
FULL, SLIDING = ("full", 64, 8, None, 64), ("sliding", 96, 8, 512, 128)

# Slow conversions run at a sixteenth of the rate; a spilled tile passes through memory.
_FORBIDDEN = ("F2F", "LDL", "STL")


def cases() -> list[Case]:
    """One case per cache, attention type, page size and number of query rows that differ."""
    return [case for arch in (90, 100) for case in (*_prologues(arch), *_decodes(arch))]


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _prologues(arch: int) -> Iterator[Case]:
    for cache, dtype in CACHES.items():
        for (name, heads, kv_heads, _, rotary), tp in ((FULL, 1), (SLIDING, 1), (SLIDING, 8)):
            heads, kv_heads = heads // tp, kv_heads // tp
            held = _meta(SLOTS, kv_heads, DIM, dtype=dtype)
            columns = (heads + 2 * kv_heads) * DIM + -(-heads // 8) * 8  # the gate's ride along
            args = (
                _meta(4096, columns), _meta(4096, dtype=torch.int64), _meta(DIM), _meta(DIM),
                _meta(CONTEXT, rotary, dtype=torch.float32), heads, kv_heads, 1e-5, held, held,
                _meta(4096, dtype=torch.int64),
            )  # fmt: skip
            reason = "moves bytes and computes little: enough warps have to fit to hide latency"
            yield Case(
                f"prologue, {name}, {cache} cache, TP={tp}",
                arch,
                lambda a=args: prologue(*a),  # type: ignore[misc]
                {"prologue_kernel": Limits(reason, blocks_per_sm=4)},
            )


def _decodes(arch: int) -> Iterator[Case]:
    for cache in CACHES:
        for page_size in (1, 64):
            for kind, tp in ((FULL, 1), (SLIDING, 1), (FULL, 8)):
                yield _decode(arch, cache, kind, tp, page_size, 1)
        yield _decode(arch, cache, FULL, 1, 64, 4)
        yield _decode(arch, cache, SLIDING, 1, 1, 8, tree=True)
        yield _decode(arch, cache, SLIDING, 8, 16, 2)


def _decode(
    arch: int,
    cache: str,
    kind: tuple[str, int, int, int | None, int],
    tp: int,
    page_size: int,
    queries: int,
    tree: bool = False,
) -> Case:
    name, heads, kv_heads, window, _ = kind
    heads, kv_heads = heads // tp, kv_heads // tp
    q = _meta(BATCH, queries, heads, DIM)
    held = _meta(SLOTS, kv_heads, DIM, dtype=CACHES[cache])
    table = _meta(BATCH, CONTEXT // page_size, dtype=torch.int32)
    lengths = _meta(BATCH, dtype=torch.int32)
    gate = _meta(BATCH, queries, heads)
    mask = _meta(BATCH, queries, queries, dtype=torch.bool) if tree else None
    common = (held, held, table, lengths, DIM**-0.5, window, page_size, 1.0, 1.0)

    def run() -> None:
        if queries == 1:
            decode(q[:, 0], *common, head_gate=gate[:, 0])
        else:
            verify(q, *common, head_gate=gate, tree_mask=mask)

    what = "decode" if queries == 1 else f"verify {queries}{' in a tree' if tree else ''}"
    return Case(
        f"{what}, {name}, {cache} cache, page {page_size}, TP={tp}",
        arch,
        run,
        {"decode_split_kernel": _limits(cache, queries * heads // kv_heads)},
    )


def _limits(cache: str, rows: int) -> Limits:
    """Of the split kernel with so many query rows a KV head."""
    tile = decode_tile(CACHES[cache], rows)
    return Limits(
        "an SM issues 128 lanes a clock, and memory delivers 14.5 bytes a clock to each of an "
        "H100's and 29 to each of a B200's: 8.8 and 4.4 instructions a byte",
        tensor_core="HMMA",
        blocks_per_sm=tile.resident,
        units=tile.block * 2 * DIM * CACHES[cache].itemsize,
        per_unit=3.2 if cache == "fp8" else 2.4,
        loop_forbids=_FORBIDDEN,
        async_copies=True,
        bytes_in_flight=BYTES_IN_FLIGHT,
    )
