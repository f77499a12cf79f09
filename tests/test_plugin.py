"""The plug-in: what it leaves alone, and how it fails when a seam has moved."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry

from step37_ext import hooks, platform_cpu, plugin
from step37_ext.model.multimodal import Step37ForConditionalGeneration
from step37_ext.model.text import Step37ForCausalLM


class Stock:
    """Stands for the model class that SGLang would have taken."""


def choose(model_impl: str, architecture: str):
    hf_config = SimpleNamespace(architectures=[architecture])
    config = SimpleNamespace(model_impl=model_impl, hf_config=hf_config)
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

    draft = SimpleNamespace(
        model_impl="step37", hf_config=SimpleNamespace(architectures=["Step3p5MTP"])
    )
    assert hooks.quantization_config(stock, other, None) == "stock"
    assert hooks.quantization_config(stock, draft, None) == "stock"
    assert hooks.cpu_padding(stock, other, None, 2) == "stock"
    hooks.quantized_moe_compatibility(stock, model_config=other, tp_size=2)
    assert len(calls) == 4
    assert hooks.cpu_padding(stock, ours, None, 2) is ours
    hooks.quantized_moe_compatibility(stock, model_config=ours, tp_size=2)
    assert len(calls) == 4


def test_a_target_that_has_moved_is_named():
    with pytest.raises(RuntimeError, match="sglang.srt.model_loader.utils.no_such_function"):
        plugin._around(("sglang.srt.model_loader.utils.no_such_function", lambda original: None))


def test_a_target_that_cannot_be_wrapped_is_named(monkeypatch):
    monkeypatch.setattr(HookRegistry, "apply_hooks", classmethod(lambda cls: None))
    target = "sglang.srt.model_loader.utils.should_async_load"
    monkeypatch.setattr(HookRegistry, "_hooks", HookRegistry._hooks.copy())
    with pytest.raises(RuntimeError, match=f"{target} could not be wrapped"):
        plugin._around((target, lambda original, *args: original(*args)))


class Arguments(SimpleNamespace):
    """Server arguments, and what a resolution step declares of them."""

    def __init__(self, **fields):
        super().__init__(
            **{
                "model_impl": "step37",
                "model_path": "no repository's name",
                "revision": None,
                "device": "cpu",
                "attention_backend": None,
                "prefill_attention_backend": None,
                "decode_attention_backend": None,
                "speculative_algorithm": None,
                "max_running_requests": None,
                "kv_cache_dtype": "auto",
                "dtype": "auto",
                "model_loader_extra_config": "{}",
            }
            | fields
        )
        self.declared = {}


@pytest.fixture
def resolve(monkeypatch):
    monkeypatch.setattr(hooks, "resolving_view", lambda arguments: arguments)
    monkeypatch.setattr(
        hooks,
        "declare_resolution",
        lambda arguments, source, **fields: arguments.declared.update(fields),
    )

    def run(step, **fields):
        arguments = Arguments(**fields)
        step(arguments, lambda server_args: None)
        return arguments.declared

    return run


def test_defaults_of_a_start(resolve):
    streaming = {"model_loader_extra_config": '{"enable_multithread_load": false}'}
    ours = {"disable_cuda_graph": True, "max_running_requests": 512}
    assert resolve(hooks.check_start) == ours | streaming
    users = '{"num_threads": 4}'
    chosen = resolve(hooks.check_start, model_loader_extra_config=users)
    assert "model_loader_extra_config" not in chosen
    assert resolve(hooks.check_start, model_impl="auto") == {}


def test_on_a_gpu_the_kernels_serve_and_decode_is_recorded(resolve, monkeypatch):
    monkeypatch.delenv("STEP37_IMPL", raising=False)
    streaming = {"model_loader_extra_config": '{"enable_multithread_load": false}'}
    kernels = {
        "disable_prefill_cuda_graph": True,
        "attention_backend": "step37",
        "max_running_requests": 512,
    }
    assert resolve(hooks.check_start, device="cuda") == kernels | streaming
    unlike = {"prefill_attention_backend": "fa3", "decode_attention_backend": "step37"}
    for reference_runs in ({"dtype": "float32"}, unlike):
        assert resolve(hooks.check_start, device="cuda", **reference_runs)["disable_cuda_graph"]
    monkeypatch.setattr(hooks, "gpu_capability", lambda device: (8, 0))
    assert resolve(hooks.check_start, device="cuda")["disable_cuda_graph"]
    with pytest.raises(ValueError, match="fp8_e4m3 needs sm_89 or later, this is sm_80"):
        resolve(hooks.check_start, device="cuda", kv_cache_dtype="fp8_e4m3")


def test_what_the_attention_kernels_do_not_take_is_refused(resolve):
    with pytest.raises(ValueError, match="--max-running-requests is 513"):
        resolve(hooks.check_start, device="cuda", max_running_requests=513)
    assert "max_running_requests" not in resolve(hooks.check_start, max_running_requests=8)
    with pytest.raises(ValueError, match="--kv-cache-dtype is fp8_e5m2"):
        resolve(hooks.check_start, device="cuda", kv_cache_dtype="fp8_e5m2")
    other = {"attention_backend": "fa3", "kv_cache_dtype": "fp8_e5m2", "max_running_requests": 999}
    assert "max_running_requests" not in resolve(hooks.check_start, device="cuda", **other)


@pytest.mark.parametrize("which", ["", "prefill_", "decode_"])
def test_a_user_s_attention_backend_wins(resolve, which):
    chosen = resolve(hooks.check_start, device="cuda", **{f"{which}attention_backend": "fa3"})
    assert "attention_backend" not in chosen
    drafting = resolve(hooks.check_start, device="cuda", speculative_algorithm="EAGLE")
    assert "attention_backend" not in drafting


def test_attention_backend_on_a_cpu(resolve):
    ours = {"attention_backend": "step37"}
    assert resolve(hooks.default_cpu_backends) == ours
    assert resolve(hooks.default_cpu_backends, attention_backend="torch_native") == {}
    assert resolve(hooks.default_cpu_backends, device="cuda") == {}
    assert resolve(hooks.default_cpu_backends, model_impl="auto") == {}


def test_platform_is_only_there_when_selected(monkeypatch):
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert platform_cpu.activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "step37_cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert platform_cpu.activate() == "step37_ext.platform_cpu:Step37CpuPlatform"


def test_platform_defaults(monkeypatch):
    # Set first, so that what the platform sets is undone after the test.
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND")
    monkeypatch.setattr(platform_cpu.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(platform_cpu.os, "getpid", lambda: 7)
    arguments = SimpleNamespace(tp_size=4, max_total_tokens=None)
    platform_cpu.Step37CpuPlatform().apply_server_args_defaults(arguments)
    assert platform_cpu.os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "1|2|0|1"
    assert arguments.max_total_tokens == platform_cpu.MAX_TOTAL_TOKENS and arguments.sleep_on_idle
    arguments = SimpleNamespace(tp_size=1, max_total_tokens=5000)
    platform_cpu.Step37CpuPlatform().apply_server_args_defaults(arguments)
    assert arguments.max_total_tokens == 5000


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
    # What 0.5.19 has not got must not be missed before the sentence is said.
    patch = (
        "mock.patch.object(plugin, 'version', lambda name: '0.5.19').start()\n"
        "mock.patch.object(plugin, '_register_seams', None).start()"
    )
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
