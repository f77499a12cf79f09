"""NVFP4 x NVFP4 grouped GEMMs, and the quantiser of their activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from nvfp4_layers import (
    down_reference,
    gate_up_reference,
    random_experts,
    routing_of,
)
from torch import Tensor

from step37_kernels.expert_weights import on_device
from step37_kernels.experts.grouped_nvfp4_nvfp4 import down, gate_up, quantize_nvfp4_row
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats import nvfp4
from step37_kernels.formats.nvfp4 import NVFP4Tensor
from step37_kernels.launch import counted, observed

E, K, TOP_K = 4, 256, 2
TILE = GemmTile(block_rows=16, block_n=128, block_k=128, num_warps=4, num_stages=3)


@pytest.fixture
def blackwell(device: torch.device) -> torch.device:
    """Where the scaled FP4 product is: the interpreter, or a GPU of sm_100 up."""
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] < 10:
        pytest.skip("no scaled FP4 product before sm_100")
    return device


@triton.jit
def _quantize_kernel(x, packed, scale, global_scale, K: tl.constexpr, GROUPS: tl.constexpr):
    quantize_nvfp4_row(x, packed, scale, tl.program_id(0), tl.load(global_scale), K, GROUPS)


def quantised(x: Tensor, global_scale: Tensor) -> NVFP4Tensor:
    """x by the kernels' helper, on x's device."""
    rows, columns = x.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, columns // 16, dtype=torch.float8_e4m3fn, device=x.device)
    unit, groups = global_scale.to(x.device), triton.next_power_of_2(columns // 16)
    _quantize_kernel[(rows,)](x, packed, scale, unit, columns, groups, num_warps=4)
    return NVFP4Tensor(packed, scale, unit)


@pytest.mark.parametrize("unit", [0.01, 3e-4, 0.5])
def test_rows_are_quantised_as_the_format_says(device: torch.device, unit: float) -> None:
    """Bit for bit, with a global scale that fits, one that saturates and one that is coarse."""
    torch.manual_seed(0)
    x = torch.randn(8, 160).bfloat16()
    x[1, 16:48] = 0
    x[2] *= 2.0**-20  # block scales below e4m3's smallest
    x[3] *= torch.linspace(0, 200, 160)
    scale = torch.tensor(unit)
    got, expected = quantised(x.to(device), scale), nvfp4.quantize(x, scale)
    assert torch.equal(got.packed.cpu(), expected.packed)
    assert torch.equal(
        got.block_scale.cpu().view(torch.uint8), expected.block_scale.view(torch.uint8)
    )


def test_every_tie_of_an_element_goes_to_even(device: torch.device) -> None:
    grid = torch.arange(-6, 6.0625, 0.0625)
    points = torch.nn.functional.pad(grid, (0, -len(grid) % 15)).view(-1, 15)
    x = torch.cat([points, torch.full_like(points[:, :1], 6)], 1).bfloat16()  # block scales of 1
    got, expected = quantised(x.to(device), torch.tensor(1.0)), nvfp4.quantize(x, torch.tensor(1.0))
    assert torch.equal(got.packed.cpu(), expected.packed)


def test_not_a_number_and_infinity_stay_in_their_group(device: torch.device) -> None:
    x = torch.randn(2, 64).bfloat16()
    x[0, 20], x[1, 63] = float("nan"), float("-inf")
    scale = quantised(x.to(device), torch.tensor(0.01)).block_scale.cpu().float()
    expected = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(scale.isnan(), expected)


def check(
    device: torch.device, size: int, ids: Tensor, limit: float | None, tile: GemmTile = TILE
) -> None:
    """gate_up and down of a random layer are within the bounds, in one launch each."""
    weights = random_experts(E, K, size)
    hidden, topk_weights = torch.randn(len(ids), K).bfloat16(), torch.rand(ids.shape)
    routing, ours = routing_of(ids.to(device), E, tile.block_rows), on_device(weights, device)
    x = quantised(hidden.to(device), torch.tensor(0.002))
    with counted() as launches:
        intermediate = gate_up(x, ours, routing, limit, tile)
    same = nvfp4.quantize(hidden, torch.tensor(0.002)).dequantize(torch.float64)
    exact, bound = gate_up_reference(same, weights, ids, limit)
    assert ((intermediate.cpu().double() - exact).abs() <= bound).all()

    rows = quantised(intermediate, torch.tensor(0.001))
    with counted() as more:
        partial = down(rows, ours, routing, topk_weights.to(device), replace(tile, block_k=64))
    assert launches + more == ["nvfp4_nvfp4_gate_up_kernel", "nvfp4_nvfp4_down_kernel"]
    same = NVFP4Tensor(rows.packed.cpu(), rows.block_scale.cpu(), rows.global_scale.cpu())
    exact, bound = down_reference(same.dequantize(torch.float64), weights, ids, topk_weights)
    assert ((partial.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("size, limit", [(48, None), (160, 0.25), (320, None)])
def test_shards_of_every_size(blackwell: torch.device, size: int, limit: float | None) -> None:
    torch.manual_seed(0)
    check(blackwell, size, torch.tensor([[3, 0], [1, 3], [0, 3]]), limit)


def test_blocks_that_are_not_full(blackwell: torch.device) -> None:
    torch.manual_seed(1)
    ids = torch.full((18, TOP_K), 2)
    ids[11, 0] = 0
    check(blackwell, 64, ids, None, replace(TILE, block_rows=32))


def test_not_a_number_stays_in_its_rows_and_other_ranks_pairs_are_not_touched(
    blackwell: torch.device,
) -> None:
    torch.manual_seed(2)
    # 48 channels are less than a trip of the loop: the scales after them are the next row's.
    weights = on_device(random_experts(E, K, 48), blackwell)
    ids, hidden = torch.tensor([[0, 1], [0, 1], [-1, 9]]), torch.randn(3, K).bfloat16()
    hidden[1, 200] = float("nan")
    routing, unit = routing_of(ids.to(blackwell), E, 16), torch.tensor(0.01)
    output = {"nvfp4_nvfp4_gate_up_kernel": 6, "nvfp4_nvfp4_down_kernel": 7}
    with observed(lambda called: called.args[output[called.name]].fill_(77)):
        rows = gate_up(quantised(hidden.to(blackwell), unit), weights, routing, None, TILE)
        topk_weights = torch.ones(3, TOP_K, device=blackwell)
        tile = replace(TILE, block_k=64)
        partial = down(quantised(rows, unit), weights, routing, topk_weights, tile)
    for written in (rows, partial):
        assert written[:2].isfinite().all() and written[2:4].isnan().all()
        assert (written[4:] == 77).all() and not (written[:2] == 77).any()


def test_errors_name_what_is_wrong() -> None:
    weights = random_experts(E, K, 64)
    routing, unit = routing_of(torch.tensor([[0, 1]]), E, 16), torch.tensor(1.0)
    x = nvfp4.quantize(torch.zeros(1, K), unit)
    with pytest.raises(ValueError, match=r"x.packed has shape \[1, 64\], expected \[any, 128\]"):
        gate_up(nvfp4.quantize(torch.zeros(1, 128), unit), weights, routing, None, TILE)
    with pytest.raises(ValueError, match="tile.block_k is 96, expected a multiple of 64"):
        gate_up(x, weights, routing, None, replace(TILE, block_k=96))
    with pytest.raises(ValueError, match="weights.w13 has strides"):
        strided = weights.w13.transpose(1, 2).contiguous().transpose(1, 2)
        gate_up(x, replace(weights, w13=strided), routing, None, TILE)
    rows = nvfp4.quantize(torch.zeros(2, 64), unit)
    with pytest.raises(ValueError, match="tile.block_n is 96, expected a divisor of 256"):
        down(rows, weights, routing, torch.ones(1, 2), replace(TILE, block_n=96))
