"""The second half of a layer: a dense MLP, or routed experts with a shared one."""

from __future__ import annotations

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.runtime_context import get_parallel
from torch import nn

from step37_ext.model.config import TextShape
from step37_ext.model.experts import ExpertShard, RoutedExperts
from step37_ext.model.load import Load, plain, whole
from step37_ext.model.operations import OperationTable


class Projections(nn.Module):
    """Gate, up and down of a gated MLP, cut over the ranks, and the activation's limit."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        limit: float | None,
        prefix: str,
        reduce_results: bool,
    ) -> None:
        super().__init__()
        self.limit = limit
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [intermediate_size] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            bias=False,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )

    def loaders(self) -> dict[str, Load]:
        """What to do with each checkpoint tensor, by its name after the MLP's."""
        gate_up = self.gate_up_proj.weight
        return {
            "gate_proj.weight": lambda t: gate_up.weight_loader(gate_up, t, 0),
            "up_proj.weight": lambda t: gate_up.weight_loader(gate_up, t, 1),
            "down_proj.weight": whole(self.down_proj.weight),
        }


class MLP(Projections):
    """The dense layers' feed-forward block: two GEMMs of SGLang's and the Step activation."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        limit: float | None,
        layer: int,
        operations: OperationTable,
        prefix: str,
    ) -> None:
        super().__init__(hidden_size, intermediate_size, limit, prefix, reduce_results=True)
        self.activation = operations.choose("activation", layer, "bf16")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, hidden]` to `[T, hidden]`, summed over ranks."""
        gate_up, _ = self.gate_up_proj(hidden)
        return self.down_proj(self.activation(gate_up, self.limit))[0]


class MoE(nn.Module):
    """Router, routed experts and the shared expert of one layer on one rank."""

    def __init__(
        self,
        text: TextShape,
        layer: int,
        weights: str,
        operations: OperationTable,
        prefix: str,
    ) -> None:
        super().__init__()
        parallel = get_parallel()
        self.text, self.limit = text, text.layers[layer].routed_limit
        self.reduce = parallel.tp_size > 1
        # Replaced at load by a parameter of the type the checkpoint stores.
        self.gate = nn.Parameter(
            torch.zeros(text.num_experts, text.hidden_size), requires_grad=False
        )
        self.router_bias = (
            nn.Parameter(torch.zeros(text.num_experts, dtype=torch.float32), requires_grad=False)
            if text.has_router_bias
            else None
        )
        self.experts = RoutedExperts(
            text,
            ExpertShard.of_rank(
                text,
                parallel.moe_ep_rank,
                parallel.moe_ep_size,
                parallel.moe_tp_rank,
                parallel.moe_tp_size,
            ),
            weights,
            torch.get_default_dtype(),
        )
        self.share_expert = Projections(
            text.hidden_size,
            text.shared_intermediate,
            text.layers[layer].shared_limit,
            f"{prefix}.share_expert",
            reduce_results=False,
        )
        self.route = operations.choose("route", layer, "bf16")
        self.run_experts = operations.choose("experts", layer, weights)
        self.run_shared = operations.choose("shared_expert", layer, "bf16")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, hidden]` to routed plus shared output `[T, hidden]`, summed over ranks."""
        topk_weights, topk_ids = self.route(
            hidden,
            self.gate,
            self.router_bias,
            self.text.top_k,
            self.text.router_scaling,
            self.text.router_renormalize,
        )
        shared = self.run_shared(
            hidden,
            self.share_expert.gate_up_proj.weight,
            self.share_expert.down_proj.weight,
            self.share_expert.limit,
        )
        output = self.run_experts(
            hidden,
            self.experts.weights,
            topk_weights,
            topk_ids,
            self.limit,
            self.experts.shard.first_expert,
            shared=shared,
        )
        return tensor_model_parallel_all_reduce(output) if self.reduce else output

    def loaders(self) -> dict[str, Load]:
        """What to do with each checkpoint tensor, by its name after the layer's."""
        loads: dict[str, Load] = {"moe.gate.weight": self._load_gate}
        if self.router_bias is not None:
            loads["moe.router_bias"] = plain(self.router_bias)
        for name, load in self.experts.loaders().items():
            loads[f"moe.{name}"] = load
        for name, load in self.share_expert.loaders().items():
            loads[f"share_expert.{name}"] = load
        return loads

    def prepare(self) -> None:
        """Bring the routed experts' weights into the form that their kernels read."""
        self.experts.prepare(self.run_experts.prepare)

    def _load_gate(self, tensor: torch.Tensor) -> None:
        self.gate = nn.Parameter(tensor.to(self.gate.device, copy=True), requires_grad=False)
