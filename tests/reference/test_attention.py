"""Paged attention against transformers' Step3p7Attention, and the cache's contents bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.step3p7.modeling_step3p7 import Step3p7Attention, Step3p7RotaryEmbedding

from step37_kernels.reference import attention
from step37_kernels.reference.attention import attend, prologue, write_cache

HEADS, KV_HEADS, DIM, SLOTS = 6, 2, 32, 64
E4M3 = torch.float8_e4m3fn
# fp32 on both sides: sums of at most 192 terms of order one, a few products in a row. A key more or
# less in a window changes outputs by more than 0.01 here.
CLOSE = {"rtol": 0, "atol": 1e-5}


def empty_cache(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Filled with NaN: whatever was not written must not be read."""
    k, v = (torch.full((SLOTS, KV_HEADS, DIM), float("nan")).to(dtype) for _ in range(2))
    return k, v


def transformers_attention(module: Step3p7Attention, hidden: torch.Tensor):
    """The oracle's output before its output projection, and the rotary cache that it used."""
    config, layer = module.config, module.layer_idx
    positions = torch.arange(hidden.shape[0])[None]
    embedding = Step3p7RotaryEmbedding(config)
    cos, sin = embedding(hidden, positions, config.layer_types[layer])
    half = cos.shape[-1] // 2
    make_mask = create_causal_mask if layer == 0 else create_sliding_window_causal_mask
    mask = make_mask(
        config=config, inputs_embeds=hidden[None], attention_mask=None, past_key_values=None,
        position_ids=positions,
    )  # fmt: skip
    with torch.no_grad():
        out, _ = module(hidden[None], (cos, sin), mask)
    return out[0], torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


def qkv_of(module: Step3p7Attention, hidden: torch.Tensor) -> torch.Tensor:
    projections = (module.q_proj, module.k_proj, module.v_proj)
    return torch.cat([projection(hidden) for projection in projections], dim=-1).detach()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("query_chunk", [3, 128])
def test_prefill_extend_and_decode_are_transformers(
    text_config, randomize, layer, query_chunk, monkeypatch
):
    monkeypatch.setattr(attention, "_QUERY_CHUNK", query_chunk)
    # Two sequences in one batch, fed in steps: a prefill, an extension, then single tokens.
    lengths, steps = (23, 17), ((9, 4), (12, 11), (1, 1), (1, 1))
    hidden = [torch.randn(length, 64) for length in lengths]
    module = Step3p7Attention(text_config, layer)
    randomize(module)
    module.o_proj = torch.nn.Identity()
    oracles = [transformers_attention(module, rows) for rows in hidden]
    norms = module.q_norm.weight.detach(), module.k_norm.weight.detach()
    window = text_config.sliding_window if layer else None
    page_table = torch.randperm(SLOTS)[:46].view(2, 23).int()
    cache = empty_cache()
    done = [0, 0]
    for step in steps:
        parts = [hidden[b][done[b] : done[b] + step[b]] for b in range(2)]
        positions = [torch.arange(done[b], done[b] + step[b]) for b in range(2)]
        slots = torch.cat([page_table[b, positions[b]] for b in range(2)])
        x = torch.cat(parts)
        q, k, v = prologue(
            qkv_of(module, x), torch.cat(positions), *norms, oracles[0][1], HEADS, KV_HEADS, 1e-5
        )
        write_cache(k, v, *cache, slots, 1.0, 1.0)
        done = [have + new for have, new in zip(done, step, strict=True)]
        out = attend(
            q, *cache, page_table, torch.tensor(done), torch.tensor(step), DIM**-0.5, window,
            head_gate=module.g_proj(x).detach(),
        )  # fmt: skip
        expected = [oracles[b][0][done[b] - step[b] : done[b]] for b in range(2)]
        torch.testing.assert_close(out, torch.cat(expected), **CLOSE)
    assert done == list(lengths)


