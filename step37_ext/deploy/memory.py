"""How the released model and its KV cache divide a GPU's memory; all sizes in bytes per GPU."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, Literal

from step37_ext.deploy.hardware import IMAGE_CACHE, OUTSIDE_SGLANG, Gpu, static_fraction
from step37_ext.model.config import SLIDING, AttentionShape, TextShape, VisionShape
from step37_ext.model.dense_format import DenseFormat
from step37_ext.model.tensors import TensorSpec, expected_tensors, mtp_tensors

Quant = Literal["bf16", "fp8", "nvfp4"]
CacheType = Literal["bf16", "fp8_e4m3"]

_TYPE_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
_CACHE_BYTES: dict[CacheType, int] = {"bf16": 2, "fp8_e4m3": 1}
_WHOLE = (  # what every rank holds entirely, beside vectors
    "moe.gate.weight",
    "eh_proj.weight",
    "vision_model.conv1.weight",
    "vision_model.vit_downsampler1.weight",
    "vision_model.vit_downsampler2.weight",
    "vision_model.positional_embedding",
)

_DENSE = re.compile(r"\.(self_attn\.[qkvo]|(mlp|share_expert)\.(gate|up|down))_proj\.")
_SPLIT_ALONG_K = ("o_proj.weight", "down_proj.weight")  # whose ranks all have every row

DEFAULT_SLIDING_RATIO = 0.8
"""SGLang's default of --swa-full-tokens-ratio: sliding layers' cache tokens per full layers'."""

_EVICTION_INTERVAL = 128  # SGLANG_SWA_EVICTION_INTERVAL
_CHUNKS_IN_FLIGHT = 2  # one is computed while the next is prepared


@dataclass(frozen=True)
class Release:
    """The released model's shapes."""

    text: TextShape
    text_with_mtp: TextShape
    vision: VisionShape


@cache
def release() -> Release:
    """The shapes of Step-3.7-Flash, from `release.json`."""
    config = release_config()
    nested = {key: SimpleNamespace(**config[key]) for key in ("text_config", "vision_config")}
    return Release(
        TextShape.from_config(nested["text_config"]),
        TextShape.from_config(nested["text_config"], with_mtp=True),
        VisionShape.from_config(SimpleNamespace(**(config | nested))),
    )


def release_config() -> dict[str, Any]:
    """config.json of the BF16 release."""
    text = files("step37_ext.deploy").joinpath("release.json").read_text(encoding="utf-8")
    return json.loads(text)["config"]


def weights_per_gpu(
    model: Release, quant: Quant, tp_size: int, drafts: bool, dense: DenseFormat = "bf16"
) -> dict[str, int]:
    """Weights of the fullest rank by part: experts, attention, dense, embeddings, vision, drafts.

    Experts are cut over all ranks, by whole experts or by slices of each, which is the same number
    of bytes; KV heads are repeated where there are more ranks than heads.

    Args:
        drafts: whether the MTP layers are loaded too, in BF16 in any case.
        dense: what the attention's, dense MLPs' and shared expert's projections are served in.
            They are loaded in BF16 whole, and then made FP8 one after the other.
    """
    parts = dict.fromkeys(("experts", "attention", "dense", "embeddings", "vision"), 0)
    for name, spec in expected_tensors(model.text, model.vision, quant).items():
        fp8 = dense == "fp8" and _DENSE.search(name) is not None
        share = _fp8_share if fp8 else _share
        parts[_part(name)] += share(name, spec, model.text, tp_size)
    if drafts:
        parts["drafts"] = _draft_weights(model.text_with_mtp, tp_size)
    return parts


def _part(name: str) -> str:
    if name.startswith(("vision_model.", "vit_large_projector.")):
        return "vision"
    if ".self_attn." in name:
        return "attention"
    if ".moe." in name and not name.endswith((".gate.weight", ".router_bias")):
        return "experts"
    return "embeddings" if name.startswith(("model.embed_tokens", "lm_head")) else "dense"


