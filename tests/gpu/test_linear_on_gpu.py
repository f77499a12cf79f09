"""What only a GPU shows of the FP8 linear layer: parts that arrive in any order, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from step37_kernels.formats.fp8_block import quantize_rows
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.linear import linear, widened
from step37_kernels.linear_tiles import FUSED_TOKENS
from step37_kernels.reference.linear import linear as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize(("rows", "columns"), [(14336, 4096), (2560, 4096), (4096, 12288)])
@pytest.mark.parametrize("tokens", [1, 16, 64, 200, FUSED_TOKENS + 1])
def test_the_same_bits_at_full_size_whoever_arrives_last(
    rows: int, columns: int, tokens: int
) -> None:
    """A part that is read before it is written, or a count that is lost, shows in some launch."""
    torch.manual_seed(0)
    weight = quantize_rows(torch.randn(rows, columns, device="cuda") * columns**-0.5)
    packed = FP8Words.pack(weight)
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    first = linear(x, packed)
    # 2^-8 / sqrt(3) is one rounding to bf16, in the mean square.
    expected = reference(x.float(), weight)
    assert (first.float() - expected).norm() < 2 * 2.0**-8 * expected.norm()
    for _ in range(200):
        # Other work in L2 and on the SMs, so that programs run in another order.
        torch.empty(32 << 20, dtype=torch.uint8, device="cuda").zero_()
        assert torch.equal(linear(x, packed), first)
    assert not packed.arrived.any()


def test_expanded_weights_are_exact_at_full_size() -> None:
    weight = quantize_rows(torch.randn(4096, 8192, device="cuda"))
    assert torch.equal(widened(FP8Words.pack(weight)).float(), weight.dequantize(torch.float32))


def test_a_recorded_graph_gives_the_same_bits() -> None:
    packed = FP8Words.pack(quantize_rows(torch.randn(2560, 4096, device="cuda")))
    x = torch.randn(1, 4096, device="cuda").bfloat16()
    eager = linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = linear(x, packed)
    for _ in range(20):
        recorded.zero_()
        graph.replay()
        assert torch.equal(recorded, eager)
