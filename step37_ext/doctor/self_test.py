"""Each operation on small inputs against its reference, on this very machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from step37_kernels import dispatch, implementations  # noqa: F401  (makes the kernels known)
from step37_kernels.dispatch import Target
from step37_kernels.expert_weights import (
    BF16Experts,
    ExpertWeights,
    FP8Experts,
    NVFP4Experts,
    on_device,
)
from step37_kernels.experts.formats import least_arch
from step37_kernels.formats import fp8_block, nvfp4
from step37_kernels.reference.activation import swiglu_step
from step37_kernels.reference.attention import attend, prologue_into_cache
from step37_kernels.reference.experts import experts
from step37_kernels.reference.linear import linear
from step37_kernels.reference.page_tables import page_tables
from step37_kernels.reference.rotary import cos_sin_cache
from step37_kernels.reference.route import route
from step37_kernels.reference.shared_expert import shared_expert

TOLERANCE = 2.0**-6
"""Relative L2: a few roundings to bf16, of 2^-8 each; a wrong scale, order or mask is far more."""

TOKENS, HIDDEN, SIZE, EXPERTS, TOP_K = 5, 128, 64, 4, 2
HEADS, KV_HEADS, DIM = 8, 2, 64


@dataclass(frozen=True)
class Check:
    """One operation's result on this machine.

    Attributes:
        error: relative L2 against the reference; None if it could not run.
        problem: why it failed, empty if it did not.
    """

    operation: str
    weights: str
    implementation: str
    error: float | None
    seconds: float
    problem: str

    @property
    def passed(self) -> bool:
        """Whether it ran and agreed."""
        return not self.problem


def run_checks(target: Target) -> list[Check]:
    """Run every operation that has kernels, with the implementation that a server would use."""
    device = torch.device(target.device_type)
    torch.manual_seed(0)
    checks = [_check("route", "-", target, partial(_route, device))]
    for kind, weights in (("bf16", _bf16), ("fp8", _fp8), ("nvfp4", _nvfp4)):
        checks.append(_check("experts", kind, target, partial(_experts, weights, device)))
    checks.append(_check("activation", "bf16", target, partial(_activation, device)))
    checks.append(_check("linear", "fp8", target, partial(_linear, device)))
    for kind in ("bf16", "fp8"):
        checks.append(_check("shared_expert", kind, target, partial(_shared, kind, device)))
    checks.append(_check("page_tables", "-", target, partial(_page_tables, device)))
    for name, cache in _caches(target):
        made = partial(_prologue, cache, device)
        checks.append(_check("prologue", f"{name} cache", target, made))
        for queries in (None, 3):
            of = f"{name} cache, {'decode' if queries is None else 'prefill'}"
            checks.append(_check("attend", of, target, partial(_attend, cache, queries, device)))
    return checks


def _caches(target: Target) -> list[tuple[str, torch.dtype]]:
    """Types of KV cache that a server starts with: it refuses FP8 where a GPU cannot convert it."""
    fp8 = target.capability is None or target.capability >= divmod(least_arch("fp8", "same"), 10)
    return [("bf16", torch.bfloat16)] + [("fp8", torch.float8_e4m3fn)] * fp8


_Run = Callable[[dispatch.Implementation], tuple[Tensor, Tensor]]


def _check(operation: str, what: str, target: Target, make: Callable[[], _Run]) -> Check:
    """Make inputs, choose, run and compare; whatever goes wrong is the check's result."""
    started = time.monotonic()
    kind = what if what in ("bf16", "fp8", "nvfp4") else "-"
    name, error, problem = "none", None, ""
    try:
        chosen = dispatch.choose(
            operation, Target(target.device_type, target.capability, kind, target.dtype)
        )
        name = chosen.name
        got, expected = (t.float().cpu() for t in make()(chosen))
        error = float((got - expected).norm() / expected.norm())
        if not error <= TOLERANCE:  # NaN too
            problem = f"relative error {error:.2g}, at most {TOLERANCE:.2g}"
    except Exception as raised:
        problem = f"{type(raised).__name__}: {raised}"
    return Check(operation, what, name, error, time.monotonic() - started, problem)


def _batch(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, HIDDEN).bfloat16().to(device)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).int().to(device)
    return hidden, torch.rand(TOKENS, TOP_K).to(device), ids


def _route(device: torch.device) -> _Run:
    hidden, gate = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(EXPERTS, HIDDEN).bfloat16()
    arguments = (hidden.to(device), gate.to(device), None, TOP_K, 3.0)
    return lambda chosen: (chosen(*arguments)[0], route(*arguments)[0])


def _experts(weights: Callable[[], ExpertWeights], device: torch.device) -> _Run:
    moved = on_device(weights(), device)
    hidden, topk_weights, ids = _batch(device)
    expected = experts(hidden.float(), moved, topk_weights, ids, 1.0)
    return lambda chosen: (
        chosen(hidden, chosen.prepare(moved), topk_weights, ids, 1.0),
        expected,
    )


