"""What a written checkpoint holds: names, shapes and dtypes of each format, and its small files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from step37_ext.checkpoint.make import random_checkpoint
from step37_ext.checkpoint.spec import FOUR_KV_HEADS, GROUPS_8_12, TINY, TinySpec
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_kernels.formats import fp8_block, nvfp4

BF16, FP32, E4M3, U8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8


def read(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}
    assert tensors.keys() == index["weight_map"].keys()
    assert sum(tensor.nbytes for tensor in tensors.values()) == index["metadata"]["total_size"]
    return tensors


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[WeightFormat, Path]:
    """The untrained model of the trained one's sizes in each format."""
    root = tmp_path_factory.mktemp("random")
    formats: tuple[WeightFormat, ...] = ("bf16", "fp8", "nvfp4")
    for weight_format in formats:
        random_checkpoint(root / weight_format, weight_format, TINY)
    return {weight_format: root / weight_format for weight_format in formats}


# The tensors of layers 0 (dense, full), 1 (experts, sliding) and 4 (the first MTP layer) for the
# sizes of TINY: hidden 256, head dim 64, heads 4 full / 6 sliding / 2 KV, 8 experts of 384.
LAYER_0 = {
    "input_layernorm.weight": (256,),
    "post_attention_layernorm.weight": (256,),
    "self_attn.q_proj.weight": (256, 256),
    "self_attn.k_proj.weight": (128, 256),
    "self_attn.v_proj.weight": (128, 256),
    "self_attn.o_proj.weight": (256, 256),
    "self_attn.g_proj.weight": (4, 256),
    "self_attn.q_norm.weight": (64,),
    "self_attn.k_norm.weight": (64,),
    "mlp.gate_proj.weight": (512, 256),
    "mlp.up_proj.weight": (512, 256),
    "mlp.down_proj.weight": (256, 512),
}
SLIDING_ATTENTION = {
    "self_attn.q_proj.weight": (384, 256),
    "self_attn.o_proj.weight": (256, 384),
    "self_attn.g_proj.weight": (6, 256),
}
LAYER_1 = {name: shape for name, shape in LAYER_0.items() if "mlp" not in name} | {
    **SLIDING_ATTENTION,
    "moe.gate.weight": (8, 256),
    "moe.router_bias": (8,),
    "moe.gate_proj.weight": (8, 384, 256),
    "moe.up_proj.weight": (8, 384, 256),
    "moe.down_proj.weight": (8, 256, 384),
    "share_expert.gate_proj.weight": (128, 256),
    "share_expert.up_proj.weight": (128, 256),
    "share_expert.down_proj.weight": (256, 128),
}
LAYER_4 = LAYER_0 | {
    **SLIDING_ATTENTION,
    "enorm.weight": (256,),
    "hnorm.weight": (256,),
    "eh_proj.weight": (256, 512),
    "transformer.shared_head.norm.weight": (256,),
    "transformer.shared_head.output.weight": (640, 256),
}


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def test_bf16_names_shapes_and_dtypes(checkpoints: dict[WeightFormat, Path]) -> None:
    tensors = read(checkpoints["bf16"])
    for layer, expected in ((0, LAYER_0), (1, LAYER_1), (4, LAYER_4)):
        found = under(f"model.layers.{layer}.", tensors)
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    assert layers == set("0123456")  # 4 decoder layers and 3 MTP layers
    assert sum(name.startswith(f"model.layers.{n}.") for name in tensors for n in (4, 5, 6)) == 51
    rest = {name: tuple(t.shape) for name, t in tensors.items() if "layers" not in name}
    assert {name: s for name, s in rest.items() if not name.startswith("vision_model.")} == {
        "model.embed_tokens.weight": (640, 256),
        "model.norm.weight": (256,),
        "lm_head.weight": (640, 256),
        "vit_large_projector.weight": (256, 256),
    }
    odd = {name: t.dtype for name, t in tensors.items() if t.dtype != BF16}
    assert odd == {f"model.layers.{n}.moe.router_bias": FP32 for n in (1, 2, 3)}


def test_fp8_quantises_the_routed_experts_only(checkpoints: dict[WeightFormat, Path]) -> None:
    base, tensors = read(checkpoints["bf16"]), read(checkpoints["fp8"])
    experts = [name for name in base if ".moe." in name and name.endswith("_proj.weight")]
    assert len(experts) == 9
    for name in experts:
        expected = fp8_block.quantize(base[name])
        data, scale = tensors.pop(name), tensors.pop(f"{name}_scale_inv")
        assert data.dtype == E4M3 and scale.dtype == FP32
        assert tuple(scale.shape) == ((8, 2, 3) if "down" in name else (8, 3, 2))
        assert torch.equal(data.view(U8), expected.data.view(U8))
        assert torch.equal(scale, expected.scale_inv)
        del base[name]
    assert tensors.keys() == base.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == (FP32 if name.endswith("moe.gate.weight") else base[name].dtype)
        assert torch.equal(tensor.to(base[name].dtype), base[name]), name


