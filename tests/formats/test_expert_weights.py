"""Expert weights of one rank: their views of gate, up and down, and what they refuse."""

import pytest
import torch

from step37_kernels.expert_weights import BF16Experts, FP8Experts, NVFP4Experts
from step37_kernels.formats import fp8_block, nvfp4

E, N, K = 3, 48, 160


def matrices(size: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(E, size, K, generator=generator)
    up = torch.randn(E, size, K, generator=generator) * 9  # a scale of its own
    return gate, up, torch.randn(E, K, size, generator=generator)


def test_bf16_halves_without_copies():
    gate, up, down = matrices()
    weights = BF16Experts(torch.cat([gate, up], 1), down)
    assert (weights.num_experts, weights.intermediate_size, weights.hidden_size) == (E, N, K)
    assert weights.format == "bf16" and torch.equal(weights.gate(1, torch.float32), gate[1])
    assert torch.equal(weights.up(1, torch.bfloat16), up[1].bfloat16())
    assert weights.down(2, torch.float32).data_ptr() == down[2].data_ptr()


@pytest.mark.parametrize("size, ranks", [(384, 2), (384, 4), (1280, 4), (1280, 8)])
def test_fp8_shards_are_slices_of_the_whole(size, ranks):
    gate, up, down = (fp8_block.quantize(m) for m in matrices(size))
    local = size // ranks
    for rank in range(ranks):
        part = slice(rank * local, (rank + 1) * local)
        g, u, d = gate.shard(part, None), up.shard(part, None), down.shard(None, part)
        weights = FP8Experts.of(g, u, d)
        assert weights.format == "fp8"
        assert (weights.num_experts, weights.intermediate_size, weights.hidden_size) == (
            E,
            local,
            K,
        )
        for e in range(E):
            whole = gate.dequantize(torch.float32)[e, part]
            assert torch.equal(weights.gate(e, torch.float32), whole)
            assert torch.equal(weights.up(e, torch.float32), up.dequantize(torch.float32)[e, part])
            whole = down.dequantize(torch.float32)[e, :, part]
            assert torch.equal(weights.down(e, torch.float32), whole)


def nvfp4_parts() -> tuple[nvfp4.NVFP4Tensor, nvfp4.NVFP4Tensor, nvfp4.NVFP4Tensor]:
    gate, up, down = (nvfp4.quantize(m) for m in matrices())
    return gate, up, down


def nvfp4_experts() -> NVFP4Experts:
    return NVFP4Experts.of(*nvfp4_parts())


def test_nvfp4_keeps_the_global_scales_apart():
    weights = nvfp4_experts()
    assert weights.format == "nvfp4"
    assert (weights.num_experts, weights.intermediate_size, weights.hidden_size) == (E, N, K)
    gate, up, down = (part.dequantize(torch.float32) for part in nvfp4_parts())
    for e in range(E):
        assert torch.equal(weights.gate(e, torch.float32), gate[e])
        assert torch.equal(weights.up(e, torch.float32), up[e])
        assert torch.equal(weights.down(e, torch.float32), down[e])


def test_errors_name_the_tensor():
    gate, up, down = matrices()
    w13 = torch.cat([gate, up], 1)
    with pytest.raises(ValueError, match=r"w2 has shape \[3, 48, 160\], expected \[3, 160, 48\]"):
        BF16Experts(w13, down.mT)
    with pytest.raises(ValueError, match="w2 has dtype torch.bfloat16, expected torch.float32"):
        BF16Experts(w13, down.bfloat16())
    with pytest.raises(ValueError, match="w13 has 95 rows"):
        BF16Experts(w13[:, 1:], down)
    e4m3 = torch.float8_e4m3fn
    scales = torch.ones(E, 2, 1, 2), torch.ones(E, 2, 1)
    FP8Experts(w13.to(e4m3), scales[0], down.to(e4m3), scales[1], intermediate_offset=80)
    with pytest.raises(ValueError, match=r"w13_scale .* expected \[3, 2, 2, 2\]"):
        FP8Experts(w13.to(e4m3), scales[0], down.to(e4m3), scales[1], intermediate_offset=96)
    with pytest.raises(ValueError, match="intermediate_offset is 128, expected 0 to 127"):
        FP8Experts(w13.to(e4m3), scales[0], down.to(e4m3), scales[1], intermediate_offset=128)
    good = nvfp4_experts()
    with pytest.raises(ValueError, match=r"w13_global_scale has shape \[3\], expected \[3, 2\]"):
        NVFP4Experts(
            good.w13, good.w13_scale, good.w2_global_scale, good.w2, good.w2_scale,
            good.w2_global_scale,
        )  # fmt: skip
    with pytest.raises(ValueError, match="intermediate size is 24, expected a multiple of 16"):
        NVFP4Experts(
            good.w13[:, :48], good.w13_scale[:, :48], good.w13_global_scale, good.w2, good.w2_scale,
            good.w2_global_scale,
        )  # fmt: skip
