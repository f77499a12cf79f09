"""The step benchmark's inputs: tokens, paged caches, and a router bias that skews the routing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention_cells import PAGE_SIZE, stored_pages
from benchmarks.attention_data import CACHE_DTYPE, K_SCALE, V_SCALE, cache_values
from benchmarks.step_model import Batch, MoEBlock, StepModel
from benchmarks.step_weights import SCORE_STD
from step37_ext.deploy.expected_experts import chances
from step37_ext.deploy.roofline import heads_of
from step37_ext.deploy.work import Heads
from step37_ext.model.config import TextShape
from step37_ext.model.forward import LayerCache, Paging

CACHE = "fp8"  # what the releases are served with


def decode_batch(
    text: TextShape, ranks: int, batch: int, context: int, device: torch.device
) -> Batch:
    """One new token for each of `batch` sequences of `context` tokens, that one included."""
    generator = torch.Generator(device).manual_seed(context)
    position = context - 1
    lengths = torch.full((batch,), context, dtype=torch.int64, device=device)
    kinds = {heads_of(layer.attention, ranks) for layer in text.layers}
    tables = {of: _page_table(of, batch, context, generator, device) for of in kinds}

    def cache(of: Heads) -> LayerCache:
        table, slots = tables[of]
        new_slots = table[:, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
        shape, dtype = (slots, of.kv, of.dim), CACHE_DTYPE[CACHE]
        return LayerCache(
            # Keys as the head norm makes them: half of the scores' standard deviation.
            cache_values(shape, dtype, K_SCALE, generator, SCORE_STD**0.5),
            cache_values(shape, dtype, V_SCALE, generator),
            Paging(table, new_slots),
            PAGE_SIZE,
            lengths,
            None,
            of.window,
            K_SCALE,
            V_SCALE,
        )

    caches = [cache(heads_of(layer.attention, ranks)) for layer in text.layers]
    return Batch(_tokens(text, ranks, batch, generator), lengths - 1, caches)


def prefill_batch(text: TextShape, ranks: int, new: int, device: torch.device) -> Batch:
    """The `new` tokens of one sequence with nothing before them, and logits of the last."""
    generator = torch.Generator(device).manual_seed(new)
    positions = torch.arange(new, device=device)
    length = torch.full((1,), new, dtype=torch.int64, device=device)
    pages = -(-new // PAGE_SIZE)
    table = torch.randperm(pages, generator=generator, device=device).int()[None]
    slots = table[0, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE

    def cache(of: Heads) -> LayerCache:
        shape, dtype = (pages * PAGE_SIZE, of.kv, of.dim), CACHE_DTYPE[CACHE]
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        paging = Paging(table, slots)
        return LayerCache(k, v, paging, PAGE_SIZE, length, length, of.window, K_SCALE, V_SCALE)

    caches = [cache(heads_of(layer.attention, ranks)) for layer in text.layers]
    ids = _tokens(text, ranks, new, generator)
    return Batch(ids, positions, caches, torch.tensor([new - 1], device=device))


def _tokens(text: TextShape, ranks: int, count: int, generator: torch.Generator) -> Tensor:
    """Different tokens (as long as there are any) of those that the rank has embeddings of."""
    rows = text.vocab_size // ranks
    ids = torch.randperm(rows, generator=generator, device=generator.device)
    return ids.repeat(-(-count // rows))[:count]


def _page_table(
    of: Heads, batch: int, context: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, int]:
    """Shuffled pages int32 [B, pages], 0 where a window leaves none, and the slots of all."""
    first, end = stored_pages(of, context)
    count = batch * (end - first)
    table = torch.zeros(batch, end, dtype=torch.int32, device=device)
    shuffled = torch.randperm(count, generator=generator, device=device)
    table[:, first:] = shuffled.view(batch, -1).int()
    return table, count * PAGE_SIZE


def selection_bias(num_experts: int, top_k: int, skew: float) -> Tensor:
    """Router biases with which each expert is selected as often as `expected_experts.chances` says.

    A score is sigmoid(z) with z standard normal: hidden states have a norm of K^1/2, the gate's
    weights a standard deviation of K^-1/2. An expert is selected where score + bias exceeds some
    threshold, nearly the same for all tokens since so many experts compete; at a threshold of 1/2
    its chance p needs a bias of 1/2 - sigmoid(z_p), where z exceeds z_p with probability p.

    Returns:
        fp32 [num_experts] on the CPU, the most popular expert first.
    """
    p = torch.tensor(chances(num_experts, top_k, skew), dtype=torch.float64)
    # A chance of 1 would need an infinite z; one in a million is as good.
    exceeded = torch.special.ndtri((1 - p).clamp(1e-6, 1 - 1e-6))
    return (0.5 - torch.sigmoid(exceeded)).float()


def skew_routing(model: StepModel, skew: float) -> None:
    """Set the routers' biases; which experts are popular differs from layer to layer.

    Raises:
        ValueError: the model's routers have no bias to skew them by.
    """
    for number, block in enumerate(model.moe_blocks()):
        if block.router_bias is None:
            raise ValueError(f"routing with skew {skew} needs a router bias, the model has none")
        bias = selection_bias(block.text.num_experts, block.text.top_k, skew)
        order = torch.randperm(len(bias), generator=torch.Generator().manual_seed(number))
        block.router_bias.copy_(bias[order])


@dataclass(frozen=True)
class Routed:
    """What a router said: weights fp32 and ids int `[T, top_k]`."""

    weights: Tensor
    ids: Tensor


@contextmanager
def recorded_routing(blocks: Sequence[MoEBlock]) -> Iterator[list[Routed]]:
    """What the blocks' routers say inside the context, in order."""
    said: list[Routed] = []

    def recorder(
        route: Callable[..., tuple[Tensor, Tensor]],
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        def record(*args: object) -> tuple[Tensor, Tensor]:
            weights, ids = route(*args)
            said.append(Routed(weights, ids))
            return weights, ids

        return record

    routes = [block.route for block in blocks]
    try:
        for block in blocks:
            block.route = recorder(block.route)
        yield said
    finally:
        for block, route in zip(blocks, routes, strict=True):
            block.route = route


def distinct_experts(model: StepModel, batch: Batch) -> float:
    """Experts that a layer uses in this pass, the mean over layers; runs the model once."""
    with recorded_routing(model.moe_blocks()) as said:
        model(batch)
    return sum(int(one.ids.unique().numel()) for one in said) / max(1, len(said))
