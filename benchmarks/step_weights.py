"""A model of random weights, made on the device in the formats' own layouts, layer by layer.

No layer's experts are ever there in BF16, and a layer comes out the same whenever it is made, so
that the reference makes its own in fp32 and nothing is held twice.

Values stay sane through any number of layers: a projection of K columns has weights of standard
deviation K^-1/2, so that a normed input of rms 1 leaves it with rms 1 and every block adds less
than 1 to a residual that begins with 1. After l layers that is sqrt(l), which the norms divide by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_data import fill_experts
from benchmarks.step_model import (
    AttentionBlock,
    BF16Linear,
    DecoderLayer,
    FP8Linear,
    MLPBlock,
    MoEBlock,
    SharedExpert,
    StepModel,
    Weight,
)
from benchmarks.step_norm import Norm
from step37_ext.deploy.roofline import heads_of
from step37_ext.model.config import AttentionShape, TextShape
from step37_ext.model.experts import ExpertShard, RoutedExperts
from step37_kernels.dispatch import Implementation
from step37_kernels.formats.fp8_block import quantize_rows
from step37_kernels.reference.activation import swiglu_step
from step37_kernels.reference.attention import attend, prologue_into_cache
from step37_kernels.reference.experts import experts
from step37_kernels.reference.linear import linear
from step37_kernels.reference.norm import gemma_rms_norm
from step37_kernels.reference.rotary import cos_sin_cache
from step37_kernels.reference.route import route
from step37_kernels.reference.shared_expert import shared_expert

SCORE_STD = 3.0
"""Of the attention's scores: with 8k keys about one then counts, as in attention that finds
something. With 1 all would, and their mean would be next to nothing beside the residual."""

Choose = Callable[[str, int, str], Implementation]
"""(operation, layer, format of its weights) to what runs it."""


@dataclass(frozen=True)
class Spec:
    """Which model.

    Attributes:
        text: the whole model.
        chosen: its layers that are run, by number.
        ranks: of tensor parallelism; rank 1 is made, or the only one.
        weights: format of the routed experts, "bf16", "fp8" or "nvfp4".
        dense: of the attention's and dense MLPs' projections and the shared experts, "bf16" or
            "fp8", made at load as STEP37_DENSE_WEIGHTS has a server do.
    """

    text: TextShape
    chosen: tuple[int, ...]
    ranks: int
    weights: str
    dense: str
    device: torch.device

    @property
    def part(self) -> TextShape:
        """The text model of the chosen layers alone."""
        return replace(self.text, layers=tuple(self.text.layers[n] for n in self.chosen))

    @property
    def vocabulary(self) -> int:
        """Tokens that the rank has embeddings and logits of."""
        return self.text.vocab_size // self.ranks

    @property
    def shard(self) -> ExpertShard:
        """The rank's slice of every expert."""
        return ExpertShard.of_rank(self.text, 0, 1, min(1, self.ranks - 1), self.ranks)


_REFERENCE: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "route": route,
    "experts": experts,
    "shared_expert": shared_expert,
    "activation": swiglu_step,
    "prologue": prologue_into_cache,
    "attend": attend,
}


def reference(operation: str, layer: int, weights: str) -> Implementation:
    """The reference implementation, whatever the machine (a `Choose`)."""
    return Implementation("reference", operation, "", _REFERENCE[operation], lambda given: given)


