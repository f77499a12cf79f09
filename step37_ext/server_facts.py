"""What the model needs to know about the running server, in one place."""

from __future__ import annotations

from pathlib import Path

import torch
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.runtime_context import attention_backends, get_model

from step37_ext.checkpoint.location import weights_folder
from step37_kernels.dispatch import Target

MOE_RUNNER = "step37"
"""`--moe-runner-backend` of this package's expert layer."""


def attention_backend_names() -> tuple[str, str]:
    """Names of the attention backends for prefill and for decode."""
    return attention_backends()


def moe_runner() -> str:
    """Name of the MoE runner: this package's, or the one of SGLang's that the user chose."""
    return get_moe_runner_backend().value


def checkpoint_folder() -> Path | None:
    """The folder with the checkpoint's weights, or None if they are not on this machine."""
    model = get_model()
    return weights_folder(model.model_path, model.revision, model.download_dir)


def device_target(device: torch.device, weights: str, dtype: torch.dtype) -> Target:
    """What the operations run on: a device, the format of their weights, the model's dtype."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Target(device.type, capability, weights, dtype)
