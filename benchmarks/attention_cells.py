"""The attention's cells: decode, prefill and prologue, their work and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.harness.cells import GIB, Cell
from benchmarks.harness.timing import calls_needed, copies_needed
from benchmarks.shapes import ATTENTION
from step37_ext.deploy import roofline
from step37_ext.deploy.work import (
    CACHE_BYTES,
    Heads,
    Work,
    decode_attention,
    prefill_attention,
    prologue,
)

BATCHES = (1, 8, 64, 256)
CONTEXTS = (1024, 8192, 65536, 262144)
NEW_TOKENS = (2048, 8192, 32768)
PREFIXES = (0, 65536)
PROLOGUE_TOKENS = (1, 64, 256, 1024, 4096, 8192, 32768)
PARALLEL = (1, 4)
CACHES = tuple(CACHE_BYTES)
PAGE_SIZE = 64  # the largest that is supported; the schedule of keys is the same for all

_MOST_COPIES = 1024  # of caches so small that 4 GiB would be tens of thousands of them
_PREFILL_COPIES = 2  # prefill's time is arithmetic, and its newest keys are in L2 when it is used


def heads_of(cell: Cell) -> Heads:
    """The rank's heads of a cell's kind and tensor-parallel size."""
    return heads(str(cell.settings["kind"]), int(str(cell.settings["parallel"]).removeprefix("TP")))


def heads(kind: str, parallel: int) -> Heads:
    """Query and KV heads of one rank."""
    return roofline.heads_of(ATTENTION[kind], parallel)


@dataclass(frozen=True)
class Rotation:
    """Distinct caches (or inputs) held, and calls of one sample over them."""

    copies: int
    calls: int


def rotation(cell: Cell) -> Rotation:
    """How a cell's data rotates."""
    return _rotation(cell.operation, cell.work.stream_bytes)


def _rotation(operation: str, touched: float) -> Rotation:
    if operation == "prefill":
        return Rotation(_PREFILL_COPIES, _PREFILL_COPIES)
    copies = min(_MOST_COPIES, copies_needed(touched))
    return Rotation(copies, calls_needed(touched, copies, _MOST_COPIES))


def stored_pages(of: Heads, context: int) -> tuple[int, int]:
    """First page that a sequence of that length needs, and the end of its pages.

    Pages that left the window are not kept, as in a server's sliding-window pool.
    """
    return (context - of.visible(context)) // PAGE_SIZE, -(-context // PAGE_SIZE)


def cells() -> list[Cell]:
    """Every cell."""
    return [*_decode(), *_prefill(), *_prologue()]


def _cell(
    operation: str, settings: dict[str, str | int | float], later: int, work: Work, memory: float
) -> Cell:
    group = " ".join([operation, *(f"{k}={v}" for k, v in settings.items())])
    return Cell("attention", operation, settings, later, group, work, memory + GIB)


def _of(kind: str, parallel: int, cache: str) -> dict[str, str | int | float]:
    return {"kind": kind, "parallel": f"TP{parallel}", "cache": cache}


def _variants() -> Iterator[tuple[dict[str, str | int | float], Heads, str]]:
    for kind in ATTENTION:
        for parallel in PARALLEL:
            for cache in CACHES:
                yield _of(kind, parallel, cache), heads(kind, parallel), cache


def _decode() -> Iterator[Cell]:
    for settings, of, cache in _variants():
        for batch in BATCHES:
            for context in CONTEXTS:
                work = decode_attention(of, batch, context, cache)
                first, end = stored_pages(of, context)
                one = batch * of.kv_bytes((end - first) * PAGE_SIZE, cache)
                memory = one * _rotation("decode", work.stream_bytes).copies
                later = (cache != "fp8") + (batch not in (1, 64)) + (of.window is not None)
                # What a window leaves out does not change the work: one context tells most.
                later += context not in (8192, 65536) if of.window is None else context != 8192
                sizes = {"batch": batch, "context": context}
                yield _cell("decode", settings | sizes, later, work, memory)


def _prefill() -> Iterator[Cell]:
    for settings, of, cache in _variants():
        for new in NEW_TOKENS:
            for prefix in PREFIXES:
                work = prefill_attention(of, new, prefix, cache)
                memory = _PREFILL_COPIES * of.kv_bytes(prefix + new, cache)
                memory += 4 * new * of.query * of.dim * 2
                later = 1 + (cache != "fp8") + (new != 8192) + (prefix != 0)
                sizes = {"new": new, "prefix": prefix}
                yield _cell("prefill", settings | sizes, later, work, memory)


def _prologue() -> Iterator[Cell]:
    for settings, of, cache in _variants():
        for tokens in PROLOGUE_TOKENS:
            work = prologue(of, tokens, cache)
            memory = 2 * work.bytes * _rotation("prologue", work.stream_bytes).copies
            later = 1 + (cache != "fp8") + (tokens not in (64, 4096))
            yield _cell("prologue", settings | {"tokens": tokens}, later, work, memory)
