"""SGLang's operations of speculative decoding on a CPU, for one chain of drafts a sequence.

SGLang has them as Triton kernels, and for a CPU in `sgl_kernel`, which is not on PyPI for one.
What is called `accept_index`, `retrieve_index` and so on is SGLang's: with a chain, row b of n
tokens are the flat numbers b * n .. b * n + n - 1, the last sampled token first and then its
drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

KERNELS = "sglang.kernels.ops.speculative"
CACHE = "sglang.srt.mem_cache"
SAMPLING = "sglang.srt.speculative.eagle_utils"


@cache
def install() -> None:
    """Put these operations in SGLang's places, in a process that is about to draft.

    Raises:
        RuntimeError: a place has moved.
    """
    from sglang.srt.speculative import eagle_utils

    from step37_ext.plugin import around

    around(
        (f"{KERNELS}.spec_tree.build_tree_kernel_efficient_func", build_chain),
        (f"{KERNELS}.spec_tree.verify_tree_greedy_func", verify_greedy),
        (f"{KERNELS}.cache_locs.assign_draft_cache_locs_contiguous_func", draft_cache_locs),
        (f"{KERNELS}.eagle.fill_bonus_tokens_func", fill_bonus_tokens),
        (f"{KERNELS}.multi_layer_eagle.rotate_input_ids", rotate_input_ids),
        (f"{CACHE}.allocation.assign_req_to_token_pool_func", assign_slots),
        (f"{CACHE}.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup", no_kv_copy),
    )
    # These are None on a platform without kernels for them, so there is nothing to wrap.
    for function in (top_k_renorm_prob, top_p_renorm_prob, tree_speculative_sampling_target_only):
        name = function.__name__
        if getattr(eagle_utils, name, function) is not None:
            raise RuntimeError(f"{SAMPLING}.{name} is not None in this SGLang")
        setattr(eagle_utils, name, function)


def extend_cache_locs(
    *,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> Tensor:
    """Slots int64 `[batch * draft_token_num]` of the positions from `start_offset` on."""
    return _slots(req_pool_indices, req_to_token, start_offset, draft_token_num).flatten()


def draft_cache_locs(
    original: Callable[..., None],
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
) -> None:
    """Write the slots of `num_cols` positions from `seq_lens` on to `out_cache_loc`."""
    _require_chain(topk)
    slots = _slots(req_pool_indices, req_to_token, seq_lens, num_cols)
    out_cache_loc.copy_(slots.flatten())


def _slots(requests: Tensor, req_to_token: Tensor, start: Tensor, count: int) -> Tensor:
    """int64 `[B, count]`."""
    positions = start[:, None] + torch.arange(count)
    return req_to_token[requests.long()[:, None], positions.long()].long()


def assign_slots(
    original: Callable[..., None],
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Enter the new slots of each sequence, from `start_offset` to `end_offset`."""
    spans = torch.stack((req_pool_indices.long(), start_offset.long(), end_offset.long()), 1)
    first = 0
    for request, start, end in spans.tolist():
        req_to_token[request, start:end] = out_cache_loc[first : first + end - start]
        first += end - start


def no_kv_copy(original: Callable[..., None], pool: Any) -> None:
    """Prepare no kernel that moves accepted keys together: those of a chain lie together."""
    pool._kv_copy_config = None


