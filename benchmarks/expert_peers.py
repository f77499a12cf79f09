"""Other implementations of the routed experts, each behind a small adapter.

An adapter imports its library in `load` only, so that every library is optional; one that changed
its interface shows as failed, one whose result is wrong is not timed.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_cells import SHARDS
from benchmarks.expert_data import Batch, ExpertSubject
from benchmarks.harness.cells import Cell
from benchmarks.shapes import EXPERTS, TOP_K
from step37_kernels.expert_weights import ExpertWeights, FP8Experts, NVFP4Experts
from step37_kernels.experts import flashinfer_cutlass


def _outside(cell: Cell, *formats: tuple[str, str]) -> str | None:
    """Why a cell is not of routed experts in these (weights, activations)."""
    if cell.operation != "experts":
        return "only the routed experts"
    if (cell.settings["format"], cell.settings["activations"]) not in formats:
        return f"only {', '.join(' x '.join(pair) for pair in formats)}"
    return None


def _outside_tp(cell: Cell, *formats: tuple[str, str]) -> str | None:
    """`_outside`, and why a cell is not tensor parallel."""
    reason = _outside(cell, *formats)
    if reason is None and str(cell.settings["parallel"]).startswith("EP"):
        return "the adapter does tensor parallelism only"
    return reason


@cache
def sglang_context() -> None:
    """Publish SGLang's settings for one process without a group, which its functions read."""
    from sglang.srt.runtime_context import get_context, get_parallel

    get_context().override_server_args().install()
    get_parallel().override_permanently(tp_group=SimpleNamespace(world_size=1))


class SGLangTriton(ExpertSubject):
    """SGLang's fused_moe_triton, with the tile configurations that its wheel has (none for E=288:
    its defaults)."""

    name, library = "SGLang Triton", "sglang"

    def load(self) -> None:
        from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
        from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        self._experts, self._topk, self._config = fused_experts, StandardTopKOutput, MoeRunnerConfig

    def refuses(self, cell: Cell) -> str | None:
        reason = _outside_tp(cell, ("bf16", "bf16"), ("fp8", "fp8"))
        if reason is None and cell.settings["format"] == "fp8":
            n = SHARDS[str(cell.settings["parallel"])].intermediate
            if n % 128:
                return f"SGLang refuses FP8 shards that are not whole blocks, {n} % 128"
        return reason

    def convert(self, raw: ExpertWeights, cell: Cell) -> ExpertWeights:
        sglang_context()
        return raw

    def run(self, weights: ExpertWeights, batch: Batch, cell: Cell) -> Tensor:
        options: dict[str, Any] = {}
        if isinstance(weights, FP8Experts):
            options = {
                "use_fp8_w8a8": True,
                "w1_scale": weights.w13_scale.flatten(1, 2),
                "w2_scale": weights.w2_scale,
                "block_shape": list(weights.block_size),
            }
        assert not isinstance(weights, NVFP4Experts)
        count = weights.num_experts
        config = self._config(inplace=False, num_experts=count, num_local_experts=count)
        chosen = self._topk(batch.topk_weights, batch.topk_ids, batch.hidden)
        return self._experts(batch.hidden, weights.w13, weights.w2, chosen, config, **options)


class SGLangMarlin(ExpertSubject):
    """SGLang's Marlin with NVFP4 weights, what it chooses by itself on Hopper."""

    name, library = "SGLang Marlin", "sglang"

    def load(self) -> None:
        from sglang.kernels.ops.moe import moe_wna16_marlin  # noqa: F401 (compiled at first use)
        from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import fused_marlin_moe
        from sglang.srt.layers.quantization.marlin_utils import marlin_make_workspace
        from sglang.srt.layers.quantization.marlin_utils_fp4 import (
            prepare_moe_nvfp4_layer_for_marlin,
        )

        self._moe, self._prepare = fused_marlin_moe, prepare_moe_nvfp4_layer_for_marlin
        self._workspace = marlin_make_workspace

    def refuses(self, cell: Cell) -> str | None:
        reason = _outside_tp(cell, ("nvfp4", "bf16"))
        if reason is None and (n := SHARDS[str(cell.settings["parallel"])].intermediate) % 64:
            return f"no Marlin tile divides a down projection of {n} columns"
        return reason

    def convert(self, raw: ExpertWeights, cell: Cell) -> SimpleNamespace:
        assert isinstance(raw, NVFP4Experts)
        sglang_context()
        layer = SimpleNamespace(
            w13_weight=raw.w13,
            w2_weight=raw.w2,
            w13_weight_scale=raw.w13_scale,
            w2_weight_scale=raw.w2_scale,
            w13_weight_scale_2=raw.w13_global_scale[:, 0].contiguous(),
            w2_weight_scale_2=raw.w2_global_scale,
            intermediate_size_per_partition=raw.intermediate_size,
            params_dtype=torch.bfloat16,
            moe_runner_config=SimpleNamespace(is_gated=True),
        )
        self._prepare(layer, group_size=16)
        return layer

    def run(self, weights: SimpleNamespace, batch: Batch, cell: Cell) -> Tensor:
        return self._moe(
            batch.hidden,
            weights.w13_weight,
            weights.w2_weight,
            weights.w13_weight_scale,
            weights.w2_weight_scale,
            gating_output=batch.hidden,
            topk_weights=batch.topk_weights,
            topk_ids=batch.topk_ids,
            w1_global_scale=weights.w13_weight_scale_2,
            w2_global_scale=weights.w2_weight_scale_2,
            workspace=self._workspace(batch.hidden.device, 4),  # one per call, as SGLang does
            num_bits=4,
        )


