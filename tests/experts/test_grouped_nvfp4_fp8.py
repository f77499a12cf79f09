"""NVFP4 x FP8 grouped GEMMs: the rounding of the weights exactly, and what it does to the sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from nvfp4_layers import (
    FINITE_SCALES,
    FP32,
    down_reference,
    gate_up_reference,
    random_experts,
    routing_of,
)
from torch import Tensor

from step37_kernels.expert_weights import BF16Experts, NVFP4Experts, on_device
from step37_kernels.experts.activations import FP8Rows
from step37_kernels.experts.grouped_nvfp4_fp8 import (
    _ROUND,
    down,
    gate_up,
    round_weights,
    row_unit,
)
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats.e4m3 import (
    dequantize_per_token_group,
    quantize_per_token_group,
    to_e4m3,
)
from step37_kernels.formats.nvfp4_tiles import (
    NVFP4Tiles,
    hidden_permutation_fp8,
    padded_intermediate,
    permuted_column,
    permuted_column_fp8,
    position_fp8,
    slab_offsets,
)
from step37_kernels.launch import counted

E, K, TOP_K = 4, 256, 2
TILE = GemmTile(block_rows=16, block_n=64, block_k=128, num_warps=4, num_stages=3)
DOWN_TILE = replace(TILE, block_k=64)
# The FP8 matrix instruction keeps 13 bits below the largest of what it adds.
QGMMA = 2.0**-13


def rounded(weights: NVFP4Experts) -> BF16Experts:
    """The weights as this kernel has them: e4m3 in units of a power of two for each row."""

    def matrix(name: str, scale: Tensor, global_scale: Tensor) -> Tensor:
        ones = torch.ones_like
        exact = replace(
            weights,
            w13_global_scale=ones(weights.w13_global_scale),
            w2_global_scale=ones(weights.w2_global_scale),
        )
        rows = []
        for e in range(weights.num_experts):
            if name == "w13":
                product = torch.cat([exact.gate(e, torch.float32), exact.up(e, torch.float32)])
            else:
                product = exact.down(e, torch.float32)
            largest = scale[e].float().abs().amax(1, keepdim=True)
            unit = torch.exp2(torch.frexp(largest).exponent - 1 - 5)  # scales below 2^6 = 64 units
            rows.append(to_e4m3(product / unit).float() * unit)
        return torch.stack(rows) * global_scale

    half = weights.w13_global_scale.repeat_interleave(weights.intermediate_size, 1)
    return BF16Experts(
        matrix("w13", weights.w13_scale, half[..., None]),
        matrix("w2", weights.w2_scale, weights.w2_global_scale[:, None, None]),
    )


@triton.jit
def _round_kernel(numbers, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    codes = tl.inline_asm_elementwise(
        _ROUND, "=r,r,r", [tl.load(numbers + at)], dtype=tl.float8e4nv, is_pure=True, pack=4
    )
    tl.store(out + at, codes)


def test_bf16_is_rounded_to_e4m3_as_in_torch(device: torch.device) -> None:
    """Every bf16 number from 2^-30 up to 1, zero, and their negatives; 2^-7.2 up saturates."""
    bits = torch.arange(97 * 128, 127 * 128, dtype=torch.int32)
    bits = bits[bits % 8 == 0]  # a weight has at most 5 significant bits
    bits = torch.nn.functional.pad(bits, (0, 512 - len(bits) % 512))  # zeros
    numbers = bits.repeat(2).short().view(torch.bfloat16)
    numbers[len(bits) :] *= -1
    out = torch.empty(1024, dtype=torch.float8_e4m3fn, device=device)
    for part in numbers.split(1024):
        _round_kernel[(1,)](part.to(device), out[: len(part)], len(part))
        expected = to_e4m3(part.float() * 2**16)
        assert torch.equal(out[: len(part)].cpu().view(torch.uint8), expected.view(torch.uint8))


@triton.jit
def _round_weights_kernel(words, codes, exponents, out, units, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word, code, k = tl.arange(0, 8)[None, :], tl.arange(0, 4)[None, :], tl.arange(0, 64)
    exponent = tl.load(exponents + row).to(tl.int32)
    weights = round_weights(
        tl.load(words + slab_offsets(row[:, None], word, 64, 8)),
        tl.load(codes + slab_offsets(row[:, None], code, 64, 4)),
        exponent,
        BLOCK,
        64,
    )
    tl.store(out + row[:, None] * 64 + k[None, :], weights)
    tl.store(units + row, row_unit(exponent))


def test_every_weight_is_the_nearest_e4m3(device: torch.device) -> None:
    """All scales beside smaller ones of their row, all elements; and the error that is stated."""
    torch.manual_seed(0)
    scale = FINITE_SCALES[torch.arange(4096) % 254]
    others = (torch.rand(4096, 3) * (scale & 0x7F)[:, None]).long()  # no larger in magnitude
    codes = torch.cat([scale[:, None], others], 1).to(torch.uint8)
    codes = codes.gather(1, torch.rand(4096, 4).argsort(1))
    weights = replace(
        random_experts(1, 4096, 64),
        w2=torch.randint(256, (1, 4096, 32), dtype=torch.uint8),
        w2_scale=codes[None].view(torch.float8_e4m3fn),
        w2_global_scale=torch.ones(1),
    )
    tiles = NVFP4Tiles.pack(on_device(weights, device))
    out = torch.empty(4096, 64, dtype=torch.float8_e4m3fn, device=device)
    units = torch.empty(4096, device=device)
    _round_weights_kernel[(32,)](tiles.w2, tiles.w2_scale, tiles.w2_exponent, out, units, 128)
    got = out.cpu().float() * units.cpu()[:, None]
    assert torch.equal(got, rounded(weights).w2[0][:, hidden_permutation_fp8(64)])
    exact = weights.down(0, torch.float32)[:, hidden_permutation_fp8(64)]
    stated = torch.maximum(exact.abs() * 2**-4, units.cpu()[:, None] * 2**-10)
    assert ((got - exact).abs() <= stated).all()
    assert ((got - exact).abs() > stated / 2).any()  # and no less is true


def test_the_two_orders_of_columns_are_translated() -> None:
    position = torch.arange(128)
    assert torch.equal(
        permuted_column_fp8.fn(position_fp8.fn(position)), permuted_column.fn(position)
    )


def quantised(x: Tensor, device: torch.device) -> FP8Rows:
    return FP8Rows(*(part.to(device) for part in quantize_per_token_group(x)))


def check(
    device: torch.device, size: int, ids: Tensor, limit: float | None, tile: GemmTile
) -> None:
    """gate_up and down against this arithmetic, and against the unrounded weights."""
    weights = random_experts(E, K, size)
    hidden, topk_weights = torch.randn(len(ids), K).bfloat16(), torch.rand(ids.shape)
    tiles = NVFP4Tiles.pack(on_device(weights, device))
    routing = routing_of(ids.to(device), E, tile.block_rows)
    model, loss = rounded(weights), FP32 if device.type == "cpu" else QGMMA
    x = quantised(hidden[:, hidden_permutation_fp8(K)], device)
    with counted() as launches:
        intermediate = gate_up(x, tiles, routing, limit, tile)
    order = permuted_column_fp8.fn(torch.arange(padded_intermediate(size)))
    rows = torch.empty(intermediate.shape)
    rows[:, order] = intermediate.cpu().float()
    assert (rows[:, size:] == 0).all()
    same = dequantize_per_token_group(*quantize_per_token_group(hidden))
    exact, bound = gate_up_reference(same, model, ids, limit, loss)
    assert ((rows[:, :size].double() - exact).abs() <= bound).all()

    q = quantised(intermediate.cpu(), device)
    with counted() as more:
        partial = down(q, tiles, routing, topk_weights.to(device), replace(tile, block_k=64))
    assert launches + more == ["nvfp4_fp8_gate_up_kernel", "nvfp4_fp8_down_kernel"]
    same = torch.empty(intermediate.shape)
    same[:, order] = dequantize_per_token_group(q.q.cpu(), q.scale.cpu())
    exact, bound = down_reference(same[:, :size], model, ids, topk_weights, loss)
    got = partial.cpu().double()
    assert ((got - exact).abs() <= bound).all()
    # Against the checkpoint's own weights: off by 2^-4 of each, or 2^-10 of its row's unit, which
    # is at most 2^-5 of the row's largest scale.
    exact, bound = down_reference(same[:, :size], weights, ids, topk_weights, loss)
    for pair, e in enumerate(ids.flatten().tolist()):
        row_scale = weights.w2_scale[e].float().abs().amax(1).double()
        tiny = row_scale * 2**-15 * float(weights.w2_global_scale[e]) * same[pair].abs().sum()
        large = weights.down(e, torch.float64).abs() @ same[pair, :size].double().abs() * 2**-4
        bound[pair] += (tiny + large) * float(topk_weights.flatten()[pair]) * (1 + 2**-8)
    assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("size, limit", [(48, None), (160, 0.25), (320, None)])
def test_shards_of_every_size(device: torch.device, size: int, limit: float | None) -> None:
    torch.manual_seed(0)
    check(device, size, torch.tensor([[3, 0], [1, 3], [0, 3]]), limit, TILE)


def test_blocks_that_are_not_full(device: torch.device) -> None:
    torch.manual_seed(1)
    ids = torch.full((18, TOP_K), 2)
    ids[11, 0] = 0
    check(device, 64, ids, None, replace(TILE, block_rows=32, block_n=128))


def test_not_a_number_stays_in_its_rows(device: torch.device) -> None:
    torch.manual_seed(2)
    tiles = NVFP4Tiles.pack(on_device(random_experts(E, K, 64), device))
    ids, hidden = torch.tensor([[0, 1], [0, 1], [-1, 9]]), torch.randn(3, K).bfloat16()
    hidden[1, 200] = float("nan")
    routing = routing_of(ids.to(device), E, 16)
    rows = gate_up(quantised(hidden, device), tiles, routing, None, TILE)
    partial = down(
        quantised(rows, device),
        tiles, routing, torch.ones(3, TOP_K, device=device), DOWN_TILE,
    )  # fmt: skip
    assert partial[:2].isfinite().all() and partial[2:4].isnan().all()


def test_errors_name_what_is_wrong() -> None:
    tiles = NVFP4Tiles.pack(random_experts(E, K, 160))
    routing = routing_of(torch.tensor([[0, 1]]), E, 16)
    x = quantised(torch.zeros(1, K), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"x.scale has shape \[1, 1\], expected \[1, 2\]"):
        gate_up(replace(x, scale=x.scale[:, :1]), tiles, routing, None, TILE)
    with pytest.raises(ValueError, match="x.q has dtype torch.uint8"):
        gate_up(replace(x, q=x.q.view(torch.uint8)), tiles, routing, None, TILE)
    with pytest.raises(ValueError, match="tile.block_n is 128, .* that divides 320"):
        gate_up(x, tiles, routing, None, replace(TILE, block_n=128))
    rows = quantised(torch.zeros(2, 192), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"topk_weights has shape \[1, 3\]"):
        down(rows, tiles, routing, torch.ones(1, 3), DOWN_TILE)
