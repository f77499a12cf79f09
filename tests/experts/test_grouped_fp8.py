"""FP8 grouped GEMMs, with FP8 and with BF16 activations, against fp64 with derived bounds."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.expert_weights import FP8Experts
from step37_kernels.experts import grouped_fp8, grouped_fp8_bf16
from step37_kernels.experts.activations import FP8Rows
from step37_kernels.experts.e4m3_words import widen, word_column, word_order
from step37_kernels.experts.fp8_blocks import refuse_nan
from step37_kernels.experts.routing import Routing
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.launch import counted
from tests.experts.dense_layers import TILE, batch, fp8_experts, stages
from tests.experts.nvfp4_layers import down_reference, gate_up_reference

BOTH = pytest.mark.parametrize("module", [grouped_fp8, grouped_fp8_bf16])
NARROW = GemmTile(16, 64, 64, 4, 3)


@triton.jit
def _widen_kernel(words, out, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row, word, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K // 4), tl.arange(0, BLOCK_K)
    loaded = tl.load(words + row[:, None] * (BLOCK_K // 4) + word[None, :])
    column = word_column(k)
    wide = widen(loaded, BLOCK_N, BLOCK_K)
    tl.store(out + row[:, None] * BLOCK_K + column[None, :], wide)


def test_every_code_widens_exactly_at_every_place(device: torch.device) -> None:
    """Row r holds code (r + column) mod 256, so each code stands in each byte of a word."""
    codes = (torch.arange(64)[:, None] + torch.arange(64)[None, :] * 4).to(torch.uint8)
    codes = torch.cat([codes, codes + 1, codes + 2, codes + 3]).contiguous()
    out = torch.empty(256, 64, dtype=torch.bfloat16, device=device)
    _widen_kernel[(1,)](codes.view(torch.int32).to(device), out, 256, 64)
    expected = codes.view(torch.float8_e4m3fn).float()
    expected = torch.where(codes == 0x7F, 480.0, torch.where(codes == 0xFF, -480.0, expected))
    assert torch.equal(out.cpu().view(torch.int16), expected.bfloat16().view(torch.int16))
    assert len(codes.unique()) == 256


def test_word_order_is_word_column(device: torch.device) -> None:
    order = word_order(64)
    lanes = order.view(4, 2, 4, 2)  # 16 columns: half, lane, pair
    for lane in range(4):  # what a lane multiplies is one word, for each instruction
        held = lanes[:, :, lane].reshape(4, 4).sort(1).values
        assert torch.equal(held, (16 * torch.arange(4) + 4 * lane)[:, None] + torch.arange(4))
    out = torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
    words = torch.arange(64).to(torch.uint8).repeat(64, 1).view(torch.int32).to(device)
    _widen_kernel[(1,)](words, out, 64, 64)
    straight = torch.arange(64).to(torch.uint8).view(torch.float8_e4m3fn).bfloat16()
    assert torch.equal(out[0].cpu(), straight)
    with pytest.raises(ValueError, match="size is 24, expected a multiple of 16"):
        word_order(24)


Rows = tuple[Tensor, Tensor, Tensor]


def check(
    module: ModuleType,
    device: torch.device,
    weights: FP8Experts,
    limit: float | None,
    tile: GemmTile,
    rows: Rows,
) -> Tensor:
    """Run a layer, hold each launch against its bound; the intermediate expected, [P, N]."""
    hidden, topk_weights, ids = rows
    ran = stages(module, device, hidden, weights, topk_weights, ids, limit, tile)
    here = (ids.flatten() >= 0) & (ids.flatten() < weights.num_experts)
    known = ids.clamp(0, weights.num_experts - 1)
    narrow = device.type == "cuda" and module is grouped_fp8
    for got, (exact, bound) in (
        (ran.intermediate, gate_up_reference(ran.x, weights, known, limit, narrow=narrow)),
        (ran.partial, down_reference(ran.multiplied, weights, known, topk_weights, narrow=narrow)),
    ):
        assert ((got.double() - exact).abs() <= bound)[here].all()
        # The bound says something; that of narrow sums is for the worst case, which none is near.
        assert narrow or bound[here].norm() < 0.1 * exact[here].norm()
        assert (got.double() - exact)[here].norm() < 2.0**-7 * exact[here].norm()
    return torch.where(here[:, None], gate_up_reference(ran.x, weights, known, limit)[0], 0)


@BOTH
@pytest.mark.parametrize(
    ("size", "offset", "limit", "tile"),
    [
        (160, 0, None, NARROW),
        (160, 32, 0.5, TILE),
        (160, 64, None, NARROW),
        (160, 96, 7.0, replace(NARROW, block_rows=32)),
        (160, 112, None, replace(NARROW, block_k=128)),
        (320, 0, 0.5, replace(TILE, block_n=256)),
        (320, 64, None, replace(TILE, block_rows=64)),
    ],
)
def test_shards_that_begin_inside_a_block(
    device: torch.device,
    module: ModuleType,
    size: int,
    offset: int,
    limit: float | None,
    tile: GemmTile,
) -> None:
    """Ragged blocks, an expert with no rows, ids of other ranks, a limit that bites."""
    torch.manual_seed(size + offset)
    weights = fp8_experts(3, 272, size, offset)  # 272 is no multiple of a block
    rows = batch(18, 3, 2, 272)
    rows[2][rows[2] == 1] = -1
    rows[2][5, 0] = 3
    expected = check(module, device, weights, limit, tile, rows)
    if limit == 0.5:
        free = check(module, device, weights, None, tile, rows)
        assert (free - expected).norm() > 0.05 * expected.norm()


@BOTH
def test_the_model_s_hidden_size_and_one_token(device: torch.device, module: ModuleType) -> None:
    torch.manual_seed(0)
    check(module, device, fp8_experts(1, 4096, 64, 96), None, TILE, batch(1, 1, 1, 4096))


@BOTH
def test_every_finite_code_as_a_weight(device: torch.device, module: ModuleType) -> None:
    torch.manual_seed(2)
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)

    def random(*shape: int) -> Tensor:
        return codes[torch.randint(len(codes), shape)].view(torch.float8_e4m3fn)

    weights = FP8Experts(
        random(1, 128, 256), torch.rand(1, 2, 1, 2) * 1e-3,
        random(1, 256, 64), torch.rand(1, 2, 1) * 1e-3,
    )  # fmt: skip
    check(module, device, weights, None, TILE, batch(16, 1, 1, 256))


@BOTH
def test_rows_keep_their_bits_beside_nan_and_infinity(
    device: torch.device, module: ModuleType
) -> None:
    torch.manual_seed(1)
    weights = fp8_experts(2, 128, 64, 96)
    hidden, topk_weights, ids = batch(18, 2, 1, 128)
    ids[:] = 1  # all on one expert: a full block and a ragged one

    def output(hidden: Tensor, topk_weights: Tensor) -> Tensor:
        return stages(module, device, hidden, weights, topk_weights, ids, None).output(1)

    clean = output(hidden, topk_weights)
    order = torch.randperm(18)
    dirty = hidden[order]
    dirty[2, 5], dirty[9, 7] = float("nan"), float("inf")
    got = output(dirty, topk_weights[order])
    kept = torch.tensor([row not in (2, 9) for row in range(18)])
    assert torch.equal(got[kept], clean[order][kept])
    assert not got[~kept].isfinite().any(1).all()


def test_nan_codes_are_refused_at_load() -> None:
    weights = fp8_experts(2, 32, 16)
    refuse_nan(weights)
    weights.w2.view(torch.uint8)[1, 3, 5] = 0xFF
    with pytest.raises(ValueError, match="w2 of expert 1 holds NaN, expected finite e4m3 codes"):
        refuse_nan(weights)


def test_bad_input_is_refused_before_a_launch() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    e4m3, fp32, int32 = torch.float8_e4m3fn, torch.float32, torch.int32

    def held(size: int, offset: int, block: int = 128) -> FP8Experts:
        blocks, groups = -(-(offset + size) // block), 128 // block
        return FP8Experts(
            meta(2, 2 * size, 128, dtype=e4m3), meta(2, 2, blocks, groups, dtype=fp32),
            meta(2, 128, size, dtype=e4m3), meta(2, groups, blocks, dtype=fp32),
            (block, block), offset,
        )  # fmt: skip

    weights, routing = held(32, 96), Routing(meta(64, dtype=int32), meta(4, dtype=int32), 16, 2)
    x8 = FP8Rows(meta(4, 128, dtype=e4m3), meta(4, 1, dtype=fp32))
    factors = meta(4, 2, dtype=fp32)
    with counted() as launches:
        for module, x in ((grouped_fp8, x8), (grouped_fp8_bf16, meta(4, 128))):
            with pytest.raises(ValueError, match="intermediate_offset is 40, expected a multiple"):
                module.gate_up(x, held(32, 40), routing, None, TILE)
            with pytest.raises(ValueError, match=r"block_size is \(64, 64\), expected \(128, 128"):
                module.gate_up(x, held(32, 0, 64), routing, None, TILE)
            with pytest.raises(ValueError, match="intermediate size is 24, expected a multiple"):
                module.gate_up(x, held(24, 0), routing, None, TILE)
            with pytest.raises(ValueError, match="limit is -1"):
                module.gate_up(x, weights, routing, -1, TILE)
        with pytest.raises(ValueError, match=r"x.scale has shape \[4, 2\], expected \[4, 1\]"):
            wide = replace(x8, scale=meta(4, 2, dtype=fp32))
            grouped_fp8.gate_up(wide, weights, routing, None, TILE)
        with pytest.raises(ValueError, match=r"intermediate.scale has shape \[8, 2\]"):
            wide = FP8Rows(meta(8, 32, dtype=e4m3), meta(8, 2, dtype=fp32))
            grouped_fp8.down(wide, weights, routing, factors, TILE)
        with pytest.raises(ValueError, match="x has dtype torch.float16"):
            x = meta(4, 128, dtype=torch.float16)
            grouped_fp8_bf16.gate_up(x, weights, routing, None, TILE)
        with pytest.raises(ValueError, match="intermediate has 6 rows, expected 8"):
            grouped_fp8_bf16.down(meta(6, 32), weights, routing, factors, TILE)
    assert not launches
