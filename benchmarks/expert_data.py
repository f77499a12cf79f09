"""Data for the expert layer's benchmark, and what its implementations have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.expert_cells import SHARDS, Shard, draw, rotation, used, work
from benchmarks.harness.cells import Accuracy, Cell, Trial, Work, relative_l2
from benchmarks.shapes import HIDDEN, INTERMEDIATE, ROUTER_SCALING, TEXT, TOP_K
from step37_ext.model.experts import ExpertShard, RoutedExperts
from step37_kernels.checks import ceil_div
from step37_kernels.expert_weights import BF16Experts, ExpertWeights, FP8Experts
from step37_kernels.reference.experts import experts

_CHECKED_ROWS = 64  # tokens do not see each other: as many rows tell as much as all of them

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16_ROUNDING = 2.0**-9  # the largest relative error of one rounding to bf16
NVFP4_ACTIVATIONS = 0.25
"""Codes of e2m1 lie at most half a value apart, so an activation is off by a quarter at most,
1/4 / sqrt(3) in the root mean square; hidden goes into gate and up, the intermediate into down."""


def raw_weights(weight_format: str, shard: Shard, seed: int) -> ExpertWeights:
    """One layer's weights in the checkpoint's layout, with random values of realistic size."""
    first_row = shard.intermediate if shard.intermediate < INTERMEDIATE else 0  # rank 1's
    part = ExpertShard(shard.first_expert, shard.experts, first_row, shard.intermediate)
    with DEVICE:
        weights = RoutedExperts(TEXT, part, weight_format, torch.bfloat16).weights
    fill_experts(weights, torch.Generator(DEVICE).manual_seed(seed))
    return weights


def fill_experts(weights: ExpertWeights, generator: torch.Generator) -> None:
    """Fill `weights` with random values whose standard deviation is about hidden_size^-1/2.

    They are made in the format itself, expert by expert: quantising a layer would need its fp32
    copy. Gate and up have equal NVFP4 global scales, as some peers need them.
    """
    std = weights.hidden_size**-0.5

    def normal(out: Tensor, deviation: float) -> None:
        for one in out:
            values = torch.randn(one.shape, generator=generator, device=out.device)
            one.copy_(values.mul_(deviation).clamp_(-448, 448))

    def uniform(out: Tensor, low: float, high: float) -> None:
        for one in out:
            values = torch.rand(one.shape, generator=generator, device=out.device)
            one.copy_(values.mul_(high - low).add_(low))

    if isinstance(weights, BF16Experts):
        normal(weights.w13, std)
        normal(weights.w2, std)
    elif isinstance(weights, FP8Experts):
        for data, scale in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
            normal(data, 64.0)
            uniform(scale, 0.5 * std / 64, 1.5 * std / 64)
    else:
        for data, scale in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
            for one in data:
                one.random_(generator=generator)
            uniform(scale, 64.0, 448.0)
        # A random nibble is about 2.7 and a block scale about 260.
        weights.w13_global_scale.fill_(std / 700)
        weights.w2_global_scale.fill_(std / 700)


@dataclass(frozen=True)
class Batch:
    """One call's tokens: hidden bf16 [T, K], topk_weights fp32 [T, 8], topk_ids int32 [T, 8]."""

    hidden: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


@dataclass(frozen=True)
class Layers:
    """A group's data: the first layer as in the checkpoint, and all of them as `convert` made."""

    raw: ExpertWeights
    converted: list[Any]


