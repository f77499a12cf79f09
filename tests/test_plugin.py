"""The plug-in: what it leaves alone, and how it fails when a seam has moved."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry

from step37_ext import hooks, plugin
from step37_ext.model.multimodal import Step37ForConditionalGeneration
from step37_ext.model.text import Step37ForCausalLM


class Stock:
    """Stands for the model class that SGLang would have taken."""


def choose(model_impl: str, architecture: str):
    config = SimpleNamespace(model_impl=model_impl)
    return hooks.model_architecture(lambda _: (Stock, architecture), config)[0]


def test_model_classes():
    assert choose("step37", "Step3p7ForConditionalGeneration") is Step37ForConditionalGeneration
    assert choose("step37", "Step3p5ForCausalLM") is Step37ForCausalLM
    assert choose("step37", "Step3p5MTP") is Stock
    assert choose("auto", "Step3p7ForConditionalGeneration") is Stock
    with pytest.raises(
        ValueError, match="supports the architectures Step3p7.*; this model is Llama"
    ):
        choose("step37", "LlamaForCausalLM")


def test_other_model_impl_is_untouched():
    other, ours = SimpleNamespace(model_impl="auto"), SimpleNamespace(model_impl="step37")
    calls = []

    def stock(*args, **kwargs):
        calls.append((args, kwargs))
        return "stock"

    assert hooks.quantization_config(stock, other, None) == "stock"
    assert hooks.cpu_padding(stock, other, None, 2) == "stock"
    hooks.quantized_moe_compatibility(stock, model_config=other, tp_size=2)
    assert len(calls) == 3
    assert hooks.cpu_padding(stock, ours, None, 2) is ours
    hooks.quantized_moe_compatibility(stock, model_config=ours, tp_size=2)
    assert len(calls) == 3


def test_a_target_that_has_moved_is_named():
    with pytest.raises(RuntimeError, match="sglang.srt.model_loader.utils.no_such_function"):
        plugin._around(("sglang.srt.model_loader.utils.no_such_function", lambda original: None))


def test_a_target_that_cannot_be_wrapped_is_named(monkeypatch):
    monkeypatch.setattr(HookRegistry, "apply_hooks", classmethod(lambda cls: None))
    target = "sglang.srt.model_loader.utils.should_async_load"
    with pytest.raises(RuntimeError, match=f"{target} could not be wrapped"):
        plugin._around((target, lambda original, *args: original(*args)))


START = """
import json, sys
from unittest import mock
import step37_ext.plugin as plugin
{patch}
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.resolution_hooks import run_hook
from sglang.srt.arg_groups.model_path_hook import handle_model_source_paths
from sglang.srt.server_args import prepare_server_args
results = []
for arguments in json.loads(sys.argv[1]):
    try:
        prepare_server_args(arguments).resolve_once()
        results.append("started")
    except Exception as error:
        results.append(str(error))
print(json.dumps(results))
"""


def starts(arguments: list[list[str]], patch: str = "") -> list[str]:
    """How SGLang's argument handling ends for each command line, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", START.format(patch=patch), json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_failures_stop_only_starts_that_ask_for_us(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    ours = ["--model-path", str(tmp_path), "--device", "cpu", "--model-impl", "step37"]
    patch = "mock.patch.object(plugin, 'version', lambda name: '0.5.19').start()"
    (refused,) = starts([ours], patch)
    assert refused == (
        "--model-impl step37 cannot start: "
        "step37_ext needs SGLang 0.5.20 or later; this is SGLang 0.5.19."
    )
    wrong_model, wrong_flag, other = starts(
        [ours, [*ours, "--pp-size", "2"], ours[:4]],
    )
    assert "supports the architectures" in wrong_model and "LlamaForCausalLM" in wrong_model
    assert wrong_flag == "--model-impl step37 does not support --pp-size (here 2)"
    assert "step37" not in other
