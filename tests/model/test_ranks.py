"""Tensor and expert parallelism over real processes: the kernels' layers on ranks, summed.

Four processes (gloo) run the kernels in the interpreter, without SGLang: its engine with ranks is
in tests/serving. The layers are the model's own order of operations, on shards of one layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from expert_shards import EXPERTS, HIDDEN, LIMIT, rank_experts, shape
from torch import Tensor
from torch.nn import functional

from step37_ext.model import forward
from step37_kernels import dispatch, interpret
from step37_kernels.checks import DEBUG_VARIABLE

FORMATS = ("bf16", "fp8", "nvfp4")
SHARED, TOKENS = 128, 6
HEADS, KV_HEADS, HEAD_DIM, WINDOW = 8, 2, 64, 16
LENGTHS = (21, 6)  # beyond the window and within it
K_SCALE, V_SCALE = 0.03, 0.02

BOUND = 2.0**-7
"""Of the relative L2 error. The intermediate, each rank's part, the sums over ranks and the output
are rounded to bf16, by 2^-9 at the most each."""


@dataclass(frozen=True)
class Part:
    """A rank's place: which of `ep` groups of experts, which of `tp` slices of each."""

    ep_rank: int = 0
    ep: int = 1
    tp_rank: int = 0
    tp: int = 1

    @property
    def rank(self) -> int:
        """Among the ranks that the layers beside the experts are cut for."""
        return self.ep_rank * self.tp + self.tp_rank

    @property
    def ranks(self) -> int:
        return self.ep * self.tp


