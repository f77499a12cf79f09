"""A checkpoint's weights in float32, dequantised from the format descriptions alone.

This shares no code with `step37_kernels.formats` and knows nothing of the model classes, so that
what holds these weights can stand witness for them. FP8: DeepSeek-V3's layout, e4m3 times one
float32 `weight_scale_inv` per 128x128 block. NVFP4: ModelOpt's, e2m1 (OCP Microscaling Formats
v1.0, table 5) times an e4m3 `weight_scale` per 16 elements times a float32 `weight_scale_2`.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NOT_WEIGHTS = ("_scale", "_scale_2", "_scale_inv")


def dequantised_weights(folder: Path) -> dict[str, Tensor]:
    """Every weight of the checkpoint in `folder`, float32, by the BF16 release's names.

    Scales are folded into the weights they belong to; `k_scale`, `v_scale` and `input_scale`
    belong to activations and are left out.
    """
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            # The NVFP4 release keeps the text model and the vision encoder one module deeper.
            name = name.replace("model.language_model.", "model.")
            stored[re.sub(r"^model\.(vi(?:sion_model|t_large_projector)\.)", r"\1", name)] = tensor
    return {
        name: _dequantise(name, tensor, stored)
        for name, tensor in stored.items()
        if not name.endswith(_NOT_WEIGHTS)
    }


def _dequantise(name: str, weight: Tensor, stored: dict[str, Tensor]) -> Tensor:
    if weight.dtype == torch.float8_e4m3fn:
        return _fp8(weight, stored[f"{name}_scale_inv"])
    if weight.dtype == torch.uint8:
        return _nvfp4(weight, stored[f"{name}_scale"], stored[f"{name}_scale_2"])
    return weight.float()


def _fp8(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """[..., N, K] of e4m3 and [..., N/128, K/128] of scales to float32 [..., N, K]."""
    per_row = scale_inv.float().repeat_interleave(128, -2)[..., : weight.shape[-2], :]
    return weight.float() * per_row.repeat_interleave(128, -1)[..., : weight.shape[-1]]


def _nvfp4(packed: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """Bytes [..., N, K/2] (even element in the low nibble) to float32 [..., N, K].

    `block_scale` is [..., N, K/16] and `global_scale` has one number per leading index.
    """
    bytes_ = packed.numpy()
    codes = np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(*bytes_.shape[:-1], -1)
    values = np.where(codes & 8, -1, 1).astype(np.float32) * _E2M1[codes & 7]
    scales = np.repeat(block_scale.float().numpy(), 16, axis=-1)
    return torch.from_numpy(values * scales * global_scale.numpy()[..., None, None])
