"""Sorting pairs by expert, the FP8 rows that ride along, and the sum at the end."""

from __future__ import annotations

import pytest
import torch

from step37_kernels.experts.activations import quantize
from step37_kernels.experts.combine import combine
from step37_kernels.experts.e4m3_words import word_order
from step37_kernels.experts.routing import Routing, most_blocks
from step37_kernels.experts.sort import sort, sort_and_prepare
from step37_kernels.formats import nvfp4
from step37_kernels.formats.e4m3 import quantize_per_token_group
from step37_kernels.formats.nvfp4_tiles import hidden_permutation, hidden_permutation_fp8
from step37_kernels.launch import counted


def check_routing(routing: Routing, ids: torch.Tensor, experts: int, first: int) -> None:
    """Every local pair stands once, in ascending order, in a block of its expert; -1 elsewhere."""
    slots = routing.pair_of_slot.view(-1, routing.block_rows).cpu()
    owners = routing.expert_of_block.cpu()
    local = ids.flatten().long().cpu() - first
    block = 0
    for e in range(experts):
        pairs = (local == e).nonzero().flatten()
        needed = -(-len(pairs) // routing.block_rows)
        mine = slots[block : block + needed].flatten()
        assert (owners[block : block + needed] == e).all()
        assert mine[: len(pairs)].tolist() == pairs.tolist() and (mine[len(pairs) :] == -1).all()
        block += needed
    assert (owners[block:] == -1).all()


@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize("case", ["one", "spread", "one expert", "other rank", "many"])
def test_pairs_are_sorted_by_expert(device: torch.device, case: str, block_rows: int) -> None:
    torch.manual_seed(0)
    experts, first, top_k = 9, 0, 4
    if case == "one":
        ids = torch.tensor([[3, 0, 8, 5]])
    elif case == "spread":
        ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(33)])
    elif case == "one expert":
        ids = torch.full((21, top_k), 8)  # a fault of the router, and still sorted
    elif case == "other rank":
        first = 100
        ids = torch.randint(-2, 120, (40, top_k))
        ids[0] = torch.tensor([-1, 2**31 - 1, -(2**31), 99])
    else:  # more than a chunk of 1024
        ids = torch.randint(0, experts, (300, top_k))
    ids = ids.int().to(device)
    with counted() as launches:
        routing = sort(ids, experts, first, block_rows)
    assert launches == ["sort_kernel"]
    check_routing(routing, ids, experts, first)


def test_int64_ids_and_no_tokens(device: torch.device) -> None:
    ids = torch.tensor([[1, 2**40, -1]], device=device)
    check_routing(sort(ids, 2, 0, 16), ids, 2, 0)
    with counted() as launches:
        assert sort(ids[:0], 2, 0, 16).max_blocks == 0
    assert not launches


def test_most_blocks_is_never_too_few_and_is_reached() -> None:
    for pairs, experts, rows in ((1, 288, 16), (8, 288, 16), (100, 9, 16), (65536, 288, 128)):
        most = most_blocks(pairs, experts, rows)
        active = min(pairs, experts)
        # One row on each of a - 1 experts and the rest on one is the worst spread.
        worst = active - 1 + -(-(pairs - active + 1) // rows)
        assert worst <= most <= worst + 1


def test_hidden_states_are_quantised_beside_the_sort(device: torch.device) -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(5, 384, device=device) * 40).bfloat16()
    hidden[1, 128:256] = 0
    hidden[2] *= 2.0**-120  # scales near fp32's smallest
    hidden[3, 7] = float("nan")
    ids = torch.randint(0, 4, (5, 2), dtype=torch.int32, device=device)
    with counted() as launches:
        routing, rows = sort_and_prepare(hidden, "fp8", ids, 4, 0, 16)
    assert len(launches) == 1
    check_routing(routing, ids, 4, 0)
    q, scale = quantize_per_token_group(hidden)
    for row in (0, 1, 2, 4):
        assert torch.equal(rows.q[row].view(torch.uint8), q[row].view(torch.uint8)), row
        assert torch.equal(rows.scale[row], scale[row])
    assert rows.q[3, 7].float().isnan()


def test_hidden_states_are_permuted_beside_the_sort(device: torch.device) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 192, device=device).bfloat16()
    ids = torch.randint(0, 4, (3, 2), dtype=torch.int32, device=device)
    for order, index in (("slabs", hidden_permutation(192)), ("words", word_order(192))):
        routing, permuted = sort_and_prepare(hidden, order, ids, 4, 0, 16)
        check_routing(routing, ids, 4, 0)
        assert torch.equal(permuted, hidden[:, index.to(device)])
        assert not torch.equal(permuted, hidden)
    with pytest.raises(ValueError, match="rows have 96 channels, slabs takes a multiple of 64"):
        sort_and_prepare(hidden[:, :96].contiguous(), "slabs", ids, 4, 0, 16)


