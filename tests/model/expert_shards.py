"""One small expert layer in the checkpoint's tensors, and any rank's part of it."""

from __future__ import annotations

import functools

import torch

from step37_ext.model.config import AttentionShape, LayerShape, TextShape
from step37_ext.model.experts import ExpertShard, RoutedExperts
from step37_kernels.formats import fp8_block, nvfp4

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, LIMIT = 4, 256, 384, 2, 0.5
PROJECTIONS = {
    "gate_proj": (EXPERTS, INTERMEDIATE, HIDDEN),
    "up_proj": (EXPERTS, INTERMEDIATE, HIDDEN),
    "down_proj": (EXPERTS, HIDDEN, INTERMEDIATE),
}


def shape(intermediate: int = INTERMEDIATE) -> TextShape:
    attention = AttentionShape(4, 2, 64, 64, 1e4, None, None)
    return TextShape(
        hidden_size=HIDDEN,
        vocab_size=128,
        rms_norm_eps=1e-5,
        max_position=128,
        dense_intermediate=512,
        num_experts=EXPERTS,
        top_k=TOP_K,
        moe_intermediate=intermediate,
        shared_intermediate=128,
        router_scaling=3.0,
        router_renormalize=True,
        has_router_bias=True,
        has_head_gate=True,
        num_mtp_layers=0,
        layers=(LayerShape(attention, True, LIMIT, None),),
    )


@functools.cache
def checkpoint(weight_format: str) -> dict[str, torch.Tensor]:
    """Tensors of one layer's routed experts under the release's names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in PROJECTIONS.items():
        weight = torch.randn(size, generator=generator) / size[-1] ** 0.5
        if weight_format == "bf16":
            tensors[f"{name}.weight"] = weight.bfloat16()
        elif weight_format == "fp8":
            blocks = fp8_block.quantize(weight)
            tensors[f"{name}.weight"] = blocks.data
            tensors[f"{name}.weight_scale_inv"] = blocks.scale_inv
        else:
            groups = nvfp4.quantize(weight)
            tensors[f"{name}.weight"] = groups.packed
            tensors[f"{name}.weight_scale"] = groups.block_scale
            tensors[f"{name}.weight_scale_2"] = groups.global_scale
    return tensors


def rank_experts(
    weight_format: str, ep_rank: int = 0, ep_size: int = 1, tp_rank: int = 0, tp_size: int = 1
) -> RoutedExperts:
    """The experts of one rank, loaded from `checkpoint`."""
    text = shape()
    shard = ExpertShard.of_rank(text, ep_rank, ep_size, tp_rank, tp_size)
    module = RoutedExperts(text, shard, weight_format, torch.bfloat16)
    for name, load in module.loaders().items():
        load(checkpoint(weight_format)[name])
    return module
