"""What can be known to be wrong before a server starts: one sentence in the parent process.

`check_config` reads config files, which of a repository are fetched first; `check_tensors` reads
the safetensors headers of a local folder. A repository's tensors are checked by the same tables
while they load (`model/weights.py`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from step37_ext.checkpoint.headers import INDEX_FILE, read_headers, read_json, weight_map
from step37_ext.model.attention import ATTENTION_BACKEND
from step37_ext.model.config import TextShape, VisionShape
from step37_ext.model.parallel import Parallel, check_parallel, check_vision_heads
from step37_ext.model.tensors import (
    TensorSpec,
    cache_scale,
    canonical_name,
    expected_tensors,
    skip_reason,
)
from step37_ext.quantization import CheckpointFormat, check_flag, checkpoint_format
from step37_kernels.attention.pages import MAX_BATCH

logger = logging.getLogger(__name__)

MULTIMODAL, TEXT, MTP = "Step3p7ForConditionalGeneration", "Step3p5ForCausalLM", "Step3p5MTP"
ARCHITECTURES = (MULTIMODAL, TEXT)

CACHE_TYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3")
FP8_CAPABILITY = (8, 9)
"""From Ada on a GPU converts e4m3."""

_REFUSED_ARGUMENTS = (  # server argument, its flag, and the values that leave it off
    ("pp_size", "--pp-size", (1,)),
    ("enable_dp_attention", "--enable-dp-attention", (False, None)),
    ("attn_dp_size", "--attn-dp-size", (1, None)),
    ("attn_cp_size", "--attention-context-parallel-size", (1, None)),
    ("dcp_size", "--dcp-size", (1, None)),
    ("moe_dp_size", "--moe-dp-size", (1, None)),
    ("moe_a2a_backend", "--moe-a2a-backend", ("none", None)),
    ("ep_num_redundant_experts", "--ep-num-redundant-experts", (0, None)),
    ("enable_two_batch_overlap", "--enable-two-batch-overlap", (False, None)),
    ("enable_lora", "--enable-lora", (False, None)),
    ("enable_eplb", "--enable-eplb", (False, None)),
    ("enable_layernorm_sp", "--enable-layernorm-sp", (False, None)),
    ("cuda_graph_backend_decode", "--cuda-graph-backend-decode", (None, "disabled", "full")),
    ("cuda_graph_backend_prefill", "--cuda-graph-backend-prefill", (None, "disabled")),
)


def check_architecture(architectures: list[str] | None) -> str:
    """The one architecture of a config that this package has a model for.

    Raises:
        ValueError: another architecture, or none.
    """
    found = architectures[0] if architectures else None
    if found not in ARCHITECTURES:
        raise ValueError(
            f"--model-impl step37 supports the architectures {' and '.join(ARCHITECTURES)}; "
            f"this model is {found}"
        )
    return found


def check_refused_arguments(config: Any) -> None:
    """Refuse what this model does not do, rather than do it wrong.

    Raises:
        ValueError: a server argument that is not supported, with its value.
    """
    for name, flag, off in _REFUSED_ARGUMENTS:
        value = getattr(config, name, off[0])
        if value not in off:
            raise ValueError(f"--model-impl step37 does not support {flag} (here {value!r})")
    speculative = getattr(config, "speculative_algorithm", None)
    backend = config.attention_backend or default_attention_backend(config)
    if speculative and backend == ATTENTION_BACKEND:
        raise ValueError(
            f"the attention backend {backend} does not support --speculative-algorithm "
            f"(here {speculative!r})"
        )


def default_attention_backend(config: Any) -> str | None:
    """What stands in for a backend that the user did not choose: ours, which verifies no drafts."""
    if config.device == "cpu":
        return ATTENTION_BACKEND
    drafts = config.speculative_algorithm is not None
    return ATTENTION_BACKEND if config.device == "cuda" and not drafts else None


def default_max_requests(config: Any) -> int | None:
    """How many requests may run at once, where the user has not said so.

    Raises:
        ValueError: the user asks for more than the attention kernels take.
    """
    asked = config.max_running_requests
    if asked is not None and asked > MAX_BATCH:
        raise ValueError(
            f"--max-running-requests is {asked}; --attention-backend {ATTENTION_BACKEND} takes up "
            f"to {MAX_BATCH}"
        )
    return MAX_BATCH if asked is None else None


def check_cache_type(config: Any, capability: tuple[int, int] | None) -> None:
    """Check --kv-cache-dtype against what the attention kernels read.

    Raises:
        ValueError: another type, or FP8 on a GPU that cannot convert it.
    """
    asked = config.kv_cache_dtype
    if asked not in CACHE_TYPES:
        raise ValueError(
            f"--kv-cache-dtype is {asked}; --attention-backend {ATTENTION_BACKEND} takes "
            f"{', '.join(CACHE_TYPES)}"
        )
    if asked == "fp8_e4m3" and capability is not None and capability < FP8_CAPABILITY:
        raise ValueError(
            f"--kv-cache-dtype fp8_e4m3 needs sm_89 or later, this is sm_{capability[0]}"
            f"{capability[1]}"
        )


def chosen_attention_backends(config: Any) -> tuple[str, ...]:
    """The attention backends that the user named, for all, for prefill and for decode."""
    names = (
        config.attention_backend,
        config.prefill_attention_backend,
        config.decode_attention_backend,
    )
    return tuple(name for name in names if name)


@dataclass(frozen=True)
class CheckedConfig:
    """What a checkpoint's config says about its tensors."""

    text: TextShape
    vision: VisionShape | None
    checkpoint: CheckpointFormat


