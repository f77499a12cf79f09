"""The expert layer's cells: their shapes, routing distributions, work and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.harness.cells import GIB, Cell, Work
from benchmarks.harness.timing import calls_needed, copies_needed
from benchmarks.shapes import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
FORMATS = (  # weights and what the activations are multiplied as
    ("nvfp4", "bf16"),
    ("fp8", "fp8"),
    ("fp8", "bf16"),
    ("bf16", "bf16"),
    ("nvfp4", "fp8"),
    ("nvfp4", "nvfp4"),
)
ROUTINGS = ("uniform", "zipf")
GATES = 256  # distinct gate weights that routing cells rotate over: 600 MB, ten times an L2

_BYTES_PER_WEIGHT = {
    "bf16": 2.0,
    "fp8": 1 + 4 / (128 * 128),  # an fp32 scale per block of 128 x 128
    "nvfp4": 0.5 + 1 / 16,  # an e4m3 scale per 16
}


@dataclass(frozen=True)
class Shard:
    """What one rank holds: rank 1, whose FP8 shard may begin inside a block."""

    name: str
    experts: int
    first_expert: int
    intermediate: int

    @property
    def weights_per_expert(self) -> int:
        """Weights of one expert on this rank: gate, up and down."""
        return 3 * self.intermediate * HIDDEN

    def bytes_of(self, weight_format: str, experts: float | None = None) -> float:
        """Bytes of that many of its experts (None: all)."""
        count = self.experts if experts is None else experts
        return count * self.weights_per_expert * _BYTES_PER_WEIGHT[weight_format]


SHARDS = {
    shard.name: shard
    for shard in (
        Shard("TP1", EXPERTS, 0, INTERMEDIATE),
        Shard("TP2", EXPERTS, 0, INTERMEDIATE // 2),
        Shard("TP4", EXPERTS, 0, INTERMEDIATE // 4),
        Shard("TP8", EXPERTS, 0, INTERMEDIATE // 8),
        Shard("EP4", EXPERTS // 4, EXPERTS // 4, INTERMEDIATE),
    )
}


def draw(tokens: int, routing: str, seed: int) -> Tensor:
    """Expert ids int64 [tokens, TOP_K], distinct in a row, on the CPU.

    "uniform" draws every set of eight alike. "zipf" draws without replacement with probabilities
    proportional to 1 / rank (by the Gumbel trick), ranks given to the experts at random but the
    same in every draw.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(tokens, EXPERTS, generator=generator)
    if routing == "zipf":
        rank = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(0)) + 1
        keys = -torch.log(-torch.log(keys.clamp(1e-20, 1 - 1e-7))) - torch.log(rank.float())
    return keys.topk(TOP_K, dim=1).indices


def used(ids: Tensor, shard: Shard) -> tuple[int, int]:
    """How many of the shard's experts `ids` [T, TOP_K] use, and by how many (token, choice)s."""
    local = ids.flatten() - shard.first_expert
    local = local[(local >= 0) & (local < shard.experts)]
    return int(local.unique().numel()), local.numel()


def expected(tokens: int, routing: str, shard: Shard) -> tuple[float, float]:
    """Expected `used`: by formula for "uniform", as the mean of four draws for "zipf"."""
    if routing == "uniform":
        # An expert is not among one token's eight with probability 1 - 8/288.
        distinct = shard.experts * (1 - (1 - TOP_K / EXPERTS) ** tokens)
        return distinct, tokens * TOP_K * shard.experts / EXPERTS
    counts = [used(ids, shard) for ids in _drawn(tokens, routing)]
    return sum(d for d, _ in counts) / len(counts), sum(p for _, p in counts) / len(counts)


@cache
def _drawn(tokens: int, routing: str) -> list[Tensor]:
    """Draws that the shards' expectations are taken from."""
    return [draw(tokens, routing, seed) for seed in range(4)]


def work(
    weight_format: str, activations: str, shard: Shard, tokens: int, distinct: float, pairs: float
) -> Work:
    """One layer's routed experts: `distinct` experts read once, `pairs` rows multiplied."""
    weights = shard.bytes_of(weight_format, distinct)
    inputs_and_output = 2 * tokens * HIDDEN * 2 + tokens * TOP_K * 8
    flops = 2 * pairs * shard.weights_per_expert
    return Work(weights, weights + inputs_and_output, flops, activations)


