"""Largest activations over a set of dialogues, for the static scales of an NVFP4 checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.models.step3p7.modeling_step3p7 import (
    Step3p7Experts,
    Step3p7ForConditionalGeneration,
)

from step37_ext.checkpoint.oracle import Example, hidden_states
from step37_ext.checkpoint.release_layout import Calibration, filled
from step37_ext.checkpoint.spec import TinySpec


class _AmaxCache(DynamicCache):
    """A KV cache that notes the largest key and value that each layer stores."""

    def __init__(self, config: PreTrainedConfig, k: Tensor, v: Tensor) -> None:
        super().__init__(config=config)
        self.k, self.v = k, v

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        for amax, states in ((self.k, key_states), (self.v, value_states)):
            amax[layer_idx] = torch.maximum(amax[layer_idx], states.abs().max())
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def routed_activations(
    experts: Step3p7Experts, hidden: Tensor, expert: int
) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate), up (both before the clamp) and their clamped product, [tokens, intermediate].

    The clamp as in the model: silu(gate) at most the limit, up between plus and minus the limit.
    """
    gate, up = F.linear(hidden, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    gate = F.silu(gate)
    product = gate.clamp(max=experts.limit) * up.clamp(-experts.limit, experts.limit)
    return gate, up, product


@torch.no_grad()
def calibrate(
    spec: TinySpec, model: Step3p7ForConditionalGeneration, examples: list[Example]
) -> Calibration:
    """Run `examples` through `model` and note the largest magnitudes."""
    k, v = torch.zeros(spec.layers), torch.zeros(spec.layers)
    inputs = torch.zeros(len(spec.moe_layers), spec.experts)
    products = torch.zeros_like(inputs)

    def note(row: int) -> Any:
        def hook(experts: Step3p7Experts, args: tuple[Tensor, Tensor, Tensor], _: Tensor) -> None:
            hidden, indices, _weights = args
            for expert in indices.unique().tolist():
                routed = hidden[(indices == expert).any(-1)]
                product = routed_activations(experts, routed, expert)[2]
                inputs[row, expert] = torch.maximum(inputs[row, expert], routed.abs().max())
                products[row, expert] = torch.maximum(products[row, expert], product.abs().max())

        return hook

    text = model.model.language_model
    with ExitStack() as hooks:
        for row, layer in enumerate(spec.moe_layers):
            hooks.enter_context(text.layers[layer].mlp.experts.register_forward_hook(note(row)))
        for example in examples:
            hidden_states(
                model,
                torch.tensor([example.tokens]),
                example.features,
                past_key_values=_AmaxCache(text.config, k, v),
            )
    return Calibration(k, v, filled(inputs), filled(products))
