"""Verification of drafts: causal and tree masks, windows, groups, row tiles."""

from __future__ import annotations

import pytest
import torch
from paged import BF16, E4M3, Batch

from step37_kernels.attention import tiles
from step37_kernels.launch import counted


@pytest.fixture(autouse=True)
def few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 2)


def tree(*parents: int) -> torch.Tensor:
    """bool [n, n] of a tree: a node sees itself and its ancestors; -1 is a root."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


CHAIN_OF_4, BUSH = tree(-1, 0, 1, 2), tree(-1, 0, 0, 1)


@pytest.mark.parametrize(
    "batch",
    [
        Batch(E4M3, 64, 8, 1, [2, 300, 65], None, queries=2, gated=True),
        Batch(E4M3, 16, 12, 2, [140, 0], 64, queries=4, k_scale=0.4, v_scale=3.0),
        Batch(E4M3, 1, 12, 1, [530], 512, queries=8),
        Batch(BF16, 32, 8, 1, [100], 9, queries=8, gated=True),
    ],
    ids=lambda batch: f"{batch.dtype}-{batch.queries}x{batch.heads}/{batch.kv_heads}",
)
def test_drafts_in_a_row_are_the_reference(device, batch: Batch) -> None:
    out = batch.run(device)
    batch.check(out)
    assert (out[[length < batch.queries for length in batch.lengths]] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, E4M3])
@pytest.mark.parametrize("window", [None, 5])
def test_trees_are_the_reference(device, dtype, window) -> None:
    """In a window of 5 the bush's last two drafts see one key of the prefix more than in a row."""
    masks = torch.stack([BUSH, CHAIN_OF_4, tree(-1, -1, 0, 1)])
    batch = Batch(dtype, 1, 3, 1, [70, 66, 4], window, queries=4, tree_mask=masks)
    out = batch.run(device)
    batch.check(out)
    batch.tree_mask = None
    in_a_row = batch.run(device)
    same = (out.view(torch.int16) == in_a_row.view(torch.int16)).flatten(2).all(-1)
    assert same[1].all()  # a chain is drafts in a row
    assert same[0].tolist() == [True, True, False, False]


def test_a_draft_does_not_see_its_siblings_and_followers(device) -> None:
    batch = Batch(E4M3, 16, 2, 1, [40], queries=4, tree_mask=BUSH[None])
    before = batch.run(device)
    last = batch.slots(0)[-4:]
    for draft in range(4):
        changed = batch.v_cache.clone()
        changed.view(torch.uint8)[last[draft]] = torch.tensor(448.0).to(E4M3).view(torch.uint8)
        batch.v_cache, kept = changed, batch.v_cache
        after = batch.run(device)
        batch.v_cache = kept
        sees = (before != after).flatten(2).any(-1)[0]
        assert sees.tolist() == BUSH[:, draft].tolist()


def test_one_draft_is_decode_of_its_prefix(device) -> None:
    """The first draft of two sees what a decode of one key less sees."""
    batch = Batch(BF16, 16, 8, 1, [50], queries=2)
    both = batch.run(device)
    batch.lengths, batch.queries, batch.q = [49], 1, batch.q[:, :1]
    batch.check(both[:, :1])


def test_errors_name_what_is_wrong(device) -> None:
    def refused(match: str, queries: int = 4, **changed: object) -> None:
        batch = Batch(BF16, 16, 8, 1, [40], queries=queries)
        vars(batch).update(changed)
        with counted() as launches, pytest.raises(ValueError, match=match):
            batch.run(device)
        assert launches == []

    refused("q has 9 drafts a sequence, expected 2 to 8", queries=9)
    refused("window is 3, expected None or at least the 4 drafts", window=3)
    refused(r"tree_mask has shape \[1, 3, 3\]", tree_mask=torch.ones(1, 3, 3).bool())
    refused("tree_mask has dtype torch.int32", tree_mask=torch.ones(1, 4, 4).int())
    refused("tree_mask has strides", tree_mask=torch.ones(1, 4, 4).bool().expand(1, 4, 4).mT)
