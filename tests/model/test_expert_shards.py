"""Shards of the routed experts: exactly the checkpoint's values, wherever they begin.

The sums over ranks go through real process groups (gloo), as tensor and expert parallelism do.
"""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from step37_ext.model.config import AttentionShape, LayerShape, TextShape
from step37_ext.model.experts import ExpertShard, RoutedExperts
from step37_kernels.formats import fp8_block, nvfp4
from step37_kernels.reference.experts import experts as run_experts
from step37_kernels.reference.route import route

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, LIMIT = 8, 256, 384, 3, 0.5
PROJECTIONS = {
    "gate_proj": (EXPERTS, INTERMEDIATE, HIDDEN),
    "up_proj": (EXPERTS, INTERMEDIATE, HIDDEN),
    "down_proj": (EXPERTS, HIDDEN, INTERMEDIATE),
}


def shape(intermediate: int = INTERMEDIATE) -> TextShape:
    attention = AttentionShape(4, 2, 64, 64, 1e4, None, None)
    return TextShape(
        hidden_size=HIDDEN,
        vocab_size=128,
        rms_norm_eps=1e-5,
        max_position=128,
        dense_intermediate=512,
        num_experts=EXPERTS,
        top_k=TOP_K,
        moe_intermediate=intermediate,
        shared_intermediate=128,
        router_scaling=3.0,
        router_renormalize=True,
        has_router_bias=True,
        has_head_gate=True,
        num_mtp_layers=0,
        layers=(LayerShape(attention, True, LIMIT, None),),
    )


@functools.cache
def checkpoint(weight_format: str) -> dict[str, torch.Tensor]:
    """Tensors of one layer's routed experts under the release's names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in PROJECTIONS.items():
        weight = torch.randn(size, generator=generator) / size[-1] ** 0.5
        if weight_format == "bf16":
            tensors[f"{name}.weight"] = weight.bfloat16()
        elif weight_format == "fp8":
            blocks = fp8_block.quantize(weight)
            tensors[f"{name}.weight"] = blocks.data
            tensors[f"{name}.weight_scale_inv"] = blocks.scale_inv
        else:
            groups = nvfp4.quantize(weight)
            tensors[f"{name}.weight"] = groups.packed
            tensors[f"{name}.weight_scale"] = groups.block_scale
            tensors[f"{name}.weight_scale_2"] = groups.global_scale
    return tensors


def rank_experts(weight_format: str, ep_rank=0, ep_size=1, tp_rank=0, tp_size=1) -> RoutedExperts:
    text = shape()
    shard = ExpertShard.of_rank(text, ep_rank, ep_size, tp_rank, tp_size)
    module = RoutedExperts(text, shard, weight_format, torch.bfloat16)
    for name, load in module.loaders().items():
        load(checkpoint(weight_format)[name])
    return module


@pytest.mark.parametrize("weight_format", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_shards_are_slices_of_the_whole(weight_format, tp_size):
    whole = rank_experts(weight_format).weights
    rows = INTERMEDIATE // tp_size
    for rank in range(tp_size):
        part = rank_experts(weight_format, tp_rank=rank, tp_size=tp_size).weights
        here = slice(rank * rows, (rank + 1) * rows)
        for expert in (0, EXPERTS - 1):
            for matrix in ("gate", "up"):
                expected = getattr(whole, matrix)(expert, torch.float32)[here]
                assert torch.equal(getattr(part, matrix)(expert, torch.float32), expected)
            expected = whole.down(expert, torch.float32)[:, here]
            assert torch.equal(part.down(expert, torch.float32), expected)


def test_fp8_shards_begin_inside_blocks():
    """The case that stock SGLang refuses is among those above."""
    offsets = [
        rank_experts("fp8", tp_rank=rank, tp_size=4).weights.intermediate_offset
        for rank in range(4)
    ]
    assert offsets == [0, 96, 64, 32]


def layer_inputs():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(16, HIDDEN, generator=generator)
    gate = torch.randn(EXPERTS, HIDDEN, generator=generator) / HIDDEN**0.5
    return hidden, *route(hidden, gate, None, TOP_K, 3.0)


def _rank(rank: int, tp_size: int, ep_size: int, weight_format: str, address: str, queue) -> None:
    torch.set_num_threads(1)
    world = tp_size * ep_size
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    module = rank_experts(weight_format, rank // tp_size, ep_size, rank % tp_size, tp_size)
    hidden, weights, ids = layer_inputs()
    output = run_experts(hidden, module.weights, weights, ids, LIMIT, module.shard.first_expert)
    dist.all_reduce(output)
    if rank == 0:
        queue.put(output.numpy())
    dist.destroy_process_group()


@pytest.mark.parametrize("weight_format, tp_size, ep_size", [("fp8", 4, 1), ("nvfp4", 2, 2)])
def test_sum_over_real_ranks(weight_format, tp_size, ep_size, tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    address = f"file://{tmp_path}/store"
    context = mp.start_processes(
        _rank,
        (tp_size, ep_size, weight_format, address, queue),
        nprocs=tp_size * ep_size,
        join=False,
        start_method="spawn",
    )
    total = torch.from_numpy(queue.get())
    while not context.join():
        pass
    hidden, weights, ids = layer_inputs()
    whole = run_experts(hidden, rank_experts(weight_format).weights, weights, ids, LIMIT)
    # The same products in fp32, summed in another order.
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
