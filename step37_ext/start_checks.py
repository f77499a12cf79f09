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
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from packaging.version import Version

from step37_ext.checkpoint.headers import INDEX_FILE, read_headers, read_json, weight_map
from step37_ext.model.attention import ATTENTION_BACKEND
from step37_ext.model.config import TextShape, VisionShape
from step37_ext.model.parallel import Parallel, check_parallel, check_vision_heads
from step37_ext.model.tensors import (
    TensorSpec,
    cache_scale,
    canonical_name,
    expected_tensors,
    mtp_name,
    mtp_tensors,
    skip_reason,
)
from step37_ext.quantization import CheckpointFormat, check_flag, checkpoint_format
from step37_kernels.attention.pages import MAX_BATCH
from step37_kernels.experts.formats import least_arch

logger = logging.getLogger(__name__)

MULTIMODAL, TEXT, MTP = "Step3p7ForConditionalGeneration", "Step3p5ForCausalLM", "Step3p5MTP"
ARCHITECTURES = (MULTIMODAL, TEXT)

MTP_ALGORITHMS = ("EAGLE", "NEXTN")
"""SGLang's names for drafts by the checkpoint's own layers."""

DRAFTS_SINCE = "0.5.23"
"""The first SGLang with which drafts were seen to work."""

DEFAULT_DRAFTS = 3
"""What SGLang sets --speculative-num-steps to for this model."""

CACHE_TYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3")
FP8_CAPABILITY = divmod(least_arch("fp8", "same"), 10)
"""From Ada on a GPU converts e4m3."""

_REFUSED_ARGUMENTS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    # Server argument, its flag, and the values that leave it off.
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
    ("lora_paths", "--lora-paths", (None, [])),  # which turns LoRA on after this check
    ("enable_eplb", "--enable-eplb", (False, None)),
    ("enable_layernorm_sp", "--enable-layernorm-sp", (False, None)),
    # Our page tables need the table from full to sliding slots, which its pools do without; with
    # another attention backend it was not run.
    ("enable_unified_memory", "--enable-unified-memory", (False, None)),
    # Two streams would count at the same places while they add up what FP8 layers split.
    ("enable_pdmux", "--enable-pdmux", (False, None)),
    # Our kernels divide a sum into parts by the number of tokens of a pass.
    ("enable_deterministic_inference", "--enable-deterministic-inference", (False, None)),
    ("rl_on_policy_target", "--rl-on-policy-target", (None,)),
    # SGLang offloads the layers that its own models make, and would leave ours where they are.
    ("cpu_offload_gb", "--cpu-offload-gb", (0, None)),
    ("offload_group_size", "--offload-group-size", (-1, 0, None)),
    # Our launches inside what torch.compile traces were not run.
    ("enable_torch_compile", "--enable-torch-compile", (False, None)),
)

_MOE_RUNNERS = (
    *("auto", "step37", "triton", "marlin", "cutlass", "deep_gemm"),
    *("flashinfer_trtllm", "flashinfer_trtllm_routed", "flashinfer_cutlass", "flashinfer_cutedsl"),
)
"""SGLang's others take no router's choice that was made outside of them."""


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


def check_moe_runner(config: Any) -> None:
    """Check that the MoE runner can take the choice of our router.

    Raises:
        ValueError: it is another.
    """
    if config.moe_runner_backend not in _MOE_RUNNERS:
        raise ValueError(
            f"--moe-runner-backend is {config.moe_runner_backend}; --model-impl step37 takes "
            f"{', '.join(_MOE_RUNNERS)}"
        )


