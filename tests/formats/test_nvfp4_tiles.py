"""The layout of NVFP4 experts for the Hopper GEMMs: what is kept, and where it lies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from step37_kernels.expert_weights import NVFP4Experts
from step37_kernels.formats import nvfp4_tiles
from step37_kernels.formats.nvfp4_tiles import NVFP4Tiles, hidden_permutation

E, K = 3, 128
FIELDS = ("w13", "w13_scale", "w13_global_scale", "w2", "w2_scale", "w2_global_scale")


def random_experts(size: int, scale_codes: torch.Tensor) -> NVFP4Experts:
    """All elements, and block scales out of `scale_codes` (e4m3 bytes)."""

    def scales(*shape: int) -> torch.Tensor:
        drawn = scale_codes[torch.randint(len(scale_codes), shape)]
        return drawn.to(torch.uint8).view(torch.float8_e4m3fn)

    def elements(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, dtype=torch.uint8)

    return NVFP4Experts(
        elements(E, 2 * size, K // 2), scales(E, 2 * size, K // 16), torch.rand(E, 2),
        elements(E, K, size // 2), scales(E, K, size // 16), torch.rand(E),
    )  # fmt: skip


@pytest.mark.parametrize("size", [16, 48, 64, 160, 320])
def test_positive_scales_come_back_byte_for_byte(size: int, monkeypatch) -> None:
    monkeypatch.setattr(nvfp4_tiles, "_BYTES_AT_A_TIME", 2 * 640 * K)  # several chunks of experts
    torch.manual_seed(0)
    weights = random_experts(size, torch.arange(1, 127))
    tiles = NVFP4Tiles.pack(weights)
    assert (tiles.num_experts, tiles.hidden_size, tiles.intermediate_size) == (E, K, size)
    assert tiles.intermediate_padded == -(-size // 64) * 64
    back = tiles.unpack()
    for name in FIELDS:
        kept, expected = getattr(back, name), getattr(weights, name)
        assert kept.dtype == expected.dtype
        assert torch.equal(kept.view(torch.uint8), expected.view(torch.uint8)), name


def test_negative_and_zero_scales_keep_every_value() -> None:
    torch.manual_seed(0)
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F])
    weights = random_experts(160, finite)
    back = NVFP4Tiles.pack(weights).unpack()
    for e in range(E):
        for part in ("gate", "up", "down"):
            expected = getattr(weights, part)(e, torch.float32)
            assert torch.equal(getattr(back, part)(e, torch.float32), expected)


def test_a_lane_holds_one_group() -> None:
    """What the GEMMs rely on: registers of one lane of the left operand share a block scale."""
    order = hidden_permutation(192)
    assert torch.equal(order.sort().values, torch.arange(192))
    registers = order.view(3, 2, 2, 2, 4, 2)  # slab, S, step, h, lane, j
    assert (registers // 16 == torch.arange(12).view(3, 1, 1, 1, 4, 1)).all()


def test_memory_is_reused_where_the_layout_has_its_size() -> None:
    torch.manual_seed(0)
    weights = random_experts(96, torch.arange(1, 127))
    expected = NVFP4Tiles.pack(weights)
    places = weights.w13.data_ptr(), weights.w2.data_ptr()
    tiles = NVFP4Tiles.pack(weights, reuse_memory=True)
    assert tiles.w13.data_ptr() == places[0] and tiles.w2.data_ptr() != places[1]  # w2 is padded
    assert torch.equal(tiles.w13, expected.w13) and torch.equal(tiles.w2, expected.w2)


def test_errors_name_what_is_wrong() -> None:
    weights = random_experts(64, torch.tensor([0x38]))
    weights.w2_scale.view(torch.uint8)[1, 5, 2] = 0xFF
    with pytest.raises(ValueError, match="w2_scale of expert 1 holds NaN"):
        NVFP4Tiles.pack(weights)
    tiles = NVFP4Tiles.pack(random_experts(64, torch.tensor([0x38])))
    with pytest.raises(ValueError, match=r"w13 has shape \[3, 2, 2, 64, 8\], expected \[3, 4"):
        replace(tiles, intermediate_size=128)
    odd = NVFP4Experts(
        torch.zeros(1, 64, 16, dtype=torch.uint8),
        torch.ones(1, 64, 2).to(torch.float8_e4m3fn),
        torch.ones(1, 2),
        torch.zeros(1, 32, 16, dtype=torch.uint8),
        torch.ones(1, 32, 2).to(torch.float8_e4m3fn),
        torch.ones(1),
    )
    with pytest.raises(ValueError, match="hidden size is 32, expected a multiple of 64"):
        NVFP4Tiles.pack(odd)