# Number of ranks and the part of each; with two ranks the other two have the next case.
CASES = {
    "TP 4": [Part(tp_rank=rank, tp=4) for rank in range(4)],
    "TP 2 x EP 2": [Part(rank // 2, 2, rank % 2, 2) for rank in range(4)],
    "TP 2": [Part(tp_rank=rank, tp=2) for rank in range(2)],
    "EP 2": [Part(ep_rank=rank, ep=2) for rank in range(2)],
}


def draw(*size: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) * scale).bfloat16()


def cut(weight: Tensor, part: Part, dim: int = 0) -> Tensor:
    """The rank's slice of a weight that is cut over all ranks."""
    return weight.chunk(part.ranks, dim)[part.rank].contiguous()


def choose(operation: str, weights: str = "-") -> dispatch.Implementation:
    return dispatch.choose(operation, dispatch.Target("cpu", None, weights))


def moe_output(weight_format: str, part: Part) -> Tensor:
    """What one rank adds to the layer's sum, bf16 `[T, hidden]`."""
    gate, up = draw(2, SHARED, HIDDEN, seed=2, scale=HIDDEN**-0.5)
    down = cut(draw(HIDDEN, SHARED, seed=3, scale=SHARED**-0.5), part, dim=1)
    run_experts = choose("experts", weight_format)
    experts = rank_experts(weight_format, part.ep_rank, part.ep, part.tp_rank, part.tp)
    experts.prepare(run_experts.prepare)
    routed = SimpleNamespace(text=shape(), limit=LIMIT, experts=experts, run_experts=run_experts)
    block = SimpleNamespace(
        text=shape(),
        gate=draw(EXPERTS, HIDDEN, seed=4, scale=HIDDEN**-0.5).float(),
        router_bias=None,
        route=choose("route", "bf16"),
        run_shared=choose("shared_expert", "bf16"),
        share_expert=SimpleNamespace(
            gate_up_proj=SimpleNamespace(weight=torch.cat([cut(gate, part), cut(up, part)])),
            down_proj=SimpleNamespace(weight=down),
            limit=LIMIT,
        ),
        routed=lambda *arguments: forward.routed_experts(routed, *arguments),
    )
    return forward.moe(block, draw(TOKENS, HIDDEN, seed=5))


def attention_output(cache_type: torch.dtype, part: Part) -> Tensor:
    """One rank's part of a prefill of both sequences and a decode step, `[T, hidden]`."""
    kv_heads = max(1, KV_HEADS // part.ranks)
    kv_rank = part.rank * KV_HEADS // part.ranks // kv_heads  # repeated beyond one for each
    qkv = draw(HEADS + 2 * KV_HEADS, HEAD_DIM, HIDDEN, seed=6, scale=HIDDEN**-0.5)
    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS])
    own_kv = slice(kv_rank * kv_heads, (kv_rank + 1) * kv_heads)
    qkv = torch.cat([cut(q, part), k[own_kv], v[own_kv]]).flatten(0, 1)
    gate = cut(draw(HEADS, HIDDEN, seed=7, scale=HIDDEN**-0.5), part)
    out = cut(draw(HIDDEN, HEADS * HEAD_DIM, seed=8, scale=HEAD_DIM**-0.5), part, dim=1)
    angles = torch.arange(32)[:, None] * 10_000.0 ** -torch.linspace(0, 1, HEAD_DIM // 2)
    block = SimpleNamespace(
        qkv_proj=lambda hidden: (functional.linear(hidden, qkv), None),
        g_proj=lambda hidden: (functional.linear(hidden, gate), None),
        o_proj=lambda hidden: (functional.linear(hidden, out), None),
        q_norm=torch.zeros(HEAD_DIM),
        k_norm=torch.zeros(HEAD_DIM),
        cos_sin_cache=torch.cat([angles.cos(), angles.sin()], dim=1).float(),
        num_heads=HEADS // part.ranks,
        num_kv_heads=kv_heads,
        eps=1e-5,
        scaling=HEAD_DIM**-0.5,
        prologue=choose("prologue"),
        attend=choose("attend"),
    )
    k_cache, v_cache = (torch.zeros(64, kv_heads, HEAD_DIM).to(cache_type) for _ in range(2))
    page_table = torch.stack([torch.arange(32), torch.arange(32, 64)]).int()

    def step(positions: list[list[int]], decode: bool) -> Tensor:
        slots = torch.cat([page_table[row][at] for row, at in enumerate(positions)])
        lengths = torch.tensor([at[-1] + 1 for at in positions])
        cache = forward.LayerCache(
            k_cache, v_cache, forward.Paging(page_table, slots.long()), 1, lengths,
            None if decode else lengths, WINDOW, K_SCALE, V_SCALE,
        )  # fmt: skip
        hidden = draw(len(slots), HIDDEN, seed=9 + decode)
        return forward.attention(block, torch.tensor(sum(positions, [])), hidden, cache)

    prefill = step([list(range(length)) for length in LENGTHS], decode=False)
    return torch.cat([prefill, step([[length] for length in LENGTHS], decode=True)])


def layers() -> Iterator[tuple[str, Any, Any]]:
    """Name, function and first argument of everything that is cut over ranks."""
    for weight_format in FORMATS:
        yield f"experts {weight_format}", moe_output, weight_format
    for name, cache_type in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        yield f"attention over {name}", attention_output, cache_type


# Attention is cut over all ranks, whatever the experts are.
RUNS = [
    (case, name)
    for case, parts in CASES.items()
    for name, layer, _ in layers()
    if layer is moe_output or parts[0].ep == 1
]


def _rank(rank: int, address: str, queue: Any) -> None:
    """One process: its part of every case, summed over the case's ranks."""
    interpret.enable()
    torch.set_num_threads(1)
    os.environ[dispatch.ENVIRONMENT_VARIABLE] = "interpret"
    from step37_kernels import implementations  # noqa: F401  (makes the kernels known)

    os.environ[DEBUG_VARIABLE] = "1"  # no rank takes another's experts for a fault
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for case, group, own in (
        ("TP 4", None, rank),
        ("TP 2 x EP 2", None, rank),
        ("EP 2" if rank >= 2 else "TP 2", pairs[rank // 2], rank % 2),
    ):
        part = CASES[case][own]
        for name, layer, argument in layers():
            if (case, name) not in RUNS:
                continue
            output = layer(argument, part).float()
            dist.all_reduce(output, group=group)
            if own == 0:
                queue.put((case, name, output.numpy()))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Tensor]:
    """The sums over ranks, by case and layer."""
    address = f"file://{tmp_path_factory.mktemp('gloo')}/store"
    queue = mp.get_context("spawn").Queue()
    context = mp.start_processes(_rank, (address, queue), 4, join=False, start_method="spawn")
    results = {}
    while len(results) < len(RUNS):
        try:
            case, name, output = queue.get(timeout=1)
            results[case, name] = torch.from_numpy(output)
        except Empty:
            context.join(timeout=0)  # raises what a rank has raised
    while not context.join():
        pass
    return results


@pytest.mark.parametrize(("case", "layer"), RUNS)
def test_sum_over_ranks_is_the_whole_layer(
    summed: dict[tuple[str, str], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    layer: str,
) -> None:
    """As the reference computes it on one rank."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    function, argument = next((f, a) for name, f, a in layers() if name == layer)
    whole = function(argument, Part()).float()
    assert (summed[case, layer] - whole).norm() < BOUND * whole.norm()
