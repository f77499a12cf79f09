"""What the grouped GEMMs check of their arguments before a launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from step37_kernels.checks import require
from step37_kernels.experts.routing import Routing
from step37_kernels.experts.tiles import GemmTile

CHANNELS_MULTIPLE = 16
"""Rows of 16 elements are copied whole in every format: 16 bytes at the least."""


def check_sizes(hidden_size: int, intermediate_size: int) -> None:
    """Check that rows of weights and activations can be copied in vectors.

    Raises:
        ValueError: a size is not a multiple of 16.
    """
    for name, size in (("hidden", hidden_size), ("intermediate", intermediate_size)):
        if size % CHANNELS_MULTIPLE:
            raise ValueError(f"{name} size is {size}, expected a multiple of {CHANNELS_MULTIPLE}")


def check_limit(limit: float | None) -> float:
    """The clamp of the activation, infinite for none.

    Raises:
        ValueError: it is negative.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}, expected a positive number, or 0 or None for no clamp")
    return float(limit) if limit else math.inf


def check_routing(routing: Routing, tile: GemmTile, device: torch.device) -> None:
    """Check that `routing` was made for blocks of this tile and lies on `device`.

    Raises:
        ValueError: a shape, dtype, device or the block size does not fit.
    """
    if routing.block_rows != tile.block_rows:
        raise ValueError(
            f"routing.block_rows is {routing.block_rows}, expected the tile's {tile.block_rows}"
        )
    slots, int32 = routing.max_blocks * routing.block_rows, (torch.int32,)
    require("routing.pair_of_slot", routing.pair_of_slot, (slots,), int32, contiguous=True)
    require("routing.expert_of_block", routing.expert_of_block, (None,), int32, contiguous=True)
    check_device("routing.pair_of_slot", routing.pair_of_slot, device)
    check_device("routing.expert_of_block", routing.expert_of_block, device)


def split_buffers(
    tile: GemmTile, tiles: int, columns: int, step: int, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Where the programs of a gate-up that splits K write their sums, and where they are counted.

    Args:
        tiles: of an expert's w13.
        columns, step: K, and what the columns of one part are a multiple of.

    Returns:
        fp32 [max_blocks * tiles, splits, block_rows, block_n] and routing.arrived; with one part,
        which needs neither, another tensor of the routing twice.

    Raises:
        ValueError: the parts are not whole steps, or `routing` has other counters.
    """
    if tile.splits == 1:
        return routing.pair_of_slot, routing.pair_of_slot
    if columns % (tile.splits * step):
        raise ValueError(
            f"tile.splits is {tile.splits}, expected a divisor of {columns} columns in steps of "
            f"{step}"
        )
    blocks = routing.max_blocks
    if routing.arrived is None:
        raise ValueError(f"routing.arrived is None, expected counters for {tile.splits} splits")
    require("routing.arrived", routing.arrived, (blocks, tiles), (torch.int32,), contiguous=True)
    return new_parts(tile, blocks * tiles, routing.arrived), routing.arrived


def new_parts(tile: GemmTile, tiles: int, like: Tensor) -> Tensor:
    """fp32 [tiles, splits, block_rows, block_n] on like's device, for `split_k.sum_of_tile`."""
    shape = (tiles, tile.splits, tile.block_rows, tile.block_n)
    return like.new_empty(shape, dtype=torch.float32)


def check_down_rows(pairs: int, routing: Routing, topk_weights: Tensor) -> None:
    """Check that the intermediate has a row for every router weight.

    Raises:
        ValueError: topk_weights has another shape or dtype, or `pairs` is not its size.
    """
    require("topk_weights", topk_weights, (None, routing.top_k), (torch.float32,), contiguous=True)
    if pairs != topk_weights.numel():
        raise ValueError(
            f"intermediate has {pairs} rows, expected {topk_weights.numel()}: one per router weight"
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Check that `tensor` is where the other tensors are.

    Raises:
        ValueError: it is on another device.
    """
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def tile_options(tile: GemmTile) -> dict[str, int]:
    """A tile as arguments of a kernel."""
    return {
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