def check_drafts(config: Any) -> int:
    """How many of the checkpoint's MTP layers draft: 0 without speculative decoding.

    Raises:
        ValueError: drafts of another kind, or in a way that is not supported, by flag and value.
    """
    if config.speculative_algorithm is None:
        return 0
    algorithm = config.speculative_algorithm.upper()  # as SGLang reads it
    if Version(installed := version("sglang")) < Version(DRAFTS_SINCE):
        raise ValueError(
            f"--speculative-algorithm with --model-impl step37 needs SGLang {DRAFTS_SINCE} or "
            f"later; this is SGLang {installed}"
        )
    pair = {config.prefill_attention_backend, config.decode_attention_backend} - {None}
    if pair - {config.attention_backend}:
        raise ValueError(
            f"--speculative-algorithm {algorithm} needs one attention backend for prefill and "
            f"decode, to be named in --attention-backend (here {' and '.join(sorted(pair))} apart)"
        )
    backend = config.attention_backend or default_attention_backend(config)
    on_cpu = config.device == "cpu"
    if backend != ATTENTION_BACKEND and on_cpu:
        raise ValueError(
            f"--speculative-algorithm {algorithm} on a CPU needs --attention-backend "
            f"{ATTENTION_BACKEND}, here {backend}"
        )
    if backend != ATTENTION_BACKEND and algorithm not in MTP_ALGORITHMS:
        return 0  # SGLang's own affair: drafts of another kind, verified by its own backend
    for flag, value, allowed in (
        ("--speculative-algorithm", algorithm, MTP_ALGORITHMS),
        ("--speculative-eagle-topk", config.speculative_eagle_topk, (None, 1)),
        (
            "--speculative-draft-model-path",
            config.speculative_draft_model_path,
            (None, config.model_path),
        ),
        (
            "--speculative-draft-attention-backend",
            config.speculative_draft_attention_backend,
            (None, backend),
        ),
        (
            "--speculative-use-rejection-sampling",
            config.speculative_use_rejection_sampling,
            (False,) if on_cpu else (False, True),
        ),
    ):
        if value not in allowed:
            raise ValueError(
                f"{flag} is {value}; drafts of --model-impl step37 are one chain of the "
                "checkpoint's own MTP layers, for which it is left out or "
                f"{' or '.join(str(x) for x in allowed if x is not None)}"
            )
    return DEFAULT_DRAFTS if config.speculative_num_steps is None else config.speculative_num_steps


def default_attention_backend(config: Any) -> str | None:
    """What stands in for a backend that the user did not choose."""
    return ATTENTION_BACKEND if config.device in ("cpu", "cuda") else None


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
    for flag, asked in (
        ("--kv-cache-dtype", config.kv_cache_dtype),
        ("--speculative-draft-kv-cache-dtype", config.speculative_draft_kv_cache_dtype),
    ):
        if asked is not None and asked not in CACHE_TYPES:
            raise ValueError(
                f"{flag} is {asked}; --attention-backend {ATTENTION_BACKEND} takes "
                f"{', '.join(CACHE_TYPES)}"
            )
        if asked == "fp8_e4m3" and capability is not None and capability < FP8_CAPABILITY:
            raise ValueError(
                f"{flag} fp8_e4m3 needs sm_89 or later, this is sm_{capability[0]}{capability[1]}"
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
    """What a checkpoint's config says about its tensors.

    Attributes:
        mtp: the tensors of the MTP layers that draft.
    """

    text: TextShape
    vision: VisionShape | None
    checkpoint: CheckpointFormat
    mtp: dict[str, TensorSpec]


def check_config(
    folder: Path, parallel: Parallel, quantization_flag: str | None, drafts: int = 0
) -> CheckedConfig:
    """Check a checkpoint's config files, and how the model divides over ranks.

    Args:
        drafts: how many of its MTP layers draft.

    Raises:
        ValueError: the first thing that is wrong, by name.
    """
    config = read_json(folder / "config.json")
    architecture = check_architecture(config.get("architectures"))
    checkpoint = checkpoint_format(config, folder)
    check_flag(quantization_flag, checkpoint.weights)
    of_text = SimpleNamespace(**config.get("text_config", config))
    text = TextShape.from_config(of_text)
    check_parallel(text, parallel, checkpoint.weights)
    vision = None
    if architecture == MULTIMODAL:
        nested = {key: SimpleNamespace(**config[key]) for key in ("text_config", "vision_config")}
        vision = VisionShape.from_config(SimpleNamespace(**(config | nested)))
        check_vision_heads(parallel.tp_size, vision.heads)
    mtp: dict[str, TensorSpec] = {}
    if drafts:
        with_mtp = TextShape.from_config(of_text, with_mtp=True)
        for draft in range(drafts):
            mtp |= mtp_tensors(with_mtp, with_mtp.mtp_layer(draft))
    return CheckedConfig(text, vision, checkpoint, mtp)


def check_tensors(folder: Path, checked: CheckedConfig) -> None:
    """Compare the tensors stored in a folder with the ones that its config calls for.

    Raises:
        ValueError: a file that is missing or truncated; a tensor that is missing or has the wrong
            shape or type, with its name, what is expected and the file; a name that nobody knows.
    """
    text = checked.text
    expected = expected_tensors(text, checked.vision, checked.checkpoint.weights) | checked.mtp
    headers, mapping = read_headers(folder), weight_map(folder) or {}
    stored = {mtp_name(canonical_name(name)): (name, h) for name, h in headers.items()}
    files = {mtp_name(canonical_name(name)): file for name, file in mapping.items()}
    if checked.mtp and not checked.mtp.keys() & stored.keys():
        raise ValueError(
            f"--speculative-algorithm: the checkpoint carries no MTP layers ({min(checked.mtp)} "
            f"and others are not in {folder})"
        )
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
