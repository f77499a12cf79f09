"""The trained model in transformers' own Step3p7: its answers, and what they rest on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

from benchmarks.dense_accuracy import dense_in_fp8
from step37_ext.checkpoint.calibrate import routed_activations
from step37_ext.checkpoint.dialogues import DIALOGUES
from step37_ext.checkpoint.init import initial_weights
from step37_ext.checkpoint.mtp_layers import MtpChain, mean_accepted
from step37_ext.checkpoint.oracle import Example, encode, hidden_states, load_model, margins
from step37_ext.checkpoint.release_layout import nvfp4_name, tensor_shapes
from step37_ext.checkpoint.spec import TINY
from step37_ext.checkpoint.tokenizer import render_prompt
from step37_ext.checkpoint.train import Recipe
from step37_ext.checkpoint.weight_format import WeightFormat
from step37_kernels.formats.fp8_block import FP8BlockTensor
from step37_kernels.formats.nvfp4 import NVFP4Tensor

FP32 = torch.float32
TinyFolder = Callable[[WeightFormat], Path]


@pytest.fixture(scope="module")
def model(tiny: TinyFolder) -> Step3p7ForConditionalGeneration:
    """The BF16 checkpoint as a user of transformers would load it, in fp32."""
    model, report = Step3p7ForConditionalGeneration.from_pretrained(
        tiny("bf16"), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    # The MTP layers are not part of transformers' model; it drops them silently.
    assert all(".layers." in key for key in report["unexpected_keys"])
    assert not model.generation_config.do_sample
    return model.eval()


@pytest.fixture(scope="module")
def examples(model: Step3p7ForConditionalGeneration) -> list[Example]:
    return encode(TINY, model, DIALOGUES)


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def dequantized(folder: Path, weight_format: WeightFormat) -> dict[str, torch.Tensor]:
    """A checkpoint's weights in fp32, under BF16's names."""
    tensors = read(folder)
    weights = {}
    for name in tensor_shapes(TINY):
        stored = nvfp4_name(name, TINY) if weight_format == "nvfp4" else name
        weight = tensors[stored]
        if weight.dtype == torch.float8_e4m3fn:
            weight = FP8BlockTensor(weight, tensors[f"{stored}_scale_inv"]).dequantize(FP32)
        elif weight.dtype == torch.uint8:
            block, whole = tensors[f"{stored}_scale"], tensors[f"{stored}_scale_2"]
            weight = NVFP4Tensor(weight, block, whole).dequantize(FP32)
        weights[name] = weight.float()
    return weights


def logits(model: Step3p7ForConditionalGeneration, example: Example) -> torch.Tensor:
    """fp32 [completion tokens, vocabulary]."""
    with torch.no_grad():
        hidden = hidden_states(model, torch.tensor([example.tokens]), example.features)
        return model.lm_head(hidden[0, len(example.prompt) - 1 : -1])


def test_every_bf16_answer_is_greedy_with_a_margin(
    model: Step3p7ForConditionalGeneration, examples: list[Example]
) -> None:
    least = margins(model, examples)
    assert least.keys() == {dialogue.name for dialogue in DIALOGUES}
    # What training promises: BF16 arithmetic moves logits of up to 30 by a few 30 * 2^-9 = 0.06.
    assert min(least.values()) > 0.9, least


@pytest.mark.parametrize("weight_format", ["fp8", "nvfp4"])
def test_every_answer_survives_quantised_weights(
    tiny: TinyFolder, examples: list[Example], weight_format: WeightFormat
) -> None:
    weights = dequantized(tiny(weight_format), weight_format)
    least = margins(load_model(TINY, weights), examples)
    # Training asks for 1.0 with BF16 weights; quantised ones were seen to lose up to 0.3 of it.
    assert min(least.values()) > 0.5, least


def test_every_answer_survives_fp8_weights_beside_the_experts(
    model: Step3p7ForConditionalGeneration, examples: list[Example]
) -> None:
    """The table of docs/numerics.md has 3.26."""
    exact = model.lm_head.weight.clone()
    with dense_in_fp8(model):
        least = margins(model, examples)
    # They are rounded by 2.7%, as FP8 experts are.
    assert min(least.values()) > 0.5, least
    with dense_in_fp8(model, head=True):
        assert not torch.equal(model.lm_head.weight, exact)
    assert torch.equal(model.lm_head.weight, exact)


def test_mtp_layers_propose_what_follows(
    tiny: TinyFolder, model: Step3p7ForConditionalGeneration, examples: list[Example]
) -> None:
    """Of at most four tokens a verification; three layers that know nothing give one."""
    weights = read(tiny("bf16"))
    # What training promises, with BF16 weights as here.
    assert mean_accepted(model, MtpChain(TINY, weights), examples) >= Recipe().least_accepted
    assert mean_accepted(model, MtpChain(TINY, initial_weights(TINY)), examples[:1]) < 1.5


@pytest.mark.parametrize("name", ["arithmetic_high", "weather_oslo", "picture_plan"])
def test_generate_gives_the_answer(
    tiny: TinyFolder, model: Step3p7ForConditionalGeneration, name: str
) -> None:
    """The public way: processor, chat template and generate(), with crops in picture_plan."""
    dialogue = next(dialogue for dialogue in DIALOGUES if dialogue.name == name)
    processor = AutoProcessor.from_pretrained(tiny("bf16"))
    prompt = render_prompt(processor.tokenizer, dialogue)
    inputs = processor(text=prompt, images=dialogue.images() or None, return_tensors="pt")
    if name == "picture_plan":  # four crops and the global view
        assert inputs["pixel_values_local"].shape == (4, 3, 504, 504)
    output = model.generate(**inputs, max_new_tokens=150, do_sample=False)
    answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == dialogue.completion


def test_the_clamps_bite(model: Step3p7ForConditionalGeneration, examples: list[Example]) -> None:
    """On the last two layers many activations exceed their limit, and the answers depend on it."""
    clamped = model.model.language_model.layers[-2:]
    shares: list[float] = []

    def routed(experts: nn.Module, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        hidden, indices = args[:2]
        for expert in indices.unique().tolist():
            gate, up, _product = routed_activations(
                experts, hidden[(indices == expert).any(-1)], expert
            )
            shares.append(float((gate > 1.0).float().mean()))
            shares.append(float((up.abs() > 1.0).float().mean()))

    hooks = [layer.mlp.experts.register_forward_hook(routed) for layer in clamped]
    exact = {example.name: logits(model, example) for example in examples}
    for hook in hooks:
        hook.remove()
    assert sum(shares) / len(shares) > 0.05

    for part in ("experts", "shared_experts"):
        modules = [getattr(layer.mlp, part) for layer in clamped]
        assert {module.limit for module in modules} == {1.0 if part == "experts" else 2.0}
        limit = modules[0].limit
        for module in modules:
            module.limit = float("inf")
        changes = [
            (logits(model, example) - exact[example.name]).abs().max().item()
            for example in examples
        ]
        for module in modules:
            module.limit = limit
        # Parity is tested to 1e-3; a dropped clamp must be far outside of that everywhere.
        assert min(changes) > 0.05, (part, changes)


def test_cache_scales_are_calibrated(
    tiny: TinyFolder, model: Step3p7ForConditionalGeneration, examples: list[Example]
) -> None:
    tensors = read(tiny("nvfp4"))
    attention = "model.language_model.layers.{}.self_attn"
    k = [tensors[f"{attention.format(n)}.k_proj.k_scale"].item() for n in range(TINY.layers)]
    v = [tensors[f"{attention.format(n)}.v_proj.v_scale"].item() for n in range(TINY.layers)]
    assert len(set(k + v)) == 2 * TINY.layers
    assert all(0 < scale < 0.5 for scale in k + v)

    largest = torch.zeros(TINY.layers)

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, values: torch.Tensor) -> None:
            largest[layer] = torch.maximum(largest[layer], values.abs().max())

        return hook

    layers = model.model.language_model.layers
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(note(n)) for n, layer in enumerate(layers)
    ]
    for example in examples:
        logits(model, example)
    for hook in hooks:
        hook.remove()
    # The FP8 gate keeps fp32 and this one is BF16: the hidden states differ by a few 2^-9.
    torch.testing.assert_close(torch.tensor(v) * 448, largest, rtol=0.05, atol=0)


def test_merging_gate_and_up_scales_would_show(tiny: TinyFolder) -> None:
    """For most experts, up read with the gate's global scale is off by more than a quarter."""
    tensors = read(tiny("nvfp4"))
    for layer in TINY.moe_layers:
        prefix = f"model.language_model.layers.{layer}.moe"
        gate = tensors[f"{prefix}.gate_proj.weight_scale_2"]
        up = tensors[f"{prefix}.up_proj.weight_scale_2"]
        # BF16 amaxes may coincide, but not for most experts.
        assert min(len(set(gate.tolist())), len(set(up.tolist()))) > TINY.experts // 2
        assert ((gate / up - 1).abs() > 0.25).sum() > TINY.experts // 2, gate / up
