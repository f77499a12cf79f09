"""The expert layer's shapes, and tensors without memory to compile its kernels with."""

from __future__ import annotations

import torch
from torch import Tensor

from step37_kernels.checks import ceil_div
from step37_kernels.experts.routing import Routing, most_blocks
from step37_kernels.experts.tiles import GemmTile

EXPERTS, HIDDEN, TOP_K = 288, 4096, 8


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_routing(tokens: int, tile: GemmTile, rows: int = 0) -> Routing:
    """The routing of `tokens` tokens for a tile of `rows` rows of weights, without memory."""
    blocks, int32 = most_blocks(tokens * TOP_K, EXPERTS, tile.block_rows), torch.int32
    tiles = ceil_div(rows, tile.block_n)
    return Routing(
        meta(blocks * tile.block_rows, dtype=int32),
        meta(blocks, dtype=int32),
        tile.block_rows,
        TOP_K,
        meta(blocks, tiles, dtype=int32) if tile.splits > 1 else None,
    )
