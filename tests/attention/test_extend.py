"""Extend against the reference: ragged batches, chunks, block and window edges, NaN, bad input."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from ragged import BF16, DIM, E4M3, Batch, make_batch

from step37_kernels.attention.extend import extend
from step37_kernels.attention.tiles import ExtendTile, extend_tile, most_extend_tiles
from step37_kernels.launch import Launch, counted, observed

# (cached keys, new tokens): one new token alone and behind a block, nothing, lengths around the
# edges of 64-key blocks, of 16-token tiles and of the window.
RAGGED = [(0, 1), (0, 17), (15, 1), (0, 0), (126, 1), (127, 1), (96, 33), (511, 1), (495, 18)]


def bits(out: torch.Tensor) -> torch.Tensor:
    return out.view(torch.int16)


@pytest.mark.parametrize(
    "batch",
    [
        make_batch(RAGGED, E4M3, 8, 1, None, 16, k_scale=0.7, v_scale=0.02, gated=True),
        make_batch(RAGGED, E4M3, 12, 1, 512, 64, k_scale=1.3, v_scale=5.0, gated=True),
        make_batch(RAGGED, BF16, 8, 1, None, 1),
        make_batch(RAGGED, BF16, 12, 1, 512, 32, gated=True),
        make_batch([(0, 0), (0, 5), (70, 11)], E4M3, 8, 8, None, 32),
        make_batch([(40, 9), (600, 11)], E4M3, 12, 4, 512, 1, gated=True),
        make_batch([(0, 9), (30, 40)], BF16, 12, 2, 5, 16),
        make_batch([(0, 9), (30, 40)], E4M3, 8, 2, 1, 16),
    ],
    ids=lambda b: f"{b.k_cache.dtype}-{b.q.shape[1]}/{b.k_cache.shape[1]}-{b.window}-{b.page_size}",
)
def test_is_the_reference(device, batch: Batch) -> None:
    batch.check(batch.run(device))


@pytest.mark.parametrize("cache_type", [BF16, E4M3])
def test_long_prefix(device, cache_type) -> None:
    batch = make_batch([(4090, 7)], cache_type, page_size=64)
    out = batch.run(device)
    batch.check(out)
    error = (out.float() - batch.reference()).norm() / batch.reference().norm()
    # Roundings spread evenly over +-u of the number's power of two have a root mean square of at
    # most u / 3^0.5; their errors add in squares. The output's u is 2^-8, P's 2^-11 or 2^-8, and
    # sums over 4097 random terms carry over P's relative error, no more.
    assert error <= (2**-16 / 3 + (2**-22 if cache_type == E4M3 else 2**-16) / 3) ** 0.5


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("cache_type", [BF16, E4M3])
def test_chunks_are_one_shot(device, cache_type, window) -> None:
    """Prefill in one launch, and its second part once more behind the first as prefix."""
    whole = make_batch([(0, 100), (30, 21)], cache_type, window=window, gated=True)
    out = whole.run(device)
    parts = [out[whole.rows(0)][67:], out[whole.rows(1)][4:]]
    keep = torch.cat([torch.arange(67, 100), torch.arange(104, 121)])
    chunk = dataclasses.replace(
        whole, q=whole.q[keep], query_lens=torch.tensor([33, 17]), head_gate=whole.head_gate[keep]
    )
    second = chunk.run(device)
    chunk.check(second)
    if window is None:  # blocks begin at key 0, so a row's sums have the same order
        assert torch.equal(bits(second), bits(torch.cat(parts)))


def test_a_row_depends_on_no_other_sequence(device) -> None:
    batch = make_batch([(70, 20), (0, 33), (200, 3)])
    out = batch.run(device)
    turned = dataclasses.replace(
        batch,
        q=torch.cat([batch.q[batch.rows(b)] for b in (2, 0, 1)]),
        **{
            name: getattr(batch, name)[[2, 0, 1]]
            for name in ("page_table", "slots", "seq_lens", "query_lens")
        },
    )
    moved = turned.run(device)
    for new, old in enumerate((2, 0, 1)):
        assert torch.equal(bits(moved[turned.rows(new)]), bits(out[batch.rows(old)]))


@pytest.mark.parametrize("cache_type", [BF16, E4M3])
@pytest.mark.parametrize("window", [20, 100])
def test_a_window_begins_at_its_key(device, cache_type, window) -> None:
    """An enormous key has no effect on a query that it is just outside of, and takes everything
    from a query that it is just inside of; so for every query of two tiles."""
    batch = make_batch([(150, 24)], cache_type, window=window)
    batch.q.fill_(1.0)
    plain = batch.run(device)
    slot = batch.slot(0, 150 + 10 - window + 1)  # the first key of the query at 150 + 10
    batch.k_cache[slot] = torch.tensor(240.0).to(cache_type)
    batch.v_cache[slot] = torch.tensor(7.0).to(cache_type)
    out = batch.run(device)
    assert (out[:11] == 7).all()
    assert not (plain[:11] == 7).any()
    assert torch.equal(bits(out[11:]), bits(plain[11:]))


@pytest.mark.parametrize("cache_type", [BF16, E4M3])
def test_new_keys_are_causal(device, cache_type) -> None:
    """The same for the newest end: a query does not see the key behind its own."""
    batch = make_batch([(50, 40)], cache_type)
    batch.q.fill_(1.0)
    plain = batch.run(device)
    slot = batch.slot(0, 50 + 21)
    batch.k_cache[slot] = torch.tensor(240.0).to(cache_type)
    batch.v_cache[slot] = torch.tensor(7.0).to(cache_type)
    out = batch.run(device)
    assert torch.equal(bits(out[:21]), bits(plain[:21])) and (out[21:] == 7).all()


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(
    "cache_type, kind, value",
    [
        (BF16, "k_cache", float("nan")),
        (E4M3, "k_cache", float("nan")),
        (BF16, "v_cache", float("nan")),
        (E4M3, "v_cache", float("nan")),
        (BF16, "v_cache", float("inf")),
    ],
)
def test_nan_reaches_those_who_see_it_and_no_others(
    device, cache_type, kind, value, window
) -> None:
    batch = make_batch([(50, 60), (0, 20)], cache_type, group=4, kv_heads=2, window=window)
    clean = batch.run(device)
    getattr(batch, kind)[batch.slot(0, 50 + 21), 1, 5] = torch.tensor(value).to(cache_type)
    out = batch.run(device)
    sees = torch.zeros(out.shape, dtype=torch.bool)
    sees[21 : 60 if window is None else 21 + window, 4:] = True
    # The channel breaks for all who see it, the others of the head where tiles do not see alike.
    assert not out[sees].view(-1, 4, DIM)[..., 5].isfinite().any()
    assert torch.equal(bits(out)[~sees], bits(clean)[~sees])


def test_nan_query_stays_in_its_head(device) -> None:
    batch = make_batch([(10, 20)])
    clean = batch.run(device)
    batch.q[3, 2, 100] = float("nan")
    out = batch.run(device)
    nan = torch.zeros(out.shape, dtype=torch.bool)
    nan[3, 2] = True
    assert torch.equal(out.isnan(), nan) and torch.equal(bits(out)[~nan], bits(clean)[~nan])


def test_queries_beyond_fp16_saturate(device) -> None:
    """bf16 reaches 3e38; over an e4m3 cache such queries count as 65504."""
    batch = make_batch([(10, 2)])
    batch.q[:, :, 1:] = 0
    batch.q[0, :, 0] = 1e30
    batch.q[1, :, 0] = -1e30
    out = batch.run(device).float()
    assert out.isfinite().all()
    k, v = batch.k_cache.float()[:, 0], batch.v_cache.float()[:, 0]
    seen = batch.slots[0, :12].long()
    for row, (sign, count) in enumerate(((1, 11), (-1, 12))):
        scores = sign * 65504 * k[seen[:count], 0] * batch.scale
        expected = scores.softmax(0) @ v[seen[:count]]
        torch.testing.assert_close(out[row], expected.expand(8, DIM), rtol=2**-7, atol=1e-3)


def test_every_finite_e4m3_code_is_read_exactly(device) -> None:
    """One key: its value is the output."""
    batch = make_batch([(0, 1)], group=4, kv_heads=2, v_scale=0.5)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    batch.v_cache.view(torch.uint8)[batch.slot(0, 0)] = codes.view(2, DIM)
    expected = (codes.view(E4M3).float() * 0.5).bfloat16().view(2, 1, DIM).expand(2, 4, DIM)
    assert torch.equal(batch.run(device)[0], expected.reshape(8, DIM))


@pytest.mark.parametrize("logit", [-30.0, 0.0, 30.0])
def test_gates(device, logit: float) -> None:
    """The gate's rows may be a wider matrix's columns."""
    batch = make_batch([(3, 20)], BF16)
    free = batch.run(device).float()
    wide = torch.full((20, 24), float("nan"))
    wide[:, 8:16] = logit
    batch.head_gate = wide.to(device)[:, 8:16]
    gate = torch.sigmoid(torch.tensor(logit))
    # The rounding of either output to bf16, and a few of fp32.
    torch.testing.assert_close(batch.run(device).float(), free * gate, rtol=2.0**-7, atol=0)


def test_faults_that_only_the_device_sees(device) -> None:
    batch = make_batch([(43, 5), (43, 5), (43, 5)])
    clean = batch.run(device)
    # The cache is the middle of a larger buffer of NaN: reading outside of it would show.
    for name in ("k_cache", "v_cache"):
        cache = getattr(batch, name)
        buffer = torch.full((3 * len(cache), 1, DIM), float("nan")).to(E4M3).to(device)
        buffer.view(torch.uint8)[len(cache) : 2 * len(cache)] = cache.view(torch.uint8).to(device)
        setattr(batch, name, buffer[len(cache) : 2 * len(cache)])
    pages = len(batch.k_cache) // batch.page_size
    batch.page_table[0, 1] = pages
    batch.page_table[1, 0] = -1
    out = batch.run(device)
    assert out.isfinite().all() and torch.equal(bits(out[10:]), bits(clean[10:]))

    batch = make_batch([(43, 5), (43, 5), (43, 5)])
    # Past its row of the table, where a wider table goes on with a page of NaN.
    nowhere = (set(range(pages)) - set(batch.page_table.flatten().tolist())).pop()
    wide = torch.full((3, 200), nowhere, dtype=torch.int32)
    wide[:, : batch.page_table.shape[1]] = batch.page_table
    batch.page_table = wide.to(device)[:, : batch.page_table.shape[1]]
    batch.seq_lens[0] = 1000
    batch.seq_lens[1] = 2  # fewer keys than queries
    out = batch.run(device)
    assert (
        (out[5:8] == 0).all()
        and out.isfinite().all()
        and torch.equal(bits(out[10:]), bits(clean[10:]))
    )
    batch.query_lens[2] = 2**30  # more queries than there are
    batch.query_lens[1] = -3
    batch.run(device)


def test_debug_mode_names_the_sequence(device, monkeypatch) -> None:
    monkeypatch.setenv("STEP37_DEBUG", "1")
    batch = make_batch([(40, 5), (10, 20)])
    batch.run(device)
    batch.page_table[1, 1] = 999
    with pytest.raises(ValueError, match="sequence 1 has page 999, expected 0 to"):
        batch.run(device)


def test_one_launch_whose_shape_the_lengths_do_not_change(device) -> None:
    """What a CUDA graph needs."""
    seen: list[Launch] = []
    batch = make_batch([(100, 20), (50, 44)], E4M3, window=512)
    with observed(seen.append, runs=False):
        batch.run(device)
        batch.seq_lens, batch.query_lens = torch.tensor([5, 94]), torch.tensor([1, 63])
        batch.run(device)
    first, second = seen
    assert first.name == "extend_kernel"
    assert first.grid == second.grid and first.options == second.options
    for mine, theirs in zip(first.args, second.args, strict=True):
        assert isinstance(mine, torch.Tensor) or mine == theirs


def test_the_host_reads_no_tensor() -> None:
    """Tensors of the meta device have nothing to read."""
    batch = make_batch([(10, 20), (50, 4)], gated=True)
    tensors = (batch.q, batch.k_cache, batch.v_cache, batch.page_table, batch.seq_lens)
    tensors = [tensor.to("meta") for tensor in (*tensors, batch.query_lens)]
    with observed(lambda called: None, runs=False):
        gate = batch.head_gate.to("meta")
        extend(*tensors, page_size=batch.page_size, head_gate=gate, **batch.shared())


def test_no_tokens_is_no_launch(device) -> None:
    with counted() as launches:
        assert make_batch([(5, 0), (9, 0)]).run(device).shape == (0, 8, DIM)
    assert launches == []


def test_grid_holds_every_split_of_the_tokens() -> None:
    for group, tokens, sequences in itertools.product((1, 8, 12), range(1, 12), (1, 2, 3)):
        tile = ExtendTile(block_rows=32, block_keys=64, num_warps=4, num_stages=2)
        most = max(
            sum(-(-new * group // tile.block_rows) for new in split)
            for split in itertools.product(range(tokens + 1), repeat=sequences)
            if sum(split) == tokens
        )
        bound = most_extend_tiles(tile, tokens, sequences, group)
        assert most <= bound <= most + sequences
    # A batch of single tokens needs a tile each, and gets no more.
    assert most_extend_tiles(extend_tile(E4M3, 90), 64, 64, 8) == 64


def test_errors_name_what_is_wrong(device) -> None:
    def refused(match: str, **changed: object) -> None:
        batch = dataclasses.replace(make_batch([(3, 4)], BF16), **changed)
        with counted() as launches, pytest.raises(ValueError, match=match):
            batch.run(device)
        assert launches == []

    cache = torch.zeros(32, 1, DIM)
    refused("q has dtype torch.float32, expected torch.bfloat16", q=torch.zeros(4, 8, DIM))
    strided = torch.zeros(4, 16, DIM).bfloat16()[:, ::2]
    refused("q has strides", q=strided)
    refused(
        "q has 8 heads, expected a multiple of k_cache's 3",
        k_cache=cache.expand(32, 3, DIM).bfloat16(),
        v_cache=cache.expand(32, 3, DIM).bfloat16(),
    )
    refused("k_cache has dtype torch.float16", k_cache=cache.half())
    refused("v_cache has dtype torch.bfloat16", k_cache=cache.to(E4M3))
    refused("page_table has dtype torch.int64", page_table=torch.zeros(1, 2, dtype=torch.int64))
    refused(r"seq_lens has shape \[2\], expected \[1\]", seq_lens=torch.ones(2).int())
    refused(r"query_lens has shape \[2\], expected \[1\]", query_lens=torch.ones(2).int())
    refused("query_lens has dtype torch.float32", query_lens=torch.ones(1))
    refused("page_size is 8, expected one of", page_size=8)
    refused("window is 0, expected a positive number or None", window=0)
    refused("k_scale is nan, expected a positive number", k_scale=float("nan"))
    refused(r"head_gate has shape \[4, 7\], expected \[4, 8\]", head_gate=torch.zeros(4, 7))
    refused("head_gate has strides", head_gate=torch.zeros(8, 4).mT)


def test_tensors_of_another_device_are_refused() -> None:
    batch = make_batch([(3, 4)], BF16)
    tensors = batch.q, batch.k_cache, batch.v_cache, batch.page_table.to("meta"), batch.seq_lens
    with pytest.raises(ValueError, match="page_table is on meta, expected cpu as q"):
        extend(*tensors, batch.query_lens, page_size=batch.page_size, **batch.shared())
