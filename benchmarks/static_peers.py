"""SGLang's Triton kernels at this model's shapes, launched on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from benchmarks.attention_cells import heads
from benchmarks.expert_cells import SHARDS
from benchmarks.shapes import EXPERTS, HEAD_DIM, HIDDEN, TOP_K
from step37_kernels.evidence.limits import Case, Limits
from step37_kernels.launch import launch

KV_SPLITS = 8  # SGLang's default of --triton-attention-num-kv-splits
CONTEXT = 8192
_FP8_BLOCK = 128


class _ShownToLaunch:
    """A Triton kernel whose launches go through `launch`, where they can be compiled."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            programs = grid(options) if callable(grid) else grid
            launch(self._kernel, programs, *args, **options)

        return run


@contextmanager
def _shown(module: ModuleType, *names: str, **replaced: Any) -> Iterator[None]:
    """Show the launches of these kernels of a module to `launch`, with other names replaced."""
    before = {name: getattr(module, name) for name in (*names, *replaced)}
    for name in names:
        setattr(module, name, _ShownToLaunch(before[name]))
    for name, value in replaced.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def fused_moe_case(arch: int, weights: str, step: str, tokens: int, parallel: str) -> Case:
    """SGLang's `fused_moe_kernel` with the tile that SGLang 0.5.23 chooses untuned.

    It has no tuned tiles for 288 experts with these columns on an NVIDIA GPU.

    Args:
        weights: "bf16", or "fp8" in blocks of 128 x 128 with FP8 activations.
        step: "gate-up" or "down".
        parallel: a name in SHARDS whose columns are whole FP8 blocks if weights are FP8.
    """
    tile = _tile(weights, tokens)
    units = tile["BLOCK_SIZE_N"] * tile["BLOCK_SIZE_K"]
    return Case(
        f"{weights} {step}, {tokens} tokens, {parallel}",
        arch,
        lambda: _fused_moe(weights, step, tokens, SHARDS[parallel].intermediate, tile),
        {"fused_moe_kernel": Limits("a peer's: only counted", units=units)},
    )


def _tile(weights: str, tokens: int) -> dict[str, int]:
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config

    from benchmarks.expert_peers import sglang_context

    sglang_context()
    kind, block = ("fp8_w8a8", [_FP8_BLOCK] * 2) if weights == "fp8" else (None, None)
    # Of the sizes only tokens and experts decide.
    return fused_moe_triton_config.get_default_config(
        tokens, EXPERTS, 0, HIDDEN, TOP_K, kind, False, block
    )


def _fused_moe(
    weights: str, step: str, tokens: int, intermediate: int, tile: dict[str, int]
) -> None:
    from sglang.kernels.ops.moe import fused_moe_triton_kernels as kernels

    up, fp8 = step == "gate-up", weights == "fp8"
    rows, outputs, inputs = (
        (tokens, 2 * intermediate, HIDDEN) if up else (tokens * TOP_K, HIDDEN, intermediate)
    )
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    blocks = [-(-size // _FP8_BLOCK) for size in (outputs, inputs)]
    slots, block = tokens * TOP_K, tile["BLOCK_SIZE_M"]
    # As moe_align_block_size pads: every expert's last block, or a block for each choice.
    padded = slots * block if slots <= EXPERTS else slots + (EXPERTS + 1) * (block - 1)
    int32, fp32 = torch.int32, torch.float32
    with _shown(kernels, "fused_moe_kernel", is_arch_support_pdl=lambda: True):
        kernels.invoke_fused_moe_kernel(
            _meta(rows, inputs, dtype=dtype),
            _meta(EXPERTS, outputs, inputs, dtype=dtype),
            None,
            _meta(tokens, TOP_K, outputs),
            _meta(rows, blocks[1], dtype=fp32) if fp8 else None,
            _meta(EXPERTS, *blocks, dtype=fp32) if fp8 else None,
            None,
            _meta(tokens, TOP_K, dtype=fp32),
            _meta(tokens, TOP_K, dtype=int32),
            _meta(padded, dtype=int32),
            _meta(-(-padded // block), dtype=int32),
            _meta(1, dtype=int32),
            not up,
            TOP_K if up else 1,
            tile,
            tl.bfloat16,
            use_fp8_w8a8=fp8,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            per_channel_quant=False,
            block_shape=[_FP8_BLOCK] * 2 if fp8 else None,
        )


def decode_case(arch: int, cache: str, kind: str, batch: int) -> Case:
    """SGLang's grouped decode attention (`--attention-backend triton`), pages of one token."""
    of = heads(kind, 1)
    per_key = of.kv_bytes(1, cache) // of.kv  # one KV head's key and value
    keys = 32  # of a trip of its loop: BLOCK in `_decode_grouped_att_m_fwd`
    limits = Limits("a peer's: only counted", units=keys * per_key)
    return Case(
        f"decode, {kind}, {cache} cache, page 1, TP=1",
        arch,
        lambda: _decode(kind, cache, batch),
        {"_fwd_grouped_kernel_stage1": limits},
    )


def _decode(kind: str, cache: str, batch: int) -> None:
    from sglang.kernels.ops.attention import decode_attention as kernels

    of, int32, fp32 = heads(kind, 1), torch.int32, torch.float32
    dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[cache]
    held = _meta(batch * CONTEXT, of.kv, HEAD_DIM, dtype=dtype)
    parts = (batch, of.query, KV_SPLITS)
    with _shown(kernels, "_fwd_grouped_kernel_stage1"):
        kernels._decode_grouped_att_m_fwd(
            _meta(batch, of.query, HEAD_DIM),
            held,
            held,
            _meta(*parts, HEAD_DIM, dtype=fp32),
            _meta(*parts, dtype=fp32),
            _meta(batch + 1, dtype=int32),
            _meta(batch * CONTEXT, dtype=torch.int64),
            _meta(batch, dtype=int32),
            KV_SPLITS,
            HEAD_DIM**-0.5,
            0.0,
        )


def cases(arch: int) -> list[Case]:
    """Every peer's launch that is compared."""
    shards = {"bf16": ("TP1", "TP4"), "fp8": ("TP1",)}  # SGLang refuses FP8 blocks that are cut
    moe = [
        fused_moe_case(arch, weights, step, tokens, parallel)
        for weights, names in shards.items()
        for parallel in names
        for tokens in (1, 64)
        for step in ("gate-up", "down")
    ]
    kinds = ("full", "sliding")
    decode = [decode_case(arch, cache, kind, 64) for cache in ("fp8", "bf16") for kind in kinds]
    return moe + decode
