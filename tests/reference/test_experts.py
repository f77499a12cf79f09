"""The routed experts against transformers' Step3p7Experts, in every format and sharding."""

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from step37_kernels.expert_weights import BF16Experts, ExpertWeights, FP8Experts, NVFP4Experts
from step37_kernels.formats import fp8_block, nvfp4
from step37_kernels.formats.e4m3 import dequantize_per_token_group, quantize_per_token_group
from step37_kernels.reference.activation import swiglu_step
from step37_kernels.reference.experts import experts

E, K, N, TOP_K = 12, 64, 48, 3
# Sums of 64 and of 48 fp32 terms of order one, in another order than the oracle's.
CLOSE = {"rtol": 0, "atol": 256 * 2**-24}


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(E)[:TOP_K] for _ in range(tokens)])
    return torch.rand(tokens, TOP_K), ids.int()


@pytest.fixture
def source(text_config, randomize) -> Step3p7Experts:
    """transformers' experts with random weights."""
    module = Step3p7Experts(text_config)
    randomize(module)
    return module


def oracle_holding(weights: ExpertWeights, config, limit: float | None) -> Step3p7Experts:
    """transformers' experts holding `weights` dequantised."""
    oracle = Step3p7Experts(config, swiglu_limit=limit)
    for e in range(E):
        gate_up = [weights.gate(e, torch.float32), weights.up(e, torch.float32)]
        oracle.gate_up_proj.data[e] = torch.cat(gate_up)
        oracle.down_proj.data[e] = weights.down(e, torch.float32)
    return oracle


def fp8_experts(oracle: Step3p7Experts) -> FP8Experts:
    gate, up = (fp8_block.quantize(half) for half in oracle.gate_up_proj.data.chunk(2, dim=1))
    down = fp8_block.quantize(oracle.down_proj.data)
    return FP8Experts.of(gate, up, down)


def nvfp4_experts(oracle: Step3p7Experts) -> NVFP4Experts:
    gate, up = oracle.gate_up_proj.data.chunk(2, dim=1)
    return NVFP4Experts.of(*(nvfp4.quantize(m) for m in (gate, 3 * up, oracle.down_proj.data)))


@pytest.mark.parametrize("limit", [None, 0.1])
@pytest.mark.parametrize("form", ["bf16", "fp8", "nvfp4"])
def test_experts_are_transformers(text_config, source, form, limit):
    build = {"fp8": fp8_experts, "nvfp4": nvfp4_experts}
    weights: ExpertWeights = (
        BF16Experts(source.gate_up_proj.data, source.down_proj.data)
        if form == "bf16"
        else build[form](source)
    )
    hidden, (topk_weights, topk_ids) = torch.randn(20, K), routing(20)
    oracle = oracle_holding(weights, text_config, limit)
    with torch.no_grad():
        expected = oracle(hidden, topk_ids.long(), topk_weights)
    got = experts(hidden, weights, topk_weights, topk_ids, limit)
    torch.testing.assert_close(got, expected, **CLOSE)
    if limit:
        free = experts(hidden, weights, topk_weights, topk_ids, None)
        assert (free - got).abs().max() > 0.01  # the limit bites


def test_bf16_is_rounded_once(source):
    weights = BF16Experts(source.gate_up_proj.data.bfloat16(), source.down_proj.data.bfloat16())
    hidden, (topk_weights, topk_ids) = torch.randn(9, K).bfloat16(), routing(9)
    got = experts(hidden, weights, topk_weights, topk_ids, None)
    exact = experts(hidden.float(), weights, topk_weights, topk_ids, None)
    assert torch.equal(got, exact.bfloat16())


def test_expert_parallel_parts_add_up(source):
    w13, w2 = source.gate_up_proj.data, source.down_proj.data
    hidden, (topk_weights, topk_ids) = torch.randn(15, K), routing(15)
    topk_ids[3] = -1  # padding
    topk_ids[4, 1] = -1
    topk_ids[5, 0] = E  # an expert nobody here holds
    whole = experts(hidden, BF16Experts(w13, w2), topk_weights, topk_ids, None)
    parts = [
        experts(hidden, BF16Experts(w13[i : i + 4], w2[i : i + 4]), topk_weights, topk_ids, None, i)
        for i in range(0, E, 4)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, **CLOSE)
    assert (whole[3] == 0).all() and (whole[[0, 4, 5]] != 0).any(1).all()


