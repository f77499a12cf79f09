"""The shared expert, split and whole, against fp64 with a bound from the arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from step37_kernels.expert_weights import BF16Experts
from step37_kernels.experts.shared_expert import prepare, shared_expert
from step37_kernels.experts.split_k import counters
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats.fp8_block import FP8BlockTensor, quantize_rows
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.launch import counted
from step37_kernels.reference.shared_expert import shared_expert as reference
from tests.experts.bounds import expect
from tests.experts.dense_layers import bf16_experts

UP, DOWN = GemmTile(16, 64, 64, 4, 3), GemmTile(16, 128, 32, 4, 3)


def expert(hidden: int, size: int) -> tuple[Tensor, Tensor]:
    """Random w13 and w2 whose outputs are of order one."""
    experts = bf16_experts(1, hidden, size)
    return experts.w13[0], experts.w2[0]


def fp8_expert(hidden: int, size: int) -> tuple[FP8BlockTensor, FP8BlockTensor]:
    """The same in FP8, rows differing in size."""
    w13, w2 = expert(hidden, size)
    sizes = torch.rand(2 * size, 1).mul(3).exp2() / 3
    return quantize_rows(w13.float() * sizes), quantize_rows(w2.float() * sizes[:1])


def on(device: torch.device, weight: Tensor | FP8BlockTensor) -> Tensor | FP8Words:
    """One matrix as the kernels read it."""
    held = prepare(weight)
    if isinstance(held, Tensor):
        return held.to(device)
    return FP8Words(*(t.to(device) for t in (held.words, held.scale, held.arrived)))


def check(
    device: torch.device,
    x: Tensor,
    w13: Tensor | FP8BlockTensor,
    w2: Tensor | FP8BlockTensor,
    limit: float | None,
    tiles: tuple[GemmTile, GemmTile] | None = None,
) -> Tensor:
    """Run it and hold the sum of its parts against the routed layer's bound; the parts."""
    with counted() as launches:
        parts = shared_expert(x.to(device), on(device, w13), on(device, w2), limit, tiles).cpu()
    assert len(launches) == 2
    assert not counters(torch.empty(0, device=device).device).any()  # left as they were found
    ones, first = torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int32)
    # FP8 rows, whose scales are powers of two, are exact in bf16.
    exact = (w if isinstance(w, Tensor) else w.dequantize(torch.bfloat16) for w in (w13, w2))
    held = BF16Experts(*(w[None] for w in exact))
    # One expert with weight 1: its two roundings of the result are one here, or none.
    expected = expect(x, held, ones, first, limit)
    assert parts.dtype == (torch.float32 if len(parts) > 1 else torch.bfloat16)
    assert ((parts.double().sum(0) - expected.output).abs() <= expected.bound).all()
    assert expected.bound.norm() < 0.3 * expected.output.norm()  # the bound says something
    return parts


@pytest.mark.parametrize(
    ("parts", "splits", "size", "limit"),
    [(1, 1, 160, None), (2, 5, 160, 0.5), (4, 1, 160, None), (1, 2, 64, 0.5), (4, 2, 64, 16.0)],
)
@pytest.mark.usefixtures("parts_interleave")
def test_every_way_to_split_is_within_the_bound(
    device: torch.device, parts: int, splits: int, size: int, limit: float | None
) -> None:
    torch.manual_seed(size + parts)
    w13, w2 = expert(256, size)
    tiles = replace(UP, splits=parts), replace(DOWN, splits=splits)
    x = torch.randn(21, 256).bfloat16()  # a full block of rows and a ragged one
    got = check(device, x, w13, w2, limit, tiles)
    assert got.shape == (splits, 21, 256)
    if limit == 0.5:
        free = shared_expert(x.to(device), w13.to(device), w2.to(device), None, tiles).cpu()
        assert (free.sum(0) - got.sum(0)).norm() > 0.05 * got.sum(0).norm()


@pytest.mark.parametrize(
    ("parts", "splits", "size"), [(1, 1, 160), (2, 5, 160), (4, 2, 64), (1, 2, 64)]
)
def test_fp8_weights_split_and_whole(
    device: torch.device, parts: int, splits: int, size: int
) -> None:
    torch.manual_seed(size + parts)
    tiles = replace(UP, splits=parts), replace(DOWN, splits=splits)
    check(device, torch.randn(21, 256).bfloat16(), *fp8_expert(256, size), 0.5, tiles)


