"""The routed experts of one rank: parameters in the checkpoint's own format, loaded as shards.

A rank holds `num_experts / ep_size` whole experts and `moe_intermediate / moe_tp_size` of each
one's intermediate dimension. Values are the checkpoint's, unpadded and not requantised: an FP8
shard keeps the block scales it touches and the place in its first block where it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from step37_ext.model.config import TextShape
from step37_ext.model.load import Load
from step37_ext.model.tensors import FP8_BLOCK, NVFP4_GROUP
from step37_kernels.expert_weights import BF16Experts, ExpertWeights, FP8Experts, NVFP4Experts


@dataclass(frozen=True)
class ExpertShard:
    """Which experts, and which part of their intermediate dimension, a rank holds."""

    first_expert: int
    num_experts: int
    first_row: int
    num_rows: int

    @classmethod
    def of_rank(
        cls, text: TextShape, ep_rank: int, ep_size: int, tp_rank: int, tp_size: int
    ) -> ExpertShard:
        experts, rows = text.num_experts // ep_size, text.moe_intermediate // tp_size
        return cls(ep_rank * experts, experts, tp_rank * rows, rows)

    @property
    def experts(self) -> slice:
        return slice(self.first_expert, self.first_expert + self.num_experts)

    def rows(self, unit: int = 1) -> slice:
        """The part of the intermediate dimension, in units that cover `unit` elements each."""
        end = self.first_row + self.num_rows
        return slice(self.first_row // unit, -(-end // unit))


class RoutedExperts(nn.Module):
    """Parameters of the routed experts and what loads each checkpoint tensor into them."""

    w13: nn.Parameter
    w13_scale: nn.Parameter
    w13_global_scale: nn.Parameter
    w2: nn.Parameter
    w2_scale: nn.Parameter
    w2_global_scale: nn.Parameter

    def __init__(
        self, text: TextShape, shard: ExpertShard, weights: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shard, self.format = shard, weights
        experts, hidden, rows = shard.num_experts, text.hidden_size, shard.num_rows
        if weights == "bf16":
            self._new("w13", (experts, 2 * rows, hidden), dtype)
            self._new("w2", (experts, hidden, rows), dtype)
        elif weights == "fp8":
            blocks = shard.rows(FP8_BLOCK)
            row_blocks, hidden_blocks = blocks.stop - blocks.start, -(-hidden // FP8_BLOCK)
            self._new("w13", (experts, 2 * rows, hidden), torch.float8_e4m3fn)
            self._new("w13_scale", (experts, 2, row_blocks, hidden_blocks), torch.float32)
            self._new("w2", (experts, hidden, rows), torch.float8_e4m3fn)
            self._new("w2_scale", (experts, hidden_blocks, row_blocks), torch.float32)
        else:
            self._new("w13", (experts, 2 * rows, hidden // 2), torch.uint8)
            self._new("w13_scale", (experts, 2 * rows, hidden // NVFP4_GROUP), torch.float8_e4m3fn)
            self._new("w13_global_scale", (experts, 2), torch.float32)
            self._new("w2", (experts, hidden, rows // 2), torch.uint8)
            self._new("w2_scale", (experts, hidden, rows // NVFP4_GROUP), torch.float8_e4m3fn)
            self._new("w2_global_scale", (experts,), torch.float32)
        self.weights: Any = self._bind()
        self.prepared = False

    def prepare(self, prepare: Callable[[ExpertWeights], Any]) -> None:
        """Replace the weights by what `prepare` makes of them; the checkpoint's form is dropped.

        One layer is held twice while this runs. The model cannot be loaded into again after it,
        unless `prepare` keeps the weights as they are.
        """
        weights = prepare(self._bind())
        if type(weights) is not type(self.weights):
            for name in list(self._parameters):
                self.register_parameter(name, None)
            self.prepared = True
        self.weights = weights

    def _new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), False))

    def _bind(self) -> ExpertWeights:
        """The parameters as the object that the operations take (the same memory)."""
        if self.format == "bf16":
            return BF16Experts(self.w13.data, self.w2.data)
        if self.format == "fp8":
            return FP8Experts(
                self.w13.data,
                self.w13_scale.data,
                self.w2.data,
                self.w2_scale.data,
                intermediate_offset=self.shard.first_row % FP8_BLOCK,
            )
        return NVFP4Experts(
            self.w13.data,
            self.w13_scale.data,
            self.w13_global_scale.data,
            self.w2.data,
            self.w2_scale.data,
            self.w2_global_scale.data,
        )

    def loaders(self) -> dict[str, Load]:
        """What to do with each checkpoint tensor, by its name after `moe.`.

        Raises:
            ValueError: the weights are in their kernels' form already.
        """
        if self.prepared:
            raise ValueError(
                "the experts' weights were laid out for their kernels when the model was loaded, "
                "so it cannot take new weights; start the server again"
            )
        loads: dict[str, Load] = {}
        for half, name in enumerate(("gate_proj", "up_proj")):
            loads |= self._gate_or_up(name, half)
        return loads | self._down()

    def _gate_or_up(self, name: str, half: int) -> dict[str, Load]:
        experts, n = self.shard.experts, self.shard.num_rows
        here = slice(half * n, (half + 1) * n)
        rows = self.shard.rows()
        loads: dict[str, Load] = {
            f"{name}.weight": lambda t: _copy(self.w13[:, here], t[experts, rows])
        }
        if self.format == "fp8":
            blocks = self.shard.rows(FP8_BLOCK)
            loads[f"{name}.weight_scale_inv"] = lambda t: _copy(
                self.w13_scale[:, half], t[experts, blocks]
            )
        elif self.format == "nvfp4":
            loads[f"{name}.weight_scale"] = lambda t: _copy(
                self.w13_scale[:, here], t[experts, rows]
            )
            loads[f"{name}.weight_scale_2"] = lambda t: _copy(
                self.w13_global_scale[:, half], t[experts]
            )
        return loads

    def _down(self) -> dict[str, Load]:
        experts, shard = self.shard.experts, self.shard
        unit = 2 if self.format == "nvfp4" else 1
        loads: dict[str, Load] = {
            "down_proj.weight": lambda t: _copy(self.w2, t[experts, :, shard.rows(unit)])
        }
        if self.format == "fp8":
            loads["down_proj.weight_scale_inv"] = lambda t: _copy(
                self.w2_scale, t[experts, :, shard.rows(FP8_BLOCK)]
            )
        elif self.format == "nvfp4":
            loads["down_proj.weight_scale"] = lambda t: _copy(
                self.w2_scale, t[experts, :, shard.rows(NVFP4_GROUP)]
            )
            loads["down_proj.weight_scale_2"] = lambda t: _copy(self.w2_global_scale, t[experts])
        return loads


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)
