"""Small BF16 and FP8 layers, and one pass through the two GEMMs of a format."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from step37_kernels.expert_weights import BF16Experts, ExpertWeights, FP8Experts, on_device
from step37_kernels.experts import grouped_fp8, grouped_fp8_bf16
from step37_kernels.experts.activations import FP8Rows
from step37_kernels.experts.e4m3_words import word_order
from step37_kernels.experts.tiles import GemmTile
from step37_kernels.formats import fp8_block
from step37_kernels.formats.e4m3 import dequantize_per_token_group, quantize_per_token_group
from tests.experts.nvfp4_layers import routing_of

TILE = GemmTile(block_rows=16, block_n=128, block_k=128, num_warps=4, num_stages=3)


def bf16_experts(experts: int, hidden: int, size: int) -> BF16Experts:
    """Random experts whose outputs are of order one."""
    w13 = torch.randn(experts, 2 * size, hidden) * hidden**-0.5
    w2 = torch.randn(experts, hidden, size) * size**-0.5
    return BF16Experts(w13.bfloat16(), w2.bfloat16())


def fp8_experts(experts: int, hidden: int, size: int, offset: int = 0) -> FP8Experts:
    """A shard of random experts that begins `offset` channels inside a block.

    Each block has a magnitude of its own, so that a scale taken from a neighbour shows.
    """
    whole = offset + size

    def quantized(rows: int, columns: int) -> fp8_block.FP8BlockTensor:
        grid = torch.rand(experts, -(-rows // 128), -(-columns // 128)).mul(4).exp2()
        spread = grid.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :rows, :columns]
        return fp8_block.quantize(torch.randn(experts, rows, columns) * columns**-0.5 * spread / 4)

    gate, up, down = quantized(whole, hidden), quantized(whole, hidden), quantized(hidden, whole)
    here = slice(offset, None)
    return FP8Experts.of(gate.shard(here, None), up.shard(here, None), down.shard(None, here))


def batch(tokens: int, count: int, top_k: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, router weights and ids of random tokens, no expert twice in a token."""
    ids = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)]).int()
    return torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, top_k), ids


@dataclass(frozen=True)
class Stages:
    """What the launches of a layer were given and gave, on the CPU, P = T * top_k rows.

    Columns are in the checkpoint's order; rows of pairs whose expert is elsewhere are zeros.
    """

    x: Tensor  # [T, K] as multiplied, fp64
    intermediate: Tensor  # [P, N] as written
    multiplied: Tensor  # [P, N] as multiplied, fp64
    partial: Tensor  # [P, K] as written

    def output(self, top_k: int) -> Tensor:
        """The sum over top_k in fp64, [T, K]."""
        return self.partial.double().view(-1, top_k, self.partial.shape[1]).sum(1)


def stages(
    module: ModuleType,
    device: torch.device,
    hidden: Tensor,
    weights: ExpertWeights,
    topk_weights: Tensor,
    ids: Tensor,
    limit: float | None,
    tile: GemmTile = TILE,
) -> Stages:
    """gate_up and down of `module`; the sort and quantise launches are done here in torch."""
    held = on_device(weights, device)
    routing = routing_of(ids.to(device), weights.num_experts, tile.block_rows)
    here = ((ids.flatten() >= 0) & (ids.flatten() < weights.num_experts))[:, None]
    factors = topk_weights.to(device)

    def own(rows: Tensor) -> Tensor:
        return torch.where(here.to(rows.device), rows, 0)

    def rows_on_device(rows: FP8Rows) -> FP8Rows:
        return FP8Rows(rows.q.to(device), rows.scale.to(device))

    if module is grouped_fp8:
        offset = weights.intermediate_offset
        x = FP8Rows(*quantize_per_token_group(hidden))
        written = own(module.gate_up(rows_on_device(x), held, routing, limit, tile))
        rows = FP8Rows(*quantize_per_token_group(written, offset=offset))
        partial = module.down(rows, held, routing, factors, tile)
        fp64 = torch.float64
        x_read = dequantize_per_token_group(x.q, x.scale, dtype=fp64)
        read = dequantize_per_token_group(rows.q, rows.scale, dtype=fp64, offset=offset)
        return Stages(x_read, written.cpu(), read.cpu(), own(partial).cpu())
    order = torch.arange(hidden.shape[1]), torch.arange(weights.intermediate_size)
    if module is grouped_fp8_bf16:
        order = word_order(len(order[0])), word_order(len(order[1]))
    x = hidden[:, order[0]].contiguous().to(device)
    written = module.gate_up(x, held, routing, limit, tile)
    partial = own(module.down(written, held, routing, factors, tile)).cpu()
    plain = own(written).cpu()[:, order[1].argsort()]
    return Stages(hidden.double(), plain, plain.double(), partial)
