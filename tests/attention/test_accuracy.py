"""The error over an e4m3 cache at any length: the stand-in's bounds, and the stand-in itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.attention_accuracy import (
    BF16,
    DECODE,
    EXTEND,
    FP8_Q,
    FP8_Q_AND_P,
    FP16,
    GROUP,
    HEAD_DIM,
    OVER_BF16,
    UNROUNDED,
    Arithmetic,
    attend,
    draw,
    errors,
    exact,
)
from benchmarks.harness.cells import relative_l2
from step37_kernels.attention.decode import decode
from step37_kernels.attention.extend import extend
from step37_kernels.formats.e4m3 import to_e4m3

# Errors spread evenly over +-u |x| have a root mean square of at most u / 3^0.5 of |x|; so have
# those of sums with random signs, whatever the number of terms.
P_ROUNDING, OUT_ROUNDING = 2.0**-11 / 3**0.5, 2.0**-8 / 3**0.5


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("length", [4096, 262144])
def test_the_error_is_small_and_does_not_grow(length: int, spread: float) -> None:
    found = errors(length, spread)
    assert found[UNROUNDED.name] <= P_ROUNDING
    for ours in (EXTEND, DECODE):
        assert found[ours.name] <= (P_ROUNDING**2 + OUT_ROUNDING**2) ** 0.5 <= 0.003
    # P in bf16 adds a rounding as large as the output's. Where the numbers are spread over all
    # mantissas, each is 2/3 of its bound and both together stay below it.
    assert found[OVER_BF16.name] <= 0.003
    # What the other ways cost; e4m3 has u = 2^-4 and so at least 1% for a factor of every product.
    assert found[FP8_Q_AND_P.name] > found[FP8_Q.name] > 0.01


def test_small_probabilities_count() -> None:
    """One key far above 262143 others, which together weigh 0.8% and each less than fp16 holds."""
    length = 262144
    scale = HEAD_DIM**-0.5
    q = torch.full((1, HEAD_DIM), 1.0)
    k = torch.zeros(length, HEAD_DIM)
    k[0] = 17.5 / (scale * HEAD_DIM)  # exp(-17.5) is 2^-25.2
    v = torch.ones(length, HEAD_DIM)
    v[0] = 0
    expected = exact(q, k, v)
    assert 0.004 < float(expected[0, 0]) < 0.008
    # All are the same, so that P's rounding, at most 2^-11, does not average out.
    assert relative_l2(attend(q, k, v, UNROUNDED), expected) <= 2.0**-10
    plain = Arithmetic("without the factor", FP16, FP16, 0.0, torch.float32)
    assert relative_l2(attend(q, k, v, plain), expected) > 0.5


@pytest.fixture(scope="module")
def heads():  # type: ignore[no-untyped-def]
    return draw(1024, 1.0)


def kernel(name: str, q: Tensor, k: Tensor, v: Tensor, device: torch.device) -> Tensor:
    """Rows q [R, D] as the heads of tokens that see all keys: [R, D]."""
    length, tokens = len(k), len(q) // GROUP
    queries = q.view(tokens, GROUP, HEAD_DIM).to(BF16).to(device)
    cache = [to_e4m3(x)[:, None].contiguous().to(device) for x in (k, v)]
    pages = torch.arange(length // 64, dtype=torch.int32, device=device).expand(tokens, -1)
    lens = torch.full((tokens,), length, device=device)
    common = (*cache, pages.contiguous(), lens)
    if name == "decode":
        out = decode(queries, *common, HEAD_DIM**-0.5, None, 64)
    else:  # every token is a sequence of its own, which ends at the last key
        out = extend(queries, *common, torch.ones_like(lens), HEAD_DIM**-0.5, None, 64)
    return out.cpu().view(-1, HEAD_DIM)


@pytest.mark.parametrize("name, arithmetic", [("extend", EXTEND), ("decode", DECODE)])
def test_the_stand_in_is_the_kernel(device, heads, name: str, arithmetic: Arithmetic) -> None:
    """Both round the same numbers and differ in the order of fp32 sums inside a block: by some
    2^-20 of an output, so that one in a thousand or fewer falls on bf16's other side. Rounding P
    to bf16 instead moves every output by 2^-9 of itself, and most to a neighbour."""
    k, v = heads.cached()
    q = heads.q[: 2 * GROUP]
    out = kernel(name, q, k, v, device)
    same = (out == attend(q, k, v, arithmetic)).float().mean()
    assert same > 0.99
    other = attend(q, k, v, Arithmetic("P in bf16", FP16, BF16))
    assert (out == other).float().mean() < 0.9