@pytest.mark.parametrize("tokens", [1, 70])
def test_the_tiles_for_fp8_weights(device: torch.device, tokens: int) -> None:
    torch.manual_seed(tokens)
    hidden = 1024 if tokens == 1 else 272
    weights = fp8_expert(hidden, 128)
    parts = check(device, torch.randn(tokens, hidden).bfloat16(), *weights, None)
    assert (len(parts) == 1) == (tokens == 70)
    x = torch.randn(tokens, hidden).bfloat16()
    plain = reference(x, *(w.dequantize(torch.float32) for w in weights), 1.0)
    assert torch.equal(reference(x, *weights, 1.0), plain)


@pytest.mark.parametrize("tokens", [1, 20, 70])
def test_the_tiles_of_the_model_s_hidden_size(device: torch.device, tokens: int) -> None:
    """Few tokens are split both ways, 70 in gate-up alone."""
    torch.manual_seed(tokens)
    w13, w2 = expert(4096 if tokens == 1 else 1024, 128)
    parts = check(device, torch.randn(tokens, w13.shape[1]).bfloat16(), w13, w2, None)
    assert (len(parts) == 1) == (tokens == 70)


def test_sizes_that_fill_no_tile(device: torch.device) -> None:
    torch.manual_seed(5)
    w13, w2 = expert(272, 48)
    check(device, torch.randn(3, 272).bfloat16(), w13, w2, 2.0)


def test_the_same_bits_again_and_beside_nan(device: torch.device) -> None:
    torch.manual_seed(6)
    w13, w2 = (w.to(device) for w in expert(256, 64))
    x = torch.randn(9, 256).bfloat16().to(device)
    clean = shared_expert(x, w13, w2, 1.0)
    assert torch.equal(clean, shared_expert(x, w13, w2, 1.0))
    dirty = x.clone()
    dirty[4, 7], dirty[6, 0] = float("nan"), float("inf")
    got = shared_expert(dirty, w13, w2, 1.0)
    kept = torch.tensor([row not in (4, 6) for row in range(9)], device=device)
    assert torch.equal(got[:, kept], clean[:, kept])
    assert got[:, 4].isnan().all()
    assert not got[:, 6].sum(0).isfinite().all()


def test_parts_that_are_not_whole_steps_are_refused() -> None:
    x, w13 = torch.empty(3, 256, device="meta"), torch.empty(64, 256, device="meta")
    x, w13, w2 = x.bfloat16(), w13.bfloat16(), torch.empty(256, 32, device="meta").bfloat16()
    with counted() as launches:
        with pytest.raises(ValueError, match="gate-up's splits are 8, expected 1 for 1 tiles"):
            shared_expert(x, w13, w2, None, (replace(UP, splits=8), DOWN))
        with pytest.raises(ValueError, match="down's splits are 2, expected a divisor of 32"):
            shared_expert(x, w13, w2, None, (UP, replace(DOWN, splits=2)))
    assert not launches


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    w13, w2 = (w.to(device) for w in expert(64, 16))
    with counted() as launches:
        none = shared_expert(torch.empty(0, 64, dtype=torch.bfloat16, device=device), w13, w2, None)
    assert none.shape[1:] == (0, 64) and not launches


def test_bad_input_is_refused_before_a_launch() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w13, w2 = meta(3, 64), meta(64, 64), meta(64, 32)
    with counted() as launches:
        with pytest.raises(ValueError, match="hidden has dtype torch.float32"):
            shared_expert(meta(3, 64, dtype=torch.float32), w13, w2, None)
        with pytest.raises(ValueError, match=r"w13 has shape \[64, 32\], expected \[any, 64\]"):
            shared_expert(x, meta(64, 32), w2, None)
        with pytest.raises(ValueError, match="w13 has 63 rows, expected an even number"):
            shared_expert(x, meta(63, 64), w2, None)
        with pytest.raises(ValueError, match=r"w2 has shape \[64, 64\], expected \[64, 32\]"):
            shared_expert(x, w13, meta(64, 64), None)
        with pytest.raises(ValueError, match="intermediate size is 24, expected a multiple of 16"):
            shared_expert(x, meta(48, 64), meta(64, 24), None)
        with pytest.raises(ValueError, match="limit is -2"):
            shared_expert(x, w13, w2, -2)
        with pytest.raises(ValueError, match="w13 and w2 are in different formats"):
            shared_expert(x, w13, prepare(quantize_rows(torch.ones(64, 32))), None)
        with pytest.raises(ValueError, match="w2 is on cpu, expected meta"):
            shared_expert(x, w13, torch.zeros(64, 32, dtype=torch.bfloat16), None)
    assert not launches
