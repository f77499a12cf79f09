"""Streaming a checkpoint: what is loaded, skipped, refused, and how much is held at once."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from sglang.srt.model_loader.weight_utils import safetensors_weights_iterator

from step37_ext.checkpoint.headers import INDEX_FILE
from step37_ext.checkpoint.spec import TINY
from step37_ext.model.config import TextShape, VisionShape
from step37_ext.model.tensors import expected_tensors
from step37_ext.model.weights import WeightLoader

FORMATS = ("bf16", "fp8", "nvfp4")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


class Attentions:
    def __init__(self):
        self.scales = {}

    def of_layer(self, layer):
        def take(which, scale):
            self.scales[layer, which] = float(scale)

        return SimpleNamespace(set_cache_scale=take)


class Run:
    """A loader whose loads only record the tensors' names."""

    def __init__(self, folder: Path, weight_format: str):
        config = json.loads((folder / "config.json").read_text())
        parts = {key: SimpleNamespace(**config[key]) for key in ("text_config", "vision_config")}
        text = TextShape.from_config(parts["text_config"])
        vision = VisionShape.from_config(SimpleNamespace(**(config | parts)))
        self.loaded: dict[str, torch.Size] = {}
        self.attentions = Attentions()
        loads = {
            name: lambda tensor, name=name: self.loaded.update({name: tensor.shape})
            for name in expected_tensors(text, vision, weight_format)
        }
        layers = [self.attentions.of_layer(index) for index in range(len(text.layers))]
        self.loader = WeightLoader(text, vision, weight_format, loads, layers, torch.bfloat16)
        self.folder = folder

    def __call__(self, tensors) -> "Run":
        self.loader.run(tensors.items() if isinstance(tensors, dict) else tensors, self.folder)
        return self


@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_tensor_is_loaded_or_skipped(untrained, weight_format):
    run = Run(untrained[weight_format], weight_format)(stored(untrained[weight_format]))
    assert set(run.loaded) == set(run.loader.expected)
    scales = {(layer, which) for layer in range(TINY.layers) for which in "kv"}
    assert set(run.attentions.scales) == (scales if weight_format == "nvfp4" else set())


def test_one_tensor_at_a_time(untrained):
    """When SGLang's iterator is asked for a tensor, all earlier ones are gone."""
    files = sorted(map(str, untrained["bf16"].glob("*.safetensors")))
    alive: list[weakref.ref] = []

    def stream():
        tensors = safetensors_weights_iterator(files)
        while True:
            assert not [ref for ref in alive if ref() is not None]
            pair = next(tensors, None)
            if pair is None:
                return
            alive.append(weakref.ref(pair[1]))
            yield pair
            del pair

    Run(untrained["bf16"], "bf16")(stream())
    assert len(alive) == len(stored(untrained["bf16"]))


def test_releases_differ(untrained):
    """No MTP tensors; cache scales under another module; the text prefix of another export."""
    tensors = stored(untrained["nvfp4"])
    expected = Run(untrained["nvfp4"], "nvfp4")(tensors)
    other = {}
    for name, tensor in tensors.items():
        if name.startswith(tuple(f"model.layers.{TINY.layers + i}." for i in range(3))):
            continue
        name = name.replace("k_proj.k_scale", "attn.k_scale").replace("v_proj.v_scale", "v_scale")
        other[name.replace("model.language_model.", "language_model.model.")] = tensor
    run = Run(untrained["nvfp4"], "nvfp4")(other)
    assert run.loaded == expected.loaded
    assert run.attentions.scales == expected.attentions.scales


GATE = "model.layers.2.moe.gate.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_gate_in_either_type(untrained, dtype, caplog):
    tensors = stored(untrained["bf16"])
    run = Run(untrained["bf16"], "bf16")(tensors | {GATE: tensors[GATE].to(dtype)})
    assert GATE in run.loaded and "rounded" not in caplog.text
    message = failure(untrained["bf16"], "bf16", tensors | {GATE: tensors[GATE].half()})
    assert GATE in message and "F16" in message


def test_rounding_is_not_silent(untrained, caplog):
    name = "model.layers.1.input_layernorm.weight"
    tensors = stored(untrained["bf16"])
    Run(untrained["bf16"], "bf16")(tensors | {name: tensors[name].float()})
    assert "1 tensors are stored in float32 and rounded to torch.bfloat16" in caplog.text


def failure(folder, weight_format, tensors) -> str:
    with pytest.raises(ValueError) as caught:
        Run(folder, weight_format)(tensors)
    return str(caught.value)


def test_what_is_wrong_is_named(untrained):
    folder, tensors = untrained["bf16"], stored(untrained["bf16"])
    file = json.loads((folder / INDEX_FILE).read_text())["weight_map"][GATE]
    without = {name: tensor for name, tensor in tensors.items() if name != GATE}
    message = failure(folder, "bf16", without)
    assert GATE in message and "[8, 256]" in message and file in message
    message = failure(folder, "bf16", tensors | {GATE: tensors[GATE][:4]})
    assert GATE in message and "[4, 256]" in message and "[8, 256]" in message and file in message
    message = failure(folder, "bf16", tensors | {GATE: tensors[GATE].to(torch.int8)})
    assert GATE in message and "int8" in message and "BF16" in message
    message = failure(folder, "bf16", tensors | {"model.layers.1.strange": torch.zeros(1)})
    assert "model.layers.1.strange" in message and "STEP37_STRICT=0" in message


def test_quantised_shared_expert_is_refused(untrained):
    """An export that quantises more than the routed experts is not loaded as if it did not."""
    name = "model.layers.1.share_expert.up_proj.weight"
    tensors = stored(untrained["fp8"])
    message = failure(
        untrained["fp8"], "fp8", tensors | {name: tensors[name].to(torch.float8_e4m3fn)}
    )
    assert name in message and "F8_E4M3" in message
