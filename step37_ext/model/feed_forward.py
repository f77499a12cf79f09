"""The second half of a layer: a dense MLP, or routed experts with a shared one."""

from __future__ import annotations

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.runtime_context import get_parallel
from torch import nn

from step37_ext.model import forward
from step37_ext.model.config import TextShape
from step37_ext.model.dense_weights import loadable, quantize_projection, quantize_weight
from step37_ext.model.experts import ExpertShard, RoutedExperts
from step37_ext.model.load import Load, plain, whole
from step37_ext.model.operations import OperationTable
from step37_ext.model.stock_experts import StockExperts
from step37_ext.server_facts import MOE_RUNNER, moe_runner


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
        gate_up = loadable(self.gate_up_proj)
        return {
            "gate_proj.weight": lambda t: gate_up.weight_loader(gate_up, t, 0),
            "up_proj.weight": lambda t: gate_up.weight_loader(gate_up, t, 1),
            "down_proj.weight": whole(loadable(self.down_proj)),
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
        fp8 = operations.dense == "fp8"
        self.linear = operations.choose("linear", layer, "fp8") if fp8 else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, hidden]` to `[T, hidden]`, summed over ranks."""
        return forward.mlp(self, hidden)

    def prepare(self) -> None:
        """After loading: both projections in FP8, where that was opted in."""
        if self.linear is not None:
            quantize_projection(self.gate_up_proj, self.linear)
            quantize_projection(self.down_proj, self.linear)


class MoE(nn.Module):
    """Router, routed experts and the shared expert of one layer on one rank.

    With the MoE runner "step37" the routed experts are this package's operation, which adds the
    shared expert's parts where it sums; with another, they are SGLang's layer with that runner.

    Args:
        stock_quant: SGLang's own quantisation of the routed experts, for its runners.
    """

    def __init__(
        self,
        text: TextShape,
        layer: int,
        weights: str,
        stock_quant: QuantizationConfig | None,
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
        self.experts: RoutedExperts | StockExperts
        if (runner := moe_runner()) == MOE_RUNNER:
            shard = ExpertShard.of_rank(
                text,
                parallel.moe_ep_rank,
                parallel.moe_ep_size,
                parallel.moe_tp_rank,
                parallel.moe_tp_size,
            )
            self.experts = RoutedExperts(text, shard, weights, torch.get_default_dtype())
            self.run_experts = operations.choose("experts", layer, weights)
        else:
            self.experts = StockExperts(text, layer, weights, stock_quant, f"{prefix}.moe.experts")
            operations.note("experts", layer, weights, f"runner {runner}", "--moe-runner-backend")
        self.share_expert = Projections(
            text.hidden_size,
            text.shared_intermediate,
            text.layers[layer].shared_limit,
            f"{prefix}.share_expert",
            reduce_results=False,
        )
        self.route = operations.choose("route", layer, "bf16")
        self.run_shared = operations.choose("shared_expert", layer, operations.dense)
        self.fp8_shared = operations.dense == "fp8"

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, hidden]` to routed plus shared output `[T, hidden]`, summed over ranks."""
        output = forward.moe(self, hidden)
        return tensor_model_parallel_all_reduce(output) if self.reduce else output

    def routed(
        self,
        hidden: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared: torch.Tensor,
    ) -> torch.Tensor:
        """This rank's routed experts and the shared expert's parts `[S, T, hidden]` in one sum."""
        if isinstance(self.experts, StockExperts):
            routed = self.experts(hidden, topk_weights, topk_ids)
            return (routed + shared.sum(0)).to(hidden.dtype)
        return forward.routed_experts(self, hidden, topk_weights, topk_ids, shared)

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
        """After loading: bring the experts' weights into the form that their kernels read."""
        if self.fp8_shared:
            quantize_weight(self.share_expert.gate_up_proj, self.run_shared)
            quantize_weight(self.share_expert.down_proj, self.run_shared)
        if isinstance(self.experts, RoutedExperts):  # SGLang prepares its own
            self.experts.prepare(self.run_experts.prepare)

    def _load_gate(self, tensor: torch.Tensor) -> None:
        self.gate = nn.Parameter(tensor.to(self.gate.device, copy=True), requires_grad=False)
