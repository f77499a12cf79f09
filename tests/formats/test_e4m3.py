"""float8 e4m3: every code and every rounding against ml_dtypes, which has its own casts."""

import ml_dtypes
import numpy as np
import pytest
import torch

from step37_kernels.formats.e4m3 import (
    E4M3_MAX,
    dequantize_per_token_group,
    power_of_two,
    quantize_per_token_group,
    to_e4m3,
)

CODES = np.arange(256, dtype=np.uint8)
VALUES = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
FINITE = np.sort(VALUES[np.isfinite(VALUES)])


def codes(x: torch.Tensor) -> np.ndarray:
    return to_e4m3(x).view(torch.uint8).numpy()


def test_powers_of_two_are_exact():
    exponent = torch.arange(-126, 128, dtype=torch.int32)
    expected = np.ldexp(np.float32(1), exponent.numpy())
    np.testing.assert_array_equal(power_of_two(exponent).numpy(), expected)


def test_every_code_survives():
    keeps = codes(torch.from_numpy(VALUES.copy()))
    nan = np.isnan(VALUES)
    np.testing.assert_array_equal(keeps[~nan], CODES[~nan])
    assert nan.sum() == 2 and np.isnan(keeps[nan].view(ml_dtypes.float8_e4m3fn)).all()


def test_ties_and_their_neighbours_round_as_ml_dtypes_does():
    middle = (FINITE[1:] + FINITE[:-1]) / 2  # exact in fp32: where nearest-even decides
    points = np.concatenate([middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)])
    expected = points.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(codes(torch.from_numpy(points)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_beyond_the_range_saturates(dtype):
    x = torch.tensor([464.5, 1e4, float("inf"), -500.0, -float("inf"), float("nan")], dtype=dtype)
    got = to_e4m3(x).float()
    assert got[:5].tolist() == [448, 448, 448, -448, -448] and got[5].isnan()


def test_integers_are_refused():
    with pytest.raises(ValueError, match="x has dtype torch.int32"):
        to_e4m3(torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("channels", [64, 128, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_groups_match_numpy(channels, dtype):
    torch.manual_seed(0)
    x = (torch.randn(5, channels) * torch.logspace(-6, 6, 5)[:, None]).to(dtype)
    x[2, : min(128, channels)] = 0
    q, scale = quantize_per_token_group(x)
    assert q.dtype == torch.float8_e4m3fn and q.shape == x.shape
    for group in range(-(-channels // 128)):
        part = x[:, group * 128 : (group + 1) * 128].float().numpy()
        amax = np.abs(part).max(-1)
        expected = np.where(amax > 0, amax / np.float32(E4M3_MAX), np.float32(1))
        np.testing.assert_array_equal(scale[:, group].numpy(), expected)
        data = (part / expected[:, None]).astype(ml_dtypes.float8_e4m3fn)
        got = q.view(torch.uint8)[:, group * 128 : (group + 1) * 128].numpy()
        np.testing.assert_array_equal(got, data.view(np.uint8))


def test_token_groups_stay_within_half_a_step():
    torch.manual_seed(1)
    x = torch.randn(16, 300) * 30
    q, scale = quantize_per_token_group(x)
    error = (dequantize_per_token_group(q, scale) - x).abs()
    # Half a step: 2^-4 of the value for normal e4m3 (3 bits behind the point), 2^-10 * scale below
    # the smallest normal; 2^-22 of the value for the two fp32 roundings around it.
    step = scale.repeat_interleave(128, -1)[:, :300]
    assert (error <= torch.maximum(x.abs() * 2**-4, step * 2**-10) + x.abs() * 2**-22).all()
    assert error.max() > 0


def test_a_shard_keeps_the_groups_of_the_whole():
    x = torch.randn(3, 384)
    whole = torch.cat([torch.zeros(3, 96), x], dim=1)  # zeros change no group's maximum
    expected, expected_scale = quantize_per_token_group(whole)
    q, scale = quantize_per_token_group(x, offset=96)
    assert torch.equal(q.view(torch.uint8), expected[:, 96:].view(torch.uint8))
    assert torch.equal(scale, expected_scale) and scale.shape == (3, 4)
    back = dequantize_per_token_group(q, scale, offset=96)
    assert torch.equal(back, dequantize_per_token_group(expected, expected_scale)[:, 96:])


def test_token_groups_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="offset is 128, expected 0 to 127"):
        quantize_per_token_group(torch.zeros(1, 4), offset=128)
    with pytest.raises(ValueError, match="group_size is 0"):
        quantize_per_token_group(torch.zeros(1, 4), 0)
    q, scale = quantize_per_token_group(torch.ones(2, 256))
    with pytest.raises(ValueError, match=r"scale has shape \[2, 1\], expected \[2, 2\]"):
        dequantize_per_token_group(q, scale[:, :1])
