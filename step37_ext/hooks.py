"""The bodies of what `plugin.py` registers; every one leaves another `--model-impl` untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.common import get_device, get_device_sm, is_remote_url

from step37_ext.checkpoint.headers import read_json
from step37_ext.checkpoint.location import folder_with_configs, local_folder
from step37_ext.graph_checks import graph_defaults
from step37_ext.model.dense_format import dense_format
from step37_ext.quantization import (
    CheckpointFormat,
    Step37QuantConfig,
    check_flag,
    checkpoint_format,
)
from step37_ext.server_facts import MOE_RUNNER, moe_runner
from step37_ext.start_checks import (
    ATTENTION_BACKEND,
    MTP,
    MULTIMODAL,
    Parallel,
    check_architecture,
    check_cache_type,
    check_config,
    check_drafts,
    check_moe_runner,
    check_refused_arguments,
    check_tensors,
    chosen_attention_backends,
    default_attention_backend,
    default_max_requests,
)

MODEL_IMPL = "step37"


def is_ours(config: Any) -> bool:
    """Whether server arguments or a model config ask for `--model-impl step37`."""
    return str(config.model_impl).lower() == MODEL_IMPL


def is_draft(model_config: Any) -> bool:
    """Whether a model config is that of the MTP layers."""
    return model_config.hf_config.architectures == [MTP]


def check_start(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution step: stop with one sentence in the parent process if this cannot work."""
    previous(server_args)
    cfg = resolving_view(server_args)
    if not is_ours(cfg):
        if cfg.moe_runner_backend == MOE_RUNNER:
            refuse_runner_core(cfg)
        return
    # SGLang fills in the device, without an index, only after this step.
    device = (cfg.device or get_device()).split(":")[0]
    declare_resolution(server_args, MODEL_IMPL, device=device)
    check_refused_arguments(cfg)
    dense_format()  # or a wrong one would stop the ranks while they load
    check_moe_runner(cfg)
    drafts = check_drafts(cfg)
    capability = gpu_capability(device)
    defaults: dict[str, Any] = graph_defaults(cfg, capability)
    if drafts:  # SGLang does so for the name EAGLE only
        defaults["enable_multi_layer_eagle"] = True
    if cfg.moe_runner_backend in ("auto", MOE_RUNNER):
        defaults["moe_runner_backend"] = MOE_RUNNER
        # On Blackwell SGLang would tune FP4 kernels that this runner does not call.
        defaults["disable_flashinfer_autotune"] = True
    chosen = chosen_attention_backends(cfg)
    backend = default_attention_backend(cfg)
    if backend is not None and device != "cpu" and not chosen:
        defaults["attention_backend"] = backend
    if ATTENTION_BACKEND in chosen or (backend is not None and not chosen):
        check_cache_type(cfg, capability)
        # SGLang has a number of its own for drafts, which is smaller.
        if (most := default_max_requests(cfg)) is not None and not drafts:
            defaults["max_running_requests"] = most
    reads_weights = cfg.load_format != "dummy"
    # Another loader refuses what it does not know; SGLang names that of a URL only after this step.
    streams = cfg.load_format in ("auto", "safetensors") and not is_remote_url(cfg.model_path)
    if streams and cfg.model_loader_extra_config in (None, "", "{}", {}):
        # SGLang's threads read whole files into memory, eight at a time; we stream by tensor.
        defaults["model_loader_extra_config"] = '{"enable_multithread_load": false}'
    declare_resolution(server_args, MODEL_IMPL, **defaults)
    folder = folder_with_configs(cfg.model_path, cfg.revision)
    if folder is not None:
        checked = check_config(folder, Parallel(cfg.tp_size, cfg.ep_size), cfg.quantization, drafts)
        # A repository's weights may still have to be fetched.
        if reads_weights and folder == Path(cfg.model_path):
            check_tensors(folder, checked)


def refuse_runner_core(config: Any) -> NoReturn:
    """Factory of SGLang's seam for MoE runners, which our own expert layer does not pass through.

    Raises:
        ValueError: always; only another model's start or expert layer asks for it.
    """
    raise ValueError(f"--moe-runner-backend {MOE_RUNNER} needs --model-impl {MODEL_IMPL}")


