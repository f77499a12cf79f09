"""This project's expert kernels as the benchmark runs them: routed experts, layer, router."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_cells import GATES, SHARDS, added, route_work, shared_work
from benchmarks.expert_data import (
    BF16_ROUNDING,
    DEVICE,
    NVFP4_ACTIVATIONS,
    Batch,
    ExpertSubject,
    Layers,
    batches_and_work,
    reference_rows,
)
from benchmarks.harness.cells import Accuracy, Cell, Trial, relative_l2
from benchmarks.shapes import EXPERTS, HIDDEN, ROUTER_SCALING, TOP_K
from step37_kernels.expert_weights import BF16Experts, ExpertWeights
from step37_kernels.reference.experts import experts as reference_experts
from step37_kernels.reference.route import route as reference_route


@cache
def _input_scales(device: torch.device) -> tuple[Tensor, Tensor]:
    """NVFP4 global scales for hidden states and intermediates that stay within 6."""
    scale = torch.full((), 1 / 448, device=device)
    return scale, scale


class Step37Experts(ExpertSubject):
    """This project's kernels: routed experts, the whole layer, and the router."""

    name, library = "step37", "step37-ext"

    def load(self) -> None:
        from step37_kernels.experts import layer
        from step37_kernels.experts.shared_expert import shared_expert
        from step37_kernels.route import route

        self._layer, self._shared, self._route = layer, shared_expert, route

    def version(self) -> str:
        return "this checkout"  # a result records the hash of its sources

    def refuses(self, cell: Cell) -> str | None:
        if cell.settings.get("activations") == "nvfp4":
            if torch.cuda.is_available() and torch.cuda.get_device_capability() < (10, 0):
                return "NVFP4 products need sm_100"
        return None

    def allowed(self, cell: Cell) -> float:
        """The largest relative L2 error that the arithmetic explains.

        BF16: the intermediate, each expert's part, the sum and the reference's own output are each
        rounded to bf16: 4 roundings.
        FP8 activations: the reference rounds alike, except where the intermediate's bf16 rounding
        (2^-9) carries a value over the border between two e4m3 codes, which lie 2^-3.5 apart in the
        geometric mean: a share 2^-5.5 of the values moves by 2^-3.5, 1.3% in the root mean square.
        NVFP4 weights rounded to e4m3 besides: at most 2^-4, 2^-4 / sqrt(3) in the root mean square,
        in gate, up and down.
        """
        rounding = 4 * BF16_ROUNDING
        activations = cell.settings.get("activations")
        if activations == "bf16":
            return rounding
        if activations == "nvfp4":
            return rounding + NVFP4_ACTIVATIONS
        fp8 = rounding + 2.0**-3.5 * 2.0**-2.75
        return fp8 + (2.0**-4 if cell.settings["format"] == "nvfp4" else 0.0)

    def convert(self, raw: ExpertWeights, cell: Cell) -> Any:
        return self._layer.prepare(raw, str(cell.settings["activations"]))

    def run(self, weights: Any, batch: Batch, cell: Cell, shared: Tensor | None = None) -> Tensor:
        activations = str(cell.settings["activations"])
        return self._layer.experts(
            batch.hidden,
            weights,
            batch.topk_weights,
            batch.topk_ids,
            limit=None,
            first_expert=SHARDS[str(cell.settings["parallel"])].first_expert,
            activations="same" if activations == "bf16" else activations,
            shared=shared,
            total_experts=EXPERTS,
            input_scales=_input_scales(batch.hidden.device) if activations == "nvfp4" else None,
        )

    def prepare(self, cell: Cell) -> Any:
        return _gates() if cell.operation == "route" else super().prepare(cell)

    def trial(self, prepared: Any, cell: Cell) -> Trial:
        if cell.operation == "route":
            return self._route_trial(prepared, cell)
        trial = super().trial(prepared, cell)
        return self._layer_trial(trial, prepared, cell) if cell.operation == "layer" else trial

    def _route_trial(self, gates: tuple[Tensor, Tensor], cell: Cell) -> Trial:
        tokens = int(cell.settings["tokens"])
        weights, bias = gates
        hidden = torch.randn(tokens, HIDDEN, device=DEVICE).bfloat16()

        def call(gate: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
            return lambda: self._route(hidden, gate, bias, TOP_K, ROUTER_SCALING)

        def check() -> Accuracy:
            found = _dense(*call(weights[0])())
            expected = _dense(*reference_route(hidden, weights[0], bias, TOP_K, ROUTER_SCALING))
            # Sums in another order may exchange two experts whose scores are equal to 2^-18: with
            # 288 scores a few tokens in ten thousand, each of weight 1/8 of its row.
            return Accuracy(relative_l2(found, expected), 0.02)

        return Trial([call(gate) for gate in weights], check, route_work(tokens))

    def _layer_trial(self, routed: Trial, prepared: Layers, cell: Cell) -> Trial:
        """Router, shared expert and routed experts; the routing is the router's own."""
        shard, tokens = SHARDS[str(cell.settings["parallel"])], int(cell.settings["tokens"])
        copies, n = len(prepared.converted), shard.intermediate
        gates, bias = _gates()
        w13 = torch.randn(copies, 2 * n, HIDDEN, device=DEVICE).mul_(HIDDEN**-0.5).bfloat16()
        w2 = torch.randn(copies, HIDDEN, n, device=DEVICE).mul_(HIDDEN**-0.5).bfloat16()
        batches, _ = batches_and_work(cell, copies)

        def call(index: int) -> Callable[[], Tensor]:
            layer, batch, gate = index % copies, batches[index], gates[index % GATES]

            def run() -> Tensor:
                self._route(batch.hidden, gate, bias, TOP_K, ROUTER_SCALING)
                shared = self._shared(batch.hidden, w13[layer], w2[layer], None)
                # The drawn ids, not the router's: routing is the cell's, uniform or skewed.
                return self.run(prepared.converted[layer], batch, cell, shared)

            return run

        def check() -> Accuracy:
            expected, rows = reference_rows(
                prepared.raw, batches[0], shard, self.multiplies(cell)
            )  # fmt: skip
            one = BF16Experts(w13[:1], w2[:1])
            hidden = batches[0].hidden[rows].float()
            ids = torch.zeros(len(rows), 1, dtype=torch.int32, device=DEVICE)
            always = torch.ones(len(rows), 1, device=DEVICE)
            expected += reference_experts(hidden, one, always, ids, limit=None)
            return Accuracy(relative_l2(call(0)()[rows], expected), self.allowed(cell))

        done = added(routed.work, shared_work(shard, tokens), route_work(tokens))
        return Trial([call(index) for index in range(len(batches))], check, done)


def _gates() -> tuple[Tensor, Tensor]:
    """Distinct gate weights bf16 [GATES, E, K] and a bias fp32 [E]."""
    weights = torch.empty(GATES, EXPERTS, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    weights.normal_(std=HIDDEN**-0.5)
    return weights, torch.randn(EXPERTS, device=DEVICE) * 0.01


def _dense(weights: Tensor, ids: Tensor) -> Tensor:
    """Router weights [T, 8] at their experts' columns, [T, E]."""
    dense = torch.zeros(weights.shape[0], EXPERTS, device=weights.device)
    return dense.scatter_(1, ids.long(), weights)
