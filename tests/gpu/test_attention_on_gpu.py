"""What only a GPU shows of attention: long contexts, CUDA graphs, repeatability."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step37_kernels.attention.decode import decode
from step37_kernels.attention.extend import extend
from step37_kernels.reference.attention import attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DIM, KV_HEADS, PAGE = 128, 8, 64
SCALE = DIM**-0.5
TYPES = {"full": (64, None), "sliding": (96, 512)}
CACHES = [torch.bfloat16, torch.float8_e4m3fn]


def paged(lengths: list[int], cache: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k and v cache, a shuffled page table, lengths."""
    if cache != torch.bfloat16 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("an FP8 cache needs sm_89")
    torch.manual_seed(0)
    width = -(-max(lengths) // PAGE)
    pages = torch.randperm(width * len(lengths), device="cuda").int().view(len(lengths), width)
    shape = (pages.numel() * PAGE, KV_HEADS, DIM)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(cache) for _ in range(2))
    return k, v, pages, torch.tensor(lengths, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", TYPES)
def test_decode_at_all_lengths(kind: str, cache: torch.dtype) -> None:
    heads, window = TYPES[kind]
    k, v, pages, lengths = paged([1, 511, 4097, 65536, 262144], cache)
    q = torch.randn(5, heads, DIM, device="cuda", dtype=torch.bfloat16)
    gate = torch.randn(5, heads, device="cuda", dtype=torch.bfloat16)
    got = decode(q, k, v, pages, lengths, SCALE, window, PAGE, 0.5, 2.0, gate)
    expected = attend(
        q.float(), k, v, pages, lengths, None, SCALE, window, 0.5, 2.0, gate, page_size=PAGE
    )
    # P rounded to 11 or 8 bits and the output to 8: 0.3%, whatever the length.
    assert ((got - expected).norm(dim=1) <= 3e-3 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("length", [65536, 262144])
def test_a_needle_is_found(length: int, cache: torch.dtype) -> None:
    """One key that the query points at, anywhere in the context, decides the answer."""
    k, v, pages, lengths = paged([length], cache)
    q = torch.randn(1, 64, DIM, device="cuda", dtype=torch.bfloat16)
    for position in (0, 1, length // 3, length - PAGE - 1, length - 1):
        slot = int(pages[0, position // PAGE]) * PAGE + position % PAGE
        keys = k.clone()
        keys[slot] = (4 * q.view(KV_HEADS, -1, DIM)[:, 0]).to(cache)
        got = decode(q, keys, v, pages, lengths, SCALE, None, PAGE).view(KV_HEADS, -1, DIM)[:, 0]
        torch.testing.assert_close(got.float(), v[slot].float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", TYPES)
def test_extend_over_a_prefix(kind: str, cache: torch.dtype) -> None:
    heads, window = TYPES[kind]
    k, v, pages, lengths = paged([3000, 129, 8192], cache)
    new = torch.tensor([1000, 129, 1], dtype=torch.int32, device="cuda")
    q = torch.randn(1130, heads, DIM, device="cuda", dtype=torch.bfloat16)
    got = extend(q, k, v, pages, lengths, new, SCALE, window, PAGE)
    expected = attend(q.float(), k, v, pages, lengths, new, SCALE, window, page_size=PAGE)
    assert ((got - expected).norm(dim=1) <= 3e-3 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("kind", TYPES)
def test_one_graph_serves_all_lengths_and_repeats(kind: str) -> None:
    heads, window = TYPES[kind]
    k, v, pages, lengths = paged([20000, 20000, 20000, 20000], torch.bfloat16)
    q = torch.randn(4, heads, DIM, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        return decode(q, k, v, pages, lengths, SCALE, window, PAGE)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for other in ([1, 1, 1, 1], [17, 20000, 512, 9999], [0, 3, 0, 16384]):
        lengths.copy_(torch.tensor(other))
        graph.replay()
        torch.cuda.synchronize()
        first = recorded.clone()
        assert torch.equal(first, run())
        for _ in range(100):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first, recorded)
