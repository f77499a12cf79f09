"""The order of the model's operations, without SGLang: its modules and the step benchmark run it.

A block is whatever has the attributes named here; its linears return (output, bias), as SGLang's
do. Sums over ranks are the caller's, or inside the linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from step37_ext.model.config import TextShape

Linear = Callable[[Tensor], tuple[Tensor, Any]]
"""`[T, in]` to (`[T, out]`, bias)."""


@dataclass(frozen=True)
class Paging:
    """Where one batch's keys are in one of the two cache pools.

    Attributes:
        page_table: int32 `[B, pages]`.
        new_slots: int `[T]`, where this step's keys go.
    """

    page_table: Tensor
    new_slots: Tensor


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache and this step's place in it, as the operations take them.

    Attributes:
        query_lens: int `[B]`, a number where every sequence has as many, None for one each.
        window: keys that a query sees at most, itself among them; None is all.
    """

    k_cache: Tensor
    v_cache: Tensor
    paging: Paging
    page_size: int
    seq_lens: Tensor
    query_lens: Tensor | int | None
    window: int | None
    k_scale: float
    v_scale: float


class AttentionBlock(Protocol):
    """What `attention` needs; `prologue` and `attend` are operations of `step37_kernels`."""

    qkv_proj: Any
    o_proj: Any
    g_proj: Any
    q_norm: Any
    k_norm: Any
    num_heads: int
    num_kv_heads: int
    eps: float
    scaling: float
    prologue: Any
    attend: Any

    @property
    def cos_sin_cache(self) -> Tensor: ...


class MLPBlock(Protocol):
    """What `mlp` needs: two linears, the activation and its limit."""

    gate_up_proj: Any
    down_proj: Any
    activation: Any
    limit: float | None


class MoEBlock(Protocol):
    """What `moe` needs: the router, the shared expert, and the routed ones as a whole."""

    text: TextShape
    gate: Any
    router_bias: Any
    share_expert: Any
    route: Any
    run_shared: Any

    def routed(
        self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared: Tensor
    ) -> Tensor: ...


class ExpertsBlock(Protocol):
    """What `routed_experts` needs: one rank's experts, their limit, and the operation."""

    text: TextShape
    limit: float | None
    experts: Any
    run_experts: Any


class Layer(Protocol):
    """What `decoder_layer` needs: two norms that add a residual where they get one."""

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any

    @property
    def feed_forward(self) -> Any: ...


def decoder(
    layers: Iterable[Any], norm: Any, positions: Tensor, hidden: Tensor, batch: Any
) -> tuple[Tensor, Tensor]:
    """All decoder layers and the final norm; returns hidden after and before the norm."""
    residual = None
    for layer in layers:
        hidden, residual = layer(positions, hidden, residual, batch)
    return norm(hidden, residual)


def decoder_layer(
    layer: Layer, positions: Tensor, hidden: Tensor, residual: Tensor | None, batch: Any
) -> tuple[Tensor, Tensor]:
    """Norm, attention, norm, feed-forward: its output and the residual it is to be added to."""
    if residual is None:
        residual, hidden = hidden, layer.input_layernorm(hidden)
    else:
        hidden, residual = layer.input_layernorm(hidden, residual)
    if hidden.shape[0]:
        hidden = layer.self_attn(positions, hidden, batch)
    hidden, residual = layer.post_attention_layernorm(hidden, residual)
    return layer.feed_forward(hidden), residual


def project(block: AttentionBlock, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """qkv `[T, (Hq + 2 Hkv) * D]` and the head gate's logits `[T, Hq]`, if there is one."""
    qkv, _ = block.qkv_proj(hidden)
    return qkv, None if block.g_proj is None else block.g_proj(hidden)[0]


def attention(
    block: AttentionBlock, positions: Tensor, hidden: Tensor, cache: LayerCache
) -> Tensor:
    """Norm, rotary and cache write in one operation, attention and head gate in another.

    Hidden `[T, hidden]` after the input norm to the block's output.
    """
    qkv, gate = project(block, hidden)
    q = block.prologue(
        qkv,
        positions,
        block.q_norm,
        block.k_norm,
        block.cos_sin_cache,
        block.num_heads,
        block.num_kv_heads,
        block.eps,
        cache.k_cache,
        cache.v_cache,
        cache.paging.new_slots,
        cache.k_scale,
        cache.v_scale,
    )
    return block.o_proj(attend_cached(block.attend, q, cache, block.scaling, gate))[0]


def attend_cached(
    attend: Callable[..., Tensor],
    q: Tensor,
    cache: LayerCache,
    scaling: float,
    head_gate: Tensor | None,
) -> Tensor:
    """The operation `attend` over a layer's cache: q `[T, Hq, D]` to `[T, Hq * D]`."""
    return attend(
        q,
        cache.k_cache,
        cache.v_cache,
        cache.paging.page_table,
        cache.seq_lens,
        cache.query_lens,
        scaling,
        cache.window,
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
        head_gate=head_gate,
        page_size=cache.page_size,
    )


def mlp(block: MLPBlock, hidden: Tensor) -> Tensor:
    """A dense layer's feed-forward block, `[T, hidden]` to `[T, hidden]`."""
    gate_up, _ = block.gate_up_proj(hidden)
    return block.down_proj(block.activation(gate_up, block.limit))[0]


def moe(block: MoEBlock, hidden: Tensor) -> Tensor:
    """Router, shared expert and this rank's routed experts, `[T, hidden]` to `[T, hidden]`."""
    topk_weights, topk_ids = block.route(
        hidden,
        block.gate,
        block.router_bias,
        block.text.top_k,
        block.text.router_scaling,
        block.text.router_renormalize,
    )
    shared = block.run_shared(
        hidden,
        block.share_expert.gate_up_proj.weight,
        block.share_expert.down_proj.weight,
        block.share_expert.limit,
    )
    return block.routed(hidden, topk_weights, topk_ids, shared)


def routed_experts(
    block: ExpertsBlock, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared: Tensor
) -> Tensor:
    """This rank's routed experts by the operation `experts`, with the shared expert's parts."""
    return block.run_experts(
        hidden,
        block.experts.weights,
        topk_weights,
        topk_ids,
        block.limit,
        block.experts.shard.first_expert,
        shared=shared,
        total_experts=block.text.num_experts,
    )
