"""Compile every kernel of this rank before its server is ready, so that no request waits for one.

CUDA graphs do so for the sizes that they capture; prompts of other sizes would each find some more.
Layers are run on tensors without memory, and what they would launch is compiled: no list of kernels
stands anywhere, and the server's own sizes, types and strides are what they are compiled for.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from step37_ext.attention_backend import Step37AttentionBackend
from step37_ext.model import forward
from step37_kernels.arch import arch_of, assumed_arch
from step37_kernels.attention.pages import MAX_BATCH
from step37_kernels.attention.tiles import batch_block
from step37_kernels.checks import debugging
from step37_kernels.compile_ahead import compile_all, launches_of, on_meta, token_counts
from step37_kernels.experts.layer import expert_tiles
from step37_kernels.experts.shared_expert import shared_tiles
from step37_kernels.experts.sort import sort_chunk
from step37_kernels.launch import Launch
from step37_kernels.linear import linear_tile
from step37_kernels.route import route_tile

logger = logging.getLogger(__name__)

TRITON = "triton"
"""Name of the implementations that launch Triton kernels on a GPU."""

Tile = Callable[[int], Hashable]
"""What a launch is compiled for with so many tokens."""


@dataclass(frozen=True)
class Part:
    """A layer's attention or feed-forward block, on tensors without memory.

    Attributes:
        run: a pass of so many tokens.
        tiles: of the launches whose tiles follow the number of tokens.
    """

    run: Callable[[int], object]
    tiles: Sequence[Tile]


def compile_ahead(
    layers: Sequence[Any], backend: Step37AttentionBackend, decodes: bool, rank: int, ranks: int
) -> None:
    """Compile what passes of any number of tokens launch, and log how long it took.

    Args:
        layers: decoder layers, their weights in the form that their kernels read.
        backend: theirs, with the cache.
        decodes: whether sequences are decoded one token at a time; with drafts they are not.
        rank, ranks: each rank begins at a place of its own, and finds in Triton's cache on disk
            what the others have compiled in the meantime.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    if debugging():  # its checks read what is in memory
        return
    start = time.perf_counter()
    try:
        launches = all_launches(layers, backend, decodes)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        logger.warning("step37: kernels are compiled when they are first needed (%s)", why)
        return
    turn = len(launches) * rank // ranks
    compile_all(launches[turn:] + launches[:turn])
    took = time.perf_counter() - start
    logger.info("step37: %d kernels are ready, after %.1f s", len(launches), took)


def all_launches(
    layers: Sequence[Any], backend: Step37AttentionBackend, decodes: bool
) -> list[Launch]:
    """One launch of each variant that passes of any number of tokens have."""
    arch = arch_of(backend.req_to_token)
    found: dict[tuple[Hashable, ...], Launch] = {}
    with assumed_arch(arch):
        # Sizes are constants of the kernels: parts that launch the same for one token always do.
        kinds = {
            tuple(launches_of(partial(part.run, 1))): part
            for part in _parts(layers, backend, decodes, arch)
        }
        for part in kinds.values():
            for tokens in token_counts(part.tiles):
                found |= launches_of(partial(part.run, tokens))
    return list(found.values())


def _parts(
    layers: Sequence[Any], backend: Step37AttentionBackend, decodes: bool, arch: int
) -> Iterator[Part]:
    for layer in layers:
        width = layer.input_layernorm.weight.shape[0]
        block = layer.self_attn
        if block.fused and _triton(block.prologue, block.attend, backend.page_tables):
            yield _attention(block, backend, width, decodes, arch)
        block = layer.feed_forward
        if hasattr(block, "share_expert"):
            if _triton(block.route, block.run_shared):
                yield _moe(block, width, arch)
        elif _triton(block.activation):
            yield _mlp(block, width, arch)


def _triton(*operations: Any) -> bool:
    return all(operation.name == TRITON for operation in operations)


