"""Each mistake that a kernel or a model class could make fails the check that the model passes.

Answers learnt by heart survive small errors, so the prompt is noise and logprobs are compared. All
are made on one loaded model, NVFP4 with an FP8 cache, which has all that can go wrong.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from expected import Subject, noise
from harness import Mutation, Request
from torch import Tensor
from torch.nn.functional import silu

from step37_ext.checkpoint.spec import TINY

# Three windows long, and one decode step.
REQUEST = Request(noise(3 * TINY.sliding_window - 5, seed=1), new_tokens=2)


def no_routed_clamp(patch: pytest.MonkeyPatch, layer: Any) -> None:
    if layer.moe is not None:
        patch.setattr(layer.moe, "limit", None)


def no_shared_clamp(patch: pytest.MonkeyPatch, layer: Any) -> None:
    if layer.moe is not None:
        patch.setattr(layer.moe.share_expert, "limit", None)


def clamped_before_silu(gate_up: Tensor, limit: float | None) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return silu(gate) * up


def routed_clamp_before_silu(patch: pytest.MonkeyPatch, layer: Any) -> None:
    from step37_kernels.reference import experts

    patch.setattr(experts, "swiglu_step", clamped_before_silu)


def shared_clamp_before_silu(patch: pytest.MonkeyPatch, layer: Any) -> None:
    from step37_kernels.reference import shared_expert

    patch.setattr(shared_expert, "swiglu_step", clamped_before_silu)


def window_longer(patch: pytest.MonkeyPatch, layer: Any, by: int) -> None:
    from step37_ext.attention_backend import Step37AttentionBackend

    attention = layer.self_attn.attn
    if attention.sliding_window_size >= 0:
        patch.setattr(attention, "sliding_window_size", attention.sliding_window_size + by)
        # The backend, which fills the pages of its own window only, is mistaken in the same way.
        wrong = property(lambda backend: vars(backend)["window"] + by)
        patch.setattr(Step37AttentionBackend, "window", wrong, raising=False)


def cache_scale_of_one(patch: pytest.MonkeyPatch, layer: Any, which: str) -> None:
    patch.setattr(layer.self_attn.attn, f"{which}_scale_float", 1.0)


def no_head_gate(patch: pytest.MonkeyPatch, layer: Any) -> None:
    # Not setattr: undoing that is more than torch's modules take.
    patch.setitem(layer.self_attn._modules, "g_proj", None)


def one_scale_for_gate_and_up(patch: pytest.MonkeyPatch, layer: Any) -> None:
    if layer.moe is not None:
        experts = layer.moe.experts
        scale = experts.weights.w13_global_scale[:, :1].expand(-1, 2).contiguous()
        patch.setattr(experts, "weights", replace(experts.weights, w13_global_scale=scale))


def nibbles_swapped(patch: pytest.MonkeyPatch, layer: Any, name: str) -> None:
    if layer.moe is not None:
        experts = layer.moe.experts
        packed = getattr(experts.weights, name)
        swapped = {name: (packed >> 4) | (packed << 4)}
        patch.setattr(experts, "weights", replace(experts.weights, **swapped))


def route_with_biased_weights(
    hidden: Tensor, gate: Tensor, bias: Tensor, top_k: int, scaling: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    weights, ids = (torch.sigmoid(hidden @ gate.float().T) + bias).topk(top_k)
    return scaling * weights / weights.sum(-1, keepdim=True), ids


def biased_router_weights(patch: pytest.MonkeyPatch, layer: Any) -> None:
    if layer.moe is not None:
        patch.setattr(layer.moe, "route", route_with_biased_weights)


def no_router_scaling(patch: pytest.MonkeyPatch, layer: Any) -> None:
    if layer.moe is not None:
        patch.setattr(layer.moe, "text", replace(layer.moe.text, router_scaling=1.0))


MUTATIONS: dict[str, Mutation] = {
    "routed clamp dropped": no_routed_clamp,
    "shared clamp dropped": no_shared_clamp,
    "routed clamp before SiLU": routed_clamp_before_silu,
    "shared clamp before SiLU": shared_clamp_before_silu,
    "window one key shorter": partial(window_longer, by=-1),
    "window one key longer": partial(window_longer, by=1),
    "k_scale taken as 1": partial(cache_scale_of_one, which="k"),
    "v_scale taken as 1": partial(cache_scale_of_one, which="v"),
    "gate and up scales merged": one_scale_for_gate_and_up,
    "head gate off": no_head_gate,
    "router bias used in the weight": biased_router_weights,
    "scaling factor forgotten": no_router_scaling,
    "nibbles of w13 swapped": partial(nibbles_swapped, name="w13"),
    "nibbles of w2 swapped": partial(nibbles_swapped, name="w2"),
}


def test_unmutated_model_passes(nvfp4_with_fp8_cache: Subject) -> None:
    nvfp4_with_fp8_cache.check_with_fp8_cache(REQUEST)


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mistake_is_found(nvfp4_with_fp8_cache: Subject, mistake: str) -> None:
    with pytest.raises(AssertionError):
        nvfp4_with_fp8_cache.check_with_fp8_cache(REQUEST, MUTATIONS[mistake])


def test_mutations_are_undone(nvfp4_with_fp8_cache: Subject) -> None:
    nvfp4_with_fp8_cache.check_with_fp8_cache(REQUEST)
