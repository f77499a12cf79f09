"""NVFP4 x bf16 grouped GEMMs against the dequantised weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from nvfp4_layers import (
    FINITE_SCALES,
    down_reference,
    gate_up_reference,
    random_experts,
    routing_of,
)
from torch import Tensor

from step37_kernels.expert_weights import on_device
from step37_kernels.experts.grouped_nvfp4 import WEIGHT_UNIT, down, expand, gate_up
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats.nvfp4_tiles import (
    NVFP4Tiles,
    hidden_permutation,
    padded_intermediate,
    permuted_column,
    slab_offsets,
)
from step37_kernels.launch import counted, observed

E, K, TOP_K = 4, 256, 2
TILE = GemmTile(block_rows=16, block_n=64, block_k=128, num_warps=4, num_stages=3)
DOWN_TILE = replace(TILE, block_k=64)


@triton.jit
def _expand_kernel(words, codes, out, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    word, code = tl.arange(0, BLOCK_K // 8)[None, :], tl.arange(0, BLOCK_K // 16)[None, :]
    weights = expand(
        tl.load(words + slab_offsets(row, word, BLOCK_K, 8)),
        tl.load(codes + slab_offsets(row, code, BLOCK_K, 4)),
        BLOCK_N,
        BLOCK_K,
    )
    tl.store(out + row * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], weights)


def test_every_element_times_every_scale_is_exact(device: torch.device) -> None:
    """16 codes x 254 finite scales x 64 places of a slab, against the product in fp64."""
    shift, columns = torch.arange(16), torch.arange(64)
    codes = (columns[None, :] + shift[:, None]) % 16  # over 16 rows each place sees every code
    rows = codes.repeat(256, 1).to(torch.uint8)
    scale = FINITE_SCALES[torch.arange(256) % 254].repeat_interleave(16).to(torch.uint8)
    weights = replace(
        random_experts(1, 64, 2048),
        w13=(rows[:, ::2] | rows[:, 1::2] << 4)[None],
        w13_scale=scale[None, :, None].expand(1, -1, 4).contiguous().view(torch.float8_e4m3fn),
    )
    tiles = NVFP4Tiles.pack(on_device(weights, device))
    out = torch.empty(4096, 64, dtype=torch.bfloat16, device=device)
    _expand_kernel[(32,)](tiles.w13, tiles.w13_scale, out, 128, 64, num_warps=4)
    got = out.cpu().double() * WEIGHT_UNIT.value

    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    element = torch.cat([sizes, -sizes])[rows.long()]
    factor = scale.view(torch.float8_e4m3fn).double()
    product = (element * factor[:, None])[:, hidden_permutation(64)]
    gate, up = product[:2048], product[2048:]  # rows of w13: 8 of gate, 8 of up, in w2's order
    order = permuted_column.fn(torch.arange(2048)).view(-1, 8)
    expected = torch.stack([gate[order], up[order]], 1).view(4096, 64)
    assert torch.equal(got, expected)
    assert torch.equal(got.signbit()[expected != 0], expected.signbit()[expected != 0])


@triton.jit
def _permuted_column_kernel(out, K: tl.constexpr):
    tl.store(out + tl.arange(0, K), permuted_column(tl.arange(0, K)))


def test_kernels_and_the_host_permute_alike(device: torch.device) -> None:
    out = torch.empty(256, dtype=torch.int32, device=device)
    _permuted_column_kernel[(1,)](out, 256)
    assert torch.equal(out.cpu().long(), hidden_permutation(256))


def in_order(intermediate: Tensor, size: int) -> Tensor:
    """The intermediate's columns in the checkpoint's order; what pads them has to be zeros."""
    order = permuted_column.fn(torch.arange(padded_intermediate(size)))
    unpermuted = torch.empty_like(intermediate)
    unpermuted[:, order] = intermediate
    assert (unpermuted[:, size:] == 0).all()
    return unpermuted[:, :size]


def check(
    device: torch.device,
    size: int,
    ids: Tensor,
    limit: float | None,
    gate_up_tile: GemmTile = TILE,
    down_tile: GemmTile = DOWN_TILE,
) -> None:
    """gate_up and down of a random layer are within the bounds, in one launch each."""
    weights = random_experts(E, K, size)
    hidden, topk_weights = torch.randn(len(ids), K).bfloat16(), torch.rand(ids.shape)
    tiles = NVFP4Tiles.pack(on_device(weights, device))
    routing = routing_of(ids.to(device), E, gate_up_tile.block_rows)
    x = hidden[:, hidden_permutation(K)].to(device)
    with counted() as launches:
        intermediate = gate_up(x, tiles, routing, limit, gate_up_tile)
        partial = down(intermediate, tiles, routing, topk_weights.to(device), down_tile)
    assert launches == ["nvfp4_gate_up_kernel", "nvfp4_down_kernel"]
    got = in_order(intermediate.cpu(), size)
    exact, bound = gate_up_reference(hidden, weights, ids, limit)
    assert ((got.double() - exact).abs() <= bound).all()
    if limit:  # both clamps bite, else the test says nothing of them
        assert (exact.abs() == limit * limit).any()
    exact, bound = down_reference(got, weights, ids, topk_weights)
    assert ((partial.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("size, limit", [(48, None), (64, 0.25), (160, None), (320, 0.25)])
def test_shards_of_every_size(device: torch.device, size: int, limit: float | None) -> None:
    torch.manual_seed(0)
    check(device, size, torch.tensor([[3, 0], [1, 3], [0, 3]]), limit)


@pytest.mark.parametrize("block_rows", [16, 32])
def test_blocks_that_are_not_full(device: torch.device, block_rows: int) -> None:
    """One expert with 35 rows, one with one, two with none."""
    torch.manual_seed(1)
    ids = torch.full((18, TOP_K), 2)
    ids[11, 0] = 0
    tile = replace(TILE, block_rows=block_rows)
    check(device, 64, ids, None, replace(tile, block_n=128), replace(tile, block_k=64, block_n=128))


def test_one_token(device: torch.device) -> None:
    torch.manual_seed(2)
    check(device, 64, torch.tensor([[1, 3]]), None)


def test_not_a_number_stays_in_its_rows_and_rows_do_not_meet(device: torch.device) -> None:
    """A row's bits depend neither on its batch-mates nor on its place in a block."""
    torch.manual_seed(3)
    tiles = NVFP4Tiles.pack(on_device(random_experts(E, K, 64), device))
    ids, hidden = torch.tensor([[0, 1], [1, 0], [1, 2], [0, 2]]), torch.randn(4, K).bfloat16()
    topk_weights = torch.rand(4, TOP_K)

    def run(order: list[int], x: Tensor) -> tuple[Tensor, Tensor]:
        routing = routing_of(ids[order].to(device), E, 16)
        columns = hidden_permutation(K)
        rows = gate_up(x[order][:, columns].to(device), tiles, routing, None, TILE)
        sums = down(rows, tiles, routing, topk_weights[order].to(device), DOWN_TILE)
        back = torch.tensor(order).argsort()
        return rows.cpu().view(4, TOP_K, -1)[back], sums.cpu().view(4, TOP_K, -1)[back]

    expected = run([0, 1, 2, 3], hidden)
    poisoned = hidden.clone()
    poisoned[2, 100], poisoned[1, 7] = float("nan"), float("inf")
    for got, clean in zip(run([3, 2, 0, 1], poisoned), expected, strict=True):
        assert torch.equal(got[[0, 3]], clean[[0, 3]])
        assert got[2].isnan().all() and not got[1].isfinite().all()