@pytest.mark.parametrize("size, ranks", [(384, 2), (384, 4), (1280, 8)])
def test_tensor_parallel_fp8_parts_add_up(size, ranks):
    gate, up = (fp8_block.quantize(torch.randn(2, size, K) * K**-0.5) for _ in range(2))
    down = fp8_block.quantize(torch.randn(2, K, size) * size**-0.5)

    def part(rank: int, ranks: int) -> FP8Experts:
        channels = slice(rank * size // ranks, (rank + 1) * size // ranks)
        g, u, d = gate.shard(channels, None), up.shard(channels, None), down.shard(None, channels)
        return FP8Experts.of(g, u, d)

    hidden, topk_ids = torch.randn(6, K), torch.tensor([[0, 1]] * 6, dtype=torch.int32)
    topk_weights = torch.rand(6, 2)
    whole = experts(hidden, part(0, 1), topk_weights, topk_ids, 0.5)
    parts = [experts(hidden, part(r, ranks), topk_weights, topk_ids, 0.5) for r in range(ranks)]
    # Sums of up to 1280 terms whose squares add up to one: well below 1280 * 2^-24.
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=0, atol=1280 * 2**-24)


def e4m3_bound(x: torch.Tensor) -> torch.Tensor:
    """Largest error of one e4m3 rounding with scale amax/448 over all of x's columns (<= 128).

    Half a step of 3 mantissa bits is 2^-4 of the value; below the smallest normal 2^-10 of the
    scale. Doubles leave fp32's own roundings, 2^-20, to the caller.
    """
    scale = x.abs().amax(-1, keepdim=True) / 448
    return torch.maximum(x.abs() * 2**-4, scale * 2**-10)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_fp8_activations_stay_within_their_derived_bound(source, limit):
    weights = BF16Experts(source.gate_up_proj.data, source.down_proj.data)
    hidden, (topk_weights, topk_ids) = torch.randn(10, K), routing(10)
    got = experts(hidden, weights, topk_weights, topk_ids, limit, activations="fp8")
    same = experts(hidden, weights, topk_weights, topk_ids, limit)

    # The error of hidden goes through |W|; SiLU's slope is below 1.1 and a clamp's is at most 1; a
    # product's error is |a| db + |b| da + da db; the intermediate is rounded again, with its error.
    bound = torch.zeros(10, K, dtype=torch.float64)
    x = hidden.double()
    for token in range(10):
        for weight, e in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
            gate, up = weights.gate(e, torch.float64), weights.up(e, torch.float64)
            g, u = torch.nn.functional.silu(gate @ x[token]), up @ x[token]
            if limit:
                g, u = g.clamp(max=limit), u.clamp(-limit, limit)
            dx = e4m3_bound(x[token])
            dg, du = 1.1 * (gate.abs() @ dx), up.abs() @ dx
            dh = g.abs() * du + u.abs() * dg + dg * du
            dh = dh + e4m3_bound((g * u).abs() + dh)
            bound[token] += weight * (weights.down(e, torch.float64).abs() @ dh)
    error = (got - same).abs()
    assert (error <= bound + 256 * 2**-24).all()
    assert error.max() > 0.01 * float(same.abs().max())  # it does round


def test_fp8_activations_round_hidden_per_token_and_128_channels():
    # Hidden is exact in e4m3 only with a scale of its own per token and group of 128 channels;
    # one-hot expert weights hand it through to an intermediate of one channel, exact as well.
    hidden = torch.zeros(3, 256)
    hidden[:, 0], hidden[:, 128] = torch.tensor([448.0, 3.0, 0.01]), torch.tensor([1e-6, 1e5, 7.0])
    w13, w2 = torch.zeros(2, 2, 256), torch.ones(2, 256, 1)
    w13[0, :, 0] = w13[1, :, 128] = 1
    for e, channel in ((0, 0), (1, 128)):
        ids = torch.full((3, 1), e, dtype=torch.int32)
        args = BF16Experts(w13, w2), torch.ones(3, 1), ids, None
        got = experts(hidden, *args, activations="fp8")[:, 0]
        x = hidden[:, channel]
        torch.testing.assert_close(got, torch.nn.functional.silu(x) * x, rtol=2**-20, atol=0)


