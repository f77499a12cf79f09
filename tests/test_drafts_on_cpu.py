"""SGLang's operations of speculative decoding in plain PyTorch, on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode

from step37_ext import drafts_on_cpu as cpu

TABLE = torch.arange(40, dtype=torch.int32).view(4, 10)


def stock(*args: object, **kwargs: object) -> None:
    raise AssertionError("SGLang's own operation was called")


def test_slots_of_a_window() -> None:
    requests, start = torch.tensor([2, 0]), torch.tensor([3, 7])
    slots = cpu.extend_cache_locs(
        req_pool_indices=requests,
        req_to_token=TABLE,
        start_offset=start,
        end_offset=start + 3,
        batch_size=2,
        draft_token_num=3,
        device="cpu",
    )
    assert slots.tolist() == [23, 24, 25, 7, 8, 9] and slots.dtype == torch.int64
    out = torch.empty(4, dtype=torch.int64)
    cpu.draft_cache_locs(stock, requests, TABLE, start, out, 1, 2)
    assert out.tolist() == [23, 24, 7, 8]
    with pytest.raises(ValueError, match="--speculative-eagle-topk 2: on a CPU"):
        cpu.draft_cache_locs(stock, requests, TABLE, start, out, 2, 1)


def test_new_slots_are_entered_where_they_belong() -> None:
    table = torch.zeros(3, 6, dtype=torch.int32)
    spans = torch.tensor([1, 4]), torch.tensor([3, 6])
    cpu.assign_slots(stock, torch.tensor([2, 0]), table, *spans, torch.tensor([7, 8, 5, 6]), 2)
    assert table.tolist() == [[0, 0, 0, 0, 5, 6], [0] * 6, [0, 7, 8, 0, 0, 0]]


def test_a_chain_as_a_tree() -> None:
    lengths, mask = torch.tensor([5, 2]), torch.zeros(18, dtype=torch.bool)
    positions, links = torch.empty(6, dtype=torch.int64), torch.empty(3, 2, 3, dtype=torch.int64)
    arguments = (None, None, lengths, mask, positions, *links)
    cpu.build_chain(stock, *arguments, 1, 2, 3, TreeMaskMode.QLEN_ONLY)  # type: ignore[arg-type]
    assert positions.tolist() == [5, 6, 7, 2, 3, 4]
    assert mask.view(2, 3, 3).int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]] * 2
    index, following, sibling = links.tolist()
    assert index == [[0, 1, 2], [3, 4, 5]] and following == [[1, 2, -1]] * 2
    assert sibling == [[-1] * 3] * 2
    with pytest.raises(ValueError, match="tree mask mode 0"):
        cpu.build_chain(stock, *arguments, 1, 2, 3, TreeMaskMode.FULL_MASK)  # type: ignore[arg-type]


def accepted(verify, candidates: list[list[int]], **more: object) -> tuple[list, list, list]:
    """(tokens, accept_index, right drafts) of a verification."""
    rows, width = len(candidates), len(candidates[0])
    predicts = torch.full((rows * width,), 99, dtype=torch.int32)
    index = torch.full((rows, width), -1, dtype=torch.int32)
    count = torch.empty(rows, dtype=torch.int32)
    verify(predicts=predicts, accept_index=index, accept_token_num=count,
           candidates=torch.tensor(candidates), **more)  # fmt: skip
    return predicts.tolist(), index.tolist(), count.tolist()


def test_greedy_verification_stops_at_the_first_wrong_draft() -> None:
    """All right; the second wrong although the third is right; none right."""
    links = dict.fromkeys(("retrieve_index", "retrieve_next_token", "retrieve_next_sibling"))
    predicts, index, count = accepted(
        lambda **given: cpu.verify_greedy(stock, **given, topk=1),
        [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]],
        target_predict=torch.tensor([[2, 3, 4, 5], [2, 7, 4, 5], [9, 3, 4, 5]]),
        **links,
    )
    assert count == [3, 1, 0]
    assert predicts == [2, 3, 4, 5, 2, 7, 0, 0, 9, 0, 0, 0]
    assert index == [[0, 1, 2, 3], [4, 5, -1, -1], [8, -1, -1, -1]]
    bonus = torch.empty(3, dtype=torch.int32)
    tokens = torch.tensor(predicts)[torch.tensor(index)]
    cpu.fill_bonus_tokens(stock, tokens, torch.tensor(count) + 1, bonus, 4, 3)
    assert bonus.tolist() == [5, 7, 9]


def test_tokens_move_on_by_one() -> None:
    ids = torch.tensor([1, 2, 3, 4, 5, 6])
    spans = torch.tensor([0, 4, 4]), torch.tensor([4, 0, 2])
    cpu.rotate_input_ids(stock, ids, *spans, torch.tensor([[70], [80], [90]]))
    assert ids.tolist() == [2, 3, 4, 70, 6, 90]
    ids = torch.tensor([1, 2, 3, 4, 5, 6])
    spans = torch.tensor([0, 3]), torch.tensor([3, 3])
    cpu.rotate_input_ids(stock, ids, *spans, torch.tensor([[70], [90]]), torch.tensor([1, 3]))
    assert ids.tolist() == [2, 70, 3, 90, 6, 6]


def test_sampled_tokens_have_the_model_s_distribution() -> None:
    """The first token after the prompt, the second after a right draft and the last of all."""
    draws = 50_000
    torch.manual_seed(0)
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25] * 4])
    predicts, _, count = accepted(
        cpu.tree_speculative_sampling_target_only,
        [[3, 1, 2]] * draws,
        **dict.fromkeys(("retrive_index", "retrive_next_token", "retrive_next_sibling")),
        uniform_samples=torch.rand(draws, 3),
        uniform_samples_for_final_sampling=torch.rand(draws),
        target_probs=probs.expand(draws, -1, -1),
        draft_probs=None,
        threshold_single=1.0,
        threshold_acc=1.0,
        deterministic=True,
    )
    tokens, right = torch.tensor(predicts).view(draws, 3), torch.tensor(count)
    # Frequencies of n draws are off by 5 standard deviations once in a million.
    for place, among in enumerate((right >= 0, right >= 1, right >= 2)):
        found = tokens[among, place].bincount(minlength=4) / among.sum()
        allowed = 5 * (probs[place] * (1 - probs[place]) / among.sum()).sqrt() + 1e-9
        assert ((found - probs[place]).abs() <= allowed).all(), (place, found)


def test_renormalised_probabilities() -> None:
    probs = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.4, 0.3, 0.2, 0.1]])
    of_two = cpu.top_k_renorm_prob(probs, torch.tensor([2, 1 << 30]))
    torch.testing.assert_close(of_two, torch.tensor([[0.625, 0, 0.375, 0], [0.4, 0.3, 0.2, 0.1]]))
    of_most = cpu.top_p_renorm_prob(probs, torch.tensor([0.5, 0.75]))
    torch.testing.assert_close(
        of_most, torch.tensor([[1, 0, 0, 0], [0.4 / 0.9, 0.3 / 0.9, 0.2 / 0.9, 0]])
    )