def _share(name: str, spec: TensorSpec, text: TextShape, tp_size: int) -> int:
    size = math.prod(spec.shape) * _TYPE_BYTES[spec.dtypes[0]]
    if len(spec.shape) == 1 or name.endswith(_WHOLE):
        return size
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        return (
            size
            * _kv_heads(text.layers[0].attention, tp_size)
            // text.layers[0].attention.num_kv_heads
        )
    return -(-size // tp_size)


def _fp8_share(name: str, spec: TensorSpec, text: TextShape, tp_size: int) -> int:
    """A BF16 matrix [N, K] in FP8: half the bytes, and an fp32 scale for each row on the rank."""
    codes = _share(name, spec, text, tp_size) // 2
    rows = spec.shape[0] if name.endswith(_SPLIT_ALONG_K) else codes // spec.shape[1]
    return codes + 4 * rows


def _kv_heads(shape: AttentionShape, tp_size: int) -> int:
    return max(1, shape.num_kv_heads // tp_size)


def _draft_weights(text: TextShape, tp_size: int) -> int:
    """The MTP layers with their heads; the embedding is the main model's."""
    decoder = len(text.layers) - text.num_mtp_layers
    return sum(
        _share(name, spec, text, tp_size)
        for layer in range(decoder, len(text.layers))
        for name, spec in mtp_tensors(text, layer).items()
    )


def _sliding(text: TextShape) -> AttentionShape:
    return next(layer.attention for layer in text.layers if layer.attention.kind == SLIDING)


@dataclass(frozen=True)
class CacheCost:
    """KV cache of one token on one GPU: bytes in all full and in all sliding layers."""

    full: int
    sliding: int

    def per_token(self, ratio: float) -> float:
        """Bytes of the pools per token of the full layers' pool."""
        return self.full + ratio * self.sliding


def cache_cost(text: TextShape, kind: CacheType, tp_size: int, drafts: bool) -> CacheCost:
    """Bytes of keys and values per token; a rank holds at least one KV head."""
    full = sliding = 0
    for layer in text.layers:
        size = _token_bytes(layer.attention, kind, tp_size)
        if layer.attention.kind == SLIDING:
            sliding += size
        else:
            full += size
    if drafts:
        sliding += text.num_mtp_layers * _token_bytes(_sliding(text), kind, tp_size)
    return CacheCost(full, sliding)


def _token_bytes(shape: AttentionShape, kind: CacheType, tp_size: int) -> int:
    return 2 * _kv_heads(shape, tp_size) * shape.head_dim * _CACHE_BYTES[kind]


@dataclass(frozen=True)
class Workload:
    """Requests at once, and tokens of each with its answer."""

    context: int
    concurrency: int

    @property
    def tokens(self) -> int:
        return self.context * self.concurrency


@dataclass(frozen=True)
class Settings:
    """What the server may be told about its memory.

    Attributes:
        prefill_chunk: tokens of one prefill chunk.
        sliding_ratio: tokens of the sliding layers' pool per token of the full layers'.
    """

    prefill_chunk: int
    sliding_ratio: float


@dataclass(frozen=True)
class MemoryPlan:
    """One GPU's memory in bytes.

    Attributes:
        outside: held before SGLang measures (driver, CUDA context, NCCL), an assumption.
        reserve: activations, CUDA graphs and the image encoder, by SGLang's own rule.
        weights: by part.
        pool: left for the KV cache; negative where the weights alone do not fit.
        needed: what the workload takes of the pool.
        capacity: tokens of context that the pool holds.
    """

    total: int
    outside: int
    reserve: int
    image_cache: int
    weights: dict[str, int]
    cost: CacheCost
    pool: int
    needed: int
    settings: Settings

    @property
    def capacity(self) -> int:
        return max(0, int(self.pool / self.cost.per_token(self.settings.sliding_ratio)))

    @property
    def left(self) -> int:
        return self.pool - self.needed

    @property
    def fits(self) -> bool:
        return self.left >= 0


def sliding_tokens(workload: Workload, window: int, prefill_chunk: int) -> int:
    """Tokens that the sliding layers' pool has to hold at once.

    A request keeps its window, what is evicted only once an interval, and a page at either end;
    prefill holds the chunks in flight besides. As SGLang counts them in
    `model_executor/pool_configurator.py`, `compute_swa_request_cap`, with pages of one token.
    """
    per_request = window + _EVICTION_INTERVAL + 2
    held = per_request * workload.concurrency + _CHUNKS_IN_FLIGHT * prefill_chunk + 1
    return min(held, workload.tokens)


def plan_memory(
    gpu: Gpu,
    weights: dict[str, int],
    cost: CacheCost,
    workload: Workload,
    settings: Settings,
    *,
    tp_size: int,
    graph_batch: int,
    window: int,
) -> MemoryPlan:
    """Divide a GPU's memory as SGLang will under these settings."""
    fraction = static_fraction(gpu, tp_size, settings.prefill_chunk, graph_batch)
    free = gpu.memory - OUTSIDE_SGLANG
    static = int(free * fraction)
    held = sliding_tokens(workload, window, settings.prefill_chunk)
    full_tokens = max(workload.tokens, math.ceil(held / settings.sliding_ratio))
    return MemoryPlan(
        total=gpu.memory,
        outside=OUTSIDE_SGLANG,
        reserve=free - static,
        image_cache=IMAGE_CACHE,
        weights=weights,
        cost=cost,
        pool=static - IMAGE_CACHE - sum(weights.values()),
        needed=math.ceil(full_tokens * cost.per_token(settings.sliding_ratio)),
        settings=settings,
    )
