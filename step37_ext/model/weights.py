"""Streaming a checkpoint into the model: every tensor loaded, or skipped for a named reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from step37_ext.checkpoint.headers import weight_map
from step37_ext.model.config import TextShape, VisionShape
from step37_ext.model.load import Load
from step37_ext.model.tensors import (
    TensorSpec,
    cache_scale,
    canonical_name,
    expected_tensors,
    skip_reason,
)
from step37_ext.start_checks import check_cache_scales, missing_tensor, report_unknown

logger = logging.getLogger(__name__)

STORED_TYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}
"""torch's types in safetensors' spelling."""


_KEPT_IN_F32 = (".moe.gate.weight", ".router_bias", ".weight_scale_inv", ".weight_scale_2")
"""Tensors whose parameters hold float32 whatever the model's type is."""


class TakesCacheScale(Protocol):
    def set_cache_scale(self, which: str, scale: torch.Tensor) -> None: ...


class WeightLoader:
    """Loads a stream of tensors, holding no more than the one at hand.

    Args:
        loads: what to do with each expected tensor, by canonical name.
        attentions: one per layer, in order, to take KV-cache scales.
        dtype: the model's; what is stored in float32 beyond it is rounded, with a warning.
    """

    def __init__(
        self,
        text: TextShape,
        vision: VisionShape | None,
        weight_format: str,
        loads: Mapping[str, Load],
        attentions: Sequence[TakesCacheScale],
        dtype: torch.dtype,
    ) -> None:
        self.text, self.loads, self.attentions, self.dtype = text, loads, attentions, dtype
        self.expected = expected_tensors(text, vision, weight_format)
        known = {name for name in loads if not skip_reason(name, text)}
        if unlike := set(self.expected) ^ known:
            raise AssertionError(f"modules and expected tensors disagree: {sorted(unlike)[:5]}")

    def run(self, weights: Iterable[tuple[str, torch.Tensor]], folder: Path | None) -> None:
        """Load everything.

        Args:
            folder: the checkpoint's folder if it is local, to name files in errors.

        Raises:
            ValueError: a tensor is missing, has the wrong shape or type, or a name nobody knows.
        """
        files = {canonical_name(n): f for n, f in ((folder and weight_map(folder)) or {}).items()}
        missing = dict(self.expected)
        skipped: Counter[str] = Counter()
        scales: set[tuple[int, str]] = set()
        unknown: list[str] = []
        rounded: list[str] = []
        for original, tensor in weights:
            name = canonical_name(original)
            if name in self.expected:
                load_checked(
                    original, self.expected[name], tensor, files.get(name), self.loads[name]
                )
                missing.pop(name, None)
                if tensor.dtype == torch.float32 and not name.endswith(_KEPT_IN_F32):
                    rounded.append(original)
            elif scale := cache_scale(name, self.text):
                self.attentions[scale[0]].set_cache_scale(scale[1], tensor)
                scales.add(scale)
            elif name in self.loads:  # what only SGLang's expert layer takes
                self.loads[name](tensor)
            elif reason := skip_reason(name, self.text):
                skipped[reason] += 1
            else:
                unknown.append(original)
            del tensor  # or it would live until the next one has been read
        report_unknown(unknown)
        for name, spec in missing.items():
            raise ValueError(missing_tensor(name, spec, files.get(name)))
        check_cache_scales(scales, self.text)
        if rounded and self.dtype != torch.float32:
            logger.warning(
                "step37: %d tensors are stored in float32 and rounded to %s, %s among them",
                len(rounded),
                self.dtype,
                rounded[0],
            )
        for reason, count in skipped.items():
            logger.info("step37: skipped %d tensors on purpose (%s)", count, reason)


def load_checked(
    original: str, spec: TensorSpec, tensor: torch.Tensor, file: str | None, load: Load
) -> None:
    """Load one tensor, stored as `original` in `file`, if it is as `spec` wants it.

    Raises:
        ValueError: its shape or type is another one.
    """
    dtype = STORED_TYPES.get(tensor.dtype, str(tensor.dtype))
    if problem := spec.problem(tuple(tensor.shape), dtype):
        where = f" in {file}" if file else ""
        raise ValueError(f"checkpoint: {original}{where} {problem}")
    load(tensor)
