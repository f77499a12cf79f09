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
from step37_ext.model.tensors import cache_scale, canonical_name, expected_tensors, skip_reason
from step37_ext.start_checks import missing_tensor, report_unknown

logger = logging.getLogger(__name__)

STORED_TYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}
"""torch's types in safetensors' spelling."""


class TakesCacheScale(Protocol):
    def set_cache_scale(self, which: str, scale: torch.Tensor) -> None: ...


class WeightLoader:
    """Loads a stream of tensors, holding no more than the one at hand.

    Args:
        loads: what to do with each expected tensor, by canonical name.
        attentions: one per layer, in order, to take KV-cache scales.
    """

    def __init__(
        self,
        text: TextShape,
        vision: VisionShape | None,
        weight_format: str,
        loads: Mapping[str, Load],
        attentions: Sequence[TakesCacheScale],
    ) -> None:
        self.text, self.loads, self.attentions = text, loads, attentions
        self.expected = expected_tensors(text, vision, weight_format)
        if unlike := set(self.expected) ^ set(loads):
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
        unknown: list[str] = []
        for original, tensor in weights:
            name = canonical_name(original)
            if name in self.expected:
                self._load(original, name, tensor, files.get(name))
                missing.pop(name, None)
            elif scale := cache_scale(name):
                self._load_cache_scale(*scale, tensor)
            elif reason := skip_reason(name, self.text):
                skipped[reason] += 1
            else:
                unknown.append(original)
            del tensor  # or it would live until the next one has been read
        report_unknown(unknown)
        for name, spec in missing.items():
            raise ValueError(missing_tensor(name, spec, files.get(name)))
        for reason, count in skipped.items():
            logger.info("step37: skipped %d tensors on purpose (%s)", count, reason)

    def _load(self, original: str, name: str, tensor: torch.Tensor, file: str | None) -> None:
        dtype = STORED_TYPES.get(tensor.dtype, str(tensor.dtype))
        if problem := self.expected[name].problem(tuple(tensor.shape), dtype):
            where = f" in {file}" if file else ""
            raise ValueError(f"checkpoint: {original}{where} {problem}")
        self.loads[name](tensor)

    def _load_cache_scale(self, layer: int, which: str, tensor: torch.Tensor) -> None:
        if layer < len(self.attentions):  # MTP layers' scales belong to the draft model
            self.attentions[layer].set_cache_scale(which, tensor)
