"""The FP8 linear layer in every way it is cut, against fp64 with a bound from the arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats import fp8_block
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.launch import counted
from step37_kernels.linear import linear, widened
from step37_kernels.linear_tiles import FUSED_TOKENS, warpgroup_products
from step37_kernels.linear_tiles import linear as choose
from step37_kernels.reference.linear import linear as reference

BF16, FP32 = 2.0**-8, 2.0**-24  # unit roundoffs


def quantized(rows: int, columns: int) -> fp8_block.FP8BlockTensor:
    """Random weights whose rows differ in size, so that a scale taken from a neighbour shows."""
    sizes = torch.rand(rows, 1).mul(6).exp2()
    return fp8_block.quantize_rows(torch.randn(rows, columns) * columns**-0.5 * sizes)


def on(device: torch.device, weight: fp8_block.FP8BlockTensor) -> FP8Words:
    packed = FP8Words.pack(weight)
    return FP8Words(*(t.to(device) for t in (packed.words, packed.scale, packed.arrived)))


def check(got: Tensor, x: Tensor, weight: fp8_block.FP8BlockTensor) -> None:
    """Exact products, at most K + 64 additions in fp32 in any order, one rounding to bf16."""
    exact = weight.dequantize(torch.float64)
    expected = x.double() @ exact.T
    slack = (weight.shape[1] + 64) * FP32 * (x.double().abs() @ exact.abs().T)
    assert got.dtype == torch.bfloat16 and got.shape == expected.shape
    bound = BF16 * (expected.abs() + slack) + slack
    assert ((got.cpu().double() - expected).abs() <= bound).all()
    assert bound.norm() < 0.02 * expected.norm()  # the bound says something


@pytest.mark.usefixtures("parts_interleave")
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "tile", "splits"),
    [
        (21, 200, 256, (16, 64, 64), 1),  # two blocks of tokens, the last rows in no full tile
        (5, 192, 512, (16, 128, 128), 4),
        (16, 128, 320, (16, 64, 64), 5),
        (3, 64, 160, (16, 64, 64), 1),  # columns that fill no step
        (2, 72, 16, (16, 64, 64), 1),
        (40, 128, 256, (64, 64, 128), 2),
    ],
)
def test_every_way_to_cut_it(
    device: torch.device,
    tokens: int,
    rows: int,
    columns: int,
    tile: tuple[int, int, int],
    splits: int,
) -> None:
    torch.manual_seed(rows + columns)
    weight, x = quantized(rows, columns), torch.randn(tokens, columns).bfloat16()
    held, chosen = on(device, weight), GemmTile(*tile, 4, 3, splits)
    with counted() as launches:
        got = linear(x.to(device), held, chosen)
    assert launches == ["linear_fp8_kernel"]
    check(got, x, weight)
    assert not held.arrived.any()
    assert torch.equal(linear(x.to(device), held, chosen), got)  # and the counts are ready again
    assert torch.allclose(reference(x.float(), weight), got.cpu().float(), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("tokens", [1, 20, FUSED_TOKENS + 1])
def test_the_chosen_tiles(device: torch.device, tokens: int) -> None:
    """One token splits K, twenty too, and very many have their weights expanded to memory."""
    torch.manual_seed(tokens)
    weight = quantized(192, 1024 if tokens < 9 else 272)
    x = torch.randn(tokens, weight.shape[1]).bfloat16()
    with counted() as launches:
        got = linear(x.to(device), on(device, weight))
    assert launches == ["linear_fp8_kernel" if tokens < FUSED_TOKENS else "widen_fp8_kernel"]
    check(got, x, weight)


def test_expanded_weights_are_exact(device: torch.device) -> None:
    torch.manual_seed(4)
    weight = quantized(70, 336)
    with counted() as launches:
        got = widened(on(device, weight))
    assert launches == ["widen_fp8_kernel"]
    assert torch.equal(got.cpu().float(), weight.dequantize(torch.float32))


def test_the_parts_are_added_in_their_order_whoever_is_last(device: torch.device) -> None:
    """2^60 - 2^60 + 1 is 1 in order, and 0 where the last part of K is not added last."""
    columns = torch.zeros(64, 192)
    columns[:, 0], columns[:, 64], columns[:, 128] = 256, -256, 1
    x = torch.zeros(1, 192)
    x[:, 0], x[:, 64], x[:, 128] = 2.0**52, 2.0**52, 1
    held = on(device, fp8_block.quantize_rows(columns))
    got = linear(x.bfloat16().to(device), held, GemmTile(16, 64, 64, 4, 3, 3))
    assert (got == 1).all()


def test_a_token_does_not_see_its_neighbours(device: torch.device) -> None:
    torch.manual_seed(6)
    held, x = on(device, quantized(64, 256)), torch.randn(9, 256).bfloat16().to(device)
    tiles = GemmTile(16, 64, 128, 4, 3, 2)
    clean, dirty = linear(x, held, tiles), x.clone()
    dirty[4, 7], dirty[6, 200] = float("nan"), float("inf")
    got = linear(dirty, held, tiles)
    kept = torch.tensor([row not in (4, 6) for row in range(9)], device=device)
    assert torch.equal(got[kept], clean[kept])
    assert got[4].isnan().all() and not got[6].isfinite().any()


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    held = on(device, quantized(64, 32))
    with counted() as launches:
        none = linear(torch.empty(0, 32, dtype=torch.bfloat16, device=device), held)
    assert none.shape == (0, 64) and not launches


def test_bad_input_is_refused_before_a_launch() -> None:
    weight = FP8Words.pack(quantized(64, 64))
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    with counted() as launches:
        with pytest.raises(ValueError, match="x has dtype torch.float32"):
            linear(x.float(), weight)
        with pytest.raises(ValueError, match=r"x has shape \[3, 32\], expected \[any, 64\]"):
            linear(x[:, :32], weight)
        with pytest.raises(ValueError, match=r"x has strides \(1, 3\)"):
            linear(x.T.contiguous().T, weight)
        with pytest.raises(ValueError, match="weight is on cpu, expected meta"):
            linear(x.to("meta"), weight)
        for tile in (GemmTile(16, 64, 64, 4, 3, 2), GemmTile(16, 64, 32, 4, 3, 3)):
            message = f"splits is {tile.splits}, expected 1 for 3 tokens"
            with pytest.raises(ValueError, match=message):
                linear(x, weight, tile)
        with pytest.raises(ValueError, match="splits is 2, expected 1 for 20 tokens in blocks"):
            linear(
                torch.zeros(20, 64, dtype=torch.bfloat16),
                weight,
                GemmTile(16, 64, 32, 4, 3, 2),
            )
    assert not launches


SHAPES = [
    (rows // tp, columns if kind == "column" else columns)
    for tp in (1, 4, 8)
    for kind, rows, columns in (
        ("column", 10240, 4096), ("column", 14336, 4096), ("column", 22528, 4096),
        ("column", 128896, 4096),
    )
] + [(4096, columns // tp) for tp in (1, 4, 8) for columns in (8192, 12288, 11264)]  # fmt: skip
"""[N, K] of the released model's layers on one rank."""
SMS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may have


