"""Largest activations over a text, for static scales, with one layer's matrices in memory at most.

All sequences' hidden states pass through a layer before the next one is read, and of its routed
experts one at a time is read. Computed are the reference operations in float32 on the CPU, with the
source's own weights, dequantised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from step37_ext.checkpoint.headers import read_json
from step37_ext.checkpoint.release_layout import Calibration, filled
from step37_ext.model.config import LayerShape, TextShape
from step37_ext.quantize.source import Source
from step37_kernels.reference.activation import swiglu_step
from step37_kernels.reference.attention import attend, prologue
from step37_kernels.reference.norm import gemma_rms_norm
from step37_kernels.reference.rotary import cos_sin_cache
from step37_kernels.reference.route import route
from step37_kernels.reference.shared_expert import shared_expert

SEQUENCE_TOKENS = 2048


def token_sequences(source: Path, file: Path) -> list[Tensor]:
    """The text in `file` as the tokenizer of the checkpoint in `source` reads it.

    Returns:
        int64 sequences of at most `SEQUENCE_TOKENS`, each led by the BOS token if the config names
        one.

    Raises:
        ValueError: the text is empty or not UTF-8, or the checkpoint has no tokenizer.json.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration text {file}: is not UTF-8: {error}") from None
    tokenizer = source / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"checkpoint: {tokenizer} is missing; calibration reads text with it")
    ids = Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids
    config = read_json(source / "config.json")
    bos = config.get("text_config", config).get("bos_token_id")
    start = [] if bos is None else [bos]
    if ids[: len(start)] == start:
        ids = ids[len(start) :]
    if not ids:
        raise ValueError(f"calibration text {file}: is empty")
    step = SEQUENCE_TOKENS - len(start)
    return [torch.tensor(start + ids[at : at + step]) for at in range(0, len(ids), step)]


@torch.no_grad()
def calibrate(
    source: Source, text: TextShape, sequences: Sequence[Tensor], after_layer: Callable[[], None]
) -> tuple[Calibration, list[int]]:
    """Run `sequences` (int64 [tokens] each) through the model.

    Returns:
        The largest magnitudes, and per layer with experts the number of experts that no token was
        routed to; they are given the largest of their layer.

    Raises:
        ValueError: an activation is not finite.
    """
    embedding = source.tensor("model.embed_tokens.weight")
    hidden = [embedding[ids].float() for ids in sequences]
    del embedding
    k, v = torch.zeros(len(text.layers)), torch.zeros(len(text.layers))
    inputs, products = [], []
    for index, layer in enumerate(text.layers):
        weights = _LayerWeights(source, f"model.layers.{index}")
        k[index], v[index] = _attention(weights, layer, text.rms_norm_eps, hidden)
        rows = torch.cat(hidden)
        normed = gemma_rms_norm(rows, weights["post_attention_layernorm"], text.rms_norm_eps)
        if layer.is_moe:
            expert_input, expert_product = _experts(weights, layer, text, normed, rows)
            inputs.append(expert_input)
            products.append(expert_product)
        else:
            rows += _gated_mlp(weights, "mlp", normed, layer.shared_limit)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"calibration: layer {index} gave hidden states that are not finite")
        hidden = list(rows.split([len(ids) for ids in sequences]))
        after_layer()
    unrouted = [int((amax == 0).sum()) for amax in inputs]
    amaxes = filled(torch.stack(inputs)), filled(torch.stack(products))
    return Calibration(k, v, *amaxes), unrouted


class _LayerWeights:
    """One layer's matrices in float32, read when asked for, by the name after the layer's."""

    def __init__(self, source: Source, layer: str) -> None:
        self._source, self._layer = source, layer

    def __getitem__(self, module: str) -> Tensor:
        return self._source.tensor(f"{self._layer}.{module}.weight").float()

    def tensor(self, name: str) -> Tensor:
        return self._source.tensor(f"{self._layer}.{name}")

    def has(self, name: str) -> bool:
        return f"{self._layer}.{name}" in self._source.headers

    def expert(self, projection: str, expert: int) -> Tensor:
        return self._source.expert(f"{self._layer}.moe.{projection}.weight", expert)


def _attention(
    weights: _LayerWeights, layer: LayerShape, eps: float, hidden: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Add the attention block's output to `hidden` in place; largest key and value."""
    shape = layer.attention
    qkv_proj = torch.cat([weights[f"self_attn.{name}_proj"] for name in "qkv"])
    o_proj, norm = weights["self_attn.o_proj"], weights["input_layernorm"]
    gate = weights["self_attn.g_proj"] if weights.has("self_attn.g_proj.weight") else None
    longest = max(len(rows) for rows in hidden)
    rotary = cos_sin_cache(shape.rotary_dim, shape.rope_theta, longest, shape.rope_scaling)
    head_norms = weights["self_attn.q_norm"], weights["self_attn.k_norm"]
    largest_k = largest_v = torch.zeros(())
    for rows in hidden:
        positions, length = torch.arange(len(rows)), torch.tensor([len(rows)])
        x = gemma_rms_norm(rows, norm, eps)
        heads = shape.num_heads, shape.num_kv_heads
        q, k, v = prologue(x @ qkv_proj.T, positions, *head_norms, rotary, *heads, eps)
        largest_k = torch.maximum(largest_k, k.abs().max())
        largest_v = torch.maximum(largest_v, v.abs().max())
        out = attend(
            q,
            k,
            v,
            page_table=positions[None],
            seq_lens=length,
            query_lens=length,
            softmax_scale=shape.head_dim**-0.5,
            window=shape.window,
            head_gate=None if gate is None else x @ gate.T,
        )
        rows += out @ o_proj.T
    return largest_k, largest_v


def _gated_mlp(weights: _LayerWeights, module: str, x: Tensor, limit: float | None) -> Tensor:
    w13 = torch.cat([weights[f"{module}.gate_proj"], weights[f"{module}.up_proj"]])
    return shared_expert(x, w13, weights[f"{module}.down_proj"], limit)[0]


def _experts(
    weights: _LayerWeights, layer: LayerShape, text: TextShape, x: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Add routed and shared experts' output for `x` to `rows` in place.

    Returns:
        fp32 [experts] each: the largest of what was routed to an expert, and of what its down
        projection read; 0 where no token was routed.
    """
    bias = weights.tensor("moe.router_bias").float() if text.has_router_bias else None
    gate = weights["moe.gate"]
    topk = route(x, gate, bias, text.top_k, text.router_scaling, text.router_renormalize)
    inputs, products = torch.zeros(text.num_experts), torch.zeros(text.num_experts)
    for expert in range(text.num_experts):
        token, choice = (topk[1] == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        routed = x[token]
        w13 = torch.cat([weights.expert(f"{name}_proj", expert) for name in ("gate", "up")])
        product = swiglu_step(routed @ w13.T, layer.routed_limit)
        inputs[expert], products[expert] = routed.abs().max(), product.abs().max()
        down = product @ weights.expert("down_proj", expert).T
        rows.index_add_(0, token, down * topk[0][token, choice, None])
    rows += _gated_mlp(weights, "share_expert", x, layer.shared_limit)
    return inputs, products