def test_fp8_groups_of_the_intermediate_are_the_weights_blocks():
    """A rank that begins inside a block has groups of 64, 128 and 64 channels."""
    torch.manual_seed(0)
    gate, up = (fp8_block.quantize(torch.randn(1, 320, K) * K**-0.5) for _ in range(2))
    down = fp8_block.quantize(torch.randn(1, K, 320))
    rows, blocks, offset = slice(64, 320), slice(0, 3), 64
    weights = FP8Experts(
        torch.cat([gate.data[:, rows], up.data[:, rows]], 1),
        torch.stack([gate.scale_inv[:, blocks], up.scale_inv[:, blocks]], 1),
        down.data[:, :, rows].contiguous(),
        down.scale_inv[:, :, blocks],
        intermediate_offset=offset,
    )
    hidden, ones = torch.randn(4, K), torch.ones(4, 1)
    ids = torch.zeros(4, 1, dtype=torch.int32)
    got = experts(hidden, weights, ones, ids, None, activations="fp8")
    x = dequantize_per_token_group(*quantize_per_token_group(hidden))
    gate_up = torch.cat([x @ weights.gate(0, x.dtype).T, x @ weights.up(0, x.dtype).T], -1)
    middle = swiglu_step(gate_up, None)
    q, scale = quantize_per_token_group(middle, offset=offset)
    rounded = dequantize_per_token_group(q, scale, offset=offset)
    torch.testing.assert_close(got, rounded @ weights.down(0, x.dtype).T, rtol=1e-5, atol=1e-5)
    from_zero = dequantize_per_token_group(*quantize_per_token_group(middle))
    assert not torch.allclose(got, from_zero @ weights.down(0, x.dtype).T, rtol=1e-3, atol=1e-3)


def test_nvfp4_activations_round_hidden_and_intermediate():
    torch.manual_seed(0)
    weights = BF16Experts(torch.randn(2, 32, K) * K**-0.5, torch.randn(2, K, 16))
    hidden, ones = torch.randn(5, K), torch.ones(5, 1)
    ids = torch.zeros(5, 1, dtype=torch.int32)
    scales = (torch.tensor(0.002), torch.tensor(0.001))
    got = experts(hidden, weights, ones, ids, 0.5, activations="nvfp4", input_scales=scales)
    x = nvfp4.quantize(hidden, scales[0]).dequantize(torch.float32)
    middle = swiglu_step(x @ weights.w13[0].T, 0.5)
    middle = nvfp4.quantize(middle, scales[1]).dequantize(torch.float32)
    torch.testing.assert_close(got, middle @ weights.w2[0].T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="input_scales is None"):
        experts(hidden, weights, ones, ids, None, activations="nvfp4")


def test_the_shared_expert_is_added_before_rounding():
    hidden, weights = (
        torch.randn(3, K).bfloat16(),
        BF16Experts(torch.zeros(2, 32, K).bfloat16(), torch.zeros(2, K, 16).bfloat16()),
    )
    ids, scale = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    shared = torch.randn(4, 3, K)
    got = experts(hidden, weights, scale, ids, None, shared=shared)
    assert torch.equal(got, shared.sum(0).bfloat16())
    with pytest.raises(ValueError, match="shared has shape"):
        experts(hidden, weights, scale, ids, None, shared=shared[0])


def test_fp8_activations_round_hidden_and_intermediate():
    # 448 makes each scale 1, and e4m3 counts in twos from 16 to 32: hidden 17.5 becomes 18, and the
    # intermediate 18 * 0.95 = 17.1 becomes 18. Without the first rounding it would be 16.
    hidden, ids = torch.tensor([[448.0, 17.5]]), torch.zeros(1, 1, dtype=torch.int32)
    up = torch.diag(torch.tensor([1 / 448, 0.95 / 18]))
    weights = BF16Experts(torch.cat([torch.eye(2), up])[None], torch.eye(2)[None])
    got = experts(hidden, weights, torch.ones(1, 1), ids, None, activations="fp8")
    torch.testing.assert_close(got, torch.tensor([[448.0, 18.0]]), rtol=2**-20, atol=0)


def test_no_tokens(source):
    weights = BF16Experts(source.gate_up_proj.data, source.down_proj.data)
    for activations in ("same", "fp8"):
        got = experts(torch.zeros(0, K), weights, *routing_of_nothing(), None, 0, activations)
        assert got.shape == (0, K)


def routing_of_nothing() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(0, TOP_K), torch.zeros(0, TOP_K, dtype=torch.int32)


def test_errors_name_what_is_wrong():
    weights = BF16Experts(torch.zeros(1, 4, 8), torch.zeros(1, 8, 2))
    ids, topk = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"hidden has shape \[2, 9\], expected \[any, 8\]"):
        experts(torch.zeros(2, 9), weights, topk, ids, None)
    with pytest.raises(ValueError, match=r"topk_ids has shape \[1, 1\], expected \[2, 1\]"):
        experts(torch.zeros(2, 8), weights, topk, ids[:1], None)
    with pytest.raises(
        ValueError, match="activations is 'int8', expected 'same', 'fp8' or 'nvfp4'"
    ):
        experts(torch.zeros(2, 8), weights, topk, ids, None, activations="int8")
