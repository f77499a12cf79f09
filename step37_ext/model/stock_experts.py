"""SGLang's own expert layer, for a user who chose one of SGLang's MoE runners.

The router and the shared expert stay this package's; only the routed experts' GEMMs are handed
over, so `--moe-runner-backend` means what it means for any other model.
"""

from __future__ import annotations

import logging

import torch
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import RoutingMethodType
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from torch import nn

from step37_ext.model.config import TextShape
from step37_ext.model.load import Load
from step37_ext.server_facts import moe_runner

logger = logging.getLogger(__name__)

WITHOUT_LIMIT = {
    "bf16": ("deep_gemm", "flashinfer_trtllm", "flashinfer_trtllm_routed"),
    "fp8": ("deep_gemm", "cutlass"),
    "nvfp4": ("marlin", "flashinfer_cutedsl"),
}
"""Runners that SGLang 0.5.23 does not give the activation limit, by format (docs/stock.md)."""

_SUFFIXES = {  # of the checkpoint's tensors, and of FusedMoE's parameters
    "bf16": {"weight": "weight"},
    "fp8": {"weight": "weight", "weight_scale_inv": "weight_scale_inv"},
    "nvfp4": {
        "weight": "weight",
        "weight_scale": "weight_scale",
        "weight_scale_2": "weight_scale_2",
        "input_scale": "input_scale",
    },
}


class StockExperts(nn.Module):
    """The routed experts of one rank as SGLang's `FusedMoE`.

    Args:
        quant_config: SGLang's own for the checkpoint; None for BF16.
    """

    def __init__(
        self,
        text: TextShape,
        layer: int,
        weights: str,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.format, self.runner = weights, moe_runner()
        limit = text.layers[layer].routed_limit
        self.fused = get_moe_impl_class(quant_config)(
            num_experts=text.num_experts,
            top_k=text.top_k,
            layer_id=layer,
            hidden_size=text.hidden_size,
            intermediate_size=text.moe_intermediate,
            quant_config=quant_config,
            prefix=prefix,
            routing_method_type=RoutingMethodType.Renormalize,
            gemm1_clamp_limit=limit,
        )
        if limit is not None and self.loses_the_limit():
            logger.warning(
                "step37: layer %d clamps its experts' activation at %g, and SGLang's MoE runner "
                "%s does not; answers will differ from the released model's",
                layer,
                limit,
                self.runner,
            )

    def loses_the_limit(self) -> bool:
        """Whether this SGLang runner is known to leave the activation limit out."""
        on_cpu = torch.get_default_device().type == "cpu"  # its native path has no limit either
        return on_cpu or self.runner in WITHOUT_LIMIT[self.format]

    def forward(
        self, hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """Hidden `[T, hidden]` to the routed sum `[T, hidden]`, not yet summed over ranks."""
        no_logits = hidden.new_empty(hidden.shape[0], 0)  # routing is done: ids and weights
        return self.fused(hidden, StandardTopKOutput(topk_weights, topk_ids, no_logits))

    def loaders(self) -> dict[str, Load]:
        """What to do with each checkpoint tensor, by its name after `moe.`."""
        loads: dict[str, Load] = {}
        for name, shard in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            for stored, suffix in _SUFFIXES[self.format].items():
                parameter = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
                loads[f"{name}.{stored}"] = self._load(parameter, shard)
        return loads

    def _load(self, name: str, shard: str) -> Load:
        def load(tensor: torch.Tensor) -> None:
            parameter = getattr(self.fused, name)
            for expert, one in enumerate(tensor):
                parameter.weight_loader(
                    parameter, one, f"experts.{name}", shard_id=shard, expert_id=expert
                )

        return load