def _activation(device: torch.device) -> _Run:
    gate_up = torch.randn(TOKENS, 2 * SIZE).bfloat16().to(device)
    return lambda chosen: (chosen(gate_up, 1.0), swiglu_step(gate_up.float(), 1.0))


def _linear(device: torch.device) -> _Run:
    weight = fp8_block.quantize_rows((torch.randn(SIZE, HIDDEN) * HIDDEN**-0.5).to(device))
    hidden, _, _ = _batch(device)
    return lambda chosen: (chosen(hidden, chosen.prepare(weight)), linear(hidden.float(), weight))


def _shared(kind: str, device: torch.device) -> _Run:
    hidden, _, _ = _batch(device)
    w13 = (torch.randn(2 * SIZE, HIDDEN) * HIDDEN**-0.5).bfloat16().to(device)
    w2 = (torch.randn(HIDDEN, SIZE) * SIZE**-0.5).bfloat16().to(device)
    up, down = (fp8_block.quantize_rows(w) if kind == "fp8" else w for w in (w13, w2))
    return lambda chosen: (
        chosen(hidden, chosen.prepare(up), chosen.prepare(down), 1.0).float().sum(0),
        shared_expert(hidden, up, down, 1.0)[0],
    )


def _cache(kind: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, 64, KV_HEADS, DIM).to(kind).to(device)
    return k, v


def _prologue(kind: torch.dtype, device: torch.device) -> _Run:
    k, v = _cache(kind, device)
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * DIM).bfloat16().to(device)
    norm, position = torch.randn(DIM).to(device) / 8, torch.arange(TOKENS, device=device)
    angles = cos_sin_cache(DIM, 1e4, 64, None).to(device)
    slots = torch.arange(TOKENS, device=device) + 7

    def run(chosen: dispatch.Implementation) -> tuple[Tensor, Tensor]:
        results = []
        for function in (chosen, prologue_into_cache):
            keys, values = k.clone(), v.clone()
            q = function(
                qkv, position, norm, norm, angles, HEADS, KV_HEADS, 1e-5, keys, values, slots,
                0.5, 2.0,
            )  # fmt: skip
            results.append(torch.cat([t.float().flatten() for t in (q, keys, values)]))
        return results[0], results[1]

    return run


def _page_tables(device: torch.device) -> _Run:
    positions = torch.randperm(64).int().view(2, 32).to(device)
    requests, lengths = torch.tensor([[1, 0], [17, 32]], device=device)
    mapping = torch.randperm(64).to(device)

    def run(chosen: dispatch.Implementation) -> tuple[Tensor, Tensor]:
        results = []
        for function in (chosen, page_tables):
            full, sliding = torch.zeros(2, 2, 32, dtype=torch.int32, device=device)
            counts, slots = torch.zeros_like(full[:, 0]), torch.zeros_like(lengths)
            function(
                positions, requests, lengths, 0, None, 1, counts, full, sliding, mapping, 8,
                lengths, slots,
            )  # fmt: skip
            results.append(torch.cat([t.flatten() for t in (counts, full, sliding, slots)]))
        return results[0], results[1]

    return run


def _attend(kind: torch.dtype, queries: int | None, device: torch.device) -> _Run:
    k, v = _cache(kind, device)
    lengths = torch.tensor([40, 21], dtype=torch.int32, device=device)
    news = None if queries is None else torch.full_like(lengths, queries)
    table = torch.randperm(64).int().view(2, 32).repeat(1, 2)[:, :40].contiguous().to(device)
    rows = 2 * (queries or 1)
    q = torch.randn(rows, HEADS, DIM).bfloat16().to(device)
    gate = torch.randn(rows, HEADS).bfloat16().to(device)
    arguments = (k, v, table, lengths, news, DIM**-0.5, 16)
    scales = {"k_scale": 0.5, "v_scale": 2.0, "head_gate": gate}
    return lambda chosen: (
        chosen(q, *arguments, **scales),
        attend(q.float(), *arguments, **scales),  # type: ignore[arg-type]
    )


def _values() -> tuple[Tensor, Tensor, Tensor]:
    gate, up = torch.randn(2, EXPERTS, SIZE, HIDDEN) * HIDDEN**-0.5
    return gate, up, torch.randn(EXPERTS, HIDDEN, SIZE) * SIZE**-0.5


def _bf16() -> BF16Experts:
    gate, up, down = _values()
    return BF16Experts(torch.cat([gate, up], 1).bfloat16(), down.bfloat16())


def _fp8() -> FP8Experts:
    return FP8Experts.of(*(fp8_block.quantize(part) for part in _values()))


def _nvfp4() -> NVFP4Experts:
    return NVFP4Experts.of(*(nvfp4.quantize(part) for part in _values()))
