"""The work that cells are said to do, against figures worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks import attention_cells, expert_cells
from benchmarks.attention_cells import heads
from benchmarks.expert_cells import SHARDS, draw, expected, used, work
from benchmarks.harness.cells import Cell
from benchmarks.harness.timing import calls_needed, copies_needed, summarize
from step37_ext.deploy.data_sheets import DATA_SHEETS
from step37_ext.deploy.work import decode_attention, prefill_attention, prologue

SUITES = (expert_cells, attention_cells)


@pytest.mark.parametrize(
    ("tokens", "distinct", "nvfp4", "fp8", "bf16", "gflop"),
    [  # one rank of TP=4: an expert's 3 x 320 x 4096 weights are 2.21, 3.93 and 7.86 MB
        (1, 8.0, 17.7, 31.5, 62.9, 0.06),
        (8, 58.1, 128.5, 228.5, 457.0, 0.50),
        (64, 240.5, 532.0, 945.8, 1891.6, 4.03),
        (256, 287.8, 636.5, 1131.6, 2263.3, 16.11),
    ],
)
def test_expert_bytes_at_tp4(tokens, distinct, nvfp4, fp8, bf16, gflop):
    shard = SHARDS["TP4"]
    found, pairs = expected(tokens, "uniform", shard)
    assert found == pytest.approx(distinct, abs=0.05)
    for weight_format, megabytes in (("nvfp4", nvfp4), ("fp8", fp8), ("bf16", bf16)):
        done = work(weight_format, "bf16", shard, tokens, found, pairs)
        assert done.stream_bytes / 1e6 == pytest.approx(megabytes, rel=3e-4, abs=0.05)
        assert done.flops / 1e9 == pytest.approx(gflop, abs=0.005)


def test_expert_floor_is_the_slower_of_bytes_and_products():
    sheet, shard = DATA_SHEETS["H100 80GB HBM3"], SHARDS["TP4"]
    decode = work("nvfp4", "bf16", shard, 64, *expected(64, "uniform", shard))
    # 532.0 MB of weights, 2 x 64 x 4096 x 2 bytes of tokens, 64 x 8 x 8 of routing at 3.35 TB/s.
    assert decode.floor(sheet.bandwidth, sheet.flops) == pytest.approx(159.1, abs=0.1)
    prefill = work("nvfp4", "bf16", shard, 8192, *expected(8192, "uniform", shard))
    # 2 x 65536 x 3932160 operations at 989 TFLOP/s.
    assert prefill.floor(sheet.bandwidth, sheet.flops) == pytest.approx(521.1, abs=0.1)


def test_expert_parallel_rank_has_a_quarter_of_the_experts_and_pairs():
    whole, part = SHARDS["TP1"], SHARDS["EP4"]
    for tokens in (1, 64):
        distinct, pairs = expected(tokens, "uniform", whole)
        assert expected(tokens, "uniform", part) == pytest.approx((distinct / 4, pairs / 4))


def test_draws_are_distinct_and_as_expected():
    ids = draw(20000, "uniform", seed=1)
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    for name in ("TP4", "EP4"):
        shard = SHARDS[name]
        counts = [used(one, shard) for one in ids[:19200].view(300, 64, 8)]
        for column, expectation in zip(zip(*counts, strict=True), expected(64, "uniform", shard),
                                       strict=True):  # fmt: skip
            # The mean of 300 draws; a draw's spread is below 4% for both.
            assert sum(column) / 300 == pytest.approx(expectation, rel=5 * 0.04 / 300**0.5)


def test_skewed_routing_uses_fewer_experts():
    uniform, _ = expected(64, "uniform", SHARDS["TP4"])
    skewed, pairs = expected(64, "zipf", SHARDS["TP4"])
    assert skewed < 0.8 * uniform and pairs == pytest.approx(512)
    ids = draw(4096, "zipf", seed=1)
    share = ids.flatten().bincount(minlength=288).sort(descending=True).values / 4096
    assert share[0] > 0.7 and share[0] > 10 * share[100]


@pytest.mark.parametrize(
    ("context", "parallel", "cache", "megabytes"),
    [  # keys and values: 2 x 8 heads x 128, a byte each in fp8
        (65536, 1, "fp8", 134.22),
        (65536, 4, "fp8", 33.55),
        (65536, 4, "bf16", 67.11),
    ],
)
def test_full_decode_reads_every_key_once(context, parallel, cache, megabytes):
    done = decode_attention(heads("full", parallel), 1, context, cache)
    assert done.stream_bytes / 1e6 == pytest.approx(megabytes, abs=0.01)
    # 16 operations a byte of fp8: 8 heads share a key, 2 operations each for it and its value.
    assert done.flops == done.stream_bytes * (16 if cache == "fp8" else 8)


def test_sliding_decode_reads_the_window():
    of = heads("sliding", 4)
    assert decode_attention(of, 64, 262144, "fp8") == decode_attention(of, 64, 512, "fp8")
    assert decode_attention(of, 64, 511, "fp8").stream_bytes == 64 * 511 * 2 * 2 * 128


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize(("new", "prefix"), [(5, 0), (600, 0), (3, 600), (600, 300)])
def test_prefill_counts_visible_pairs(kind, new, prefix):
    of = heads(kind, 4)
    window = of.window or 10**9
    pairs = sum(min(position + 1, window) for position in range(prefix, prefix + new))
    seen = {
        key
        for position in range(prefix, prefix + new)
        for key in range(max(0, position + 1 - window), position + 1)
    }
    done = prefill_attention(of, new, prefix, "bf16")
    assert done.flops == 4 * of.query * 128 * pairs
    assert done.stream_bytes == len(seen) * 2 * of.kv * 128 * 2


def test_prologue_bytes():
    # TP=1, full: 80 heads in, 64 out, 16 to the cache in fp8, 64 cosines and sines of fp32.
    done = prologue(heads("full", 1), 4096, "fp8")
    assert done.bytes == 4096 * (80 * 256 + 64 * 256 + 16 * 128 + 256)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_cells_have_their_own_names_and_hold_their_data(suite):
    cells: list[Cell] = suite.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.memory > cell.work.stream_bytes, cell.name
        assert cell.work.bytes >= cell.work.stream_bytes, cell.name


def test_the_first_cells_are_the_two_served_formats_in_decode():
    first = [cell for cell in expert_cells.cells() if cell.priority == 0]
    assert {(c.settings["format"], c.settings["activations"]) for c in first} == {
        ("nvfp4", "bf16"), ("fp8", "fp8"),
    }  # fmt: skip
    assert {c.settings["tokens"] for c in first} == {1, 8, 64, 256, 8192}
    assert {c.settings["parallel"] for c in first} == {"TP1", "TP4"}


def test_rotation_touches_more_than_any_l2():
    """Data of one sample, or all of it there is, is many times the largest L2 (126 MB, B200)."""
    for cell in expert_cells.cells():
        if cell.operation == "experts":
            shard = SHARDS[str(cell.settings["parallel"])]
            weight_format = str(cell.settings["format"])
            copies, calls = expert_cells.rotation(weight_format, shard, cell.work.stream_bytes)
            assert copies * shard.bytes_of(weight_format) >= 4 << 30
            assert calls % copies == 0 and calls * cell.work.stream_bytes > 4 * 126e6, cell.name
    for cell in attention_cells.cells():
        if cell.operation == "decode":
            turns = attention_cells.rotation(cell)
            assert turns.copies * cell.work.stream_bytes > 2 * 126e6, cell.name


def test_copies_and_calls():
    gib = 1 << 30
    assert [copies_needed(size) for size in (gib, 3 * gib, 9 * gib)] == [4, 2, 1]
    assert calls_needed(gib, 4) == 4
    assert calls_needed(gib // 2, 3) == 9  # 8 calls are wanted, in whole turns
    assert calls_needed(1, 7) == 259  # 256 at the most, in whole turns
    assert calls_needed(1, 1024, 1024) == 1024


def test_summary_of_samples():
    found = summarize([40.0, 10.0, 20.0, 30.0, 50.0], calls=10, graph=True)
    assert (found.median, found.least, found.samples, found.calls) == (3.0, 1.0, 5, 10)
    assert (found.p10, found.p90) == pytest.approx((1.4, 4.6))
