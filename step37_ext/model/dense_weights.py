"""The weights beside the routed experts in FP8: opted in, made from BF16 after loading.

They are those of the attention's and dense layers' projections and of the shared expert. Router,
head gate, embedding, output head, MTP layers and vision encoder stay as they are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from torch import nn

from step37_ext.model.dense_format import DENSE_VARIABLE
from step37_kernels.dispatch import Implementation
from step37_kernels.formats.fp8_block import quantize_rows


class FP8Projection(LinearMethodBase):
    """SGLang's seam for how a linear layer multiplies: by the operation "linear"."""

    def __init__(self, operation: Implementation) -> None:
        self.operation = operation

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x `[T, in]` to `[T, out]`; these layers have no bias."""
        return self.operation(x, layer.weight)


def quantize_projection(projection: LinearBase, operation: Implementation) -> None:
    """Replace a loaded linear layer's weight by FP8, and its GEMM by `operation`."""
    quantize_weight(projection, operation)
    projection.quant_method = FP8Projection(operation)


def quantize_weight(projection: LinearBase, operation: Implementation) -> None:
    """Replace a loaded weight `[out, in]` of this rank by what `operation` takes for it.

    The BF16 weight is dropped, and `projection` cannot be called by itself any more.
    """
    weight = projection.weight.data
    del projection.weight  # a parameter, whose name the next line takes
    projection.weight = operation.prepare(quantize_rows(weight))
    projection.quant_method = None


def loadable(projection: LinearBase) -> Any:
    """The parameter that a checkpoint is loaded into.

    Raises:
        ValueError: it has been made FP8 already.
    """
    if not isinstance(projection.weight, nn.Parameter):
        raise ValueError(
            "the weights beside the experts were made FP8 when the model was loaded "
            f"({DENSE_VARIABLE}), so it cannot take new weights; start the server again"
        )
    return projection.weight