class ExpertSubject:
    """An implementation of "experts" cells: what differs is `load`, `convert` and `run`."""

    name: str
    library: str

    def load(self) -> None:
        """Import what it needs; any exception says that it cannot be used, and why."""
        raise NotImplementedError

    def version(self) -> str:
        from importlib import metadata

        return f"{self.library} {metadata.version(self.library)}"

    def available(self) -> tuple[bool, str]:
        try:
            self.load()
            return True, self.version()
        except Exception as error:  # libraries without their GPU fail in many ways
            return False, f"{type(error).__name__}: {error}".splitlines()[0][:160]

    def refuses(self, cell: Cell) -> str | None:
        raise NotImplementedError

    def convert(self, raw: ExpertWeights, cell: Cell) -> Any:
        """The weights as this implementation wants them."""
        raise NotImplementedError

    def run(self, weights: Any, batch: Batch, cell: Cell) -> Tensor:
        """The operation; [T, K] bf16."""
        raise NotImplementedError

    def allowed(self, cell: Cell) -> float:
        """The largest relative L2 error that is rounding: gate-up, activation, weighting, sum,
        output and the reference's own output rounded to bf16, at the most twice over."""
        fp4 = cell.settings["activations"] == "nvfp4"
        return 12 * BF16_ROUNDING + (NVFP4_ACTIVATIONS if fp4 else 0.0)

    def prepare(self, cell: Cell) -> Layers:
        settings = cell.settings
        shard, weight_format = SHARDS[str(settings["parallel"])], str(settings["format"])
        copies, _ = rotation(weight_format, shard, 1.0)
        raw = raw_weights(weight_format, shard, 0)
        converted = [self.convert(raw, cell)]
        for seed in range(1, copies):
            converted.append(self.convert(raw_weights(weight_format, shard, seed), cell))
        return Layers(raw, converted)

    def trial(self, prepared: Layers, cell: Cell) -> Trial:
        shard = SHARDS[str(cell.settings["parallel"])]
        batches, done = batches_and_work(cell, len(prepared.converted))
        weights = prepared.converted

        def call(index: int) -> Callable[[], Tensor]:
            return lambda: self.run(weights[index % len(weights)], batches[index], cell)

        def check() -> Accuracy:
            expected, rows = reference_rows(prepared.raw, batches[0], shard, self.multiplies(cell))
            found = call(0)()[rows]
            return Accuracy(relative_l2(found, expected), self.allowed(cell))

        return Trial([call(index) for index in range(len(batches))], check, done)

    def multiplies(self, cell: Cell) -> Literal["same", "fp8"]:
        """The activations that the reference rounds to."""
        return "fp8" if cell.settings["activations"] == "fp8" else "same"


def batches_and_work(cell: Cell, copies: int) -> tuple[list[Batch], Work]:
    """The inputs of every call, and the mean work of one: from the ids really drawn."""
    settings = cell.settings
    shard, tokens = SHARDS[str(settings["parallel"])], int(settings["tokens"])
    weight_format, activations = str(settings["format"]), str(settings["activations"])
    expert_bytes = cell.work.stream_bytes
    _, calls = rotation(weight_format, shard, expert_bytes)
    calls = copies * ceil_div(calls, copies)
    ids = draw(tokens * calls, str(settings["routing"]), seed=tokens).view(calls, tokens, TOP_K)
    counts = [used(one, shard) for one in ids]
    distinct, pairs = (math.fsum(column) / calls for column in zip(*counts, strict=True))
    done = work(weight_format, activations, shard, tokens, distinct, pairs)

    generator = torch.Generator(DEVICE).manual_seed(tokens)
    batches = []
    for one in ids:
        hidden = torch.randn(tokens, HIDDEN, generator=generator, device=DEVICE)
        share = torch.rand(tokens, TOP_K, generator=generator, device=DEVICE) + 0.1
        share *= ROUTER_SCALING / share.sum(-1, keepdim=True)
        batches.append(Batch(hidden.bfloat16(), share, one.to(DEVICE, torch.int32)))
    return batches, done


def reference_rows(
    raw: ExpertWeights, batch: Batch, shard: Shard, activations: Literal["same", "fp8"]
) -> tuple[Tensor, Tensor]:
    """The reference's result of some rows spread over the batch, and which rows."""
    tokens = batch.hidden.shape[0]
    rows = torch.linspace(0, tokens - 1, min(tokens, _CHECKED_ROWS), device=DEVICE).round().long()
    expected = experts(
        batch.hidden[rows].float(),
        raw,
        batch.topk_weights[rows],
        batch.topk_ids[rows],
        limit=None,
        first_expert=shard.first_expert,
        activations=activations,
    )
    return expected, rows