def test_nvfp4_names_and_values(checkpoints: dict[WeightFormat, Path]) -> None:
    base, tensors = read(checkpoints["bf16"]), read(checkpoints["nvfp4"])
    for name in list(base):
        if name.startswith(("vision_model.", "vit_large_projector.")):
            there = f"model.{name}"
        elif name.startswith(("lm_head.", *(f"model.layers.{n}." for n in (4, 5, 6)))):
            there = name
        else:
            there = name.replace("model.", "model.language_model.", 1)
        if ".moe." in name and name.endswith("_proj.weight"):
            expected = nvfp4.quantize(base[name])
            module = there.removesuffix(".weight")
            packed, block_scale = tensors.pop(there), tensors.pop(f"{module}.weight_scale")
            experts, rows, cols = base[name].shape
            assert packed.dtype == U8 and tuple(packed.shape) == (experts, rows, cols // 2)
            assert block_scale.dtype == E4M3 and block_scale.shape == (experts, rows, cols // 16)
            assert torch.equal(packed, expected.packed)
            assert torch.equal(block_scale.view(U8), expected.block_scale.view(U8))
            assert torch.equal(tensors.pop(f"{module}.weight_scale_2"), expected.global_scale)
            assert tuple(tensors.pop(f"{module}.input_scale").shape) == (experts,)
        else:
            assert torch.equal(tensors.pop(there), base[name]), name
    scales = {
        f"model.language_model.layers.{n}.self_attn.{which}_proj.{which}_scale"
        for n in range(4)
        for which in "kv"
    }
    assert tensors.keys() == scales
    assert all(tensor.shape == () and tensor.dtype == FP32 for tensor in tensors.values())


def test_gate_and_up_global_scales_differ(checkpoints: dict[WeightFormat, Path]) -> None:
    tensors = read(checkpoints["nvfp4"])
    prefix = "model.language_model.layers.1.moe"
    ratio = (
        tensors[f"{prefix}.up_proj.weight_scale_2"]
        / (tensors[f"{prefix}.gate_proj.weight_scale_2"])
    )
    # Experts are initialised with up projections 1.5 to 3.5 times as large as their gates.
    assert ratio.min() > 1.2 and ratio.max() > 2.5


def test_configs_name_the_format(checkpoints: dict[WeightFormat, Path]) -> None:
    configs = {
        weight_format: json.loads((folder / "config.json").read_text())
        for weight_format, folder in checkpoints.items()
    }
    assert "quantization_config" not in configs["bf16"]
    fp8 = configs["fp8"]["quantization_config"]
    assert (fp8["quant_method"], fp8["weight_block_size"]) == ("fp8", [128, 128])
    kept = set(fp8["modules_to_not_convert"])
    # What is kept and what is quantised make up all matrices of the text model.
    matrices = {
        name.removesuffix(".weight")
        for name, tensor in read(checkpoints["bf16"]).items()
        if name.startswith(("model.", "lm_head")) and tensor.ndim >= 2
    }
    routed = {f"model.layers.{n}.moe.{p}_proj" for n in (1, 2, 3) for p in ("gate", "up", "down")}
    assert kept - {"vision_model", "vit_large_projector"} == matrices - routed

    legacy = json.loads((checkpoints["nvfp4"] / "hf_quant_config.json").read_text())
    new = configs["nvfp4"]["quantization_config"]
    assert new["quant_method"] == "modelopt"
    assert legacy["quantization"]["exclude_modules"] == new["ignore"]
    assert legacy["quantization"] | {"exclude_modules": []} == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": [],
    }
    for config in configs.values():
        text = config["text_config"]
        for field in (
            "layer_types",
            "rope_theta",
            "partial_rotary_factors",
            "swiglu_limits",
            "swiglu_limits_shared",
        ):
            assert len(text[field]) == 4 + 3, field


def test_same_seed_same_bytes(checkpoints: dict[WeightFormat, Path], tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    random_checkpoint(again, "fp8", TINY)
    random_checkpoint(other, "fp8", TINY, seed=1)
    files = sorted(path.name for path in checkpoints["fp8"].iterdir())
    assert sorted(path.name for path in again.iterdir()) == files
    for name in files:
        assert (again / name).read_bytes() == (checkpoints["fp8"] / name).read_bytes(), name
    shard = "model-00001-of-00003.safetensors"
    assert (other / shard).read_bytes() != (again / shard).read_bytes()


@pytest.mark.parametrize(
    ("spec", "full_group", "sliding_group", "kv_heads"),
    [(GROUPS_8_12, 8, 12, 2), (FOUR_KV_HEADS, 2, 3, 4)],
    ids=["groups_8_12", "four_kv_heads"],
)
def test_named_specs(spec: TinySpec, full_group: int, sliding_group: int, kv_heads: int) -> None:
    text = spec.text_config([1])
    assert text["num_attention_groups"] == kv_heads
    assert text["num_attention_heads"] == full_group * kv_heads
    assert text["attention_other_setting"]["num_attention_heads"] == sliding_group * kv_heads


def test_transformers_rope_is_scaled_where_the_prompts_are(
    checkpoints: dict[WeightFormat, Path],
) -> None:
    from transformers import AutoConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7RotaryEmbedding

    config = AutoConfig.from_pretrained(checkpoints["bf16"]).text_config
    rope = Step3p7RotaryEmbedding(config)
    plain, _ = rope.compute_default_rope_parameters(config, layer_type="full_attention")
    shift = 300 * (plain - rope.full_attention_inv_freq)  # radians at a position within a prompt
    assert len(plain) == 16  # half of the head dim of 64, in pairs
    assert (shift.abs() > 0.1).sum() >= 4