def _attention(
    block: Any, backend: Step37AttentionBackend, width: int, decodes: bool, arch: int
) -> Part:
    """Prompts of at least a token each, and as many sequences that decode one token."""
    bare = SimpleNamespace(
        prologue=block.prologue,
        attend=block.attend,
        qkv_proj=_linear(block.qkv_proj, block.linear),
        o_proj=_linear(block.o_proj, block.linear),
        g_proj=None if block.g_proj is None else _linear(block.g_proj, None),
        q_norm=on_meta(block.q_norm),
        k_norm=on_meta(block.k_norm),
        cos_sin_cache=on_meta(block.cos_sin_cache),
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        eps=block.eps,
        scaling=block.scaling,
    )
    tiles: list[Tile] = [lambda tokens: batch_block(min(tokens, MAX_BATCH))]
    for projection in (block.qkv_proj, block.o_proj):
        tiles += _linear_tiles(projection, block.linear, arch)

    def run(tokens: int) -> None:
        modes = [ForwardMode.EXTEND, *([ForwardMode.DECODE] if decodes else [])]
        for mode in modes:
            count = tokens if mode == ForwardMode.EXTEND else min(tokens, MAX_BATCH)
            cache = _cache(block.attn, backend, mode, count)
            positions = _meta(count, dtype=torch.int64)
            forward.attention(bare, positions, _meta(count, width), cache)

    return Part(run, tiles)


def _cache(
    attn: Any, backend: Step37AttentionBackend, mode: ForwardMode, tokens: int
) -> forward.LayerCache:
    """A layer's cache in a pass of so many tokens of as many sequences as there may be."""
    sequences = min(tokens, MAX_BATCH)
    batch = SimpleNamespace(
        forward_mode=mode,
        batch_size=sequences,
        req_pool_indices=_meta(sequences, dtype=torch.int64),
        seq_lens=_meta(sequences, dtype=torch.int64),
        seq_lens_cpu=None,
        extend_seq_lens=_meta(sequences, dtype=torch.int32),
        out_cache_loc=_meta(tokens, dtype=torch.int64),
        spec_info=None,
    )
    bare: Any = copy.copy(backend)
    bare.req_to_token = on_meta(backend.req_to_token)
    bare.init_forward_metadata(batch)
    cache = bare.layer_cache(attn)
    return replace(cache, k_cache=on_meta(cache.k_cache), v_cache=on_meta(cache.v_cache))


def _mlp(block: Any, width: int, arch: int) -> Part:
    bare = SimpleNamespace(
        gate_up_proj=_linear(block.gate_up_proj, block.linear),
        down_proj=_linear(block.down_proj, block.linear),
        activation=block.activation,
        limit=block.limit,
    )
    tiles = [
        *_linear_tiles(block.gate_up_proj, block.linear, arch),
        *_linear_tiles(block.down_proj, block.linear, arch),
    ]
    return Part(lambda tokens: forward.mlp(bare, _meta(tokens, width)), tiles)


def _moe(block: Any, width: int, arch: int) -> Part:
    """Router, shared expert and routed experts; the last only where their kernels are Triton's."""
    shared = block.share_expert
    gate, text = on_meta(block.gate), block.text
    bare = SimpleNamespace(
        text=text,
        gate=gate,
        router_bias=on_meta(block.router_bias),
        route=block.route,
        run_shared=block.run_shared,
        share_expert=SimpleNamespace(
            gate_up_proj=SimpleNamespace(weight=on_meta(shared.gate_up_proj.weight)),
            down_proj=SimpleNamespace(weight=on_meta(shared.down_proj.weight)),
            limit=shared.limit,
        ),
        routed=lambda *given: None,
        limit=block.limit,
    )
    w13 = bare.share_expert.gate_up_proj.weight
    tiles: list[Tile] = [
        lambda tokens: route_tile(tokens, gate),
        lambda tokens: shared_tiles(tokens, w13, arch),
    ]
    # Another runner's experts have no weights of ours, and FlashInfer's are no Triton kernels.
    run_experts = getattr(block, "run_experts", None)
    if run_experts is not None and _triton(run_experts):
        weights = on_meta(block.experts.weights)
        bare.experts = SimpleNamespace(weights=weights, shard=block.experts.shard)
        bare.run_experts = run_experts
        bare.routed = partial(forward.routed_experts, bare)
        top_k, total = text.top_k, text.num_experts
        tiles += [
            lambda tokens: sort_chunk(tokens * top_k),
            lambda tokens: expert_tiles(weights, "same", tokens * top_k, total, arch),
        ]
    return Part(lambda tokens: forward.moe(bare, _meta(tokens, width)), tiles)


def _linear(projection: Any, operation: Any) -> forward.Linear:
    """A projection without memory: by the operation, or as if torch had multiplied."""
    weight = on_meta(projection.weight)
    if operation is not None:
        return lambda x: (operation(x, weight), None)
    return lambda x: (x.new_empty((x.shape[0], weight.shape[0])), None)


def _linear_tiles(projection: Any, operation: Any, arch: int) -> list[Tile]:
    if operation is None:
        return []
    rows, columns = projection.weight.shape
    return [lambda tokens: linear_tile(tokens, rows, columns, arch)]


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
