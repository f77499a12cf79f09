"""The bodies of what `plugin.py` registers; every one leaves another `--model-impl` untouched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

from step37_ext.checkpoint.location import folder_with_configs, local_folder
from step37_ext.quantization import Step37QuantConfig, check_flag, checkpoint_format
from step37_ext.start_checks import (
    ATTENTION_BACKEND,
    FP8_CAPABILITY,
    MTP,
    MULTIMODAL,
    Parallel,
    check_architecture,
    check_cache_type,
    check_config,
    check_refused_arguments,
    check_tensors,
    chosen_attention_backends,
    default_attention_backend,
    default_max_requests,
)
from step37_kernels.dispatch import ENVIRONMENT_VARIABLE

MODEL_IMPL = "step37"


def is_ours(config: Any) -> bool:
    """Whether server arguments or a model config ask for `--model-impl step37`."""
    return str(config.model_impl).lower() == MODEL_IMPL


def is_draft(model_config: Any) -> bool:
    """Whether a model config is that of the MTP layers, which SGLang's own class serves."""
    return model_config.hf_config.architectures == [MTP]


def check_start(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution step: stop with one sentence in the parent process if this cannot work."""
    previous(server_args)
    cfg = resolving_view(server_args)
    if not is_ours(cfg):
        return
    check_refused_arguments(cfg)
    capability = gpu_capability(cfg.device)
    defaults: dict[str, Any] = graph_defaults(cfg, capability)
    chosen = chosen_attention_backends(cfg)
    backend = default_attention_backend(cfg)
    if backend is not None and cfg.device != "cpu" and not chosen:
        defaults["attention_backend"] = backend
    if ATTENTION_BACKEND in chosen or (backend is not None and not chosen):
        check_cache_type(cfg, capability)
        if (most := default_max_requests(cfg)) is not None:
            defaults["max_running_requests"] = most
    if cfg.model_loader_extra_config in (None, "", "{}", {}):
        # SGLang's threads read whole files into memory, eight at a time; we stream by tensor.
        defaults["model_loader_extra_config"] = '{"enable_multithread_load": false}'
    declare_resolution(server_args, MODEL_IMPL, **defaults)
    folder = folder_with_configs(cfg.model_path, cfg.revision)
    if folder is not None:
        checked = check_config(folder, Parallel(cfg.tp_size, cfg.ep_size), cfg.quantization)
        if folder == Path(cfg.model_path):  # a repository's weights may still have to be fetched
            check_tensors(folder, checked)


def gpu_capability(device: str) -> tuple[int, int] | None:
    """Compute capability of the first GPU; None where there is none."""
    has_gpu = device == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability() if has_gpu else None


def graph_defaults(config: Any, capability: tuple[int, int] | None) -> dict[str, Any]:
    """Which CUDA graphs a start gets.

    The kernels can be recorded; some reference operations read numbers on the host, which no graph
    can: they run in another type than bfloat16, before sm_89 with FP8, and for the cache of a
    server whose backends differ. Prefill's graphs would need tables that ours does not keep.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    chosen = set(chosen_attention_backends(config))
    kernels = (
        config.device == "cuda"
        and forced in (None, "", "triton")
        and config.dtype in ("auto", "bfloat16")
        and (capability is None or capability >= FP8_CAPABILITY)
        and (ATTENTION_BACKEND not in chosen or len(chosen) == 1)
    )
    return {"disable_prefill_cuda_graph": True} if kernels else {"disable_cuda_graph": True}


def default_cpu_backends(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution step: our attention backend on a CPU, where SGLang does not ask the platform."""
    cfg = resolving_view(server_args)
    backend = default_attention_backend(cfg) if is_ours(cfg) else None
    if backend is not None and cfg.device == "cpu" and cfg.attention_backend is None:
        declare_resolution(server_args, MODEL_IMPL, attention_backend=backend)
    previous(server_args)


def model_architecture(original: Callable, model_config: Any) -> tuple[type, str]:
    """Around `get_model_architecture`: our classes under `--model-impl step37`."""
    if not is_ours(model_config) or is_draft(model_config):
        return original(model_config)
    check_architecture(model_config.hf_config.architectures)
    _, architecture = original(model_config)  # which also notes its choice in the config
    if architecture == MULTIMODAL:
        from step37_ext.model.multimodal import Step37ForConditionalGeneration

        return Step37ForConditionalGeneration, architecture
    from step37_ext.model.text import Step37ForCausalLM

    return Step37ForCausalLM, architecture


def quantization_config(original: Callable, model_config: Any, load_config: Any) -> Any:
    """Around `_get_quantization_config`: stock refuses float32, and FP8 and NVFP4 off its GPUs."""
    if not is_ours(model_config) or is_draft(model_config):
        return original(model_config, load_config)
    folder = local_folder(model_config.model_path, model_config.revision)
    checkpoint = checkpoint_format(model_config.hf_config, folder)
    check_flag(model_config.quantization, checkpoint.weights)
    return None if checkpoint.weights == "bf16" else Step37QuantConfig(checkpoint)


def quantized_moe_compatibility(original: Callable, *, model_config: Any, **sizes: Any) -> None:
    """Around stock's refusal of shards that are not whole 128-blocks: ours need not be."""
    if not is_ours(model_config):
        original(model_config=model_config, **sizes)


def cpu_padding(original: Callable, model_config: Any, load_config: Any, tp_size: int) -> Any:
    """Around stock's padding of sizes on a CPU, which no longer fit the checkpoint's shapes."""
    if is_ours(model_config):
        return model_config
    return original(model_config, load_config, tp_size)


def attention_backend(runner: Any) -> Any:
    """Factory of the attention backend "step37"."""
    from step37_ext.attention_backend import Step37AttentionBackend

    return Step37AttentionBackend(runner)
