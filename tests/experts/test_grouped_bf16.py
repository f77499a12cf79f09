"""BF16 grouped GEMMs against fp64, with a bound from the arithmetic (`bounds.expect`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from step37_kernels.expert_weights import BF16Experts, on_device
from step37_kernels.experts import grouped_bf16
from step37_kernels.experts.grouped_bf16 import down, gate_up
from step37_kernels.experts.routing import Routing
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.launch import counted
from tests.experts.bounds import expect
from tests.experts.dense_layers import TILE, batch, bf16_experts, stages
from tests.experts.nvfp4_layers import routing_of


def output(
    device: torch.device, rows: tuple[Tensor, Tensor, Tensor], weights: BF16Experts,
    limit: float | None, tile: GemmTile = TILE,
) -> Tensor:  # fmt: skip
    """The layer's result [T, K] for hidden, router weights and ids."""
    hidden, topk_weights, ids = rows
    args = (hidden, weights, topk_weights, ids, limit, tile)
    return stages(grouped_bf16, device, *args).output(ids.shape[1])


@pytest.mark.parametrize(
    ("size", "limit", "tile"),
    [
        (160, None, GemmTile(16, 64, 64, 4, 3)),  # 160 columns are two and a half steps
        (160, 0.5, GemmTile(32, 128, 128, 4, 3)),  # and the last tile of rows is half empty
        (320, 7.0, GemmTile(16, 128, 64, 4, 3)),
        (48, None, GemmTile(16, 128, 128, 4, 3)),
    ],
)
def test_layer_is_within_its_bound(
    device: torch.device, size: int, limit: float | None, tile: GemmTile
) -> None:
    """Ragged blocks, an expert with no rows, ids of other ranks, a limit that bites."""
    torch.manual_seed(size)
    weights = bf16_experts(4, 272, size)  # 272 is no multiple of a step either
    hidden, topk_weights, ids = batch(21, 4, 3, 272)
    ids[ids == 1] = -1
    ids[5, 0] = 4
    got = output(device, (hidden, topk_weights, ids), weights, limit, tile)
    expected = expect(hidden, weights, topk_weights, ids, limit)
    assert ((got - expected.output).abs() <= expected.bound).all()
    assert expected.bound.norm() < 0.1 * expected.output.norm()  # the bound says something
    if limit == 0.5:
        free = expect(hidden, weights, topk_weights, ids, None).output
        assert (free - expected.output).norm() > 0.05 * expected.output.norm()


def test_the_model_s_shape_and_one_token(device: torch.device) -> None:
    torch.manual_seed(0)
    weights = bf16_experts(1, 4096, 160)
    hidden, topk_weights, ids = batch(1, 1, 1, 4096)
    tile = GemmTile(16, 128, 64, 4, 3)
    got = output(device, (hidden, topk_weights, ids), weights, None, tile)
    expected = expect(hidden, weights, topk_weights, ids, None)
    assert ((got - expected.output).abs() <= expected.bound).all()


def test_rows_keep_their_bits_beside_nan_and_infinity(device: torch.device) -> None:
    torch.manual_seed(1)
    weights = bf16_experts(2, 128, 64)
    hidden, topk_weights, ids = batch(18, 2, 1, 128)
    ids[:] = 1  # all on one expert: a full block and a ragged one
    clean = output(device, (hidden, topk_weights, ids), weights, None)
    order = torch.randperm(18)
    dirty = hidden[order]
    dirty[2, 5], dirty[9, 7] = float("nan"), float("inf")
    got = output(device, (dirty, topk_weights[order], ids), weights, None)
    kept = torch.tensor([row not in (2, 9) for row in range(18)])
    assert torch.equal(got[kept], clean[order][kept])
    assert not got[~kept].isfinite().any(1).all()


def test_limits_keep_nan(device: torch.device) -> None:
    weights = bf16_experts(1, 64, 16)
    hidden, topk_weights, ids = batch(2, 1, 1, 64)
    hidden[1, 3] = float("nan")
    got = output(device, (hidden, topk_weights, ids), weights, 0.5)
    assert got[0].isfinite().all() and got[1].isnan().all()


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    weights = on_device(bf16_experts(2, 64, 16), device)
    none = torch.empty(0, 2, dtype=torch.int32, device=device)
    with counted() as launches:
        x = torch.empty(0, 64, dtype=torch.bfloat16, device=device)
        routing = routing_of(none, 2, 16)
        intermediate = gate_up(x, weights, routing, None, TILE)
        partial = down(intermediate, weights, routing, none.float(), TILE)
    assert intermediate.shape == (0, 16) and partial.shape == (0, 64) and not launches


def test_bad_input_is_refused_before_a_launch() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = BF16Experts(meta(2, 64, 64), meta(2, 64, 32))
    slots, owners = meta(64, dtype=torch.int32), meta(4, dtype=torch.int32)
    routing = Routing(slots, owners, 16, 2)
    x, intermediate = meta(4, 64), meta(8, 32)
    factors = meta(4, 2, dtype=torch.float32)
    with counted() as launches:
        with pytest.raises(ValueError, match=r"x has shape \[4, 32\], expected \[any, 64\]"):
            gate_up(meta(4, 32), weights, routing, None, TILE)
        with pytest.raises(ValueError, match="x has dtype torch.float32"):
            gate_up(meta(4, 64, dtype=torch.float32), weights, routing, None, TILE)
        with pytest.raises(ValueError, match="x has strides"):
            gate_up(meta(64, 4).T, weights, routing, None, TILE)
        with pytest.raises(ValueError, match="limit is -1"):
            gate_up(x, weights, routing, -1, TILE)
        with pytest.raises(ValueError, match="routing.block_rows is 16, expected the tile's 32"):
            gate_up(x, weights, routing, None, replace(TILE, block_rows=32))
        with pytest.raises(ValueError, match=r"pair_of_slot has shape \[64\], expected \[32\]"):
            gate_up(x, weights, replace(routing, expert_of_block=owners[:2]), None, TILE)
        with pytest.raises(ValueError, match="intermediate size is 24, expected a multiple of 16"):
            gate_up(x, BF16Experts(meta(2, 48, 64), meta(2, 64, 24)), routing, None, TILE)
        with pytest.raises(ValueError, match="routing.pair_of_slot is on cpu, expected meta"):
            cpu = torch.zeros(64, dtype=torch.int32)
            gate_up(x, weights, replace(routing, pair_of_slot=cpu), None, TILE)
        with pytest.raises(ValueError, match="intermediate has 7 rows, expected 8"):
            down(intermediate[:7], weights, routing, factors, TILE)
        with pytest.raises(ValueError, match=r"topk_weights has shape \[8, 1\]"):
            down(intermediate, weights, routing, factors.view(8, 1), TILE)
        with pytest.raises(ValueError, match="w2 is on meta, expected cpu"):
            down(torch.zeros(8, 32, dtype=torch.bfloat16), weights, routing, factors, TILE)
    assert not launches
