"""The text model as the step benchmark runs it: blocks that `step37_ext.model.forward` runs.

Only what SGLang's modules do besides is here: what a linear, a norm, the embedding and the head
are on one rank. A rank of several sums nothing: there is nobody to sum with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from step37_ext.model import forward
from step37_ext.model.config import TextShape
from step37_ext.model.experts import RoutedExperts
from step37_ext.model.forward import LayerCache, Paging


@dataclass(frozen=True)
class Batch:
    """One forward pass's inputs.

    Attributes:
        input_ids, positions: int64 `[T]`.
        caches: one per layer of the model.
        last: int64, the rows whose logits are asked for; None is all.
    """

    input_ids: Tensor
    positions: Tensor
    caches: Sequence[LayerCache]
    last: Tensor | None = None

    def of_layers(self, chosen: Sequence[int]) -> Batch:
        """The same for a model of some of the layers."""
        return replace(self, caches=[self.caches[place] for place in chosen])

    def sequences(self, rows: Tensor) -> Batch:
        """Some of the sequences of a decode batch, int64 `[n]`."""

        def part(cache: LayerCache) -> LayerCache:
            paging = Paging(cache.paging.page_table[rows], cache.paging.new_slots[rows])
            return replace(cache, paging=paging, seq_lens=cache.seq_lens[rows])

        caches = [part(cache) for cache in self.caches]
        return Batch(self.input_ids[rows], self.positions[rows], caches)

    def beginning(self, tokens: int) -> Batch:
        """The first tokens of the one sequence of a prefill batch; they see nothing behind them."""

        def part(cache: LayerCache) -> LayerCache:
            paging = Paging(cache.paging.page_table, cache.paging.new_slots[:tokens])
            length = torch.full_like(cache.seq_lens, tokens)
            return replace(cache, paging=paging, seq_lens=length, query_lens=length)

        caches = [part(cache) for cache in self.caches]
        return Batch(self.input_ids[:tokens], self.positions[:tokens], caches)


@dataclass
class AttentionBlock:
    """Attention of one layer on one rank, see `forward.AttentionBlock`.

    `place` is the layer's in the model that is run.
    """

    place: int
    qkv_proj: Any
    o_proj: Any
    g_proj: Any
    q_norm: Tensor
    k_norm: Tensor
    cos_sin_cache: Tensor
    num_heads: int
    num_kv_heads: int
    eps: float
    scaling: float
    prologue: Any
    attend: Any

    def __call__(self, positions: Tensor, hidden: Tensor, batch: Batch) -> Tensor:
        return forward.attention(self, positions, hidden, batch.caches[self.place])


@dataclass
class MLPBlock:
    """The dense layers' MLP, see `forward.MLPBlock`."""

    gate_up_proj: Any
    down_proj: Any
    activation: Any
    limit: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return forward.mlp(self, hidden)


@dataclass(frozen=True)
class Weight:
    """A projection that an operation multiplies with itself, as SGLang's linears hold it."""

    weight: Any


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert's weights and limit."""

    gate_up_proj: Weight
    down_proj: Weight
    limit: float | None


@dataclass
class MoEBlock:
    """Router, routed experts and shared expert of one layer on one rank, see `forward.MoEBlock`."""

    text: TextShape
    gate: Tensor
    router_bias: Tensor | None
    experts: RoutedExperts
    share_expert: SharedExpert
    limit: float | None
    route: Any
    run_experts: Any
    run_shared: Any

    def __call__(self, hidden: Tensor) -> Tensor:
        return forward.moe(self, hidden)

    def routed(
        self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared: Tensor
    ) -> Tensor:
        return forward.routed_experts(self, hidden, topk_weights, topk_ids, shared)


@dataclass
class DecoderLayer:
    """One decoder layer; `index` is its number in the whole model."""

    index: int
    input_layernorm: Any
    self_attn: AttentionBlock
    post_attention_layernorm: Any
    feed_forward: MLPBlock | MoEBlock

    def __call__(
        self, positions: Tensor, hidden: Tensor, residual: Tensor | None, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        return forward.decoder_layer(self, positions, hidden, residual, batch)


@dataclass
class StepModel:
    """Embedding, decoder layers, final norm and head of one rank."""

    text: TextShape
    embedding: Tensor
    layers: list[DecoderLayer]
    norm: Any
    head: Any

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Logits `[rows, vocabulary of the rank]` of one forward pass."""
        hidden = torch.nn.functional.embedding(batch.input_ids, self.embedding)
        hidden, _ = forward.decoder(self.layers, self.norm, batch.positions, hidden, batch)
        return self.head(hidden if batch.last is None else hidden[batch.last])[0]

    def moe_blocks(self) -> list[MoEBlock]:
        """The layers' blocks with routed experts, in order."""
        blocks = (layer.feed_forward for layer in self.layers)
        return [block for block in blocks if isinstance(block, MoEBlock)]


class BF16Linear:
    """A projection of PyTorch's, returning (output, None) as SGLang's linears do."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


class FP8Linear:
    """A projection by the operation `linear`, with the weight as its `prepare` returned it."""

    def __init__(self, weight: Any, run: Any) -> None:
        self.weight, self.run = weight, run

    def __call__(self, x: Tensor) -> tuple[Tensor, None]:
        return self.run(x, self.weight), None