def check_config(folder: Path, parallel: Parallel, quantization_flag: str | None) -> CheckedConfig:
    """Check a checkpoint's config files, and how the model divides over ranks.

    Raises:
        ValueError: the first thing that is wrong, by name.
    """
    config = read_json(folder / "config.json")
    architecture = check_architecture(config.get("architectures"))
    checkpoint = checkpoint_format(config, folder)
    check_flag(quantization_flag, checkpoint.weights)
    text = TextShape.from_config(SimpleNamespace(**config.get("text_config", config)))
    check_parallel(text, parallel, checkpoint.weights)
    vision = None
    if architecture == MULTIMODAL:
        nested = {key: SimpleNamespace(**config[key]) for key in ("text_config", "vision_config")}
        vision = VisionShape.from_config(SimpleNamespace(**(config | nested)))
        check_vision_heads(parallel.tp_size, vision.heads)
    return CheckedConfig(text, vision, checkpoint)


def check_tensors(folder: Path, checked: CheckedConfig) -> None:
    """Compare the tensors stored in a folder with the ones that its config calls for.

    Raises:
        ValueError: a file that is missing or truncated; a tensor that is missing or has the wrong
            shape or type, with its name, what is expected and the file; a name that nobody knows.
    """
    text = checked.text
    expected = expected_tensors(text, checked.vision, checked.checkpoint.weights)
    stored = {canonical_name(name): (name, h) for name, h in read_headers(folder).items()}
    files = {canonical_name(name): file for name, file in (weight_map(folder) or {}).items()}
    for name, spec in expected.items():
        if name not in stored:
            raise ValueError(missing_tensor(name, spec, files.get(name)))
        original, header = stored[name]
        if problem := spec.problem(header.shape, header.dtype):
            raise ValueError(f"checkpoint: {original} in {header.file} {problem}")
    others = [name for name in stored if name not in expected and not skip_reason(name, text)]
    scales = {scale for name in others if (scale := cache_scale(name, text))}
    check_cache_scales(scales, text)
    report_unknown([stored[name][0] for name in others if not cache_scale(name, text)])


def check_cache_scales(scales: Collection[tuple[int, str]], text: TextShape) -> None:
    """Check that a checkpoint has KV-cache scales for all layers or for none.

    Args:
        scales: (layer, "k" or "v") of those that there are.

    Raises:
        ValueError: only some layers have them, with the first that is missing.
    """
    wanted = [(layer, which) for layer in range(len(text.layers)) for which in "kv"]
    missing = [scale for scale in wanted if scale not in scales]
    if scales and missing:
        layer, which = missing[0]
        raise ValueError(
            f"checkpoint: {which}_scale of layer {layer} is missing, while other layers have theirs"
        )


def missing_tensor(name: str, spec: TensorSpec, file: str | None) -> str:
    """The sentence for a tensor that a checkpoint should hold and does not."""
    where = file or f"any file ({INDEX_FILE} does not name it)"
    return (
        f"checkpoint: {name} is missing; expected {list(spec.shape)} of type "
        f"{' or '.join(spec.dtypes)}, looked for in {where}"
    )


def report_unknown(names: list[str]) -> None:
    """Stop on tensor names that nobody knows, or list them in one warning if so asked.

    Raises:
        ValueError: there are such names and STEP37_STRICT is not 0.
    """
    if not names:
        return
    listed = ", ".join(sorted(names))
    if os.environ.get("STEP37_STRICT", "1") == "0":
        logger.warning("checkpoint: ignoring %d unknown tensors: %s", len(names), listed)
        return
    raise ValueError(
        f"checkpoint: {len(names)} tensors have names that this model does not know: {listed}; "
        "set STEP37_STRICT=0 to ignore them"
    )
