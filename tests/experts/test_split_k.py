"""Gate-up with K in several parts: in every format, its counters, and when it is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from step37_kernels.expert_weights import on_device
from step37_kernels.experts import grouped_bf16, layer, tiles
from step37_kernels.experts.formats import FORMATS
from step37_kernels.experts.routing import Routing
from step37_kernels.experts.sort import sort, sort_and_prepare
from step37_kernels.experts.split_k import sum_of_tile
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.launch import counted
from tests.experts.bounds import expect
from tests.experts.dense_layers import fp8_experts
from tests.experts.test_layer import batch, make_weights, options_of, run

SPLIT = [pair for pair in FORMATS if pair != ("nvfp4", "fp8")]  # W4A8 is for prefill
K = 1024


@pytest.fixture
def routings(monkeypatch: pytest.MonkeyPatch) -> list[Routing]:
    """What the layers of a test have sorted."""
    seen: list[Routing] = []

    def kept(make):
        def sorted_by(*args, **kwargs):
            made = make(*args, **kwargs)
            seen.append(made[0] if isinstance(made, tuple) else made)
            return made

        return sorted_by

    monkeypatch.setattr(layer, "sort", kept(sort))
    monkeypatch.setattr(layer, "sort_and_prepare", kept(sort_and_prepare))
    return seen


@pytest.mark.parametrize(("form", "activations"), SPLIT)
@pytest.mark.usefixtures("parts_interleave")
def test_parts_add_up_in_every_format(
    device: torch.device, routings: list[Routing], form: str, activations: str
) -> None:
    """Several tiles and blocks, an expert without rows, ids of other ranks, a limit that bites."""
    torch.manual_seed(0)
    # FP8's blocks have unlike scales, so that one taken from another part shows.
    weights = fp8_experts(4, K, 160, 96) if form == "fp8" else make_weights(form, 4, K, 160)
    hidden, topk_weights, ids = batch(5, 6, 3, K)
    ids[ids == 2] = 7
    ids[1, 0] = -1
    args = (topk_weights, ids, 0.5)
    with counted() as launches:
        got = run(device, hidden, weights, *args, **options_of(activations))
    assert len(launches) <= (4 if activations == "same" else 5)
    (routing,) = routings
    assert routing.arrived is not None and routing.arrived.shape[1] > 1
    live = routing.expert_of_block >= 0
    assert live.any() and not live.all()
    assert not routing.arrived[live].any()  # left as they were found
    expected = expect(
        hidden, weights, *args, **options_of(activations), narrow=device.type == "cuda"
    )
    assert ((got.double() - expected.output).abs() <= expected.bound).all()
    again = run(device, hidden, weights, *args, **options_of(activations))
    assert torch.equal(got, again)


@triton.jit
def _sum_kernel(parts, arrived, out, last_of, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    split = tl.program_id(2)
    valid = tl.arange(0, 16) < ROWS
    acc = tl.zeros((64, 16), tl.float32) + (split + 1)
    acc, last = sum_of_tile(acc, parts, arrived, valid, SPLITS)
    tl.store(last_of + split, last.to(tl.int32))
    if last:
        at = tl.arange(0, 64)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(out + at, acc, mask=valid[None, :])


def test_one_program_has_the_sum(device: torch.device) -> None:
    parts = torch.full((3, 16, 64), float("nan"), device=device)
    arrived, last_of = (torch.zeros(n, dtype=torch.int32, device=device) for n in (1, 3))
    out = torch.full((64, 16), -1.0, device=device)
    _sum_kernel[(1, 1, 3)](parts, arrived, out, last_of, 3, 5)
    assert last_of.sum() == 1 and not arrived.any()
    assert (out[:, :5] == 1 + 2 + 3).all() and (out[:, 5:] == -1).all()


def test_the_sort_zeroes_the_counters_of_its_blocks(device: torch.device) -> None:
    ids = torch.tensor([[0, 3], [3, 9], [3, 1]], dtype=torch.int32, device=device)
    held = torch.full((4096,), 7, dtype=torch.int32, device=device)  # what new memory may hold
    del held
    routing = sort(ids, 4, 0, 16, counters=5)
    assert routing.arrived is not None and routing.arrived.shape == (routing.max_blocks, 5)
    live = routing.expert_of_block >= 0
    assert live.sum() == 3 and not routing.arrived[live].any()
    assert sort(ids, 4, 0, 16).arrived is None


def test_counters_and_steps_that_do_not_fit_are_refused(device: torch.device) -> None:
    weights = on_device(make_weights("bf16", 2, 256, 64), device)
    x, _, ids = (tensor.to(device) for tensor in batch(3, 2, 2, 256))
    tile = GemmTile(16, 64, 64, 4, 3, splits=2)
    with counted() as launches:
        with pytest.raises(ValueError, match=r"arrived is None, expected counters for 2 splits"):
            grouped_bf16.gate_up(x, weights, sort(ids, 2, 0, 16), None, tile)
        with pytest.raises(ValueError, match=r"arrived has shape \[2, 3\], expected \[2, 2\]"):
            grouped_bf16.gate_up(x, weights, sort(ids, 2, 0, 16, counters=3), None, tile)
        with pytest.raises(ValueError, match=r"splits is 3, expected a divisor of 256 columns in"):
            routing = sort(ids, 2, 0, 16, counters=2)
            grouped_bf16.gate_up(x, weights, routing, None, replace(tile, splits=3))
    assert set(launches) == {"sort_kernel"}


CHOICES = (tiles.nvfp4, tiles.bf16, tiles.fp8, tiles.fp8_bf16, tiles.nvfp4_nvfp4)


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("size", [1280, 640, 320, 160])
def test_small_grids_are_cut_and_large_ones_are_not(choose, arch: int, size: int) -> None:
    """Two programs an SM where K allows it, whole steps, and never down."""
    sms = tiles.SM_COUNT[arch]
    for tokens in (1, 2, 4, 8, 16, 64, 256, 8192):
        up, down = choose(8 * tokens, 288, size, 4096, arch)
        programs = -(-2 * size // up.block_n) * tiles.most_blocks(8 * tokens, 288, up.block_rows)
        assert down.splits == 1
        assert up.splits == 1 or programs * up.splits < 4 * sms
        assert programs * up.splits >= 2 * sms or up.splits == 8 or up.block_rows > 16
        assert 4096 % (2 * up.block_k * up.splits) == 0
        assert up.splits == 1 or 4096 // up.splits % 128 == 0  # FP8's blocks stay whole
    assert choose(8, 288, size, 4096, arch)[0].splits > 1


def test_w4a8_is_not_cut() -> None:
    assert tiles.nvfp4_fp8(8, 288, 320, 4096, 90)[0].splits == 1


def test_a_rank_of_several_is_cut_for_the_pairs_that_it_has(
    device: torch.device, routings: list[Routing]
) -> None:
    """40 tokens are 80 rows on 2 experts, but less than one where 288 share them."""
    weights = on_device(make_weights("bf16", 2, K, 64), device)
    hidden, topk_weights, ids = (tensor.to(device) for tensor in batch(40, 2, 2, K))
    layer.experts(hidden, weights, topk_weights, ids, None)
    layer.experts(hidden, weights, topk_weights, ids, None, total_experts=288)
    whole, part = routings
    assert whole.block_rows == 64 and whole.arrived is None
    assert part.block_rows == 16 and part.arrived is not None
