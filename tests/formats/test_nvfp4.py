"""NVFP4 bit for bit against nvidia-modelopt and torchao, its codes against ml_dtypes."""

import warnings

import ml_dtypes
import numpy as np
import pytest
import torch

from step37_kernels.formats.nvfp4 import NVFP4Tensor, quantize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about their own optional extensions
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
    from torchao.prototype.mx_formats import nvfp4_tensor as torchao


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def as_bytes(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Codes 0..15, the low nibble first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


WEIGHTS = [
    (torch.float32, 1.0),
    (torch.float32, 1e-4),
    (torch.bfloat16, 1.0),
    (torch.bfloat16, 0.02),
]


@pytest.mark.parametrize("dtype, scale", WEIGHTS)
def test_bits_equal_modelopt(dtype, scale):
    weight = random(96, 256, dtype=dtype, scale=scale)
    weight[3, 16:64] = 0
    weight[4] *= 1e-7  # block scales below e4m3's smallest
    ours = quantize(weight)
    theirs, block_scale, global_scale = NVFP4QTensor.quantize(weight.clone(), 16)
    assert torch.equal(ours.packed, theirs._quantized_data)
    assert torch.equal(as_bytes(ours.block_scale), as_bytes(block_scale))
    assert torch.equal(ours.global_scale, global_scale)
    # modelopt multiplies the two scales first, we the element and its block scale (exact): each is
    # at most two fp32 roundings of 2^-24 from the true product.
    expected = theirs.dequantize(
        dtype=torch.float32, scale=block_scale, double_scale=global_scale, block_sizes={-1: 16}
    )
    torch.testing.assert_close(ours.dequantize(torch.float32), expected, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype, scale", WEIGHTS)
def test_bits_equal_torchao_but_for_ties(dtype, scale):
    weight = random(96, 256, dtype=dtype, scale=scale)
    ours = quantize(weight)
    global_scale = torchao.per_tensor_amax_to_scale(weight.abs().max())
    block_scale, packed = torchao.nvfp4_quantize(weight, 16, global_scale)
    assert torch.equal(ours.global_scale, global_scale)
    assert torch.equal(as_bytes(ours.block_scale), as_bytes(block_scale).view(96, 16))
    # torchao multiplies by the reciprocal scale, modelopt and we divide: three fp32 roundings
    # (3 * 2^-24) tell them apart, so only a quotient that close to a tie may differ, by one code.
    differ = unpack(ours.packed) != unpack(packed)
    step = ours.block_scale.double().repeat_interleave(16, -1) * global_scale.double()
    quotient = (weight.double().abs() / step)[differ]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    distance = (quotient[:, None] / ties - 1).abs().amin(-1)
    assert (distance <= 3 * 2**-24).all() and differ.float().mean() < 1e-3
    apart = unpack(ours.packed)[differ].int() - unpack(packed)[differ].int()
    assert (apart.abs() == 1).all()


def test_experts_each_have_their_global_scale():
    weight = random(3, 32, 64) * torch.tensor([1.0, 7.0, 0.01])[:, None, None]
    stacked = quantize(weight)
    for expert in range(3):
        single = quantize(weight[expert])
        assert torch.equal(stacked.packed[expert], single.packed)
        assert torch.equal(stacked.global_scale[expert], single.global_scale)
        got = stacked.dequantize(torch.bfloat16)[expert]
        assert torch.equal(got, single.dequantize(torch.bfloat16))


def test_all_codes_low_nibble_first():
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    packed = torch.arange(0, 16, 2, dtype=torch.uint8) | torch.arange(1, 16, 2).byte() << 4
    scale = torch.tensor([[2.5]]).to(torch.float8_e4m3fn)
    tensor = NVFP4Tensor(packed[None], scale, torch.tensor(0.125))
    np.testing.assert_array_equal(tensor.dequantize(torch.float32)[0], values * 2.5 * 0.125)


def test_rounding_of_elements_is_ml_dtypes():
    # With amax 6 and global scale 1 the block scale is 1, and elements are rounded as they stand.
    grid = torch.arange(-6, 6.0625, 0.0625)  # all ties and what lies between
    points = torch.cat([grid, torch.nextafter(grid, grid + 1).clamp(max=6)])
    points = torch.nn.functional.pad(points, (0, -points.numel() % 15)).view(-1, 15)
    weight = torch.cat([points, torch.full_like(points[:, :1], 6)], dim=-1)
    tensor = quantize(weight, global_scale=torch.tensor(1.0))
    expected = weight.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert (tensor.block_scale.float() == 1).all()
    np.testing.assert_array_equal(tensor.dequantize(torch.float32).numpy(), expected)


def test_a_small_given_global_scale_saturates():
    tensor = quantize(torch.full((1, 16), 1e4), global_scale=torch.tensor(1.0))
    assert (tensor.dequantize(torch.float32) == 6 * 448).all()


def test_zeros_stay_zeros():
    tensor = quantize(torch.zeros(2, 4, 32))
    assert (tensor.global_scale == 1).all() and (tensor.dequantize(torch.float32) == 0).all()


def test_shards_are_slices():
    whole = quantize(random(2, 64, 96))
    expected = whole.dequantize(torch.float32)
    shard = whole.shard(slice(5, 40), slice(16, 80))
    assert torch.equal(shard.dequantize(torch.float32), expected[:, 5:40, 16:80])
    assert torch.equal(whole.shard(None, None).dequantize(torch.float32), expected)


def test_errors_name_what_is_wrong():
    tensor = quantize(random(32, 64))
    with pytest.raises(
        ValueError, match="cols is slice\\(8, 32, None\\), expected multiples of 16"
    ):
        tensor.shard(None, slice(8, 32))
    with pytest.raises(ValueError, match=r"block_scale has shape \[32, 2\], expected \[32, 4\]"):
        NVFP4Tensor(tensor.packed, tensor.block_scale[:, ::2], tensor.global_scale)
    with pytest.raises(ValueError, match="packed has dtype torch.int8"):
        NVFP4Tensor(tensor.packed.view(torch.int8), tensor.block_scale, tensor.global_scale)
    with pytest.raises(ValueError, match=r"weight has shape \[2, 24\].*multiple of 16"):
        quantize(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(torch.full((1, 16), float("nan")))
    with pytest.raises(ValueError, match="global_scale is 0.0, expected positive"):
        quantize(torch.ones(1, 16), global_scale=torch.tensor(0.0))
