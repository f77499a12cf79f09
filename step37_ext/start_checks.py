"""What can be known to be wrong before a server starts: one sentence in the parent process.

Everything here reads config.json and the safetensors headers of a local checkpoint; a repository
that is not downloaded yet is checked while it loads (`model/weights.py`) by the same tables.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from step37_ext.checkpoint.headers import INDEX_FILE, TensorHeader, read_headers, read_json
from step37_ext.checkpoint.headers import weight_map as read_weight_map
from step37_ext.model.config import TextShape, VisionShape
from step37_ext.model.tensors import (
    NVFP4_GROUP,
    TensorSpec,
    cache_scale,
    canonical_name,
    expected_tensors,
    skip_reason,
)
from step37_ext.quantization import check_flag, checkpoint_format

logger = logging.getLogger(__name__)

MULTIMODAL, TEXT, MTP = "Step3p7ForConditionalGeneration", "Step3p5ForCausalLM", "Step3p5MTP"
ARCHITECTURES = (MULTIMODAL, TEXT)

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
)


@dataclass(frozen=True)
class Parallel:
    """Ranks of tensor parallelism, and how many of them split the experts by whole experts."""

    tp_size: int = 1
    ep_size: int = 1


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


def check_checkpoint(folder: Path, parallel: Parallel, quantization_flag: str | None) -> None:
    """Check a local checkpoint's config, files, tensors and how it divides over ranks.

    Raises:
        ValueError: the first thing that is wrong, by name.
    """
    config = read_json(folder / "config.json")
    architecture = check_architecture(config.get("architectures"))
    checkpoint = checkpoint_format(config, folder)
    check_flag(quantization_flag, checkpoint.weights)
    text_config = config.get("text_config", config)
    text = TextShape.from_config(SimpleNamespace(**text_config))
    vision = None
    if architecture == MULTIMODAL:
        nested = {key: SimpleNamespace(**config[key]) for key in ("text_config", "vision_config")}
        vision = VisionShape.from_config(SimpleNamespace(**(config | nested)))
    check_parallel(text, parallel, checkpoint.weights)
    if vision is not None:
        _divides(parallel.tp_size, vision.heads, f"the vision encoder's {vision.heads} heads")
    expected = expected_tensors(text, vision, checkpoint.weights)
    check_tensors(read_headers(folder), expected, text, read_weight_map(folder))


def check_parallel(text: TextShape, parallel: Parallel, weights: str) -> None:
    """Check that heads, experts and intermediate sizes divide over the ranks.

    Raises:
        ValueError: the first size that does not divide, by name, with its value.
    """
    tp, ep = parallel.tp_size, parallel.ep_size
    if tp % ep:
        raise ValueError(f"--ep-size {ep} does not divide --tp {tp}")
    for shape in {layer.attention.kind: layer.attention for layer in text.layers}.values():
        _divides(tp, shape.num_heads, f"the {shape.num_heads} query heads of {shape.kind}")
        kv = shape.num_kv_heads
        if kv % tp and tp % kv:
            raise ValueError(
                f"--tp {tp} neither divides nor is a multiple of the {kv} KV heads of {shape.kind}"
            )
    _divides(tp, text.dense_intermediate, f"intermediate_size {text.dense_intermediate}")
    _divides(tp, text.shared_intermediate, f"share_expert_dim {text.shared_intermediate}")
    if text.num_experts % ep:
        raise ValueError(f"--ep-size {ep} does not divide the {text.num_experts} experts")
    moe_tp, unit = tp // ep, NVFP4_GROUP if weights == "nvfp4" else 1
    if text.moe_intermediate % (moe_tp * unit):
        groups = f" in groups of {unit}" if unit > 1 else ""
        raise ValueError(
            f"--tp {tp} with --ep-size {ep} does not divide the experts' "
            f"moe_intermediate_size {text.moe_intermediate}{groups}"
        )


def check_tensors(
    headers: Mapping[str, TensorHeader],
    expected: Mapping[str, TensorSpec],
    text: TextShape,
    weight_map: Mapping[str, str] | None,
) -> None:
    """Compare stored tensors with the expected ones.

    Raises:
        ValueError: a tensor that is missing or has the wrong shape or type, with its name, what is
            expected and the file; or names that nobody knows.
    """
    stored = {canonical_name(name): (name, header) for name, header in headers.items()}
    by_canonical = {canonical_name(name): file for name, file in (weight_map or {}).items()}
    for name, spec in expected.items():
        if name not in stored:
            raise ValueError(missing_tensor(name, spec, by_canonical.get(name)))
        original, header = stored[name]
        if problem := spec.problem(header.shape, header.dtype):
            raise ValueError(f"checkpoint: {original} in {header.file} {problem}")
    unknown = [
        original
        for name, (original, _) in stored.items()
        if name not in expected and not skip_reason(name, text) and not cache_scale(name)
    ]
    report_unknown(unknown)


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


def _divides(tp: int, size: int, what: str) -> None:
    if size % tp:
        raise ValueError(f"--tp {tp} does not divide {what}")
