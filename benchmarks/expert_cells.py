"""The expert layer's cells: their shapes, routing distributions, work and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.harness.cells import GIB, Cell
from benchmarks.harness.timing import calls_needed, copies_needed
from benchmarks.shapes import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K
from step37_ext.deploy.expected_experts import chances, distinct
from step37_ext.deploy.work import (
    BYTES_PER_WEIGHT,
    Work,
    added,
    route,
    routed_experts,
    shared_expert,
)
from step37_kernels.experts.formats import FORMATS, multiplied_as

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
SERVED = (("nvfp4", "bf16"), ("fp8", "fp8"))
"""Weights, and what activations are multiplied as, of the two releases that are served."""
_PAIRS = [(weights, multiplied_as(activations)) for weights, activations in FORMATS]
ROUTINGS = ("uniform", "zipf")
GATES = 256  # distinct gate weights that routing cells rotate over: 600 MB, ten times an L2


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
        return count * self.weights_per_expert * BYTES_PER_WEIGHT[weight_format]


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


@cache
def _popularity() -> Tensor:
    """Each expert's rank in popularity under "zipf", int64 [EXPERTS] from 1; always the same."""
    return torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(0)) + 1


def draw(tokens: int, routing: str, seed: int) -> Tensor:
    """Expert ids int64 [tokens, TOP_K], distinct in a row, on the CPU.

    "uniform" draws every set of eight alike. "zipf" draws without replacement with probabilities
    proportional to 1 / rank (by the Gumbel trick), ranks given to the experts at random but the
    same in every draw.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(tokens, EXPERTS, generator=generator)
    if routing == "zipf":
        gumbel = -torch.log(-torch.log(keys.clamp(1e-20, 1 - 1e-7)))
        keys = gumbel - torch.log(_popularity().float())
    return keys.topk(TOP_K, dim=1).indices


def used(ids: Tensor, shard: Shard) -> tuple[int, int]:
    """How many of the shard's experts `ids` [T, TOP_K] use, and by how many (token, choice)s."""
    local = ids.flatten() - shard.first_expert
    local = local[(local >= 0) & (local < shard.experts)]
    return int(local.unique().numel()), local.numel()


def expected(tokens: int, routing: str, shard: Shard) -> tuple[float, float]:
    """Expected `used`."""
    by_rank = chances(EXPERTS, TOP_K, 1.0 if routing == "zipf" else 0.0)
    ranks = _popularity()[shard.first_expert :][: shard.experts].tolist()
    local = [by_rank[rank - 1] for rank in ranks]
    return distinct(tokens, local), tokens * sum(local)


def work(
    weight_format: str, activations: str, shard: Shard, tokens: int, distinct: float, pairs: float
) -> Work:
    """One layer's routed experts: `distinct` experts read once, `pairs` rows multiplied."""
    return routed_experts(
        tokens, HIDDEN, TOP_K, shard.intermediate, distinct, pairs, weight_format, activations
    )


def shared_work(shard: Shard, tokens: int) -> Work:
    """The shared expert (BF16), whole on every rank with EP, split like the others with TP."""
    return shared_expert(tokens, HIDDEN, shard.intermediate)


def route_work(tokens: int) -> Work:
    """The router with a BF16 gate."""
    return route(tokens, HIDDEN, EXPERTS, TOP_K)


def rotation(weight_format: str, shard: Shard, touched_bytes: float) -> tuple[int, int]:
    """Distinct layers held, and calls of one sample over them."""
    copies = copies_needed(shard.bytes_of(weight_format))
    return copies, calls_needed(touched_bytes, copies)


def cells() -> list[Cell]:
    """Every cell: routed experts in all combinations, whole layers in the telling ones, router."""
    return [*_routed(), *_layers(), *_router()]


def _routed() -> Iterator[Cell]:
    for weight_format, activations in (*SERVED, *(p for p in _PAIRS if p not in SERVED)):
        for shard in SHARDS.values():
            for routing in ROUTINGS:
                for tokens in TOKENS:
                    yield routed_cell("experts", weight_format, activations, shard, routing, tokens)


def _layers() -> Iterator[Cell]:
    for weight_format, activations in SERVED:
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


def _priority(
    operation: str, weight_format: str, activations: str, shard: str, routing: str, tokens: int
) -> int:
    """0 is measured first: what a reader asks first, of the two releases that are served."""
    later = 0
    later += (weight_format, activations) not in SERVED
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
