"""The routed experts in one call: sort, gate-up, down, combine, with the kernels of each format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from step37_kernels.arch import arch_of
from step37_kernels.checks import DEBUG_VARIABLE, ceil_div, debugging, require
from step37_kernels.expert_weights import BF16Experts, ExpertWeights, FP8Experts, NVFP4Experts
from step37_kernels.experts import (
    grouped_bf16,
    grouped_fp8,
    grouped_fp8_bf16,
    grouped_nvfp4,
    grouped_nvfp4_fp8,
    grouped_nvfp4_nvfp4,
    tiles,
)
from step37_kernels.experts.activations import Form, quantize
from step37_kernels.experts.combine import combine
from step37_kernels.experts.formats import least_arch
from step37_kernels.experts.fp8_blocks import refuse_nan
from step37_kernels.experts.routing import Routing
from step37_kernels.experts.sort import sort, sort_and_prepare
from step37_kernels.formats.nvfp4_tiles import NVFP4Tiles

PreparedExperts = BF16Experts | FP8Experts | NVFP4Tiles | NVFP4Experts


@dataclass(frozen=True)
class _Batch:
    """What every format's launches are given."""

    hidden: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    limit: float | None
    first_expert: int
    input_scales: tuple[Tensor, Tensor] | None
    total_experts: int | None


def prepare(weights: ExpertWeights, activations: str = "same") -> PreparedExperts:
    """The weights as the kernels read them: NVFP4 is laid out anew, the other formats stay.

    Args:
        weights: one rank's experts as the checkpoint has them. With NVFP4 the result is a copy of
            the same size; drop `weights` after it.
        activations: as of `experts`; the FP4 x FP4 product reads NVFP4 as it is.

    Raises:
        ValueError: a weight cannot be served: an FP8 code or an NVFP4 block scale that is NaN.
    """
    if isinstance(weights, NVFP4Experts) and activations != "nvfp4":
        return NVFP4Tiles.pack(weights)
    if isinstance(weights, FP8Experts):
        refuse_nan(weights)
    return weights