def build_chain(
    original: Callable[..., None],
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """Fill positions, mask `[B, n, n]` and the links of a tree that is one chain."""
    from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode

    _require_chain(topk)
    if tree_mask_mode != TreeMaskMode.QLEN_ONLY:
        raise ValueError(f"tree mask mode {tree_mask_mode}: only QLEN_ONLY is there on a CPU")
    count, steps = num_verify_tokens, torch.arange(num_verify_tokens)
    positions.copy_((seq_lens[:, None] + steps).flatten())
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    tree_mask.view(-1, count, count).copy_(causal.expand(len(seq_lens), -1, -1))
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token.copy_(torch.where(steps + 1 < count, steps + 1, -1))
    retrieve_next_sibling.fill_(-1)


def verify_greedy(
    original: Callable[..., Any],
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept drafts `candidates[:, 1:]` up to the first that is not the model's greedy token."""
    _require_chain(topk)
    right = candidates[:, 1:] == target_predict[:, :-1]
    _accept(right, target_predict, predicts, accept_index, accept_token_num)
    return predicts, accept_index, accept_token_num


def tree_speculative_sampling_target_only(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float,
    threshold_acc: float,
    deterministic: bool,
) -> None:
    """Accept a draft with the probability that the model gives it, else sample another token.

    The token after the accepted ones comes from the model's distribution, without the draft that
    was refused there: together every token has the model's distribution.

    Args:
        target_probs: `[B, n, vocab]`.
        uniform_samples, uniform_samples_for_final_sampling: `[B, n]` and `[B]` in [0, 1).
    """
    drafts = candidates[:, 1:].long()
    of_draft = target_probs[:, :-1].gather(2, drafts[..., None])[..., 0]
    accepted = uniform_samples[:, : drafts.shape[1]] < of_draft / threshold_acc
    accepted |= of_draft >= threshold_single
    others = target_probs.clone()
    others[:, :-1].scatter_(2, drafts[..., None], 0.0)  # where a draft is refused
    count = accepted.int().cumprod(1).sum(1)
    rows = torch.arange(len(drafts))
    cumulative = others[rows, count].double().cumsum(1)
    wanted = uniform_samples_for_final_sampling.double() * cumulative[:, -1]
    last = torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]
    tokens = torch.cat((drafts, drafts[:, :1]), 1).scatter(1, count[:, None], last[:, None])
    _accept(accepted, tokens, predicts, accept_index, accept_token_num)


def _accept(
    right: Tensor, tokens: Tensor, predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor
) -> None:
    """Write what is accepted: the drafts before the first wrong one, and the token after them.

    Args:
        right: bool `[B, n - 1]`.
        tokens: `[B, n]`, the model's token after each of the n.
    """
    count = right.int().cumprod(1).sum(1)
    accepted = torch.arange(tokens.shape[1]) <= count[:, None]
    flat = torch.arange(tokens.numel()).view_as(tokens)
    accept_index.copy_(torch.where(accepted, flat, -1))
    predicts.copy_(torch.where(accepted, tokens, 0).flatten())
    accept_token_num.copy_(count)


def fill_bonus_tokens(
    original: Callable[..., None],
    accept_tokens: Tensor,
    accept_lens: Tensor,
    bonus_tokens: Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """The last accepted token of each sequence, of `accept_stride` places each."""
    rows = accept_tokens.view(batch_size, accept_stride)
    bonus_tokens.copy_(rows.gather(1, accept_lens.long()[:, None] - 1)[:, 0])


def rotate_input_ids(
    original: Callable[..., Tensor],
    input_ids: Tensor,
    extend_start_loc: Tensor,
    extend_seq_lens: Tensor,
    topk_index: Tensor,
    select_index: Tensor | None = None,
) -> Tensor:
    """Shift each sequence's tokens by one to the left, in place, and put its new token last.

    Args:
        select_index: where the new token goes instead, a place in `input_ids` for each sequence.
    """
    places = zip(extend_start_loc.tolist(), extend_seq_lens.tolist(), strict=True)
    for row, (start, length) in enumerate(places):
        if length == 0:
            continue
        input_ids[start : start + length - 1] = input_ids[start + 1 : start + length].clone()
        last = start + length - 1 if select_index is None else int(select_index[row])
        input_ids[last] = topk_index.flatten()[row]
    return input_ids


def top_k_renorm_prob(probs: Tensor, top_ks: Tensor) -> Tensor:
    """Only the `top_ks` largest probabilities of each row, summing to one again."""
    ranked = probs.sort(dim=-1, descending=True).values
    last = top_ks.long().clamp(1, probs.shape[-1])[:, None] - 1
    kept = probs.where(probs >= ranked.gather(-1, last), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm_prob(probs: Tensor, top_ps: Tensor) -> Tensor:
    """Only the largest probabilities that reach `top_ps` together, summing to one again."""
    ranked, order = probs.sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    kept = torch.zeros_like(probs).scatter(
        -1, order, ranked.where(before < top_ps.float()[:, None], 0.0)
    )
    return kept / kept.sum(-1, keepdim=True)


def _require_chain(topk: int) -> None:
    if topk != 1:
        raise ValueError(f"--speculative-eagle-topk {topk}: on a CPU drafts are one chain (1)")
