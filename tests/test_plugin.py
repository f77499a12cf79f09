"""The plug-in: what it leaves alone, and how it fails when a seam has moved."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import plugins
from sglang.srt.model_executor.model_runner_components import weight_updater
from sglang.srt.plugins.hook_registry import HookRegistry

from step37_ext import hooks, platform_cpu, plugin
from step37_ext.model.mtp import Step37MTP
from step37_ext.model.multimodal import Step37ForConditionalGeneration
from step37_ext.model.text import DecoderLayer, Step37ForCausalLM


class Stock:
    """Stands for the model class that SGLang would have taken."""


def choose(model_impl: str, architecture: str):
    hf_config = SimpleNamespace(architectures=[architecture])
    config = SimpleNamespace(model_impl=model_impl, hf_config=hf_config)
    return hooks.model_architecture(lambda _: (Stock, architecture), config)[0]


def test_model_classes():
    assert choose("step37", "Step3p7ForConditionalGeneration") is Step37ForConditionalGeneration
    assert choose("step37", "Step3p5ForCausalLM") is Step37ForCausalLM
    assert choose("step37", "Step3p5MTP") is Step37MTP
    assert choose("auto", "Step3p7ForConditionalGeneration") is Stock
    assert choose("auto", "Step3p5MTP") is Stock
    with pytest.raises(
        ValueError, match="supports the architectures Step3p7.*; this model is Llama"
    ):
        choose("step37", "LlamaForCausalLM")


def test_other_model_impl_is_untouched(monkeypatch, tmp_path):
    other = SimpleNamespace(model_impl="auto")
    served = SimpleNamespace(architectures=["Step3p7ForConditionalGeneration"])
    ours = SimpleNamespace(model_impl="step37", hf_config=served)
    calls = []

    def stock(*args, **kwargs):
        calls.append((args, kwargs))
        return "stock"

    draft = SimpleNamespace(
        model_impl="step37",
        model_path=str(tmp_path),
        revision=None,
        hf_config=SimpleNamespace(architectures=["Step3p5MTP"]),
    )
    quant = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quant}))
    assert hooks.quantization_config(stock, other, None) == "stock"
    assert hooks.cpu_padding(stock, other, None, 2) == "stock"
    hooks.quantized_moe_compatibility(stock, model_config=other, tp_size=2)
    assert len(calls) == 3
    # Drafts are BF16 and without experts, whatever the main model's are.
    assert hooks.quantization_config(stock, draft, None) is None
    quant["kv_cache_quant_algo"] = "FP8"  # their cache is the main model's, for which SGLang plans
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quant}))
    config = hooks.quantization_config(stock, draft, None)
    assert (config.weights, config.kv_cache_quant_algo) == ("bf16", "FP8")
    hooks.quantized_moe_compatibility(stock, model_config=draft, tp_size=2)
    assert len(calls) == 3
    assert hooks.cpu_padding(stock, ours, None, 2) is ours
    monkeypatch.setattr(hooks, "moe_runner", lambda: "step37")
    hooks.quantized_moe_compatibility(stock, model_config=ours, tp_size=2)
    assert len(calls) == 3
    monkeypatch.setattr(hooks, "moe_runner", lambda: "triton")  # its own layer, and its own limits
    hooks.quantized_moe_compatibility(stock, model_config=ours, tp_size=2)
    assert len(calls) == 4


def test_a_target_that_has_moved_is_named():
    with pytest.raises(RuntimeError, match="sglang.srt.model_loader.utils.no_such_function"):
        plugin.around(("sglang.srt.model_loader.utils.no_such_function", lambda original: None))


def test_a_target_that_cannot_be_wrapped_is_named(monkeypatch):
    monkeypatch.setattr(HookRegistry, "apply_hooks", classmethod(lambda cls: None))
    target = "sglang.srt.model_loader.utils.should_async_load"
    monkeypatch.setattr(HookRegistry, "_hooks", HookRegistry._hooks.copy())
    with pytest.raises(RuntimeError, match=f"{target} could not be wrapped"):
        plugin.around((target, lambda original, *args: original(*args)))


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
                "moe_runner_backend": "auto",
                "cuda_graph_config": None,
                "cuda_graph_backend_decode": None,
                "cuda_graph_backend_prefill": None,
                "speculative_draft_kv_cache_dtype": None,
                "speculative_algorithm": None,
                "speculative_num_steps": None,
                "speculative_eagle_topk": None,
                "speculative_draft_model_path": None,
                "speculative_draft_attention_backend": None,
                "speculative_use_rejection_sampling": False,
                "max_running_requests": None,
                "kv_cache_dtype": "auto",
                "dtype": "auto",
                "model_loader_extra_config": "{}",
                "load_format": "auto",
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
    ours = {
        "device": "cpu",
        "disable_cuda_graph": True,
        "disable_flashinfer_autotune": True,
        "max_running_requests": 512,
        "moe_runner_backend": "step37",
    }
    assert resolve(hooks.check_start) == ours | streaming
    users = '{"num_threads": 4}'
    chosen = resolve(hooks.check_start, model_loader_extra_config=users)
    assert "model_loader_extra_config" not in chosen
    assert resolve(hooks.check_start, model_impl="auto") == {}


@pytest.mark.parametrize(
    "fields, streams",
    [
        ({"load_format": "safetensors"}, True),
        ({"load_format": "dummy"}, False),
        ({"load_format": "sharded_state"}, False),  # whose loader refuses the key
        ({"model_path": "s3://bucket/model"}, False),  # SGLang's loader of URLs, named later
        ({"model_path": "gs://bucket/model"}, False),
    ],
)
def test_only_the_loader_of_files_is_told_to_stream(resolve, fields, streams):
    assert ("model_loader_extra_config" in resolve(hooks.check_start, **fields)) is streams


def test_sglang_refuses_new_weights_for_every_model_of_ours():
    reason_of = weight_updater._unsupported_derived_weight_cache_error
    assert reason_of(torch.nn.Sequential(torch.nn.Linear(1, 1))) is None
    layer = DecoderLayer.__new__(DecoderLayer)
    torch.nn.Module.__init__(layer)  # without a server there is no more of it
    assert "start the server again" in reason_of(torch.nn.Sequential(layer))


def test_on_a_gpu_the_kernels_serve_and_decode_is_recorded(resolve, monkeypatch):
    monkeypatch.delenv("STEP37_IMPL", raising=False)
    streaming = {"model_loader_extra_config": '{"enable_multithread_load": false}'}
    kernels = {
        "device": "cuda",
        "disable_flashinfer_autotune": True,
        "disable_prefill_cuda_graph": True,
        "attention_backend": "step37",
        "max_running_requests": 512,
        "moe_runner_backend": "step37",
    }
    assert resolve(hooks.check_start, device="cuda") == kernels | streaming
    unlike = {"prefill_attention_backend": "fa3", "decode_attention_backend": "step37"}
    for reference_runs in ({"dtype": "float32"}, unlike):
        assert resolve(hooks.check_start, device="cuda", **reference_runs)["disable_cuda_graph"]
    monkeypatch.setattr(hooks, "gpu_capability", lambda device: (8, 0))
    assert resolve(hooks.check_start, device="cuda")["disable_cuda_graph"]
    with pytest.raises(ValueError, match="fp8_e4m3 needs sm_89 or later, this is sm_80"):
        resolve(hooks.check_start, device="cuda", kv_cache_dtype="fp8_e4m3")
    monkeypatch.setattr(hooks, "gpu_capability", lambda device: (9, 0))
    assert "disable_cuda_graph" not in resolve(hooks.check_start, device="cuda")
    monkeypatch.setenv("STEP37_DEBUG", "1")  # reads numbers on the host, which no graph can
    assert resolve(hooks.check_start, device="cuda")["disable_cuda_graph"]


def test_a_format_that_dense_weights_do_not_have_stops_the_start(resolve, monkeypatch):
    monkeypatch.setenv("STEP37_DENSE_WEIGHTS", "int4")
    with pytest.raises(ValueError, match="STEP37_DENSE_WEIGHTS is 'int4', expected bf16 or fp8"):
        resolve(hooks.check_start)
    assert resolve(hooks.check_start, model_impl="auto") == {}


def test_graphs_that_cannot_be_recorded_are_refused(resolve, monkeypatch):
    """SGLang lets the JSON win over the flags, and the flags over what a default turns off."""
    monkeypatch.delenv("STEP37_IMPL", raising=False)

    def start(**fields):
        return resolve(hooks.check_start, device="cuda", **fields)

    assert start(cuda_graph_config={"decode": {"backend": "full"}})["disable_prefill_cuda_graph"]
    assert start(cuda_graph_backend_prefill="disabled")["disable_prefill_cuda_graph"]
    as_parsed = SimpleNamespace(to_dict=lambda: {"prefill": {"backend": "breakable"}})
    for config in (as_parsed, {"prefill": {"backend": "full"}}):
        with pytest.raises(ValueError, match="--cuda-graph-config asks for .* in prefill"):
            start(cuda_graph_config=config)
    with pytest.raises(ValueError, match="backend-decode asks for 'breakable' in decode"):
        start(cuda_graph_backend_decode="breakable")
    with pytest.raises(ValueError, match="backend-decode asks for 'full'.*allows 'disabled'"):
        start(cuda_graph_backend_decode="full", dtype="float16")
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    with pytest.raises(ValueError, match="SGLANG_ENABLE_METADATA_GLUE_GRAPH is set"):
        start()


def test_a_runner_that_cannot_take_our_router_s_choice_is_refused(resolve):
    with pytest.raises(ValueError, match="--moe-runner-backend is triton_kernel; .* triton, "):
        resolve(hooks.check_start, moe_runner_backend="triton_kernel")


def test_what_the_attention_kernels_do_not_take_is_refused(resolve):
    with pytest.raises(ValueError, match="--speculative-draft-kv-cache-dtype is fp8_e5m2"):
        resolve(hooks.check_start, device="cuda", speculative_draft_kv_cache_dtype="fp8_e5m2")
    with pytest.raises(ValueError, match="--max-running-requests is 513"):
        resolve(hooks.check_start, device="cuda", max_running_requests=513)
    assert "max_running_requests" not in resolve(hooks.check_start, max_running_requests=8)
    with pytest.raises(ValueError, match="--kv-cache-dtype is fp8_e5m2"):
        resolve(hooks.check_start, device="cuda", kv_cache_dtype="fp8_e5m2")
    other = {"attention_backend": "fa3", "kv_cache_dtype": "fp8_e5m2", "max_running_requests": 999}
    assert "max_running_requests" not in resolve(hooks.check_start, device="cuda", **other)


def test_a_user_s_moe_runner_wins(resolve):
    chosen = resolve(hooks.check_start, device="cuda", moe_runner_backend="flashinfer_trtllm")
    assert "moe_runner_backend" not in chosen and chosen["attention_backend"] == "step37"


def test_our_moe_runner_is_for_our_model(resolve):
    sentence = "--moe-runner-backend step37 needs --model-impl step37"
    with pytest.raises(ValueError, match=sentence):
        resolve(hooks.check_start, model_impl="auto", moe_runner_backend="step37")
    with pytest.raises(ValueError, match=sentence):
        hooks.refuse_runner_core(None)


@pytest.mark.parametrize("which", ["", "prefill_", "decode_"])
def test_a_user_s_attention_backend_wins(resolve, which):
    chosen = resolve(hooks.check_start, device="cuda", **{f"{which}attention_backend": "fa3"})
    assert "attention_backend" not in chosen


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_drafts_leave_the_number_of_requests_to_sglang(resolve, device):
    drafting = resolve(hooks.check_start, device=device, speculative_algorithm="EAGLE")
    assert "max_running_requests" not in drafting
    assert drafting.get("attention_backend") == ("step37" if device == "cuda" else None)
    assert drafting["enable_multi_layer_eagle"]  # which SGLang derives from the name EAGLE only


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


def test_the_plugin_stays_where_another_platform_is_selected(monkeypatch):
    """SGLang drops the plug-ins of distributions that carry a platform which is not selected."""
    monkeypatch.setenv("SGLANG_PLATFORM", "another")
    dropped = plugins._get_excluded_dists()
    assert "step37-cpu" in dropped
    assert "step37" in plugins.load_plugins_by_group(plugins.GENERAL_PLUGINS_GROUP, dropped)


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
import json, multiprocessing, sys
from unittest import mock
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
import step37_ext.plugin as plugin

def ending(command):
    try:
        prepare_server_args(command).resolve_once()
    except Exception as error:
        return str(error)
    return "started"

def endings(patch, commands):
    exec(patch)
    load_plugins()
    return list(map(ending, commands))

# Before the forks nothing is registered, only imported.
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps(pool.starmap(endings, json.loads(sys.argv[1]), chunksize=1)))
"""


def starts(*patched: tuple[str, list[list[str]]]) -> list[list[str]]:
    """How SGLang's argument handling ends for each command line; a process for each patch."""
    run = subprocess.run(
        [sys.executable, "-c", START, json.dumps(patched)],
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
    (refused,), (wrong_model, wrong_flag, other) = starts(
        (patch, [ours]), ("", [ours, [*ours, "--pp-size", "2"], ours[:4]])
    )
    assert refused == (
        "--model-impl step37 cannot start: "
        "step37_ext needs SGLang 0.5.20 or later; this is SGLang 0.5.19."
    )
    assert "supports the architectures" in wrong_model and "LlamaForCausalLM" in wrong_model
    assert wrong_flag == "--model-impl step37 does not support --pp-size (here 2)"
    assert "step37" not in other
