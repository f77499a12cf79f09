"""Rotary against transformers, with its llama3 frequencies and partial rotation."""

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import (
    Step3p7RotaryEmbedding,
    apply_rotary_pos_emb,
)

from step37_kernels.reference.rotary import apply_rotary, cos_sin_cache

LAYERS = [("full_attention", 16, 5e6), ("sliding_attention", 32, 1e4)]


def cache_of(config, layer_type: str, rotary_dim: int, theta: float) -> torch.Tensor:
    scaling = config.rope_parameters[layer_type]
    return cos_sin_cache(rotary_dim, theta, 8192, scaling)


@pytest.mark.parametrize("layer_type, rotary_dim, theta", LAYERS)
def test_cache_is_transformers(text_config, layer_type, rotary_dim, theta):
    cache = cache_of(text_config, layer_type, rotary_dim, theta)
    positions = torch.arange(8192)
    oracle = Step3p7RotaryEmbedding(text_config)
    cos, sin = oracle(torch.zeros(1), positions[None], layer_type)
    half = rotary_dim // 2
    expected = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
    # A frequency takes some eight fp32 roundings, and the angle scales their error; cosine and sine
    # of it add one of 2^-24 each.
    frequency = getattr(oracle, f"{layer_type}_inv_freq").repeat(2)
    bound = positions[:, None] * frequency * 8 * 2**-24 + 2**-22
    assert ((cache - expected).abs() <= bound).all()


def test_llama3_scaling_bites(text_config):
    scaled = cache_of(text_config, "full_attention", 16, 5e6)
    plain = cos_sin_cache(16, 5e6, 8192, None)
    same = (scaled == plain).all(0)[8:]  # sines tell frequencies apart
    assert same[0] and not same[-1]  # the highest frequency is kept, the lowest is not
    torch.testing.assert_close(scaled[1, -1], plain[1, -1] / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layer_type, rotary_dim, theta", LAYERS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rotation_is_transformers(text_config, layer_type, rotary_dim, theta, index):
    cache = cache_of(text_config, layer_type, rotary_dim, theta)
    positions = torch.tensor([0, 1, 2, 77, 1000, 4095], dtype=index)
    q, k = torch.randn(6, 6, 32), torch.randn(6, 2, 32)
    half = cache[positions].view(6, 2, -1)
    cos, sin = half.repeat(1, 1, 2).unbind(1)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for x, want in zip((q, k), expected, strict=True):
        got = apply_rotary(x, positions, cache)
        # Two products and a sum: three roundings of terms no larger than the pair's length.
        torch.testing.assert_close(got, want, rtol=0, atol=3 * 2**-24 * float(x.abs().max()) * 2)
        assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])
        assert not torch.equal(got[1:, :, : rotary_dim // 2], x[1:, :, : rotary_dim // 2])
        assert torch.equal(apply_rotary(x.bfloat16(), positions, cache), apply_rotary(
            x.bfloat16().float(), positions, cache).bfloat16())  # fmt: skip


def test_errors_name_what_is_wrong():
    x, positions = torch.zeros(2, 1, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="rotary_dim is 10, .* head dim 8"):
        apply_rotary(x, positions, torch.zeros(4, 10))
    with pytest.raises(ValueError, match=r"positions has shape \[1\], expected \[2\]"):
        apply_rotary(x, positions[:1], torch.zeros(4, 8))
    with pytest.raises(ValueError, match="rope_scaling type is 'yarn'"):
        cos_sin_cache(8, 1e4, 4, {"rope_type": "yarn"})
    with pytest.raises(ValueError, match="rope_scaling lacks low_freq_factor"):
        cos_sin_cache(8, 1e4, 4, {
            "rope_type": "llama3", "factor": 2, "high_freq_factor": 32,
            "original_max_position_embeddings": 64,
        })  # fmt: skip