def one_sequence(length: int, dtype: torch.dtype = torch.float32):
    q, k, v = (torch.randn(length, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    cache = empty_cache(dtype)
    page_table = torch.randperm(SLOTS)[:length][None]
    return q, k, v, cache, page_table


def test_a_window_sees_exactly_its_keys():
    length, window = 30, 7
    q, k, v, cache, page_table = one_sequence(length)
    write_cache(k, v, *cache, page_table[0], 1.0, 1.0)
    lens = torch.tensor([length]), torch.tensor([length])
    before = attend(q, *cache, page_table, *lens, 1.0, window).view(length, HEADS, DIM)
    changed = 12
    cache[1][page_table[0, changed]] += 1.0
    after = attend(q, *cache, page_table, *lens, 1.0, window).view(length, HEADS, DIM)
    sees = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
    assert sees == list(range(changed, changed + window))


def test_slots_before_the_window_are_not_touched():
    q, k, v, cache, page_table = one_sequence(40)
    write_cache(k, v, *cache, page_table[0], 1.0, 1.0)
    lens, window = (torch.tensor([40]), torch.tensor([3])), 8
    expected = attend(q[37:], *cache, page_table, *lens, 1.0, window)
    page_table = page_table.clone()
    page_table[0, : 37 - window + 1] = 10**9  # freed: reading one of them raises
    assert torch.equal(attend(q[37:], *cache, page_table, *lens, 1.0, window), expected)
    page_table[0, 37 - window + 1] = 10**9
    with pytest.raises(IndexError):
        attend(q[37:], *cache, page_table, *lens, 1.0, window)


def test_head_gate_multiplies_heads():
    q, k, v, cache, page_table = one_sequence(4)
    write_cache(k, v, *cache, page_table[0], 1.0, 1.0)
    lens, gate = (torch.tensor([4]), torch.tensor([4])), torch.randn(4, HEADS)
    free = attend(q, *cache, page_table, *lens, 1.0, None)
    gated = attend(q, *cache, page_table, *lens, 1.0, None, head_gate=gate)
    expected = free.view(4, HEADS, DIM) * gate.sigmoid()[..., None]
    torch.testing.assert_close(gated, expected.flatten(1))


def test_prologue_rounds_bf16_once():
    qkv = torch.randn(5, (HEADS + 2 * KV_HEADS) * DIM).bfloat16()
    norms = torch.randn(DIM), torch.randn(DIM)
    args = torch.arange(5), *norms, torch.randn(8, DIM), HEADS, KV_HEADS, 1e-5
    for got, exact in zip(prologue(qkv, *args), prologue(qkv.float(), *args), strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())


def test_fp8_cache_holds_what_ml_dtypes_makes():
    _, k, v, cache, page_table = one_sequence(20, E4M3)
    k, v = k * 100, v * 0.01
    k[3, 0, 0] = 1e6  # saturates
    write_cache(k, v, *cache, page_table[0], 0.25, 0.5)
    for new, held, scale in ((k, cache[0], 0.25), (v, cache[1], 0.5)):
        expected = (new.numpy() / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(
            held[page_table[0]].view(torch.uint8).numpy(), expected.view(np.uint8)
        )


def test_fp8_cache_is_read_with_its_scales():
    q, k, v, cache, page_table = one_sequence(20, E4M3)
    write_cache(k, v, *cache, page_table[0], 0.03, 0.02)
    exact = [
        torch.from_numpy(c.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype("f4") * s)
        for c, s in zip(cache, (np.float32(0.03), np.float32(0.02)), strict=True)
    ]
    lens = torch.tensor([20]), torch.tensor([20])
    got = attend(q, *cache, page_table, *lens, 1.0, 9, 0.03, 0.02)
    # Scales do not apply to a cache that is not fp8, so the same call on exact values ignores them.
    assert torch.equal(got, attend(q, *exact, page_table, *lens, 1.0, 9, 0.03, 0.02))


def test_fp8_values_stay_within_half_a_step():
    q, _, v, cache, page_table = one_sequence(20, E4M3)
    k = torch.randint(-8, 9, (20, KV_HEADS, DIM)).float()  # exact in e4m3: scores do not change
    v_scale = 0.02
    write_cache(k, v, *cache, page_table[0], 1.0, v_scale)
    exact = empty_cache()
    write_cache(k, v, *exact, page_table[0], 1.0, v_scale)
    error = v.abs().maximum(torch.tensor(2**-6 * v_scale)) * 2**-4  # half a step, as in e4m3
    bound = empty_cache()
    write_cache(k, error, *bound, page_table[0], 1.0, 1.0)
    lens = torch.tensor([20]), torch.tensor([20])
    got = attend(q, *cache, page_table, *lens, 0.1, None, v_scale=v_scale)
    expected = attend(q, *exact, page_table, *lens, 0.1, None)
    # An output is an average of values, so its error is at most the average of theirs.
    limit = attend(q, *bound, page_table, *lens, 0.1, None) + 1e-5
    assert ((got - expected).abs() <= limit).all() and not torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_caches_hold_the_values_themselves(dtype):
    _, k, v, cache, page_table = one_sequence(20, dtype)
    write_cache(k, v, *cache, page_table[0], 0.25, 0.5)
    assert torch.equal(cache[0][page_table[0]], k.to(dtype))
    assert torch.equal(cache[1][page_table[0]], v.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, E4M3])
def test_slot_minus_one_is_skipped(dtype):
    _, k, v, cache, _ = one_sequence(4, dtype)
    write_cache(k, v, *cache, torch.tensor([5, -1, 9, -1], dtype=torch.int32), 1.0, 1.0)
    for new, held in ((k, cache[0]), (v, cache[1])):
        written = ~held.float().isnan().flatten(1).all(1)
        assert written.nonzero().flatten().tolist() == [5, 9]
        assert torch.equal(held[5].float(), new[0].to(dtype).float())
        assert torch.equal(held[9].float(), new[2].to(dtype).float())


def test_sequences_without_queries_and_no_tokens():
    q, k, v, cache, page_table = one_sequence(6)
    write_cache(k, v, *cache, page_table[0], 1.0, 1.0)
    alone = attend(q[5:], *cache, page_table, torch.tensor([6]), torch.tensor([1]), 1.0, None)
    pages = page_table.repeat(3, 1)
    lens = torch.tensor([6, 6, 0]), torch.tensor([0, 1, 0])
    assert torch.equal(attend(q[5:], *cache, pages, *lens, 1.0, None), alone)
    nothing = attend(q[:0], *cache, pages[:0], lens[0][:0], lens[1][:0], 1.0, 4)
    assert nothing.shape == (0, HEADS * DIM)


def test_errors_name_what_is_wrong():
    q, k, v, cache, page_table = one_sequence(6)
    six, two = torch.tensor([6]), torch.tensor([2])
    with pytest.raises(ValueError, match="query_lens add up to 2, expected the 6 rows of q"):
        attend(q, *cache, page_table, six, two, 1.0, None)
    with pytest.raises(ValueError, match="sequence 0 has query_len 6 and seq_len 2"):
        attend(q, *cache, page_table, two, six, 1.0, None)
    with pytest.raises(ValueError, match="window is 0"):
        attend(q, *cache, page_table, six, six, 1.0, 0)
    with pytest.raises(ValueError, match="q has 5 heads, expected a multiple of 2"):
        attend(q[:, :5], *cache, page_table, six, six, 1.0, None)
    with pytest.raises(ValueError, match="v_scale is 0.0, expected a positive number"):
        write_cache(k, v, *cache, page_table[0], 1.0, 0.0)
    with pytest.raises(ValueError, match=r"slots has shape \[5\], expected \[6\]"):
        write_cache(k, v, *cache, page_table[0, :5], 1.0, 1.0)
    with pytest.raises(ValueError, match=r"qkv has shape \[1, 9\], expected \[any, 40\]"):
        prologue(torch.zeros(1, 9), six[:1], torch.zeros(4), torch.zeros(4), k, 6, 2, 1e-5)


@pytest.mark.parametrize("window", [None, 6])
def test_a_draft_in_a_tree_sees_its_path(window):
    """Each draft is what it would be at the end of a sequence that holds its path only."""
    parents, length = (-1, 0, 0, 1, -1), 20
    mask = torch.eye(5, dtype=torch.bool)
    for node, parent in enumerate(parents):
        mask[node] |= mask[parent] if parent >= 0 else mask[node]
    q, k, v, cache, page_table = one_sequence(length)
    write_cache(k, v, *cache, page_table[0], 1.0, 1.0)
    lens = torch.tensor([length]), torch.tensor([5])
    drafts = q[length - 5 :]
    out = attend(drafts, *cache, page_table, *lens, 1.0, window, tree_mask=mask[None])
    for node in range(5):
        seen = torch.cat([torch.ones(length - 5, dtype=torch.bool), mask[node]])
        path = page_table[:, seen]
        lens = torch.tensor([path.shape[1]]), torch.tensor([1])
        alone = attend(drafts[node : node + 1], *cache, path, *lens, 1.0, window)
        torch.testing.assert_close(out[node : node + 1], alone, **CLOSE)
    with pytest.raises(ValueError, match="query_lens are .4., expected .B, n, n. and n each"):
        four = torch.tensor([length]), torch.tensor([4])
        attend(q[:4], *cache, page_table, *four, 1.0, None, tree_mask=mask[None])