@pytest.mark.parametrize("arch", SMS)
def test_tiles_fit_the_shapes(arch: int) -> None:
    for rows, columns in SHAPES:
        for tokens in (0, 1, 16, 17, 32, 64, 65, 128, 129, FUSED_TOKENS):
            tile = choose(tokens, rows, columns, arch)
            assert columns % (tile.splits * tile.block_k) == 0
            assert tile.splits == 1 or tokens <= tile.block_rows
            # Parts are written and read in fp32: at most a quarter of the weights' bytes.
            assert tile.splits == 1 or 4 * 8 * tile.splits * tokens <= columns
            step = tile.block_n + 2 * tile.block_rows
            assert tile.num_stages * step * tile.block_k <= SHARED_MEMORY[arch] * 1024
            assert tile.block_n >= 64  # the counters of `FP8Words` are one for each 64 rows
            assert tile.block_rows <= (128 if warpgroup_products(arch) else 64)


def test_one_token_has_work_for_every_sm() -> None:
    for rows, columns in SHAPES:
        chosen = choose(1, rows, columns, 90)
        programs = -(-rows // chosen.block_n) * chosen.splits
        # 1408 columns, of a dense layer at TP=8, are 11 steps, which do not divide.
        assert programs >= (64 if columns == 1408 else 132), (rows, columns, chosen)
        # More than needed are more parts to add, and more than three an SM wait for another.
        assert chosen.splits == 1 or programs <= 3 * 132, (rows, columns, chosen)
