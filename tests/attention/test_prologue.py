"""The prologue kernel against the reference's prologue and cache write."""

from __future__ import annotations

import pytest
import torch

from step37_kernels.attention.prologue import prologue
from step37_kernels.formats.e4m3 import to_e4m3
from step37_kernels.launch import counted
from step37_kernels.reference import attention as reference
from step37_kernels.reference.rotary import cos_sin_cache

D, SLOTS, POSITIONS = 128, 48, 4096
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def same(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits; any NaN equals any NaN."""
    assert ours.dtype == expected.dtype
    width = {1: torch.uint8, 2: torch.int16}[ours.dtype.itemsize]
    both_nan = ours.float().isnan() & expected.float().isnan()
    return bool((both_nan | (ours.view(width) == expected.view(width))).all())


class Inputs:
    """Random inputs of T tokens; qkv has the gate's columns behind it, as a real one may."""

    def __init__(self, device: torch.device, tokens: int, heads: int, kv_heads: int, rotary: int):
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.device = heads, kv_heads, device
        columns = (heads + 2 * kv_heads) * D
        self.qkv = torch.randn(tokens, columns + 16).bfloat16()
        self.positions = torch.randint(POSITIONS, (tokens,))
        self.weights = torch.randn(D).bfloat16() * 0.3, torch.randn(D) * 0.3
        self.angles = cos_sin_cache(rotary, 5e6, POSITIONS, None)
        self.slots = torch.randperm(SLOTS)[:tokens].int()
        self.scales = 0.37, 0.0123
        self.cached_heads = kv_heads

    def cache(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.full((SLOTS, self.cached_heads, D), 7.0).to(dtype) for _ in range(2)]

    def run(self, cache: list[torch.Tensor]) -> torch.Tensor:
        """The kernel; `cache` is written in place."""
        on_device = [c.to(self.device) for c in cache]
        qkv, positions, q_weight, k_weight, angles, slots = (
            t.to(self.device)
            for t in (self.qkv, self.positions, *self.weights, self.angles, self.slots)
        )
        q = prologue(
            qkv, positions, q_weight, k_weight, angles, self.heads, self.kv_heads, 1e-5,
            *on_device, slots, *self.scales,
        )  # fmt: skip
        for mine, theirs in zip(cache, on_device, strict=True):
            mine.copy_(theirs.cpu())
        return q.cpu()

    def expected(self) -> tuple[torch.Tensor, ...]:
        """q, k, v of the reference in fp32, not rounded."""
        columns = (self.heads + 2 * self.kv_heads) * D
        return reference.prologue(
            self.qkv[:, :columns].float(), self.positions, *self.weights, self.angles,
            self.heads, self.kv_heads, 1e-5,
        )  # fmt: skip


def neighbours(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest bf16 that the kernel may round `exact` [.., D] to.

    The sum of 128 squares is off by at most 127 roundings of 2^-24, relative; its inverse root by
    half of that, and norm, weight and rotation add fewer than 64 more: in all 2^-16 of the largest
    channel. Rounding is monotonic.
    """
    error = 2.0**-16 * exact.abs().amax(-1, keepdim=True)
    return (exact - error).bfloat16(), (exact + error).bfloat16()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rotary", "dtype", "tokens"),
    [(8, 1, 64, E4M3, 9), (24, 2, 128, E4M3, 5), (24, 2, 128, BF16, 5), (16, 2, 64, BF16, 4)],
)
def test_is_the_reference(device, heads, kv_heads, rotary, dtype, tokens) -> None:
    inputs = Inputs(device, tokens, heads, kv_heads, rotary)
    cache = inputs.cache(dtype)
    with counted() as launches:
        q = inputs.run(cache)
    assert len(launches) == 1
    exact_q, exact_k, exact_v = inputs.expected()
    least, most = neighbours(exact_q)
    assert q.dtype == BF16 and ((least <= q) & (q <= most)).all()
    assert (least == most).float().mean() > 0.9  # so nearly all have to be equal

    least, most = neighbours(exact_k)
    lower, upper = inputs.cache(dtype), inputs.cache(dtype)
    reference.write_cache(least, exact_v.bfloat16(), *lower, inputs.slots, *inputs.scales)
    reference.write_cache(most, exact_v.bfloat16(), *upper, inputs.slots, *inputs.scales)
    assert (lower[0].float() <= cache[0].float()).all()
    assert (cache[0].float() <= upper[0].float()).all()
    assert (lower[0].float() == upper[0].float()).float().mean() > 0.9
    assert same(cache[1], lower[1])


def test_every_bf16_value_becomes_the_references_code(device) -> None:
    """v over all 65,536 bf16 values, in two launches.

    With 1/4 there are exact ties, with 196/448 quotients that only a correct rounding makes ties.
    """
    inputs = Inputs(device, SLOTS, 8, 8, 128)
    values = torch.arange(65536, dtype=torch.int32).short().view(BF16).view(64, 8, D)
    for part, scale in ((values[:48], 0.25), (values[16:], float(torch.tensor(196.0) / 448))):
        inputs.qkv[:, 16 * D : 24 * D] = part.reshape(SLOTS, -1)
        inputs.scales = 1.0, scale
        cache = inputs.cache(E4M3)
        inputs.run(cache)
        assert same(cache[1][inputs.slots.long()], to_e4m3(part.float() / scale))


def test_a_token_with_nan_stays_alone(device) -> None:
    inputs = Inputs(device, 4, 8, 1, 64)
    clean = inputs.cache(E4M3)
    q_clean = inputs.run(clean)
    inputs.qkv[1] = float("nan")
    inputs.qkv[2] = float("inf")
    cache = inputs.cache(E4M3)
    q = inputs.run(cache)
    assert q[1:3].isnan().all() and same(q[[0, 3]], q_clean[[0, 3]])
    slots = inputs.slots.long()
    for held, before in zip(cache, clean, strict=True):
        assert same(held[slots[[0, 3]]], before[slots[[0, 3]]])
        assert held[slots[1]].float().isnan().all()
    assert cache[0][slots[2]].float().isnan().all()
    assert (cache[1][slots[2]].float() == 448).all()


def test_other_slots_are_not_written(device) -> None:
    inputs = Inputs(device, 6, 8, 1, 64)
    inputs.slots = torch.tensor([5, -1, SLOTS, 9, 2**31 - 1, 0])
    for dtype in (BF16, E4M3):
        cache = inputs.cache(dtype)
        inputs.run(cache)
        for held in cache:
            written = (held.float() != 7).flatten(1).any(1)
            assert written.nonzero().flatten().tolist() == [0, 5, 9]


def test_positions_outside_the_rotary_cache_read_nothing(device) -> None:
    inputs = Inputs(device, 3, 8, 1, 128)
    inputs.positions = torch.tensor([2**40, 3, -5])
    q = inputs.run(inputs.cache(BF16))
    assert (q[[0, 2]] == 0).all() and (q[1] != 0).any()


def test_no_tokens_is_no_launch(device) -> None:
    with counted() as launches:
        inputs = Inputs(device, 0, 8, 1, 64)
        assert inputs.run(inputs.cache(BF16)).shape == (0, 8, D)
    assert launches == []


def test_errors_name_what_is_wrong(device) -> None:
    inputs = Inputs(device, 4, 8, 1, 64)

    def refused(match: str, cache_dtype: torch.dtype = BF16, **changed: object) -> None:
        saved = dict(vars(inputs))
        vars(inputs).update(changed)
        with counted() as launches, pytest.raises(ValueError, match=match):
            inputs.run(inputs.cache(cache_dtype))
        assert launches == []
        vars(inputs).update(saved)

    refused("k_cache has dtype torch.float16", torch.float16)
    refused("k_scale is 0.0, expected a positive number", scales=(0.0, 1.0))
    refused("v_scale is nan", scales=(1.0, float("nan")))
    refused("qkv has dtype torch.float32", qkv=inputs.qkv.float())
    refused(r"qkv has 1024 columns, expected at least 1280", qkv=inputs.qkv[:, :1024])
    refused(r"qkv has strides \(1, 4\)", qkv=inputs.qkv.t().contiguous().t())
    refused(r"qkv has strides \(1295, 1\)", qkv=inputs.qkv[:, :-1].contiguous())
    refused("qkv has strides .* begins at address", qkv=inputs.qkv[:, 1:])
    refused("cos_sin_cache has 32 columns, expected 64 or 128", angles=inputs.angles[:, :32])
    refused(r"slots has shape \[3\], expected \[4\]", slots=inputs.slots[:3])
    refused("q has 7 heads, expected a multiple of k_cache's 3", heads=7, cached_heads=3)
    refused("k_cache has 1 heads, expected 2", heads=4, kv_heads=2)
