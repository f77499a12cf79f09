"""Seeded initial weights under the release's names; what training starts from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from step37_ext.checkpoint.release_layout import tensor_shapes
from step37_ext.checkpoint.spec import TinySpec


def initial_weights(spec: TinySpec, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of `tensor_shapes(spec)`, fp32 with values that BF16 holds exactly.

    Matrices are normal with the fan-in's standard deviation. No norm or bias is at its neutral
    value, so that a loader that misses one is seen. The up projections of the experts are scaled,
    each differently, so that their NVFP4 global scales differ from the gates' by large factors.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _draw(name, shape, generator).bfloat16().float()
        for name, shape in tensor_shapes(spec).items()
    }


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.startswith("vision_model."):
        return _vision(name, noise)
    if name.endswith("norm.weight"):
        return 0.05 * noise  # zero-centred: a norm multiplies by 1 + weight
    if name.endswith("router_bias"):
        return 0.1 * noise
    if name == "model.embed_tokens.weight":
        return 0.5 * noise
    scaled = noise / math.sqrt(shape[-1])
    if name.endswith("moe.up_proj.weight"):
        factors = torch.linspace(1.5, 3.5, shape[0])
        return scaled * factors[:, None, None]
    # The router's factor of 3 and the larger up projections would drown what attention brings.
    if name.endswith("moe.down_proj.weight"):
        return 0.3 * scaled
    if name.endswith("share_expert.down_proj.weight"):
        return 0.5 * scaled
    return scaled


def _vision(name: str, noise: Tensor) -> Tensor:
    if name.endswith("gamma"):
        return 0.1 + 0.02 * noise
    if name.endswith(("ln_pre.weight", "ln_1.weight", "ln_2.weight")):
        return 1 + 0.05 * noise
    if noise.ndim == 1:
        return 0.05 * noise
    if name.endswith("positional_embedding"):
        return 0.05 * noise
    # A patch is 588 normalised pixels that vary together, hence more than the fan-in would ask.
    return noise / math.sqrt(noise[0].numel())
