"""The release's tensor names: which tensors a checkpoint holds, in which shape and number format.

Names and shapes are those that the loaders of SGLang 0.5.23 and TensorRT-LLM expect of
Step-3.7-Flash. BF16 and FP8 checkpoints name the text model `model.*`; NVFP4 ones, written by
ModelOpt, `model.language_model.*`, except for the MTP layers and the head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from step37_ext.checkpoint.spec import TinySpec
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_kernels.formats.fp8_block import quantize as quantize_fp8_block
from step37_kernels.formats.nvfp4 import quantize as quantize_nvfp4

Shapes = dict[str, tuple[int, ...]]

_ROUTED_EXPERT = re.compile(r"model\.layers\.(\d+)\.moe\.(gate|up|down)_proj\.weight")
_E4M3_MAX = 448.0
_E2M1_MAX = 6.0


class Depth(Protocol):
    """How many decoder layers a model has, which of them have routed experts, and MTP layers."""

    @property
    def layers(self) -> int: ...

    @property
    def mtp_layers(self) -> int: ...

    @property
    def moe_layers(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Calibration:
    """Largest magnitudes seen on some text; what ModelOpt's static scales are made from.

    Args:
        k, v: fp32 [layers], of the keys (after rotary) and values that enter the KV cache.
        expert_input: fp32 [moe layers, experts], of the hidden states routed to an expert.
        expert_product: fp32 [moe layers, experts], of silu(gate) * up, which down_proj reads.
    """

    k: Tensor
    v: Tensor
    expert_input: Tensor
    expert_product: Tensor


def filled(amax: Tensor) -> Tensor:
    """[moe layers, experts] with the largest of its layer where no token was routed.

    There is no better guess; ModelOpt does the same.
    """
    return torch.where(amax > 0, amax, amax.amax(1, keepdim=True))


def is_routed_expert(name: str) -> bool:
    """Whether a BF16 checkpoint's `name` is a stack of routed experts: all that is quantised."""
    return _ROUTED_EXPERT.fullmatch(name) is not None