def experts(
    hidden: Tensor,
    weights: PreparedExperts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    limit: float | None,
    first_expert: int = 0,
    activations: str = "same",
    shared: Tensor | None = None,
    total_experts: int | None = None,
    input_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sum over a token's experts of topk_weight * down(swiglu_step(gate(x), up(x))).

    Four launches, five with FP8 activations, all of shapes known on the host; nothing is read back.
    Products are exact, sums in fp32. Rounded to bf16: the intermediate, each expert's weighted
    output, and the result. Deterministic, and a token's bits depend on the other tokens only
    through their number, by which tiles are chosen.

    Args:
        hidden: bf16 [T, K], contiguous; T may be 0.
        weights: what `prepare` returned.
        topk_weights: fp32 [T, top_k], contiguous.
        topk_ids: int32 or int64 [T, top_k], contiguous; ids outside first_expert ..
            first_expert + E - 1 contribute nothing, as with `reference.experts`.
        limit: the clamp of `swiglu_step`; None or 0 is none.
        first_expert: global id of weights' expert 0.
        activations: "same" multiplies in bf16; "fp8" in e4m3 with a scale per token and 128
            channels, NVFP4 weights being rounded to e4m3 too; "nvfp4" in e2m1 with a scale per
            token and 16 channels (sm_100 up).
        shared: fp32 or bf16 [S, T, K], contiguous: the shared expert's parts, added to the sum.
        total_experts: experts of the layer on all ranks, None if they are all here. Tiles are
            chosen for the pairs that fall to this rank on average.
        input_scales: fp32 scalars, the global scales of hidden and of the intermediate; for
            activations "nvfp4".

    Returns:
        bf16 [T, K].

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or there are no kernels for these
            weights and activations; with STEP37_DEBUG=1 also an id that no expert has.
    """
    require("hidden", hidden, (None, weights.hidden_size), (torch.bfloat16,), contiguous=True)
    require(
        "topk_weights", topk_weights, (hidden.shape[0], None), (torch.float32,), contiguous=True
    )
    id_types = (torch.int32, torch.int64)
    require("topk_ids", topk_ids, topk_weights.shape, id_types, contiguous=True)
    for name, tensor in (("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, expected hidden's {hidden.device}")
    run = _RUNS.get((type(weights), activations))
    if run is None:
        known = ", ".join(f"{kind.format} with {word!r}" for kind, word in _RUNS)
        raise ValueError(
            f"activations is {activations!r} with {weights.format} weights, expected {known}"
        )
    _check_arch(hidden, weights, activations)
    if debugging():
        _check_ids(topk_ids, total_experts or first_expert + weights.num_experts)
    batch = _Batch(hidden, topk_weights, topk_ids, limit, first_expert, input_scales, total_experts)
    parts = run(batch, weights)
    return combine(parts, topk_ids, weights.num_experts, first_expert, shared)


def _check_arch(hidden: Tensor, weights: PreparedExperts, activations: str) -> None:
    """Refuse a GPU that has no instruction for these products; the interpreter has all."""
    least = least_arch(weights.format, activations)
    if hidden.is_cuda and arch_of(hidden) < least:
        raise ValueError(
            f"activations is {activations!r} with {weights.format} weights on "
            f"sm_{arch_of(hidden)}, expected sm_{least} or later"
        )


def _check_ids(topk_ids: Tensor, total_experts: int) -> None:
    """Read the ids back and name the first that no expert has; -1 is padding."""
    wrong = (topk_ids < -1) | (topk_ids >= total_experts)
    if bool(wrong.any()):
        token, choice = (int(index) for index in wrong.nonzero()[0])
        raise ValueError(
            f"topk_ids[{token}, {choice}] is {int(topk_ids[token, choice])}, expected -1 to "
            f"{total_experts - 1} (token {token}; checked because {DEBUG_VARIABLE}=1)"
        )


def expert_tiles(
    weights: PreparedExperts,
    activations: str,
    pairs: int,
    total_experts: int | None,
    arch: int,
) -> tuple[tiles.GemmTile, tiles.GemmTile]:
    """The tiles of the gate-up and of the down GEMM.

    Args:
        pairs: T * top_k, of which this rank has its part.
        arch: 90 for sm_90 and so on; the other arguments as of `experts`.
    """
    here = weights.num_experts
    pairs = ceil_div(pairs * here, total_experts or here)
    choose = _TILES[type(weights), activations]
    return choose(pairs, here, weights.intermediate_size, weights.hidden_size, arch)


def _tiles(
    batch: _Batch, weights: PreparedExperts, activations: str = "same"
) -> tuple[tiles.GemmTile, tiles.GemmTile]:
    pairs = batch.topk_ids.numel()
    return expert_tiles(weights, activations, pairs, batch.total_experts, arch_of(batch.hidden))


def _run_bf16(batch: _Batch, weights: BF16Experts) -> Tensor:
    up, down = _tiles(batch, weights)
    routing = sort(
        batch.topk_ids, weights.num_experts, batch.first_expert, up.block_rows,
        _counters(weights, up),
    )  # fmt: skip
    intermediate = grouped_bf16.gate_up(batch.hidden, weights, routing, batch.limit, up)
    return grouped_bf16.down(intermediate, weights, routing, batch.topk_weights, down)


def _run_reordered(batch: _Batch, weights: FP8Experts | NVFP4Tiles) -> Tensor:
    """bf16 activations whose channels stand in the order that the expanded weights have."""
    fp8 = isinstance(weights, FP8Experts)
    kernels: Any = grouped_fp8_bf16 if fp8 else grouped_nvfp4
    up, down = _tiles(batch, weights)
    routing, rows = _sorted(batch, weights, "words" if fp8 else "slabs", up)
    intermediate = kernels.gate_up(rows, weights, routing, batch.limit, up)
    return kernels.down(intermediate, weights, routing, batch.topk_weights, down)


def _run_quantized(
    batch: _Batch,
    weights: PreparedExperts,
    activations: str,
    kernels: Any,
    forms: tuple[Form, Form],
) -> Tensor:
    """Activations quantised: hidden beside the sort, the intermediate in a launch of its own."""
    up, down = _tiles(batch, weights, activations)
    routing, rows = _sorted(batch, weights, forms[0], up)
    intermediate = kernels.gate_up(rows, weights, routing, batch.limit, up)
    offset = weights.intermediate_offset if isinstance(weights, FP8Experts) else 0
    rows = quantize(
        intermediate, forms[1], batch.topk_ids, weights.num_experts, batch.first_expert, offset,
        None if batch.input_scales is None else batch.input_scales[1],
    )  # fmt: skip
    return kernels.down(rows, weights, routing, batch.topk_weights, down)


def _sorted(
    batch: _Batch, weights: PreparedExperts, form: Form, up: tiles.GemmTile
) -> tuple[Routing, Any]:
    return sort_and_prepare(
        batch.hidden, form, batch.topk_ids, weights.num_experts, batch.first_expert, up.block_rows,
        _counters(weights, up), None if batch.input_scales is None else batch.input_scales[0],
    )  # fmt: skip


def _counters(weights: PreparedExperts, up: tiles.GemmTile) -> int:
    """One for each tile of an expert's w13 where K is split."""
    if up.splits == 1:
        return 0
    rows = weights.w13_rows if isinstance(weights, NVFP4Tiles) else 2 * weights.intermediate_size
    return ceil_div(rows, up.block_n)


_TILES: dict[
    tuple[type[PreparedExperts], str], Callable[..., tuple[tiles.GemmTile, tiles.GemmTile]]
] = {
    (BF16Experts, "same"): tiles.bf16,
    (FP8Experts, "same"): tiles.fp8_bf16,
    (NVFP4Tiles, "same"): tiles.nvfp4,
    (FP8Experts, "fp8"): tiles.fp8,
    (NVFP4Tiles, "fp8"): tiles.nvfp4_fp8,
    (NVFP4Experts, "nvfp4"): tiles.nvfp4_nvfp4,
}
_Run = Callable[[_Batch, Any], Tensor]  # takes the weights that its key names
_RUNS: dict[tuple[type[PreparedExperts], str], _Run] = {
    (BF16Experts, "same"): _run_bf16,
    (FP8Experts, "same"): _run_reordered,
    (NVFP4Tiles, "same"): _run_reordered,
    (FP8Experts, "fp8"): partial(
        _run_quantized, activations="fp8", kernels=grouped_fp8, forms=("fp8", "fp8")
    ),
    (NVFP4Tiles, "fp8"): partial(
        _run_quantized, activations="fp8", kernels=grouped_nvfp4_fp8,
        forms=("fp8 slabs", "fp8"),
    ),
    (NVFP4Experts, "nvfp4"): partial(
        _run_quantized, activations="nvfp4", kernels=grouped_nvfp4_nvfp4,
        forms=("nvfp4", "nvfp4"),
    ),
}  # fmt: skip
