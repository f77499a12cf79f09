"""Step-3.7's router: sigmoid scores, a bias that only selects, top-k, renormalised and scaled."""

import torch
from torch import Tensor

from step37_kernels.checks import require


def route(
    hidden: Tensor,
    gate_weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    scaling_factor: float,
    renormalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Pick the top-k experts of every token and their weights.

    score = sigmoid(hidden @ gate_weight.T), products and sums in fp32 whatever the dtypes; experts
    are chosen by score + bias, of equals the one with the lower id; weights come from score alone.

    Args:
        hidden: [T, K], floating point.
        gate_weight: [E, K], bf16 or fp32.
        bias: fp32 [E] or None.
        top_k: experts per token, 1 to E.
        scaling_factor: multiplies the weights (moe_router_scaling_factor).
        renormalize: make a token's weights add up to 1 before scaling.

    Returns:
        weights fp32 [T, top_k] and ids int32 [T, top_k], best first.

    Raises:
        ValueError: a shape or dtype does not fit, or top_k is out of range.
    """
    require("hidden", hidden, (None, None))
    require("gate_weight", gate_weight, (None, hidden.shape[1]), (torch.bfloat16, torch.float32))
    num_experts = gate_weight.shape[0]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to the number of experts {num_experts}")
    score = torch.sigmoid(hidden.float() @ gate_weight.float().T)
    choice = score
    if bias is not None:
        require("bias", bias, (num_experts,), (torch.float32,))
        choice = score + bias
    # A stable sort, not topk: topk leaves open which of two equal experts it takes.
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = score.gather(1, ids)
    if renormalize:
        # Scores can all underflow to zero; then the weights are zero instead of NaN.
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return weights * scaling_factor, ids.int()