def shared_work(shard: Shard, tokens: int) -> Work:
    """The shared expert (BF16), whole on every rank with EP, split like the others with TP."""
    weights = 3 * shard.intermediate * HIDDEN
    return Work(2 * weights, 2 * weights, 2 * tokens * weights, "bf16")


def route_work(tokens: int) -> Work:
    """The router with a BF16 gate: reads it and hidden, writes weights and ids."""
    weights = 2 * EXPERTS * HIDDEN
    moved = weights + tokens * (2 * HIDDEN + 8 * TOP_K)
    return Work(weights, moved, 2 * tokens * EXPERTS * HIDDEN, "bf16")


def rotation(weight_format: str, shard: Shard, touched_bytes: float) -> tuple[int, int]:
    """Distinct layers held, and calls of one sample over them."""
    copies = copies_needed(shard.bytes_of(weight_format))
    return copies, calls_needed(touched_bytes, copies)


def cells() -> list[Cell]:
    """Every cell: routed experts in all combinations, whole layers in the telling ones, router."""
    return [*_routed(), *_layers(), *_router()]


def _routed() -> Iterator[Cell]:
    for weight_format, activations in FORMATS:
        for shard in SHARDS.values():
            for routing in ROUTINGS:
                for tokens in TOKENS:
                    yield routed_cell("experts", weight_format, activations, shard, routing, tokens)


def _layers() -> Iterator[Cell]:
    for weight_format, activations in FORMATS[:2]:
        for name in ("TP1", "TP4"):
            for tokens in TOKENS:
                yield routed_cell(
                    "layer", weight_format, activations, SHARDS[name], "uniform", tokens
                )


def routed_cell(
    operation: str, weight_format: str, activations: str, shard: Shard, routing: str, tokens: int
) -> Cell:
    """A cell of "experts" or "layer"; `shard` need not be one of SHARDS, but has to have its name
    there when the cell is run."""
    expectation = expected(tokens, routing, shard)
    done = work(weight_format, activations, shard, tokens, *expectation)
    copies, calls = rotation(weight_format, shard, done.stream_bytes)
    if operation == "layer":
        done = added(done, shared_work(shard, tokens), route_work(tokens))
    # One copy more is the checkpoint's own layout, for the reference.
    memory = (copies + 1) * shard.bytes_of(weight_format)
    memory += tokens * TOP_K * 2 * (3 * shard.intermediate + 2 * HIDDEN)
    memory += calls * tokens * HIDDEN * 2 + GIB
    return Cell(
        "moe",
        operation,
        {
            "format": weight_format,
            "activations": activations,
            "parallel": shard.name,
            "routing": routing,
            "tokens": tokens,
        },
        _priority(operation, weight_format, activations, shard.name, routing, tokens),
        f"{weight_format} x {activations} {shard.name}",
        done,
        memory,
    )


def added(*works: Work) -> Work:
    """The work of several operations, one after the other; multiplied as the first is."""
    return Work(
        math.fsum(w.stream_bytes for w in works),
        math.fsum(w.bytes for w in works),
        math.fsum(w.flops for w in works),
        works[0].matmul,
    )


def _priority(
    operation: str, weight_format: str, activations: str, shard: str, routing: str, tokens: int
) -> int:
    """0 is measured first: what a reader asks first, of the two releases that are served."""
    later = 0
    later += (weight_format, activations) not in (("nvfp4", "bf16"), ("fp8", "fp8"))
    later += shard not in ("TP1", "TP4")
    later += tokens not in (1, 8, 64, 256, 8192)
    later += 2 * (routing != "uniform")
    later += 2 * (operation != "experts")
    return later


def _router() -> Iterator[Cell]:
    for tokens in TOKENS:
        done = route_work(tokens)
        memory = GATES * (done.stream_bytes + tokens * 2 * HIDDEN) + GIB
        priority = 1 if tokens in (1, 64, 8192) else 3
        yield Cell("moe", "route", {"tokens": tokens}, priority, "route", done, memory)