class TorchGroupedMM(ExpertSubject):
    """PyTorch's grouped matrix product, with the sorting and the sum in PyTorch too."""

    name, library = "torch grouped_mm", "torch"

    def load(self) -> None:
        found = getattr(torch.nn.functional, "grouped_mm", None)
        self._mm = found or torch._grouped_mm

    def refuses(self, cell: Cell) -> str | None:
        return _outside_tp(cell, ("bf16", "bf16"))

    def convert(self, raw: ExpertWeights, cell: Cell) -> ExpertWeights:
        return raw

    def run(self, weights: Any, batch: Batch, cell: Cell) -> Tensor:
        ids = batch.topk_ids.flatten().long()
        order = ids.argsort(stable=True)
        counts = torch.zeros(weights.num_experts, dtype=torch.int32, device=ids.device)
        counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        ends = counts.cumsum(0, dtype=torch.int32)
        sorted_hidden = batch.hidden[order // TOP_K]
        gate_up = self._mm(sorted_hidden, weights.w13.transpose(1, 2), offs=ends)
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate) * up
        down = self._mm(activated, weights.w2.transpose(1, 2), offs=ends)
        weighted = torch.empty_like(down)
        weighted[order] = down * batch.topk_weights.flatten()[order, None].bfloat16()
        return weighted.view(batch.hidden.shape[0], TOP_K, -1).sum(1)


class FlashInferCutlass(ExpertSubject):
    """FlashInfer's cutlass_fused_moe, called as this project's second backend calls it: summed in
    order instead of by atomics, not autotuned."""

    name, library = "FlashInfer CUTLASS", "flashinfer-python"

    def load(self) -> None:
        from flashinfer.fused_moe import cutlass_fused_moe  # noqa: F401 (the backend calls it)

    def refuses(self, cell: Cell) -> str | None:
        formats = [("bf16", "bf16")]
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0):
            formats.append(("nvfp4", "nvfp4"))
        return _outside(cell, *formats)

    def convert(self, raw: ExpertWeights, cell: Cell) -> flashinfer_cutlass.FlashInferExperts:
        ones = torch.ones(raw.num_experts, device=raw.w2.device)
        # As if calibrated on these tokens: their largest values are about 5 and 20.
        scales = flashinfer_cutlass.InputScales(
            (ones * 5 / 2688)[:, None].repeat(1, 2), ones * 20 / 2688
        )
        return flashinfer_cutlass.prepare(raw, None, scales)

    def run(self, weights: Any, batch: Batch, cell: Cell) -> Tensor:
        return flashinfer_cutlass.experts(
            batch.hidden,
            weights,
            batch.topk_weights,
            batch.topk_ids,
            limit=None,
            first_expert=SHARDS[str(cell.settings["parallel"])].first_expert,
            total_experts=EXPERTS,
        )


class TritonKernels(ExpertSubject):
    """OpenAI's triton_kernels in BF16: gathering and scattering products, the activation apart."""

    name, library = "triton_kernels", "triton_kernels"

    def load(self) -> None:
        from triton_kernels.matmul import matmul
        from triton_kernels.tensor import make_ragged_tensor_metadata
        from triton_kernels.topk import topk

        self._matmul, self._metadata, self._topk = matmul, make_ragged_tensor_metadata, topk

    def refuses(self, cell: Cell) -> str | None:
        return _outside_tp(cell, ("bf16", "bf16"))

    def convert(self, raw: Any, cell: Cell) -> tuple[Tensor, Tensor]:
        return raw.w13.transpose(1, 2), raw.w2.transpose(1, 2)

    def run(self, weights: tuple[Tensor, Tensor], batch: Batch, cell: Cell) -> Tensor:
        tokens, experts = batch.hidden.shape[0], weights[0].shape[0]
        logits = torch.zeros(tokens, experts, dtype=torch.bfloat16, device=batch.hidden.device)
        # Only the bookkeeping is taken from its top-k: the experts are the ones that were drawn.
        chosen = self._topk(logits, TOP_K, apply_softmax=False, y_indx=batch.topk_ids.short())
        by_expert = chosen.mask_metadata.col_sorted_indx
        ragged = self._metadata(chosen.mask_metadata.col_sum, by_expert.shape[0])
        gate_up = self._matmul(
            batch.hidden, weights[0], None, a_ragged_metadata=ragged, gather_indx=by_expert // TOP_K
        )
        gate, up = gate_up.chunk(2, dim=-1)
        down = self._matmul(
            torch.nn.functional.silu(gate) * up,
            weights[1],
            None,
            a_ragged_metadata=ragged,
            scatter_indx=by_expert,
            gammas=batch.topk_weights.flatten()[by_expert],
        )
        return down if down.shape[0] == tokens else down.view(tokens, TOP_K, -1).sum(1)


def peers() -> list[ExpertSubject]:
    """All peers, whether they can be used here or not."""
    return [SGLangMarlin(), SGLangTriton(), TorchGroupedMM(), FlashInferCutlass(), TritonKernels()]
