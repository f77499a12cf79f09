"""Which number format a checkpoint's routed experts are in, and SGLang's seam for it.

Only routed experts are quantised in the releases; every other weight is BF16. SGLang's own FP8 and
NVFP4 methods refuse this model (shards that are not whole 128-blocks; NVFP4 off Blackwell; float32
activations), so that the model builds its expert layer itself and SGLang gets `Step37QuantConfig`,
which leaves every other layer unquantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from step37_ext.checkpoint.headers import read_json
from step37_ext.model.tensors import FP8_BLOCK, NVFP4_GROUP

SUPPORTED = "BF16 (no quantization_config), FP8 in 128x128 blocks, NVFP4 with groups of 16"
_FLAGS = {  # what --quantization may say for a checkpoint of each format
    "bf16": (),
    "fp8": ("fp8",),
    "nvfp4": ("modelopt_fp4", "modelopt"),
}


@dataclass(frozen=True)
class CheckpointFormat:
    """Format of the routed experts ("bf16", "fp8", "nvfp4") and of the KV cache if it says so."""

    weights: str
    fp8_kv_cache: bool = False


def checkpoint_format(config: Any, folder: str | Path | None = None) -> CheckpointFormat:
    """Read the format from a model config's `quantization_config`.

    Args:
        config: anything with an optional attribute or key `quantization_config`.
        folder: checkpoint folder, where ModelOpt's `hf_quant_config.json` may stand instead.

    Raises:
        ValueError: a quantisation that is not supported, with its name and what is.
    """
    quant = (
        config.get("quantization_config")
        if isinstance(config, dict)
        else getattr(config, "quantization_config", None)
    )
    quant = dict(quant) if quant else {}
    path = Path(folder, "hf_quant_config.json") if folder else None
    if path is not None and path.exists():
        quant = {"quant_method": "modelopt"} | quant | read_json(path).get("quantization", {})
    if not quant:
        return CheckpointFormat("bf16")
    method = quant.get("quant_method")
    if method == "fp8":
        return _fp8(quant)
    if method in ("modelopt", "modelopt_fp4"):
        return _modelopt(quant)
    raise ValueError(
        f"checkpoint: quant_method {method!r} is not supported; supported: {SUPPORTED}"
    )


def _fp8(quant: dict) -> CheckpointFormat:
    block = quant.get("weight_block_size")
    if block is None or list(block) != [FP8_BLOCK, FP8_BLOCK]:
        raise ValueError(
            f"checkpoint: weight_block_size {block} is not supported for FP8; "
            f"it must be [{FP8_BLOCK}, {FP8_BLOCK}]"
        )
    return CheckpointFormat("fp8")


def _modelopt(quant: dict) -> CheckpointFormat:
    algo = quant.get("quant_algo")
    if algo != "NVFP4":
        raise ValueError(
            f"checkpoint: quant_algo {algo!r} is not supported; supported: {SUPPORTED}"
        )
    groups = {int(size) for size in _group_sizes(quant)}
    if groups - {NVFP4_GROUP}:
        raise ValueError(
            f"checkpoint: group_size {sorted(groups - {NVFP4_GROUP})[0]} is not supported for "
            f"NVFP4; it must be {NVFP4_GROUP}"
        )
    scheme = quant.get("kv_cache_scheme") or {}
    fp8_cache = quant.get("kv_cache_quant_algo") == "FP8" or (
        scheme.get("type") == "float" and scheme.get("num_bits") == 8
    )
    return CheckpointFormat("nvfp4", fp8_cache)


def _group_sizes(quant: dict) -> list[int]:
    sizes = [quant["group_size"]] if quant.get("group_size") is not None else []
    for group in (quant.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("group_size") is not None:
            sizes.append(weights["group_size"])
    return sizes


def check_flag(flag: str | None, weights: str) -> None:
    """Compare `--quantization` with the checkpoint.

    Raises:
        ValueError: the flag asks for another format than the checkpoint is in.
    """
    if flag is not None and flag not in _FLAGS[weights]:
        allowed = " or ".join(repr(x) for x in _FLAGS[weights]) or "no --quantization at all"
        raise ValueError(
            f"--quantization {flag!r} does not fit this checkpoint, whose experts are in "
            f"{weights}; it takes {allowed}"
        )


class Step37QuantConfig(QuantizationConfig):
    """What SGLang is told: the experts' format by name, and nothing else quantised.

    Attributes:
        weights: "fp8" or "nvfp4".
        stock: SGLang's own configuration, where one of its MoE runners was chosen.
        kv_cache_quant_algo: "FP8" if the checkpoint asks for an FP8 KV cache; SGLang reads it for
            `--kv-cache-dtype auto`.
    """

    def __init__(
        self, checkpoint: CheckpointFormat, stock: QuantizationConfig | None = None
    ) -> None:
        super().__init__()
        self.stock = stock
        self.weights = checkpoint.weights
        self.kv_cache_quant_algo = "FP8" if checkpoint.fp8_kv_cache else None

    def get_name(self) -> str:
        return f"step37_{self.weights}"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Step37QuantConfig:
        return cls(checkpoint_format({"quantization_config": config}))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_scaled_act_names(self) -> list[str]:
        return []
