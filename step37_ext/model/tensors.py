"""Which tensors a checkpoint must, may and need not hold: names, shapes and types.

Names and shapes follow the releases' own layout. The releases differ in a prefix (the NVFP4 one
puts the text model under `model.language_model.` and the encoder under `model.`), which
`canonical_name` removes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from step37_ext.model.config import TextShape, VisionShape
from step37_kernels.formats.nvfp4 import GROUP_SIZE

FLOATS = ("BF16", "F16", "F32")
"""Stored types of what is never quantised, in safetensors' spelling."""

FP8_BLOCK = 128
NVFP4_GROUP = GROUP_SIZE

_PREFIXES = (
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("language_model.", "model."),
    ("model.vision_model.", "vision_model."),
    ("model.vit_large_projector.", "vit_large_projector."),
    ("model.lm_head.", "lm_head."),
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_IN_TRANSFORMER = re.compile(r"^(model\.layers\.\d+\.)transformer\.")
_CACHE_SCALE = re.compile(r"model\.layers\.(\d+)\.(?:.+\.)?([kv])_scale$")


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor must look like; `dtypes` in safetensors' spelling."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS

    def problem(self, shape: tuple[int, ...], dtype: str) -> str | None:
        """What is wrong with a tensor of this shape and type, or None."""
        if tuple(shape) != self.shape:
            return f"has shape {list(shape)}, expected {list(self.shape)}"
        if dtype not in self.dtypes:
            return f"has type {dtype}, expected {' or '.join(self.dtypes)}"
        return None


def canonical_name(name: str) -> str:
    """A checkpoint's tensor name without the prefix in which the releases differ."""
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def cache_scale(name: str, text: TextShape) -> tuple[int, str] | None:
    """(layer, "k" or "v") if a canonical name is a decoder layer's KV-cache scale.

    The module that carries the scale is not the same in all exports, so that any name inside a
    layer that ends in `.k_scale` or `.v_scale` counts.
    """
    match = _CACHE_SCALE.match(name)
    if match is None or int(match[1]) >= len(text.layers):
        return None
    return int(match[1]), match[2]


def skip_reason(name: str, text: TextShape) -> str | None:
    """Why a canonical name is skipped on purpose, or None if it is not on that list."""
    layer = _LAYER.match(name)
    if layer and len(text.layers) <= int(layer[1]) < len(text.layers) + text.num_mtp_layers:
        return "MTP layer: loaded by the draft model"
    if name.endswith(".rotary_emb.inv_freq"):
        return "rotary frequencies: computed from the config"
    if ".moe." in name and name.endswith(".input_scale"):
        return "activation scale of an FP4 x FP4 product: activations are not quantised to FP4 here"
    return None


def expected_tensors(
    text: TextShape, vision: VisionShape | None, weight_format: str
) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint must hold, by canonical name.

    Args:
        weight_format: "bf16", "fp8" or "nvfp4", the format of the routed experts.
    """
    hidden, vocab = text.hidden_size, text.vocab_size
    specs = {
        "model.embed_tokens.weight": TensorSpec((vocab, hidden)),
        "model.norm.weight": TensorSpec((hidden,)),
        "lm_head.weight": TensorSpec((vocab, hidden)),
    }
    for index in range(len(text.layers)):
        for name, spec in _layer_tensors(text, index, weight_format).items():
            specs[f"model.layers.{index}.{name}"] = spec
    if vision is not None:
        specs.update(_vision_tensors(vision))
    return specs


def mtp_name(name: str) -> str:
    """A canonical name without the `transformer.` that exports give some of an MTP layer's."""
    return _IN_TRANSFORMER.sub(r"\1", name)


def mtp_tensors(text: TextShape, layer: int) -> dict[str, TensorSpec]:
    """Every tensor of one MTP layer, by `mtp_name`; BF16 in every release.

    Args:
        text: read with its MTP layers.
        layer: the MTP layer's number in the checkpoint, counted after the decoder's layers.
    """
    hidden, vocab = text.hidden_size, text.vocab_size
    specs = _layer_tensors(text, layer, "bf16") | {
        "enorm.weight": TensorSpec((hidden,)),
        "hnorm.weight": TensorSpec((hidden,)),
        "eh_proj.weight": TensorSpec((hidden, 2 * hidden)),
        "shared_head.norm.weight": TensorSpec((hidden,)),
        "shared_head.output.weight": TensorSpec((vocab, hidden)),
    }
    return {f"model.layers.{layer}.{name}": spec for name, spec in specs.items()}


def _mlp(prefix: str, intermediate: int, hidden: int) -> dict[str, TensorSpec]:
    return {
        f"{prefix}.gate_proj.weight": TensorSpec((intermediate, hidden)),
        f"{prefix}.up_proj.weight": TensorSpec((intermediate, hidden)),
        f"{prefix}.down_proj.weight": TensorSpec((hidden, intermediate)),
    }


def _layer_tensors(text: TextShape, index: int, weight_format: str) -> dict[str, TensorSpec]:
    layer, hidden = text.layers[index], text.hidden_size
    shape = layer.attention
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    specs = {
        "input_layernorm.weight": TensorSpec((hidden,)),
        "post_attention_layernorm.weight": TensorSpec((hidden,)),
        "self_attn.q_proj.weight": TensorSpec((q_size, hidden)),
        "self_attn.k_proj.weight": TensorSpec((kv_size, hidden)),
        "self_attn.v_proj.weight": TensorSpec((kv_size, hidden)),
        "self_attn.o_proj.weight": TensorSpec((hidden, q_size)),
        "self_attn.q_norm.weight": TensorSpec((shape.head_dim,)),
        "self_attn.k_norm.weight": TensorSpec((shape.head_dim,)),
    }
    if text.has_head_gate:
        specs["self_attn.g_proj.weight"] = TensorSpec((shape.num_heads, hidden))
    if not layer.is_moe:
        return specs | _mlp("mlp", text.dense_intermediate, hidden)
    specs |= _mlp("share_expert", text.shared_intermediate, hidden)
    specs["moe.gate.weight"] = TensorSpec((text.num_experts, hidden), ("BF16", "F32"))
    if text.has_router_bias:
        specs["moe.router_bias"] = TensorSpec((text.num_experts,))
    for name, rows, cols in (
        ("gate_proj", text.moe_intermediate, hidden),
        ("up_proj", text.moe_intermediate, hidden),
        ("down_proj", hidden, text.moe_intermediate),
    ):
        for suffix, spec in _expert_tensors(text.num_experts, rows, cols, weight_format).items():
            specs[f"moe.{name}.{suffix}"] = spec
    return specs


def _expert_tensors(
    experts: int, rows: int, cols: int, weight_format: str
) -> dict[str, TensorSpec]:
    """Tensors of one stacked expert projection `[experts, rows, cols]`, by name suffix."""
    if weight_format == "bf16":
        return {"weight": TensorSpec((experts, rows, cols))}
    if weight_format == "fp8":
        blocks = (experts, -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
        return {
            "weight": TensorSpec((experts, rows, cols), ("F8_E4M3",)),
            "weight_scale_inv": TensorSpec(blocks, ("F32", "BF16")),
        }
    return {
        "weight": TensorSpec((experts, rows, cols // 2), ("U8",)),
        "weight_scale": TensorSpec((experts, rows, cols // NVFP4_GROUP), ("F8_E4M3",)),
        "weight_scale_2": TensorSpec((experts,), ("F32",)),
    }


def _vision_tensors(vision: VisionShape) -> dict[str, TensorSpec]:
    width, patch = vision.width, vision.patch_size
    specs = {
        "vision_model.conv1.weight": TensorSpec((width, vision.num_channels, patch, patch)),
        "vision_model.vit_downsampler1.weight": TensorSpec((2 * width, width, 3, 3)),
        "vision_model.vit_downsampler1.bias": TensorSpec((2 * width,)),
        "vision_model.vit_downsampler2.weight": TensorSpec((4 * width, 2 * width, 3, 3)),
        "vision_model.vit_downsampler2.bias": TensorSpec((4 * width,)),
        "vit_large_projector.weight": TensorSpec((vision.text_hidden_size, 4 * width)),
    }
    if vision.use_abs_posemb:
        specs["vision_model.positional_embedding"] = TensorSpec((vision.grid**2, width))
    if vision.projector_bias:
        specs["vit_large_projector.bias"] = TensorSpec((vision.text_hidden_size,))
    for name, used in (("ln_pre", vision.use_ln_pre), ("ln_post", vision.use_ln_post)):
        if used:
            specs[f"vision_model.{name}.weight"] = TensorSpec((width,))
            specs[f"vision_model.{name}.bias"] = TensorSpec((width,))
    block = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (vision.mlp_hidden, width),
        "mlp.c_fc.bias": (vision.mlp_hidden,),
        "mlp.c_proj.weight": (width, vision.mlp_hidden),
        "mlp.c_proj.bias": (width,),
    }
    for norm in ("ln_1", "ln_2"):
        block[f"{norm}.weight"] = block[f"{norm}.bias"] = (width,)
    for scale in ("ls_1", "ls_2"):
        block[f"{scale}.gamma"] = (width,)
    for index in range(vision.layers):
        for name, shape in block.items():
            specs[f"vision_model.transformer.resblocks.{index}.{name}"] = TensorSpec(shape)
    return specs
