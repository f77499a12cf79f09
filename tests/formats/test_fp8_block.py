"""FP8 blocks against a numpy loop with ml_dtypes' casts, and shards against slices of the whole."""

import ml_dtypes
import numpy as np
import pytest
import torch

from step37_kernels.formats.fp8_block import FP8BlockTensor, quantize


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator) * 0.05


@pytest.mark.parametrize("shape", [(256, 384), (200, 130), (2, 129, 64)])
def test_blocks_match_a_loop(shape):
    weight = random(*shape)
    weight[..., :128, :128] = 0
    got = quantize(weight)
    dequantized = got.dequantize(torch.float32)
    for index in np.ndindex(got.scale_inv.shape):
        *lead, i, j = index
        part = (*lead, slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
        block = weight[part].numpy()
        amax = np.abs(block).max()
        scale = amax / np.float32(448) if amax else np.float32(1)
        assert got.scale_inv[index] == scale
        data = (block / scale).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(got.data[part].view(torch.uint8), data.view(np.uint8))
        np.testing.assert_array_equal(dequantized[part], data.astype(np.float32) * scale)


def test_dequantize_rounds_once_to_bf16():
    got = quantize(random(130, 130))
    assert torch.equal(got.dequantize(torch.bfloat16), got.dequantize(torch.float32).bfloat16())


@pytest.mark.parametrize("size, ranks", [(384, 2), (384, 4), (1280, 4), (1280, 8)])
def test_shards_beginning_inside_a_block(size, ranks):
    whole = quantize(random(size, size + 100))
    expected = whole.dequantize(torch.float32)
    local = size // ranks
    offsets = set()
    for rank in range(ranks):
        part = slice(rank * local, (rank + 1) * local)
        rows, cols = whole.shard(part, None), whole.shard(None, part)
        assert torch.equal(rows.dequantize(torch.float32), expected[part])
        assert torch.equal(cols.dequantize(torch.float32), expected[:, part])
        offsets.add(rows.row_offset)
        # A shard of a shard lands where the same slice of the whole does.
        inner = whole.shard(part, part).shard(slice(40, local - 5), slice(33, local))
        at = rank * local
        square = expected[at + 40 : at + local - 5, at + 33 : at + local]
        assert torch.equal(inner.dequantize(torch.float32), square)
    assert offsets != {0}  # otherwise nothing began inside a block


def test_a_shard_keeps_only_the_scales_it_touches():
    shard = quantize(random(1280, 64)).shard(slice(320, 640), None)
    assert shard.scale_inv.shape == (3, 1) and shard.row_offset == 64
    assert shard.data.dtype == torch.float8_e4m3fn and shard.shape == (320, 64)


def test_errors_name_what_is_wrong():
    data, scale = torch.zeros(64, 64).to(torch.float8_e4m3fn), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"scale_inv has shape \[1, 1\], expected \[2, 1\]"):
        FP8BlockTensor(data, scale, row_offset=65)
    with pytest.raises(ValueError, match="col_offset is 128, expected 0 to 127"):
        FP8BlockTensor(data, scale, col_offset=128)
    with pytest.raises(ValueError, match="data has dtype torch.float32"):
        FP8BlockTensor(data.float(), scale)
    with pytest.raises(ValueError, match="block_size is \\(0, 128\\)"):
        FP8BlockTensor(data, scale, (0, 128))
    with pytest.raises(ValueError, match="rows is slice\\(0, 65, None\\).*0..64"):
        FP8BlockTensor(data, scale).shard(slice(0, 65), None)
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(torch.full((2, 2), float("inf")))