def gpu_capability(device: str) -> tuple[int, int] | None:
    """Compute capability of the first GPU, without a context on it; None where there is none."""
    capability = get_device_sm() if device == "cuda" else 0
    return divmod(capability, 10) if capability else None


def default_cpu_backends(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution step: our attention backend on a CPU, where SGLang does not ask the platform."""
    cfg = resolving_view(server_args)
    backend = default_attention_backend(cfg) if is_ours(cfg) else None
    if backend is not None and cfg.device == "cpu" and cfg.attention_backend is None:
        declare_resolution(server_args, MODEL_IMPL, attention_backend=backend)
    previous(server_args)


def model_architecture(original: Callable, model_config: Any) -> tuple[type, str]:
    """Around `get_model_architecture`: our classes under `--model-impl step37`."""
    if not is_ours(model_config):
        return original(model_config)
    if not is_draft(model_config):
        check_architecture(model_config.hf_config.architectures)
    _, architecture = original(model_config)  # which also notes its choice in the config
    if architecture == MTP:
        from step37_ext.model.mtp import Step37MTP

        return Step37MTP, architecture
    if architecture == MULTIMODAL:
        from step37_ext.model.multimodal import Step37ForConditionalGeneration

        return Step37ForConditionalGeneration, architecture
    from step37_ext.model.text import Step37ForCausalLM

    return Step37ForCausalLM, architecture


def quantization_config(original: Callable, model_config: Any, load_config: Any) -> Any:
    """Around `_get_quantization_config`: stock refuses float32, and FP8 and NVFP4 off its GPUs."""
    if not is_ours(model_config):
        return original(model_config, load_config)
    folder = local_folder(model_config.model_path, model_config.revision)
    if is_draft(model_config):  # in BF16 whatever the experts' format is, with the model's cache
        config = model_config.hf_config if folder is None else read_json(folder / "config.json")
        fp8_cache = checkpoint_format(config, folder).fp8_kv_cache
        return Step37QuantConfig(CheckpointFormat("bf16", True)) if fp8_cache else None
    checkpoint = checkpoint_format(model_config.hf_config, folder)
    check_flag(model_config.quantization, checkpoint.weights)
    if checkpoint.weights == "bf16":
        return None
    # Only SGLang's own expert layer needs its configuration, and may refuse type or GPU then.
    stock = None if moe_runner() == MOE_RUNNER else original(model_config, load_config)
    return Step37QuantConfig(checkpoint, stock)


def quantized_moe_compatibility(original: Callable, *, model_config: Any, **sizes: Any) -> None:
    """Around stock's refusal of shards that are not whole 128-blocks: ours need not be."""
    ours = is_ours(model_config)
    if ours and (is_draft(model_config) or moe_runner() == MOE_RUNNER):
        return  # drafts have no routed experts
    original(model_config=model_config, **sizes)


def cpu_padding(original: Callable, model_config: Any, load_config: Any, tp_size: int) -> Any:
    """Around stock's padding of sizes on a CPU, which no longer fit the checkpoint's shapes."""
    if is_ours(model_config):
        return model_config
    return original(model_config, load_config, tp_size)


def attention_backend(runner: Any) -> Any:
    """Factory of the attention backend "step37"; on a GPU every kernel is compiled with it.

    It is the last that SGLang asks for before it captures graphs, when weights and cache are there.
    """
    from step37_ext.attention_backend import Step37AttentionBackend

    backend = Step37AttentionBackend(runner)
    if backend.req_to_token.is_cuda:
        from step37_ext.model.compile_ahead import compile_ahead
        from step37_ext.model.text import DecoderLayer

        layers = [part for part in runner.model.modules() if isinstance(part, DecoderLayer)]
        parallel = get_parallel()
        decodes = runner.spec_algorithm.is_none()
        compile_ahead(layers, backend, decodes, parallel.tp_rank, parallel.tp_size)
    return backend


def draft_extend_backend(original: Callable, factory: Any) -> Any:
    """Around the choice of the attention backend for drafts: with ours, the runner's own."""
    from step37_ext.attention_backend import Step37AttentionBackend

    backend = factory.draft_model_runner.attn_backend
    return backend if isinstance(backend, Step37AttentionBackend) else original(factory)