@pytest.mark.parametrize(("size", "offset"), [(320, 64), (160, 96), (128, 0)])
def test_the_intermediate_keeps_the_groups_of_the_whole(
    device: torch.device, size: int, offset: int
) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[5, 9], [4, 6]], dtype=torch.int32, device=device)
    intermediate = torch.randn(4, size, device=device).bfloat16()
    rows = quantize(intermediate, "fp8", ids, num_experts=3, first_expert=4, offset=offset)
    q, scale = quantize_per_token_group(intermediate, offset=offset)
    for pair in (0, 2, 3):  # pair 1 belongs to another rank
        assert torch.equal(rows.q[pair].view(torch.uint8), q[pair].view(torch.uint8))
        assert torch.equal(rows.scale[pair], scale[pair])


def test_fp8_rows_are_permuted_inside_their_groups(device: torch.device) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 256, device=device).bfloat16()
    ids = torch.randint(0, 4, (3, 2), dtype=torch.int32, device=device)
    _, rows = sort_and_prepare(hidden, "fp8 slabs", ids, 4, 0, 16)
    index = hidden_permutation_fp8(256).to(device)
    q, scale = quantize_per_token_group(hidden)
    assert torch.equal(rows.q.view(torch.uint8), q.view(torch.uint8)[:, index])
    assert torch.equal(rows.scale, scale)


def test_rows_are_quantised_to_nvfp4(device: torch.device) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 96, device=device).bfloat16()
    ids = torch.randint(0, 4, (3, 2), dtype=torch.int32, device=device)
    unit = torch.tensor(0.001, device=device)
    _, rows = sort_and_prepare(hidden, "nvfp4", ids, 4, 0, 16, global_scale=unit)
    expected = nvfp4.quantize(hidden, unit)
    assert torch.equal(rows.packed, expected.packed)
    assert torch.equal(rows.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8))
    intermediate = torch.randn(6, 64, device=device).bfloat16()
    again = quantize(intermediate, "nvfp4", ids, 4, 0, global_scale=unit)
    assert torch.equal(again.packed, nvfp4.quantize(intermediate, unit).packed)
    with pytest.raises(ValueError, match="NVFP4 activations need a global scale"):
        sort_and_prepare(hidden, "nvfp4", ids, 4, 0, 16)


def test_combine_adds_what_is_here_in_fp32(device: torch.device) -> None:
    torch.manual_seed(0)
    tokens, top_k, size = 3, 4, 1100  # not a whole number of blocks
    ids = torch.tensor([[7, 8, -1, 9], [0, 1, 2, 99], [8, 8, 8, 8]], dtype=torch.int32)
    here = (ids >= 7) & (ids < 10)
    partial = torch.randn(tokens * top_k, size).bfloat16()
    partial[~here.flatten()] = float("nan")  # never written by a GEMM, never read
    shared = torch.randn(2, tokens, size)
    kept = partial.float().view(tokens, top_k, size).masked_fill(~here[..., None], 0)
    for extra in (None, shared, shared[:1].bfloat16()):
        moved = None if extra is None else extra.to(device)
        out = combine(partial.to(device), ids.to(device), 3, 7, moved)
        exact = kept.double().sum(1) + (0 if extra is None else extra.double().sum(0))
        # Six sums in fp32, and one rounding to bf16, whose unit roundoff is 2^-8.
        parts = kept.abs().sum(1) + (0 if extra is None else extra.float().abs().sum(0))
        bound = 2.0**-8 * exact.abs() * (1 + 2.0**-6) + 6 * 2.0**-24 * parts
        assert ((out.cpu() - exact).abs() <= bound).all()


def test_bad_input_is_refused(device: torch.device) -> None:
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="topk_ids has dtype torch.float32"):
        sort(ids.float(), 4, 0, 16)
    with pytest.raises(ValueError, match=r"topk_ids has strides \(1, 2\)"):
        sort(ids.T, 4, 0, 16)
    with pytest.raises(ValueError, match=r"hidden has shape \[3, 128\], expected \[2, any\]"):
        hidden = torch.zeros(3, 128, device=device).bfloat16()
        sort_and_prepare(hidden, "fp8", ids, 4, 0, 16)
    with pytest.raises(ValueError, match=r"shared has shape \[1, 2, 64\]"):
        partial = torch.zeros(4, 128, device=device).bfloat16()
        combine(partial, ids, 4, 0, torch.zeros(1, 2, 64, device=device))
