"""The model's sizes that the benchmarks use: the one place.

Source: the text config of the released stepfun-ai/Step-3.7-Flash (equal to Step-3.5-Flash's), as
the tests of step37_ext/model/config.py have it.
"""

from __future__ import annotations

from dataclasses import dataclass

HIDDEN = 4096
EXPERTS = 288
TOP_K = 8
INTERMEDIATE = 1280  # of a routed expert, and of the shared one
ROUTER_SCALING = 3.0
HEAD_DIM = 128
RMS_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Attention:
    """One of the model's two kinds of attention, before tensor parallelism."""

    name: str
    query_heads: int
    kv_heads: int
    rotary_dim: int
    rope_theta: float
    window: int | None

    def visible(self, context: int) -> int:
        """Keys that a query at the end of `context` keys sees."""
        return context if self.window is None else min(context, self.window)


FULL = Attention("full", 64, 8, 64, 5e6, None)
SLIDING = Attention("sliding", 96, 8, 128, 1e4, 512)
ATTENTION = {kind.name: kind for kind in (FULL, SLIDING)}
