"""What only a GPU shows of the expert layer: full size, CUDA graphs, repeatability."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step37_kernels.arch import arch_of
from step37_kernels.expert_weights import BF16Experts, ExpertWeights, FP8Experts, NVFP4Experts
from step37_kernels.experts.formats import FORMATS, least_arch
from step37_kernels.experts.layer import experts, prepare
from step37_kernels.experts.shared_expert import shared_expert
from step37_kernels.experts.split_k import counters
from step37_kernels.reference.experts import experts as reference
from step37_kernels.reference.shared_expert import shared_expert as reference_shared
from step37_kernels.route import route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

EXPERTS, HIDDEN, SIZE, TOP_K = 288, 4096, 1280, 8
ARCH = arch_of(torch.empty(0, device="cuda")) if torch.cuda.is_available() else 90
HERE = [
    pair
    for pair in FORMATS
    if pair != ("nvfp4", "nvfp4")  # which needs input scales too
    and least_arch(*pair) <= ARCH
]
# Relative L2 of the whole output. bf16: intermediate, parts and sum, 2^-8 / sqrt(3) each and more
# for the reference's own rounding. e4m3 intermediates and weights: 2^-4 / sqrt(3) each.
ALLOWED = {"same": 2 * 2.0**-8, "fp8": 2 * 2.0**-4}


def make(form: str, count: int = EXPERTS, size: int = SIZE) -> ExpertWeights:
    """Random weights made on the GPU in a format's own bytes, outputs of order one."""
    torch.manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)

    def constant(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device="cuda")

    if form == "bf16":
        return BF16Experts(values(count, 2 * size, HIDDEN), values(count, HIDDEN, size))
    if form == "fp8":
        fp8 = torch.float8_e4m3fn
        return FP8Experts(
            (values(count, 2 * size, HIDDEN) * 1024).to(fp8),
            constant(1 / 1024, count, 2, -(-size // 128), HIDDEN // 128),
            (values(count, HIDDEN, size) * 1024).to(fp8),
            constant(1 / 1024, count, HIDDEN // 128, -(-size // 128)),
        )

    def scales(*shape: int) -> Tensor:
        return torch.randint(0x30, 0x40, shape, device="cuda", dtype=torch.uint8).view(
            torch.float8_e4m3fn
        )

    gate = constant(HIDDEN**-0.5 / 4, count, 1)
    return NVFP4Experts(
        codes(count, 2 * size, HIDDEN // 2),
        scales(count, 2 * size, HIDDEN // 16),
        torch.cat([gate, gate / 8], 1),
        codes(count, HIDDEN, size // 2),
        scales(count, HIDDEN, size // 16),
        constant(size**-0.5 / 4, count),
    )


def batch(tokens: int, count: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    gate = torch.randn(count, HIDDEN, device="cuda", dtype=torch.bfloat16) / 64
    return hidden, *route(hidden, gate, None, min(TOP_K, count), 3.0)


@pytest.mark.parametrize(("form", "activations"), HERE)
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_the_whole_layer_at_the_model_s_size(form: str, activations: str, tokens: int) -> None:
    weights = make(form)
    hidden, topk_weights, ids = batch(tokens)
    expected = reference(hidden.float(), weights, topk_weights, ids, 7.0)
    prepared = prepare(weights, activations)
    got = experts(hidden, prepared, topk_weights, ids, 7.0, activations=activations)
    error = (got - expected).norm() / expected.norm()
    assert error < ALLOWED[activations]


@pytest.mark.parametrize(("form", "activations"), HERE)
def test_a_hundred_runs_give_the_same_bits(form: str, activations: str) -> None:
    prepared = prepare(make(form, count=32), activations)
    hidden, topk_weights, ids = batch(128, count=32)
    first = experts(hidden, prepared, topk_weights, ids, None, activations=activations)
    for _ in range(100):
        again = experts(hidden, prepared, topk_weights, ids, None, activations=activations)
        assert torch.equal(first.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize(("form", "activations"), HERE)
@pytest.mark.parametrize("size", [320, 160])
def test_the_same_bits_whoever_brings_the_last_part(form: str, activations: str, size: int) -> None:
    """One token of a TP=4 or TP=8 rank: gate-up splits K, while another stream takes SMs."""
    weights = make(form, size=size)
    hidden, topk_weights, ids = batch(1)
    prepared = prepare(weights, activations)
    first = experts(hidden, prepared, topk_weights, ids, 7.0, activations=activations)
    expected = reference(hidden.float(), weights, topk_weights, ids, 7.0)
    assert (first - expected).norm() / expected.norm() < ALLOWED[activations]
    other, beside = torch.cuda.Stream(), torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(200):
        with torch.cuda.stream(other):
            beside.zero_()
        again = experts(hidden, prepared, topk_weights, ids, 7.0, activations=activations)
        assert torch.equal(first.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize(("form", "activations"), HERE)
@pytest.mark.parametrize(("tokens", "size"), [(16, SIZE), (1, 320)])
def test_a_recorded_graph_follows_the_routing(
    form: str, activations: str, tokens: int, size: int
) -> None:
    """One token at TP=4 splits K: its counters are zeroed by the recorded sort."""
    prepared = prepare(make(form, count=32, size=size), activations)
    hidden, topk_weights, ids = batch(tokens, count=32)

    def run() -> Tensor:
        return experts(hidden, prepared, topk_weights, ids, None, activations=activations)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for seed in range(5):
        torch.manual_seed(seed)
        new = batch(tokens, count=32)
        new[2][seed % tokens, seed] = -1  # as padding has, or another rank's expert
        for old, fresh in zip((hidden, topk_weights, ids), new, strict=True):
            old.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(recorded, run())


@pytest.mark.parametrize("size", [1280, 320])
@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_the_shared_expert_s_parts_in_any_order(tokens: int, size: int) -> None:
    """In BF16, in which its counters are the device's; beside another stream's work."""
    weights = make("bf16", count=1, size=size)
    w13, w2 = weights.w13[0], weights.w2[0]
    hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    first = shared_expert(hidden, w13, w2, 16.0)
    expected = reference_shared(hidden.float(), w13.float(), w2.float(), 16.0).sum(0)
    error = (first.float().sum(0) - expected).norm() / expected.norm()
    assert error < ALLOWED["same"]
    other, beside = torch.cuda.Stream(), torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(200):
        with torch.cuda.stream(other):
            beside.zero_()
        assert torch.equal(shared_expert(hidden, w13, w2, 16.0), first)
    assert not counters(hidden.device).any()
