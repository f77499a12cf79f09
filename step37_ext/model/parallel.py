"""How the model divides over ranks, and which numbers of ranks it does not divide over."""

from __future__ import annotations

from dataclasses import dataclass

from step37_ext.model.config import TextShape
from step37_ext.model.tensors import NVFP4_GROUP


@dataclass(frozen=True)
class Parallel:
    """Ranks of tensor parallelism, and how many of them split the experts by whole experts."""

    tp_size: int = 1
    ep_size: int = 1


def check_parallel(text: TextShape, parallel: Parallel, weights: str) -> None:
    """Check that heads, experts and intermediate sizes divide over the ranks.

    Raises:
        ValueError: the first size that does not divide, by name, with its value.
    """
    tp, ep = parallel.tp_size, parallel.ep_size
    if tp % ep:
        raise ValueError(f"--ep-size {ep} does not divide --tp {tp}")
    for shape in {layer.attention.kind: layer.attention for layer in text.layers}.values():
        _divides(tp, shape.num_heads, f"the {shape.num_heads} query heads of {shape.kind}")
        kv = shape.num_kv_heads
        if kv % tp and tp % kv:
            raise ValueError(
                f"--tp {tp} neither divides nor is a multiple of the {kv} KV heads of {shape.kind}"
            )
    _divides(tp, text.dense_intermediate, f"intermediate_size {text.dense_intermediate}")
    _divides(tp, text.shared_intermediate, f"share_expert_dim {text.shared_intermediate}")
    if text.num_experts % ep:
        raise ValueError(f"--ep-size {ep} does not divide the {text.num_experts} experts")
    moe_tp, unit = tp // ep, NVFP4_GROUP if weights == "nvfp4" else 1
    if text.moe_intermediate % (moe_tp * unit):
        groups = f" in groups of {unit}" if unit > 1 else ""
        raise ValueError(
            f"--tp {tp} with --ep-size {ep} does not divide the experts' "
            f"moe_intermediate_size {text.moe_intermediate}{groups}"
        )


def check_vision_heads(tp: int, heads: int) -> None:
    """Check that the vision encoder's heads divide over the ranks.

    Raises:
        ValueError: they do not.
    """
    _divides(tp, heads, f"the vision encoder's {heads} heads")


def _divides(tp: int, size: int, what: str) -> None:
    if size % tp:
        raise ValueError(f"--tp {tp} does not divide {what}")
