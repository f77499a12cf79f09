"""Decode against the reference: lengths, groups, pages, windows, every e4m3 code, bad input."""

from __future__ import annotations

import pytest
import torch
from paged import BF16, E4M3, NOWHERE, Batch, D, relative_l2

from step37_kernels.attention import tiles
from step37_kernels.attention.decode import decode
from step37_kernels.launch import counted, observed

# With two processors the programs' runs cross from sequence to sequence, and long sequences are
# split; with 132 nearly every block would be a program of its own.
PROCESSORS = 2
RAGGED = [1, 15, 0, 16, 17, 511, 512, 513]


@pytest.fixture(autouse=True)
def few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: PROCESSORS)


def bits(out: torch.Tensor) -> torch.Tensor:
    return out.view(torch.int16)


@pytest.mark.parametrize(
    "batch",
    [
        Batch(E4M3, 16, 8, 1, RAGGED, None, k_scale=0.7, v_scale=0.02, gated=True),
        Batch(E4M3, 64, 24, 2, [513, 0, 600], 512, k_scale=1.3, v_scale=5.0),
        Batch(E4M3, 1, 12, 1, [1000, 17], 512, gated=True),
        Batch(BF16, 1, 8, 1, RAGGED, 512),
        Batch(BF16, 32, 12, 1, [1000, 511], 512, gated=True),
        Batch(BF16, 64, 16, 2, [130, 15], None),
    ],
    ids=lambda batch: f"{batch.dtype}-page{batch.page_size}-{batch.heads}/{batch.kv_heads}",
)
def test_is_the_reference(device, batch: Batch) -> None:
    out = batch.run(device)
    batch.check(out)
    assert (out[[n == 0 for n in batch.lengths]] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_long_sequence_repeats_bit_for_bit(device, dtype) -> None:
    batch = Batch(dtype, 64, 8, 1, [4097])
    out = batch.run(device)
    batch.check(out)
    if device.type == "cuda":  # programs run in another order each time
        assert all(torch.equal(bits(batch.run(device)), bits(out)) for _ in range(10))


@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_a_window_begins_at_its_key(device, dtype) -> None:
    """An enormous key just outside has no effect at all; just inside it takes everything."""
    batch = Batch(dtype, 1, 8, 1, [600, 70], 20)
    batch.q.fill_(1.0)
    plain = batch.run(device)
    enormous = min(set(range(670)) - set(batch.page_table.flatten().tolist()))
    batch.k_cache[enormous] = torch.tensor(240.0).to(dtype)
    batch.v_cache[enormous] = torch.tensor(7.0).to(dtype)
    for sequence, length in enumerate(batch.lengths):
        batch.page_table[sequence, length - 20 - 1] = enormous
    assert torch.equal(bits(batch.run(device)), bits(plain))
    for sequence, length in enumerate(batch.lengths):
        batch.page_table[sequence, length - 20] = enormous
    assert (batch.run(device) == 7).all()


def test_every_e4m3_code_is_read_exactly(device) -> None:
    """One key: its value is the output. The codes of two heads are shifted by one channel, so that
    each stands in a low and in a high byte."""
    batch = Batch(E4M3, 1, 4, 4, [1, 3], v_scale=0.5)
    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.cat([codes, codes.roll(1)]).view(4, D)
    slot = int(batch.slots(0)[0])
    batch.v_cache.view(torch.uint8)[slot] = values
    out = batch.run(device)
    expected = (values.view(E4M3).float() * 0.5).bfloat16()
    assert torch.equal(out[0, 0].isnan(), expected.isnan()) and expected.isnan().sum() == 4
    assert torch.equal(out[0, 0].nan_to_num(), expected.nan_to_num())
    assert out[1].isfinite().all()


def test_every_e4m3_code_is_multiplied_as_a_key(device) -> None:
    """Each key has one code in all its channels; values are unit vectors, so the output holds every
    key's probability. q is 1/128 and the scale 1/64, so that scores are code / 64."""
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    value = codes.view(E4M3).float()
    k = codes.masked_fill(value.isnan(), 0).flatten()[:, None, None].expand(256, 1, D).contiguous()
    v = torch.eye(128).expand(2, 128, 128).reshape(256, 1, D).to(E4M3)
    q = torch.full((2, 1, D), 1 / 128).bfloat16()
    table, lens = torch.arange(256).view(2, 128).int(), torch.tensor([128, 128])
    args = [t.to(device) for t in (q, k.view(E4M3), v, table, lens)]
    out = decode(*args, 1 / 64, None, 1).cpu().float()
    expected = (value.nan_to_num() / 64).softmax(-1)
    # The roundings of a probability to fp16 and of the output to bf16, and fp32's beside them.
    torch.testing.assert_close(out, expected, rtol=2.0**-8 + 2.0**-10, atol=0)
    args[1] = codes.flatten()[:, None, None].expand(256, 1, D).contiguous().view(E4M3).to(device)
    assert decode(*args, 1 / 64, None, 1).isnan().all()  # both halves have a NaN code


def test_nan_stays_in_its_sequence_and_its_channel(device) -> None:
    batch = Batch(E4M3, 16, 8, 2, [70, 90, 40])
    clean = batch.run(device)
    batch.v_cache.view(torch.uint8)[batch.slots(0)[5], 1, 3] = 0x7F
    batch.k_cache.view(torch.uint8)[batch.slots(2)[39], 0, 7] = 0xFF
    out = batch.run(device)
    nan = torch.zeros_like(out, dtype=torch.bool)
    nan[0, :, 4:, 3] = True
    nan[2, :, :4] = True
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(bits(out)[~nan], bits(clean)[~nan])


def test_queries_beyond_fp16_saturate(device) -> None:
    batch = Batch(E4M3, 16, 8, 1, [40, 40, 40])
    batch.q[0] *= 2.0**20
    batch.q[1] = batch.q[0].clamp(-65504, 65504)
    batch.q[1][batch.q[1].abs() > 65000] = 65536.0  # rounds to 65504's neighbour, above it
    batch.q[2, :, :, 0] = float("nan")
    out = batch.run(device)
    assert out[:2].isfinite().all() and out[2].isnan().all()
    only = batch.q[0, 0].float().clamp(-65504, 65504) @ batch.k_cache[batch.slots(0), 0].float().T
    winner = batch.v_cache[batch.slots(0), 0].float()[only.argmax(1)]
    torch.testing.assert_close(out[0, 0].float(), winner)  # gaps of scores are enormous too


@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_improbable_keys_count(device, dtype) -> None:
    """127 keys of probability 2^-26, which fp16 itself would lose, beside one whose value is 0."""
    k, v = torch.full((128, 1, D), -26.0), torch.ones(128, 1, D)
    k[40], v[40] = 0.0, 0.0
    args = (torch.ones(1, 1, D).bfloat16(), k.to(dtype), v.to(dtype), torch.arange(128)[None].int())
    args = [t.to(device) for t in (*args, torch.tensor([128]))]
    out = decode(*args, 0.6931471805599453 / D, None, 1).cpu().float()  # scores in powers of two
    rest = 127 * 2.0**-26
    torch.testing.assert_close(out, torch.full((1, D), rest / (1 + rest)), rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("logit", [-30.0, 0.0, 30.0])
def test_gates(device, logit: float) -> None:
    batch = Batch(BF16, 16, 8, 1, [20])
    free = batch.run(device).float()
    batch.head_gate = torch.full((1, 1, 8), logit)
    gate = torch.sigmoid(torch.tensor(logit))
    # The rounding of either output to bf16, and a few of fp32.
    torch.testing.assert_close(batch.run(device).float(), free * gate, rtol=2.0**-7, atol=0)


def test_lse_is_of_the_scaled_scores(device) -> None:
    for dtype, k_scale in ((BF16, 1.0), (E4M3, 0.3)):
        batch = Batch(dtype, 16, 16, 2, [70, 0, 5], k_scale=k_scale)
        lse = torch.empty(3, 1, 16)
        batch.run(device, lse)
        for sequence in (0, 2):
            k = batch.k_cache[batch.slots(sequence)].float() * k_scale
            q = batch.q[sequence, 0].view(2, 8, D).float()
            scores = torch.einsum("hgd,lhd->hgl", q, k).flatten(0, 1) * D**-0.5
            # Sums of 128 products and of 70 terms: 2^-24 each of scores of order ten.
            torch.testing.assert_close(lse[sequence, 0], scores.logsumexp(-1), rtol=0, atol=1e-4)
        assert (lse[1] == float("-inf")).all()


def test_faults_that_only_the_device_sees_read_nothing(device) -> None:
    """A page past the cache, and a length past the table: neighbours are untouched."""
    batch = Batch(E4M3, 16, 8, 1, [40, 40, 40])
    clean = batch.run(device)
    batch.page_table[0, 1] = NOWHERE
    batch.page_table[1, 0] = -7
    out = batch.run(device)
    assert torch.equal(bits(out)[2], bits(clean)[2]) and out.isfinite().all()
    # Keys and values of such a page count as zeros.
    missing = Batch(E4M3, 16, 8, 1, [40, 40, 40])
    for sequence, first in ((0, 16), (1, 0)):
        for cache in (missing.k_cache, missing.v_cache):
            cache.view(torch.uint8)[missing.slots(sequence)[first : first + 16]] = 0
    assert torch.equal(bits(out), bits(missing.run(device)))

    longer = Batch(E4M3, 16, 8, 1, [40, 40, 40])
    longer.lengths = [40, 40, 2**30]
    out = longer.run(device)
    assert torch.equal(bits(out)[:2], bits(clean)[:2])


def test_debug_mode_names_the_sequence(device, monkeypatch) -> None:
    monkeypatch.setenv("STEP37_DEBUG", "1")
    batch = Batch(BF16, 16, 8, 1, [40, 30], 10)
    batch.run(device)  # pages before the window may be anything
    batch.page_table[1, 1] = 999
    with pytest.raises(ValueError, match="sequence 1 has page 999, expected 0 to 7"):
        batch.run(device)
    batch.lengths[0] = 65
    with pytest.raises(ValueError, match="sequence 0 has seq_len 65, expected 0 to 64"):
        batch.run(device)


def test_launches_depend_on_shapes_alone(device) -> None:
    """What a CUDA graph needs: grids and numbers do not change with the lengths."""
    seen = []
    for lengths in ([1, 600], [600, 0]):
        batch = Batch(E4M3, 64, 8, 1, [600, 600], 512)
        batch.lengths = lengths
        with observed(lambda called: seen.append(called), runs=False):
            batch.run(device)
    first, second = seen[:2], seen[2:]
    assert [called.name for called in first] == ["decode_split_kernel", "decode_merge_kernel"]
    for before, after in zip(first, second, strict=True):
        assert before.grid == after.grid and before.options == after.options
        for mine, theirs in zip(before.args, after.args, strict=True):
            assert isinstance(mine, torch.Tensor) or mine == theirs


@pytest.mark.parametrize("dtype", [BF16, E4M3])
@pytest.mark.parametrize("keys", [4096, 262144])
def test_the_error_does_not_grow_with_length(dtype, keys) -> None:
    """The kernel's arithmetic without the kernel, at lengths that the interpreter cannot reach.

    32 pieces side by side, each over blocks of 64 keys in a row: probabilities relative to the
    running maximum and rounded, sums in fp32 in the kernel's order; against fp64.
    """
    torch.manual_seed(0)
    scores = torch.randn(keys).double() * 2.5
    v = torch.randn(keys, D).to(dtype).double()
    exact = scores.softmax(0) @ v
    raised, narrow = (15.0, torch.float16) if dtype == E4M3 else (0.0, BF16)
    blocks = (scores * 1.4426950408889634).float().view(32, -1, 64)
    values = v.float().view(32, -1, 64, D)
    maximum, total, out = torch.full((32, 1), -torch.inf), torch.zeros(32, 64), torch.zeros(32, D)
    for block, value in zip(blocks.unbind(1), values.unbind(1), strict=True):
        new = maximum.maximum(block.amax(1, keepdim=True))
        chance, shrink = (block - (new - raised)).exp2(), (maximum - new).exp2()
        total = total * shrink + chance
        rounded = chance.to(narrow).float()
        out = (rounded[:, None] @ value)[:, 0] + out * shrink
        maximum = new
    weight = (maximum - maximum.max()).exp2()
    merged = (out * weight).sum(0) / (total.sum(1, keepdim=True) * weight).sum()
    assert relative_l2(merged.bfloat16(), exact) <= 0.003


def test_no_sequences_is_no_launch(device) -> None:
    q, cache = torch.zeros(0, 8, D).bfloat16(), torch.zeros(16, 1, D).bfloat16()
    table, lens = torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    with counted() as launches:
        out = decode(*(t.to(device) for t in (q, cache, cache, table, lens)), 1.0, None, 16)
    assert out.shape == (0, 8 * D) and launches == []


def test_errors_name_what_is_wrong(device) -> None:
    def refused(match: str, **changed: object) -> None:
        batch = Batch(BF16, 16, 8, 1, [40])
        vars(batch).update(changed)
        with counted() as launches, pytest.raises(ValueError, match=match):
            batch.run(device)
        assert launches == []

    half = torch.zeros(64, 1, D)
    refused("page_size is 8, expected one of", page_size=8)
    refused("window is 0, expected a positive number or None", window=0)
    refused("k_scale is -1.0, expected a positive number", k_scale=-1.0)
    refused("k_cache has dtype torch.float16", k_cache=half.half())
    refused("v_cache has dtype torch.bfloat16", k_cache=half.to(E4M3))
    refused("v_cache has strides", v_cache=torch.zeros(64, 2, D).bfloat16()[:, :1])
    refused(r"seq_lens has shape \[2\], expected \[1\]", lengths=[40, 40])
    refused("page_table has dtype torch.int64", page_table=torch.zeros(1, 4, dtype=torch.int64))
    refused(
        "q has 8 heads, expected a multiple of k_cache's 3",
        k_cache=torch.zeros(64, 3, D).bfloat16(),
        v_cache=torch.zeros(64, 3, D).bfloat16(),
    )
    refused("head_gate has dtype torch.float64", head_gate=torch.zeros(1, 1, 8).double())