def test_pairs_of_other_ranks_are_not_touched(device: torch.device) -> None:
    torch.manual_seed(4)
    tiles = NVFP4Tiles.pack(on_device(random_experts(E, K, 160), device))
    ids = torch.tensor([[-1, 1], [7, -1]], device=device)
    routing = routing_of(ids, E, 16)
    x, weights = torch.randn(2, K).bfloat16().to(device), torch.ones(2, TOP_K, device=device)
    output = {"nvfp4_gate_up_kernel": 4, "nvfp4_down_kernel": 5}
    with observed(lambda called: called.args[output[called.name]].fill_(77)):
        rows = gate_up(x, tiles, routing, None, TILE)
        partial = down(rows, tiles, routing, weights, DOWN_TILE)
    for written in (rows, partial):
        assert (written[[0, 2, 3]] == 77).all() and not (written[1] == 77).any()


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    tiles = NVFP4Tiles.pack(on_device(random_experts(E, K, 64), device))
    routing = routing_of(torch.zeros(0, TOP_K, dtype=torch.int64, device=device), E, 16)
    with counted() as launches:
        rows = gate_up(torch.empty(0, K).bfloat16().to(device), tiles, routing, None, TILE)
        down(rows, tiles, routing, torch.empty(0, TOP_K, device=device), DOWN_TILE)
    assert not launches


def test_errors_name_what_is_wrong() -> None:
    tiles = NVFP4Tiles.pack(random_experts(E, K, 160))
    routing = routing_of(torch.tensor([[0, 1]]), E, 16)
    x = torch.zeros(1, K, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x has shape \[1, 128\], expected \[any, 256\]"):
        gate_up(x[:, :128], tiles, routing, None, TILE)
    with pytest.raises(ValueError, match="x has dtype torch.float32"):
        gate_up(x.float(), tiles, routing, None, TILE)
    with pytest.raises(ValueError, match="routing.block_rows is 16, expected the tile's 32"):
        gate_up(x, tiles, routing, None, replace(TILE, block_rows=32))
    with pytest.raises(ValueError, match="tile.block_n is 128, .* that divides 320"):
        gate_up(x, tiles, routing, None, replace(TILE, block_n=128))
    with pytest.raises(ValueError, match="limit is -1.0"):
        gate_up(x, tiles, routing, -1.0, TILE)
    rows = torch.zeros(2, 192, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="tile.block_k is 128, .* that divides 192"):
        down(rows, tiles, routing, torch.ones(1, 2), TILE)
    with pytest.raises(ValueError, match=r"topk_weights has shape \[1, 3\]"):
        down(rows, tiles, routing, torch.ones(1, 3), DOWN_TILE)
