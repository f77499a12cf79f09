"""Tokens per second that a plan may be expected to give: an estimate from the performance model."""

from __future__ import annotations

from dataclasses import dataclass

from step37_ext.deploy.memory import release
from step37_ext.deploy.plans import Plan
from step37_ext.deploy.roofline import Formats, decode_step, drafted_step

REACHED = (0.5, 0.7)
"""Assumed share of the floor that the kernels of a step reach. Published decode kernels for these
GPUs reach 54% to 84% of a data sheet's bandwidth (trtllm-gen, DeepGEMM, FlashInfer, FA3)."""

LAUNCH_US = (2.0, 1.0)
"""Assumed latency of one kernel in a CUDA graph, from the end of the one before to its own loads;
not measured."""

ALL_REDUCE_US = (12.0, 5.0)
"""Assumed latency of one small all-reduce inside a node, or an NVL72 rack; not measured."""

NETWORK_ALL_REDUCE_US = (60.0, 25.0)
"""Assumed latency of one between nodes without NVLink; not measured."""

NETWORK = 50e9
"""Assumed bytes/s of each GPU between nodes without NVLink: one 400 Gb/s adapter."""

_RACK = ("gb200", "gb300")  # NVLink reaches over their nodes


@dataclass(frozen=True)
class Estimate:
    """A decode step at a plan's concurrency, every request at its full context.

    With drafts a step verifies one of every MTP layer and makes the next ones.

    Attributes:
        floor_us: the least time by the data sheet's bandwidth and rates, without communication.
        sent_us: the least time of sending what all-reduces have to.
        launches: kernels of a step, without communication, at LAUNCH_US each.
        all_reduces: in a step.
        all_reduce_us: assumed latency of each, (slow, fast).
        step_us: (slow, fast): the floor at the shares REACHED, the launches, the communication.
        concurrency: requests in the step.
        drafts: of each request in the step; each may be accepted or not.
    """

    floor_us: float
    sent_us: float
    launches: int
    all_reduces: int
    all_reduce_us: tuple[float, float]
    step_us: tuple[float, float]
    concurrency: int
    drafts: int

    def tokens_per_s(self, accepted: int = 0) -> tuple[float, float]:
        """Of all requests together, (low, high), if every step accepts so many of its drafts."""
        tokens = self.concurrency * (accepted + 1)
        slow, fast = self.step_us
        return tokens / slow * 1e6, tokens / fast * 1e6


def estimate(plan: Plan) -> Estimate:
    """What a plan's decode step may be expected to take: nothing in it was measured."""
    sheet, request, model = plan.gpu.sheet, plan.request, release()
    load = request.workload
    formats = Formats(request.quant, plan.cache.removesuffix("_e4m3"), request.dense_weights)
    sizes = formats, plan.parallel, load.concurrency, load.context
    if request.mtp:
        step = drafted_step(model.text, model.text_with_mtp, *sizes)
    else:
        step = decode_step(model.text, *sizes)
    network = request.nodes > 1 and plan.gpu.name not in _RACK
    latency = NETWORK_ALL_REDUCE_US if network else ALL_REDUCE_US
    floor = step.floor(sheet.bandwidth, sheet.flops)
    sent = step.sent_bytes / (NETWORK if network else sheet.link) * 1e6
    slow, fast = (
        floor / share + step.launches * launch + sent + step.all_reduces * each
        for share, launch, each in zip(REACHED, LAUNCH_US, latency, strict=True)
    )
    return Estimate(
        floor_us=floor,
        sent_us=sent,
        launches=step.launches,
        all_reduces=step.all_reduces,
        all_reduce_us=latency,
        step_us=(slow, fast),
        concurrency=load.concurrency,
        drafts=model.text.num_mtp_layers if request.mtp else 0,
    )
