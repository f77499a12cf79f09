"""The released model's sizes under the names that the benchmarks use."""

from __future__ import annotations

from step37_ext.deploy.memory import release

TEXT = release().text
HIDDEN = TEXT.hidden_size
EXPERTS = TEXT.num_experts
TOP_K = TEXT.top_k
INTERMEDIATE = TEXT.moe_intermediate  # of a routed expert, and of the shared one
ROUTER_SCALING = TEXT.router_scaling
RMS_NORM_EPS = TEXT.rms_norm_eps

ATTENTION = {
    "full": next(x.attention for x in TEXT.layers if x.attention.window is None),
    "sliding": next(x.attention for x in TEXT.layers if x.attention.window is not None),
}
"""The model's two kinds of attention, before tensor parallelism."""

HEAD_DIM = ATTENTION["full"].head_dim
