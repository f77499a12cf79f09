"""The small files of a checkpoint: configs, tokenizer, preprocessor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from step37_ext.checkpoint.release_layout import (
    Depth,
    Shapes,
    nvfp4_name,
    tensor_shapes,
    unquantized_modules,
)
from step37_ext.checkpoint.spec import TinySpec
from step37_ext.checkpoint.tokenizer import (
    CHAT_TEMPLATE,
    TURN_END,
    build_tokenizer,
    tokenizer_config,
)
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_ext.checkpoint.write import write_json


def write_files(folder: Path, spec: TinySpec, weight_format: WeightFormat) -> None:
    """Write everything but the tensors into `folder`."""
    tokenizer = build_tokenizer(spec.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config()},
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    ids = tokenizer.get_vocab()
    patch_id, end_id = ids["<im_patch>"], ids[TURN_END]
    config = model_config(spec, image_token_id=patch_id, eos_token_ids=[1, 2, end_id])
    if weight_format == "fp8":
        config["quantization_config"] = fp8_config(tensor_shapes(spec))
    if weight_format == "nvfp4":
        config["quantization_config"] = nvfp4_config(spec)
        write_json(folder / "hf_quant_config.json", nvfp4_legacy_config(spec))
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": [1, 2, end_id], "pad_token_id": 1},
    )
    write_json(folder / "preprocessor_config.json", preprocessor_config())


def model_config(
    spec: TinySpec, *, image_token_id: int, eos_token_ids: list[int]
) -> dict[str, Any]:
    """config.json without a quantization_config; fields of the release's, sizes of `spec`."""
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": eos_token_ids,
        "pad_token_id": 1,
        "hidden_size": spec.hidden_size,
        "image_token_id": image_token_id,
        "image_token_len": 169,
        "patch_token_len": 81,
        "im_start_token": "<im_start>",
        "im_end_token": "<im_end>",
        "im_patch_token": "<im_patch>",
        "use_im_start_end": True,
        "understand_projector_stride": 2,
        "projector_bias": False,
        "vision_select_layer": -1,
        "text_config": spec.text_config(eos_token_ids),
        "vision_config": spec.vision_config(),
    }


def fp8_config(shapes: Shapes) -> dict[str, Any]:
    """`quantization_config` of the FP8 release: 128x128 blocks on routed experts only.

    Args:
        shapes: of every tensor of the BF16 checkpoint, by name.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": unquantized_modules(shapes),
    }


def _nvfp4_excluded(spec: Depth) -> list[str]:
    """Patterns of what ModelOpt left alone; `*` matches any rest of a name, dots included."""
    patterns = ["lm_head"]
    for layer in range(spec.layers + spec.mtp_layers):
        module = nvfp4_name(f"model.layers.{layer}", spec)
        if layer in spec.moe_layers:
            patterns += [f"{module}.self_attn*", f"{module}.moe.gate", f"{module}.share_expert*"]
        else:
            patterns += [f"{module}.*"]
    return [*patterns, "model.vision_model*", "model.vit_large_projector"]


def nvfp4_config(spec: Depth, *, fp8_cache: bool = True) -> dict[str, Any]:
    """`quantization_config` of config.json as ModelOpt's exporter writes it for NVFP4.

    Args:
        fp8_cache: whether the checkpoint has scales for an FP8 KV cache.
    """
    eight_bits = {"dynamic": False, "num_bits": 8, "type": "float"}
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "kv_cache_scheme": eight_bits if fp8_cache else None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": four_bits,
                "weights": four_bits,
            }
        },
        "ignore": _nvfp4_excluded(spec),
        "producer": {"name": "step37_ext"},
    }


def nvfp4_legacy_config(spec: Depth, *, fp8_cache: bool = True) -> dict[str, Any]:
    """hf_quant_config.json, the older file that ModelOpt writes beside config.json."""
    return {
        "producer": {"name": "step37_ext"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8" if fp8_cache else None,
            "group_size": 16,
            "exclude_modules": _nvfp4_excluded(spec),
        },
    }


def preprocessor_config() -> dict[str, Any]:
    """preprocessor_config.json; SGLang and transformers both find their processor by these names.

    Sizes are the release's (728-pixel global view, 504-pixel crops), mean and deviation CLIP's.
    """
    return {
        "image_processor_type": "Step3p7ImageProcessor",
        "processor_class": "Step3p7Processor",
        "size": {"height": 728, "width": 728},
        "patch_size": 504,
        "max_image_size": 3024,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
        "resample": 2,
    }