def tensor_shapes(spec: TinySpec) -> Shapes:
    """Every tensor of a BF16 checkpoint, name to shape, MTP layers included."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(spec.layers + spec.mtp_layers):
        shapes |= _prefixed(f"model.layers.{layer}.", _layer(spec, layer))
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    shapes |= _prefixed("vision_model.", _vision(spec))
    shapes["vit_large_projector.weight"] = (hidden, 4 * spec.vision_width)
    return shapes


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _layer(spec: TinySpec, layer: int) -> Shapes:
    hidden = spec.hidden_size
    q_rows, kv_rows = spec.heads(layer) * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "self_attn.g_proj.weight": (spec.heads(layer), hidden),
        "self_attn.q_norm.weight": (spec.head_dim,),
        "self_attn.k_norm.weight": (spec.head_dim,),
    }
    if layer in spec.moe_layers:
        experts, inter = spec.experts, spec.expert_intermediate
        shapes |= {
            "moe.gate.weight": (experts, hidden),
            "moe.router_bias": (experts,),
            "moe.gate_proj.weight": (experts, inter, hidden),
            "moe.up_proj.weight": (experts, inter, hidden),
            "moe.down_proj.weight": (experts, hidden, inter),
        }
        shapes |= _prefixed("share_expert.", _mlp(hidden, spec.shared_intermediate))
    else:
        shapes |= _prefixed("mlp.", _mlp(hidden, spec.dense_intermediate))
    if layer >= spec.layers:
        shapes |= {
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "eh_proj.weight": (hidden, 2 * hidden),
            "transformer.shared_head.norm.weight": (hidden,),
            "transformer.shared_head.output.weight": (spec.vocab_size, hidden),
        }
    return shapes


def _mlp(hidden: int, inter: int) -> Shapes:
    return {
        "gate_proj.weight": (inter, hidden),
        "up_proj.weight": (inter, hidden),
        "down_proj.weight": (hidden, inter),
    }


def _vision(spec: TinySpec) -> Shapes:
    width, inter = spec.vision_width, spec.vision_intermediate
    shapes: Shapes = {
        "conv1.weight": (width, 3, 14, 14),
        "positional_embedding": (52 * 52, width),
        "ln_pre.weight": (width,),
        "ln_pre.bias": (width,),
        "vit_downsampler1.weight": (2 * width, width, 3, 3),
        "vit_downsampler1.bias": (2 * width,),
        "vit_downsampler2.weight": (4 * width, 2 * width, 3, 3),
        "vit_downsampler2.bias": (4 * width,),
    }
    block: Shapes = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (inter, width),
        "mlp.c_fc.bias": (inter,),
        "mlp.c_proj.weight": (width, inter),
        "mlp.c_proj.bias": (width,),
        "ls_1.gamma": (width,),
        "ls_2.gamma": (width,),
    }
    for norm in ("ln_1", "ln_2"):
        block |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for index in range(spec.vision_layers):
        shapes |= _prefixed(f"transformer.resblocks.{index}.", block)
    return shapes


def in_format(
    spec: TinySpec,
    weights: dict[str, Tensor],
    weight_format: WeightFormat,
    calibration: Calibration | None = None,
) -> dict[str, Tensor]:
    """The tensors of a checkpoint in `weight_format`, under the release's names.

    Only routed experts are quantised. Everything else is BF16 but for the router bias (fp32 always)
    and the router gate: fp32 in FP8 checkpoints, BF16 in the others, because the releases are not
    known to agree on it.

    Args:
        weights: the tensors of `tensor_shapes(spec)`, any floating dtype.
        calibration: needed for NVFP4, which stores static activation and KV-cache scales.

    Raises:
        ValueError: `weight_format` is unknown, or NVFP4 is asked for without a calibration.
    """
    if weight_format not in get_args(WeightFormat):
        raise ValueError(
            f"weight format {weight_format!r}: must be one of {', '.join(get_args(WeightFormat))}"
        )
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        expert = is_routed_expert(name)
        if expert and weight_format == "fp8":
            tensors |= _fp8_expert(name, weight.bfloat16())
        elif expert and weight_format == "nvfp4":
            tensors |= _nvfp4_expert(name, weight.bfloat16())
        else:
            tensors[name] = weight.to(_stored_dtype(name, weight_format)).contiguous()
    if weight_format == "nvfp4":
        if calibration is None:
            raise ValueError("calibration is None: NVFP4 needs one for its static scales")
        tensors |= static_scales(spec, calibration)
        tensors = {nvfp4_name(name, spec): tensor for name, tensor in tensors.items()}
    return tensors


def _stored_dtype(name: str, weight_format: WeightFormat) -> torch.dtype:
    fp32_gate = weight_format == "fp8" and name.endswith(".moe.gate.weight")
    return torch.float32 if fp32_gate or name.endswith(".router_bias") else torch.bfloat16


def _fp8_expert(name: str, weight: Tensor) -> dict[str, Tensor]:
    quantized = quantize_fp8_block(weight)
    return {name: quantized.data, f"{name}_scale_inv": quantized.scale_inv}


def _nvfp4_expert(name: str, weight: Tensor) -> dict[str, Tensor]:
    quantized = quantize_nvfp4(weight)
    return {
        name: quantized.packed,
        f"{name}_scale": quantized.block_scale,
        f"{name}_scale_2": quantized.global_scale,
    }


def static_scales(spec: Depth, calibration: Calibration) -> dict[str, Tensor]:
    """KV-cache scales amax / 448 and expert `input_scale` amax / (6 * 448), all fp32.

    Names as in a BF16 checkpoint.
    """
    scales: dict[str, Tensor] = {}
    for layer in range(spec.layers):
        attention = f"model.layers.{layer}.self_attn"
        scales[f"{attention}.k_proj.k_scale"] = calibration.k[layer] / _E4M3_MAX
        scales[f"{attention}.v_proj.v_scale"] = calibration.v[layer] / _E4M3_MAX
    for row, layer in enumerate(spec.moe_layers):
        for projection, amax in (
            ("gate_proj", calibration.expert_input),
            ("up_proj", calibration.expert_input),
            ("down_proj", calibration.expert_product),
        ):
            name = f"model.layers.{layer}.moe.{projection}.input_scale"
            scales[name] = amax[row] / (_E4M3_MAX * _E2M1_MAX)
    # Distinct copies: safetensors refuses tensors that share memory.
    return {name: scale.float().clone() for name, scale in scales.items()}


def nvfp4_name(name: str, spec: Depth) -> str:
    """The name that an NVFP4 checkpoint gives to the tensor or module that BF16 calls `name`."""
    if name.startswith(("vision_model", "vit_large_projector")):
        return f"model.{name}"
    layer = re.match(r"model\.layers\.(\d+)", name)
    if name.startswith("lm_head") or (layer and int(layer[1]) >= spec.layers):
        return name
    return re.sub(r"^model\.", "model.language_model.", name)


def unquantized_modules(shapes: Shapes) -> list[str]:
    """Module names of every matrix of a BF16 checkpoint's `shapes` that is never quantised."""
    return sorted(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight")
        and len(shape) == 2
        and not name.startswith(("vision_model", "vit_large_projector"))
        and not is_routed_expert(name)
    ) + ["vision_model", "vit_large_projector"]