class ReferenceNorm:
    """`step_norm.Norm` by the reference: in fp32, nothing in place."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return gemma_rms_norm(x, self.weight, self.eps)
        return gemma_rms_norm(x + residual, self.weight, self.eps), x + residual


class Maker:
    """Makes the model's parts.

    Args:
        choose: what runs each operation.
        exact: fp32 weights and norms, experts as the checkpoint has them: for `reference`.
    """

    def __init__(self, spec: Spec, choose: Choose, exact: bool = False) -> None:
        self.spec, self.choose, self.exact = spec, choose, exact
        self.norm = ReferenceNorm if exact else Norm
        self.rotary: dict[str, Tensor] = {}

    def model(self) -> StepModel:
        """All chosen layers, embedding and head."""
        spec = self.spec
        return StepModel(
            spec.part,
            _Draw(spec.device, 0).normal(spec.vocabulary, spec.text.hidden_size, 1.0),
            [self.layer(place) for place in range(len(spec.chosen))],
            self._norm(),
            self.head(),
        )

    def head(self) -> BF16Linear:
        """The projection to the rank's part of the vocabulary; BF16 in any case, as in a server."""
        draw = _Draw(self.spec.device, len(self.spec.text.layers) + 1)
        return BF16Linear(self._cast(draw.normal(self.spec.vocabulary, self.spec.text.hidden_size)))

    def layer(self, place: int) -> DecoderLayer:
        """The chosen layer number `place`."""
        index = self.spec.chosen[place]
        draw = _Draw(self.spec.device, index + 1)
        is_moe = self.spec.text.layers[index].is_moe
        return DecoderLayer(
            index,
            self._norm(),
            self._attention(draw, place, index),
            self._norm(),
            self._moe(draw, index) if is_moe else self._mlp(draw, index),
        )

    def _norm(self) -> Any:
        dtype = torch.float32 if self.exact else torch.bfloat16
        weight = torch.zeros(self.spec.text.hidden_size, dtype=dtype, device=self.spec.device)
        return self.norm(weight, self.spec.text.rms_norm_eps)

    def _attention(self, draw: _Draw, place: int, index: int) -> AttentionBlock:
        text, shape = self.spec.text, self.spec.text.layers[index].attention
        of, size, dim = heads_of(shape, self.spec.ranks), text.hidden_size, shape.head_dim
        # A product of two normed heads has variance D, times the scaling D^-1/2 squared.
        norm = torch.full((dim,), SCORE_STD**0.5 - 1, device=self.spec.device).bfloat16()
        return AttentionBlock(
            place,
            self._linear(draw, index, of.qkv_width, size),
            self._linear(draw, index, size, of.query * dim),
            BF16Linear(self._cast(draw.normal(of.query, size))) if text.has_head_gate else None,
            norm,
            norm,
            self._rotary(shape),
            of.query,
            of.kv,
            text.rms_norm_eps,
            dim**-0.5,
            self.choose("prologue", index, "-"),
            self.choose("attend", index, "-"),
        )

    def _rotary(self, shape: AttentionShape) -> Tensor:
        if shape.kind not in self.rotary:
            table = cos_sin_cache(
                shape.rotary_dim, shape.rope_theta, self.spec.text.max_position, shape.rope_scaling
            )
            self.rotary[shape.kind] = table.to(self.spec.device)
        return self.rotary[shape.kind]

    def _mlp(self, draw: _Draw, index: int) -> MLPBlock:
        text = self.spec.text
        columns = text.dense_intermediate // self.spec.ranks
        return MLPBlock(
            self._linear(draw, index, 2 * columns, text.hidden_size),
            self._linear(draw, index, text.hidden_size, columns),
            self.choose("activation", index, "bf16"),
            text.layers[index].shared_limit,
        )

    def _moe(self, draw: _Draw, index: int) -> MoEBlock:
        text, spec = self.spec.text, self.spec
        run_experts = self.choose("experts", index, spec.weights)
        run_shared = self.choose("shared_expert", index, spec.dense)
        gate = draw.normal(text.num_experts, text.hidden_size)
        bias = torch.zeros(text.num_experts, device=spec.device) if text.has_router_bias else None
        with spec.device:
            routed = RoutedExperts(text, spec.shard, spec.weights, torch.bfloat16)
        fill_experts(routed.weights, draw.generator)
        if not self.exact:
            routed.prepare(run_experts.prepare)
        columns = text.shared_intermediate // spec.ranks
        return MoEBlock(
            text,
            gate,
            bias,
            routed,
            SharedExpert(
                self._shared(draw, run_shared, 2 * columns, text.hidden_size),
                self._shared(draw, run_shared, text.hidden_size, columns),
                text.layers[index].shared_limit,
            ),
            text.layers[index].routed_limit,
            self.choose("route", index, "bf16"),
            run_experts,
            run_shared,
        )

    def _linear(self, draw: _Draw, index: int, rows: int, columns: int) -> BF16Linear | FP8Linear:
        weight = draw.normal(rows, columns)
        if self.spec.dense == "bf16":
            return BF16Linear(self._cast(weight))
        run = self.choose("linear", index, self.spec.dense)
        return FP8Linear(run.prepare(quantize_rows(weight)), run)

    def _shared(self, draw: _Draw, run: Implementation, rows: int, columns: int) -> Weight:
        weight = draw.normal(rows, columns)
        if self.spec.dense == "bf16":
            return Weight(self._cast(weight))
        return Weight(run.prepare(quantize_rows(weight)))

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.float() if self.exact else weight


class _Draw:
    """One layer's random numbers."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, rows: int, columns: int, std: float | None = None) -> Tensor:
        """bf16 [rows, columns] of standard deviation columns^-1/2, or `std`."""
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=self.device)
        return out.normal_(std=columns**-0.5 if std is None else std, generator=self.generator)
