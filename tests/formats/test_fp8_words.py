"""FP8 weights with a scale per row, and their order for the kernels."""

from __future__ import annotations

import pytest
import torch

from step37_kernels.formats import fp8_block
from step37_kernels.formats.fp8_words import FP8Words


def test_rows_are_quantised_by_powers_of_two() -> None:
    torch.manual_seed(0)
    weight = (
        torch.randn(6, 320) * torch.tensor([1e-3, 1, 7, 300, 1e30, 1e-38])[:, None]
    ).bfloat16()
    weight[2, 5], weight[3] = 448 * 8, 0
    quantized = fp8_block.quantize_rows(weight)
    scale = quantized.scale_inv[:, 0]
    assert quantized.block_size == (1, 320) and (torch.frexp(scale)[0] == 0.5).all()
    amax = weight.float().abs().amax(1)
    assert scale[2] == 8 and scale[3] == 1  # 448 * 8 needs no more than 8
    ordinary = [0, 1, 2, 4]
    assert (amax / scale <= 448).all() and (amax / scale > 224)[ordinary].all()
    back = quantized.dequantize(torch.float32)
    assert torch.equal(back, back.bfloat16().float())  # nothing is lost in bf16
    # Half a step of e4m3: 2^-4 of a number, or 2^-10 of the scale below its normal numbers.
    bound = torch.maximum(weight.float().abs() * 2.0**-4, scale[:, None] * 2.0**-10)
    assert ((back - weight.float()).abs() <= bound).all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"weight has shape \[3\]"),
        (torch.ones(0, 16), "not empty"),
        (torch.ones(2, 16, dtype=torch.int32), "weight has dtype torch.int32"),
        (torch.full((2, 16), torch.nan), "holds NaN or infinity"),
        (torch.full((2, 16), torch.inf), "holds NaN or infinity"),
    ],
)
def test_weights_that_have_no_rows_to_quantise(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp8_block.quantize_rows(weight)


def test_there_and_back() -> None:
    codes = torch.arange(256).repeat(48 * 130 // 256 + 1)[: 48 * 130].view(130, 48)
    codes[codes & 0x7F == 0x7F] = 0
    data = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    weight = fp8_block.FP8BlockTensor(data, torch.rand(130, 1), (1, 48))
    packed = FP8Words.pack(weight)
    assert packed.shape == (130, 48) and packed.words.shape == (130, 12)
    assert packed.arrived.shape == (3,) and not packed.arrived.any()
    back = packed.unpack()
    assert torch.equal(back.data.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(back.scale_inv, weight.scale_inv) and back.block_size == weight.block_size


def test_word_t_holds_columns_2t_and_2t_plus_8() -> None:
    """The place of each of 16 columns, spelled out."""
    data = torch.arange(16, dtype=torch.uint8)[None].view(torch.float8_e4m3fn)
    packed = FP8Words.pack(fp8_block.FP8BlockTensor(data, torch.ones(1, 1), (1, 16)))
    assert packed.words.view(torch.uint8).view(4, 4).tolist() == [
        [0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]
    ]  # fmt: skip


def test_what_has_no_such_order_is_refused() -> None:
    row = torch.ones(4, 24)
    with pytest.raises(ValueError, match=r"blocks of \[128, 128\], expected a scale per row"):
        FP8Words.pack(fp8_block.quantize(row))
    with pytest.raises(ValueError, match="24 columns, expected a multiple of 16"):
        FP8Words.pack(fp8_block.quantize_rows(row))
    quantized = fp8_block.quantize_rows(torch.ones(4, 32))
    quantized.data.view(torch.uint8)[3, 7] = 0xFF
    with pytest.raises(ValueError, match="weight holds NaN"):
        FP8Words.pack(quantized)
    with pytest.raises(ValueError, match=r"arrived has shape \[2\], expected \[1\]"):
        FP8Words(torch.zeros(4, 8).int(), torch.ones(4), torch.zeros(2).int())
